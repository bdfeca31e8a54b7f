# SPDX-License-Identifier: GPL-2.0-only
"""Prints how many tests of a JUnit file have passed, failed, and passed in an earlier run.

The latter are reference runs, see reference_runs.py. A missing file counts as one failure.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree


def counts(path: Path) -> tuple[int, int, int]:
    """Returns the numbers of passed, failed and cached tests of the JUnit file `path`."""
    if not path.exists():
        return 0, 1, 0
    cases = list(ElementTree.parse(path).iter("testcase"))
    bad = sum(
        1
        for case in cases
        if len(case.findall("failure")) + len(case.findall("error")) + len(case.findall("skipped"))
    )
    cached = sum(case.find("properties/property[@name='cached']") is not None for case in cases)
    return len(cases) - bad, bad if cases else 1, cached


if __name__ == "__main__":
    print(*counts(Path(sys.argv[1])))
