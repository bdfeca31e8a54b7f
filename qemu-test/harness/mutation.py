# SPDX-License-Identifier: GPL-2.0-only
"""Mutations of the drivers: patch files in qemu-test/mutations, and the results of their last runs.

A mutation removes what some features of Documentation/feature-rows.txt describe, or what a file
of packaging/modprobe.d does, and names the scenario that has to detect it. Its file, NAME.patch,
is a patch for `git apply` under these lines:

    # SPDX-License-Identifier: GPL-2.0-only
    Driver: rblkfront
    Features: FE-08
    Scenario: disk_facts
    Pair: C/R

`Pair` is for a feature that our pair does not use; R/R is the default. `Features` is left out
where no row describes what is removed.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import features
from . import matrix
from .cache import key_of

DIRECTORY = features.TREE / "qemu-test" / "mutations"
RESULTS = DIRECTORY / "results.json"
KERNEL, PAIR = "7.3", "R/R"
"""The kernel that scenarios run on, and the pair if a mutation names none."""
DRIVERS = ("rblkback", "rblkfront")
FIELDS = ("Driver", "Features", "Scenario", "Pair")


@dataclass(frozen=True)
class Mutation:
    """One patch file."""

    name: str
    driver: str
    features: tuple[str, ...]
    scenario: str
    pair: str
    text: str
    """The whole file."""

    @property
    def path(self) -> Path:
        """The patch file."""
        return DIRECTORY / f"{self.name}.patch"

    @property
    def version(self) -> str:
        """Tells the mutation from an earlier one of the same name."""
        return key_of(self.text)

    @property
    def files(self) -> list[str]:
        """The files that it changes, as paths in the tree."""
        return re.findall(r"^\+\+\+ b/(\S+)$", self.text, re.MULTILINE)

    @property
    def labels(self) -> set[str]:
        """The words that select it."""
        return {self.name, self.driver, self.scenario, *self.features}

    def hunks(self) -> Iterator[tuple[str, str]]:
        """Yields the file and the text before the change of each hunk."""
        file = ""
        for part in re.split(r"^(?=--- |@@ )", self.text, flags=re.MULTILINE):
            if part.startswith("--- "):
                file = re.findall(r"^\+\+\+ b/(\S+)$", part, re.MULTILINE)[0]
            elif part.startswith("@@ "):
                lines = part.splitlines(keepends=True)[1:]
                yield file, "".join(line[1:] for line in lines if line[0] in " -")


def mutations() -> list[Mutation]:
    """Returns all mutations, sorted by name."""
    return [_parse(path) for path in sorted(DIRECTORY.glob("*.patch"))]


def _parse(path: Path) -> Mutation:
    text = path.read_text()
    head = text.partition("\n--- ")[0]
    fields = dict(re.findall(r"^([A-Z]\w+): (.*)$", head, re.MULTILINE))
    missing = {"Driver", "Scenario"} - set(fields)
    if missing or set(fields) - set(FIELDS):
        raise ValueError(f"{path}: the lines of its head must be {', '.join(FIELDS)}")
    return Mutation(
        name=path.stem,
        driver=fields["Driver"],
        features=tuple(fields.get("Features", "").replace(",", " ").split()),
        scenario=fields["Scenario"],
        pair=fields.get("Pair", PAIR),
        text=text,
    )


def results() -> dict[str, dict[str, Any]]:
    """Returns the results of mutations that have not changed since they were run, by name.

    They stay in the tree, because trying all mutations takes hours.
    """
    if not RESULTS.exists():
        return {}
    versions = {mutation.name: mutation.version for mutation in mutations()}
    known: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    return {name: one for name, one in known.items() if one["version"] == versions.get(name)}


def findings() -> Iterator[str]:
    """Yields what is wrong with the patch files, a line each."""
    known = {number for number, *_ in features.features()}
    tested = {name: numbers for name, _path, numbers in features.scenarios()}
    runs = matrix.read(tiers=("daily", "full"))
    for mutation in mutations():
        problems = [
            *_wrong_head(mutation, known, tested),
            *_wrong_run(mutation, runs),
            *_wrong_patch(mutation),
        ]
        yield from (f"{mutation.path.relative_to(features.TREE)}: {one}" for one in problems)


def _wrong_head(mutation: Mutation, known: set[str], tested: dict[str, list[str]]) -> Iterator[str]:
    if mutation.driver not in DRIVERS:
        yield f"{mutation.driver} is none of {', '.join(DRIVERS)}"
    for number in mutation.features:
        if number not in known:
            yield f"{number} is not in {features.ROWS.name}"
        elif number not in tested.get(mutation.scenario, []):
            yield f"{mutation.scenario} is not marked with the feature {number}"


def _wrong_run(mutation: Mutation, runs: dict[str, list[matrix.Run]]) -> Iterator[str]:
    if (KERNEL, mutation.pair) not in runs.get(mutation.scenario, []):
        yield f"no scenario {mutation.scenario} runs on {KERNEL} with {mutation.pair}"


def _wrong_patch(mutation: Mutation) -> Iterator[str]:
    """Checks that the patch applies, and at one place only."""
    checked = apply(mutation, features.TREE, "--check")
    if checked.returncode != 0:
        yield f"does not apply: {checked.stdout.strip()}"
        return
    for file, text in mutation.hunks():
        count = (features.TREE / file).read_text().count(text)
        if count != 1:
            yield f"applies at {count} places of {file}: give it more lines of context"


def apply(mutation: Mutation, tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Applies a mutation to the sources below `tree`, which is in the project's repository."""
    if tree != features.TREE:
        options = (f"--directory={tree.relative_to(features.TREE)}", *options)
    return subprocess.run(
        ["git", "apply", "--whitespace=nowarn", *options, mutation.path],
        cwd=features.TREE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
