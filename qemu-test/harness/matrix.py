# SPDX-License-Identifier: GPL-2.0-only
"""The matrix of scenarios, kernels and pairs of drivers: test-matrix.toml.

RBLKIF_TIERS lists the tiers that are run, daily if it is not set.

As a program it prints the kernels on which scenarios with NAME in their name run.
"""

import os
import sys
import tomllib
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "test-matrix.toml"
TIERS = ("daily", "full", "debug", "packages")

Run = tuple[str, str]
"""A kernel and a pair of drivers."""


def read(tiers: tuple[str, ...] | None = None, path: Path = FILE) -> dict[str, list[Run]]:
    """Returns the runs of each scenario in these tiers, in the order of the file.

    `tiers` are those of RBLKIF_TIERS if none are given. Raises `ValueError` if the file is invalid.
    """
    if tiers is None:
        tiers = tuple(os.environ.get("RBLKIF_TIERS", "").split() or ["daily"])
    matrix: dict[str, list[Run]] = {}
    for scenario in tomllib.loads(path.read_text())["scenario"]:
        name = scenario["name"]
        if name in matrix:
            raise ValueError(f"{path}: {name} is listed twice")
        matrix[name] = []
        for entry in scenario["runs"]:
            if entry["tier"] not in TIERS:
                raise ValueError(f"{path}: {name}: there is no tier {entry['tier']!r}")
            if entry["tier"] in tiers:
                matrix[name] += [(entry["kernel"], pair) for pair in entry["pairs"]]
    return matrix


if __name__ == "__main__":
    selected = [runs for name, runs in read().items() if sys.argv[1] in name]
    print(*sorted({kernel for runs in selected for kernel, _pair in runs}))
