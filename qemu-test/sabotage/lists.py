# SPDX-License-Identifier: GPL-2.0-only
"""The lists of sabotages, and what came of them when they were last run.

A list is a file *.toml beside this one. An entry takes away what some rows of the
feature table say, and names the scenario that is to notice:

    [[sabotage]]
    name = "ignores-physical-sector-size"
    rows = ["FE-08"]
    scenario = "disk_facts"
    file = "rust/blkfront/nodes.rs"
    old = '''text that occurs exactly once in the file'''
    new = '''what it becomes'''

`pair = "C/R"` is for what our pair does not show.
"""

import json
import tomllib
from collections import Counter
from pathlib import Path

from harness import features
from harness import matrix
from harness.cache import key_of

HERE = Path(__file__).resolve().parent
RESULTS = features.TREE / "build" / "sabotage.json"
KEYS = ["file", "name", "new", "old", "rows", "scenario"]
RUN = ("7.3", "R/R")
"""The kernel with which each scenario runs, and the pair if an entry names none."""


def entries():
    """All sabotages; each knows its list too."""
    found = []
    for path in sorted(HERE.glob("*.toml")):
        listed = tomllib.loads(path.read_text()).get("sabotage", [])
        found += [{"pair": RUN[1]} | entry | {"list": path.stem} for entry in listed]
    return found


def version(entry):
    """What tells an entry from an earlier one of the same name."""
    return key_of(json.dumps([entry[key] for key in KEYS]))


def results():
    """Name to result of the entries that have been run and are still the same."""
    if not RESULTS.exists():
        return {}
    present = {(entry["name"], version(entry)) for entry in entries()}
    read = json.loads(RESULTS.read_text())
    return {name: one for name, one in read.items() if (name, one["version"]) in present}


def findings():
    """What is wrong with the lists, a line each."""
    known = {number for number, *_ in features.features()}
    shown = {name: claims for name, _path, claims in features.scenarios()}
    runs = matrix.read(tiers=("daily", "full"))
    found = entries()
    names = Counter(entry.get("name") for entry in found)
    for entry in found:
        for wrong in _findings(entry, known, shown, runs):
            yield f"{entry['list']}.toml: {entry.get('name')}: {wrong}"
    yield from (f"{names[name]} sabotages are called {name}" for name in names if names[name] > 1)


def _findings(entry, known, shown, runs):
    """What is wrong with one entry."""
    if sorted(entry) != sorted([*KEYS, "list", "pair"]):
        yield f"must have {', '.join(KEYS)} and nothing else"
        return
    scenario, file = entry["scenario"], features.TREE / entry["file"]
    if (RUN[0], entry["pair"]) not in runs.get(scenario, []):
        yield f"no scenario {scenario} runs with {RUN[0]} {entry['pair']}"
    for row in entry["rows"]:
        if row not in known:
            yield f"{row} is not in {features.ROWS.name}"
        elif row not in shown.get(scenario, []):
            yield f"{scenario} does not say that it shows {row}"
    if not entry["rows"]:
        yield "is for no row"
    count = file.read_text().count(entry["old"]) if file.is_file() else 0
    if count != 1 or entry["old"] == entry["new"]:
        yield f"what it changes occurs {count} times in {entry['file']}, or is not changed"
