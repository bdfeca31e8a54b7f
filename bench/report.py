# SPDX-License-Identifier: GPL-2.0-only
"""Prints the results of a run as tables: costs of one I/O, changes, and profiles."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]
"""What one I/O of a workload costs, see measure.py."""

Document = dict[str, Any]
"""All results of a run, as they are written to a file."""

SCHEDULING = {
    "fpu_taskswitch", "iret", "sched_op", "set_segment_base", "set_timer_op", "stack_switch",
    "update_descriptor", "vcpu_op", "xen_version",
}  # fmt: skip
"""Hypercalls for task switches, timers and returns from traps, which drivers do not make."""

PAGE = 4096
"""Size of a page, which kernels copy with copy_page."""

TITLES = {
    "nosched": "scheduler none and a clock that is read without a trap",
    "nonpersistent": "as above, and feature_persistent=0 on both sides",
    "queues": "four virtual CPUs with a ring each, on one processor",
    "large-ring": "as above, with rings of 16 pages and requests of 256 segments",
    "qcow2": "scheduler none and a clock that is read without a trap; a qcow2 image",
    "default": "as it comes: the default scheduler, and each reading of the clock traps",
}

COLUMNS = ("total", "of C/C", "guest", "xen", "dom0", "hypercalls", "maps", "copies", "empty",
           "flushes", "to back", "to front", "switches", "allocated", "copied")  # fmt: skip

TAP_COLUMNS = (*COLUMNS[:2], "of qdisk", *COLUMNS[2:])


def total(result: Result) -> float:
    """Instructions of an I/O, over all domains and Xen, without idling."""
    instructions: dict[str, float] = result["instructions"]
    return sum(count for name, count in instructions.items() if name != "idle")


def tables(document: Document) -> Iterator[tuple[str, list[Result]]]:
    """Yields a title and the sorted results for each kind of guest and setting."""
    results = document["results"]
    for kind, setting in dict.fromkeys((r["type"], r["setting"]) for r in results):
        chosen = [r for r in results if (r["type"], r["setting"]) == (kind, setting)]
        workloads = list(dict.fromkeys(r["workload"] for r in chosen))
        chosen.sort(key=lambda r: (workloads.index(r["workload"]), r["pair"]))
        yield f"{kind.upper()} guest, {TITLES[setting]}", chosen


def row(results: Sequence[Result], result: Result) -> dict[str, Any]:
    """Returns the columns of a result; `None` where there is no value."""
    instructions, events, grants = (result[part] for part in ("instructions", "events", "grants"))

    def ratio(pair: str) -> float | None:
        reference = next((total(r) for r in results if _is(r, result, "pair", pair)), None)
        return total(result) / reference if reference else None

    return {
        "total": total(result),
        "of C/C": ratio("C/C"),
        "of qdisk": ratio(result["pair"][:2] + "Q"),
        **{name: instructions.get(name, 0) for name in ("guest", "xen", "dom0")},
        "hypercalls": sum(hypercalls(result).values()),
        "maps": grants.get("map pages", 0),
        "copies": grants.get("copy pages", 0),
        "empty": grants.get("empty calls", 0),
        "flushes": _sum(events, ":flushes"),
        "to back": events.get("guest:notifications", 0),
        "to front": events.get("dom0:notifications", 0),
        "switches": _sum(events, ":switches"),
        "allocated": sum(_sum(events, f":{name}") for name in ("allocations", "kmalloc", "kmalloc_cache")),
        "copied": _sum(events, "copied bytes") + PAGE * _sum(events, ":pages_copied"),
        "baseline guest": _baseline(results, result, "guest"),
        "baseline dom0": _baseline(results, result, "dom0"),
    }  # fmt: skip


def hypercalls(result: Result) -> dict[str, float]:
    """Returns the hypercalls that drivers make, by kind."""
    kinds: dict[str, float] = {}
    for name, count in result["hypercalls"].items():
        kind = name.split(":")[1]
        if kind not in SCHEDULING:
            kinds[kind] = kinds.get(kind, 0) + count
    return kinds


def shown(value: float | None) -> str:
    """Returns a number with its significant digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def print_report(
    document: Document, base: Document | None = None, columns: Sequence[str] = COLUMNS
) -> None:
    """Prints the tables; with an earlier document, how much of it each total is."""
    before = {_key(r): total(r) for r in base["results"]} if base else {}
    columns = [*columns, "baseline guest", "baseline dom0"]
    for title, results in tables(document):
        print(f"\n{title}; kernel {document['kernel']}, for each I/O")
        print(
            f"{'':20}{'':5}"
            + "".join(f"{name:>12}" for name in columns)
            + "     of base" * bool(base)
        )
        for result in results:
            if result["where"] != "pair":
                continue
            values = row(results, result)
            line = f"{result['workload']:20}{result['pair']:5}"
            line += "".join(f"{shown(values[name]):>12}" for name in columns)
            if base:
                old = before.get(_key(result))
                line += f"{shown(total(result) / old if old else None):>12}"
            print(line)
    print("\nbytes of code: " + code(document))


def code(document: Document) -> str:
    """Returns the code sizes of the drivers."""
    return ", ".join(f"{name} {size}" for name, size in document["code"].items())


def print_profile(document: Document, limit: int = 60) -> None:
    """Prints, for each workload, the functions with the most instructions, pair by pair."""
    for title, results in tables(document):
        for workload in dict.fromkeys(r["workload"] for r in results):
            found = {
                r["pair"]: r for r in results if r["workload"] == workload and r["where"] == "pair"
            }
            _print_profile(f"{title}: {workload}", found, limit)


def _print_profile(title: str, found: Mapping[str, Result], limit: int) -> None:
    counts = {
        pair: {(where, name): count for where, name, count in result["profile"]}
        for pair, result in found.items()
    }
    names = {
        name: max(c.get(name, 0) for c in counts.values()) for c in counts.values() for name in c
    }
    print(f"\n{title}: instructions for each I/O")
    print("".join(f"{pair:>9}" for pair in found))
    for name in sorted(names, key=lambda name: names[name], reverse=True)[:limit]:
        print(
            "".join(f"{shown(c.get(name, 0)):>9}" for c in counts.values())
            + f"  {name[0]:6}{name[1]}"
        )


def merged(earlier: Document, document: Document) -> Document:
    """Returns an earlier run with its results replaced by those of this one."""
    new = {_key(result): result for result in document["results"]}
    results = [new.pop(_key(result), result) for result in earlier["results"]]
    return document | {"results": [*results, *new.values()]}


def _baseline(results: Sequence[Result], result: Result, where: str) -> float | None:
    same = (r for r in results if r["where"] == where and r["workload"] == result["workload"])
    return next((total(r) for r in same), None)


def _is(one: Result, result: Result, name: str, value: str) -> bool:
    return (one[name], one["workload"], one["where"]) == (value, result["workload"], "pair")


def _key(result: Result) -> tuple[str, ...]:
    return tuple(result[name] for name in ("type", "setting", "where", "workload", "pair"))


def _sum(counts: Mapping[str, float], end: str) -> float:
    return sum(count for name, count in counts.items() if name.endswith(end))
