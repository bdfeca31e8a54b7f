# SPDX-License-Identifier: GPL-2.0-only
"""Writes tables for the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import disks
import queues
from report import COLUMNS
from report import TAP_COLUMNS
from report import code
from report import hypercalls
from report import row
from report import shown
from report import tables

if TYPE_CHECKING:
    from report import Document
    from report import Result

HEAD = """.. SPDX-License-Identifier: GPL-2.0-only
.. Written by bench/page.py from the results of a run.

Kernel {kernel}; {date}. Bytes of code: {sizes}.
"""


PLAIN_HEAD = """.. SPDX-License-Identifier: GPL-2.0-only
.. Written by bench/page.py from the results of a run.
"""


def write_page(document: Document, path: Path) -> None:
    """Writes all tables in reStructuredText."""
    lines = [HEAD.format(**document, sizes=code(document))]
    for title, results in tables(document):
        lines += [title, "-" * len(title), "", *_table(results), ""]
        lines += ["Hypercalls that drivers ask for, by kind:", "", *_kinds(results), ""]
    path.write_text("\n".join(lines))


def write_tap(document: Document, path: Path) -> None:
    """Writes the tables of backends in user space."""
    lines = [HEAD.format(**document, sizes=code(document))]
    for title, results in tables(document):
        lines += [title, "-" * len(title), "", *_table(results, TAP_COLUMNS), ""]
    path.write_text("\n".join(lines))


def write_disks(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes the table of what disks cost beside I/O."""
    lines = [PLAIN_HEAD, ".. list-table::", "   :header-rows: 1", ""]
    lines += _row(["disks", "pair", *disks.COLUMNS.values()])
    for found in rows:
        lines += _row(
            [found["disks"], found["pair"], *(shown(found[name]) for name in disks.COLUMNS)]
        )
    path.write_text("\n".join([*lines, ""]))


def write_queues(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes the table of times with several queues."""
    lines = [PLAIN_HEAD, ".. list-table::", "   :header-rows: 1", ""]
    lines += _row(["load", "measure", *queues.RATIOS])
    for found in rows:
        ratios = (shown(found[name]) for name in queues.RATIOS)
        lines += _row([found["load"], queues.MEASURES[found["measure"]], *ratios])
    path.write_text("\n".join([*lines, ""]))


def _table(results: Sequence[Result], chosen: Sequence[str] = COLUMNS) -> Iterator[str]:
    yield from (".. list-table::", "   :header-rows: 1", "")
    columns = [
        *chosen,
        *["baseline guest", "baseline dom0"] * any(r["where"] != "pair" for r in results),
    ]
    yield from _row(["load", "pair", *columns])
    for result in results:
        if result["where"] == "pair":
            values = row(results, result)
            yield from _row(
                [result["workload"], result["pair"], *(shown(values[name]) for name in columns)]
            )


def _kinds(results: Sequence[Result]) -> Iterator[str]:
    results = [result for result in results if result["where"] == "pair"]
    kinds = sorted({kind for result in results for kind in hypercalls(result)})
    yield from (".. list-table::", "   :header-rows: 1", "")
    yield from _row(["load", "pair", *kinds])
    for result in results:
        counts = hypercalls(result)
        yield from _row(
            [result["workload"], result["pair"], *(shown(counts.get(kind, 0)) for kind in kinds)]
        )


def _row(fields: Iterable[object]) -> Iterator[str]:
    for number, field in enumerate(fields):
        yield f"   {'*' if number == 0 else ' '} - {field}"
