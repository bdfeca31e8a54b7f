# SPDX-License-Identifier: GPL-2.0
"""Which scenarios must pass, with which pairs, on which kernels.

`expected.txt` has one row a scenario: its name, then KERNEL:PAIR,PAIR...
for each kernel it runs on. A scenario without drivers for Xen disks has the
pair "-". The rows are what gets run, so a change there is the whole change.

Not every run has the time for what is written KERNEL+:PAIR: it is left out
unless RBLKIF_ROWS=all.
"""

import os
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "expected.txt"


def read(path=FILE):
    """Scenario name to a list of (kernel, pair), in the file's order."""
    everything = os.environ.get("RBLKIF_ROWS") == "all"
    rows = {}
    for line in Path(path).read_text().splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        name, *cells = words
        if name in rows:
            raise ValueError(f"{path}: two rows for {name}")
        rows[name] = list(_runs(cells, everything))
    return rows


def _runs(cells, everything):
    for cell in cells:
        kernel, pairs = cell.split(":")
        if everything or not kernel.endswith("+"):
            for pair in pairs.split(","):
                yield kernel.removesuffix("+"), pair
