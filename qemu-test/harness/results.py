# SPDX-License-Identifier: GPL-2.0-only
"""Prints how many tests in a JUnit file passed, how many did not, how many were kept.

Kept ones passed, in an earlier run, see controls.py. A file that is not there is
one failure: the run did not get as far.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree


def counts(path):
    """(passed, failed, kept) of the JUnit file `path`."""
    if not Path(path).exists():
        return 0, 1, 0
    cases = list(ElementTree.parse(path).iter("testcase"))
    bad = sum(
        1
        for case in cases
        if len(case.findall("failure")) + len(case.findall("error")) + len(case.findall("skipped"))
    )
    kept = sum(1 for case in cases if case.find("properties/property[@name='kept']") is not None)
    return len(cases) - bad, bad if cases else 1, kept


if __name__ == "__main__":
    print(*counts(sys.argv[1]))
