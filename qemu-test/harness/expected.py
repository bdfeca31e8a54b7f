# SPDX-License-Identifier: GPL-2.0-only
"""Which scenarios must pass, with which pairs, on which kernels.

`expected.txt` has one row a scenario: its name, then KERNEL:PAIR,PAIR...
for each kernel it runs on. A scenario without drivers for Xen disks has the
pair "-". The rows are what gets run, so a change there is the whole change.

Not every run has the time for what is written KERNEL+:PAIR: it is left out unless
RBLKIF_ROWS, a list of kernels, has that kernel.

As a program it prints the kernels of the rows with NAME in their name.
"""

import os
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "expected.txt"


def read(path=FILE, whole=None):
    """Scenario name to a list of (kernel, pair), in the file's order.

    `whole` are the kernels of which nothing is left out; RBLKIF_ROWS if not said.
    """
    if whole is None:
        whole = os.environ.get("RBLKIF_ROWS", "").split()
    rows = {}
    for line in Path(path).read_text().splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        name, *cells = words
        if name in rows:
            raise ValueError(f"{path}: two rows for {name}")
        rows[name] = list(_runs(cells, whole))
    return rows


def _runs(cells, whole):
    for cell in cells:
        kernel, pairs = cell.split(":")
        if not kernel.endswith("+") or kernel.removesuffix("+") in whole:
            for pair in pairs.split(","):
                yield kernel.removesuffix("+"), pair


if __name__ == "__main__":
    chosen = [runs for name, runs in read().items() if sys.argv[1] in name]
    print(*sorted({kernel for runs in chosen for kernel, _pair in runs}))
