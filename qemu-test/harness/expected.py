# SPDX-License-Identifier: GPL-2.0
"""Which scenarios must pass, with which pairs, on which kernels.

`expected.txt` has one row a scenario: its name, then KERNEL:PAIR,PAIR...
for each kernel it runs on. A scenario without drivers for Xen disks has the
pair "-". The rows are what gets run, so a change there is the whole change.
"""

from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "expected.txt"


def read(path=FILE):
    """Scenario name to a list of (kernel, pair), in the file's order."""
    rows = {}
    for line in Path(path).read_text().splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        name, *cells = words
        if name in rows:
            raise ValueError(f"{path}: two rows for {name}")
        rows[name] = list(_runs(cells))
    return rows


def _runs(cells):
    for cell in cells:
        kernel, pairs = cell.split(":")
        for pair in pairs.split(","):
            yield kernel, pair
