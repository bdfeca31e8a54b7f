#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Applies mutations of the drivers one by one, and runs the scenarios that have to detect them.

A scenario that passes with a driver that lacks the feature under test shows nothing. Each mutation
(harness/mutation.py) is applied to a copy of the sources below build/, the modules are built from
it, and its scenario must fail with them.

A scenario detects a mutation by an assertion, by trouble on a console, or by a command that is not
answered, after the machines have started. Any other failure is an error of the mutation.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from harness import features
from harness import mutation
from harness.features import TREE
from harness.mutation import Mutation

SPACE = TREE / "build" / "mutations"
COPY = SPACE / "tree"
SOURCES = ("Kbuild", "rust", "packaging/modprobe.d")
"""What modules are built from, and what decides which module is loaded."""
COMMENTARY = re.compile(r"Omitting|Differing items|Use -v|Full diff")
"""Lines of pytest about a failure that do not describe it."""
CHAINED = re.compile(r"^(?:During handling of the|The) above exception.*:$", re.MULTILINE)
"""What pytest prints between an exception and the one that it caused."""
DETECTED = re.compile(
    r"(?:[\w.]*\.)?(?:assert|AssertionError|CommandFailed|MachineTrouble|Failed)\b"
)


class NotRun(Exception):
    """A mutation could not be tried."""


def sources(root: Path) -> set[Path]:
    """Returns the path below `root` of each file that can be changed."""
    tops = [root / name for name in SOURCES]
    files = [file for top in tops for file in (top, *top.rglob("*")) if file.is_file()]
    return {file.relative_to(root) for file in files}


def refresh_copy() -> None:
    """Makes the copy equal to the tree.

    Only files that differ are written, because Kbuild rebuilds what is newer than its object. An
    interrupted run may have left a mutation there, which differs too.
    """
    for path in sources(TREE):
        write(COPY / path, (TREE / path).read_bytes())
    for path in sources(COPY) - sources(TREE):
        (COPY / path).unlink()


def write(path: Path, content: bytes) -> None:
    """Gives a file this content, unless it has it."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@contextmanager
def applied(mutant: Mutation) -> Iterator[None]:
    """The copy has this mutation."""
    result = mutation.apply(mutant, COPY)
    try:
        if result.returncode != 0:
            raise NotRun(f"does not apply: {result.stdout.strip()}")
        yield
    finally:
        for file in mutant.files:
            write(COPY / file, (TREE / file).read_bytes())


def build(kernel: Path) -> None:
    """Builds the modules of the copy where the harness looks for them."""
    release = (kernel / "O/include/config/kernel.release").read_text().strip()
    objects = SPACE / release
    objects.mkdir(parents=True, exist_ok=True)
    command = ["make", "-s", "-C", str(kernel / "O"), f"M={COPY}", f"MO={objects}"]
    command += [f"-j{os.cpu_count()}", "modules"]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode != 0:
        errors = [line for line in made.stdout.splitlines() if "error" in line]
        raise NotRun(f"does not build: {errors[0] if errors else made.stdout[-300:]}")


def run_scenario(scenario: str, pair: str, kernel: Path) -> str:
    """Runs a scenario with the modules of the copy; returns its failure, or "" if it has passed."""
    files = {name: path for name, path, _features in features.scenarios()}
    results = SPACE / "scenario.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-B", "-m", "pytest", "-c", "qemu-test/pytest.ini"]
    command += ["--rootdir", "qemu-test", f"--junitxml={results}"]
    command += [f"{files[scenario]}::test_{scenario}[{mutation.KERNEL}-{pair}]"]
    environment = os.environ | {
        "RBLKIF_KERNELS": f"{mutation.KERNEL}={kernel}",
        "RBLKIF_BUILD": str(SPACE),
        "RBLKIF_MODPROBE_D": str(COPY / "packaging/modprobe.d"),
        "RBLKIF_TIERS": "daily full",
    }
    with (SPACE / "scenario.log").open("w") as log:
        ended = subprocess.run(command, cwd=TREE, env=environment, stdout=log, stderr=log)
    if ended.returncode not in (0, 1):
        raise NotRun(f"pytest ended with status {ended.returncode}, see {SPACE / 'scenario.log'}")
    return failure_in(next(ElementTree.parse(results).iter("testcase")))


def failure_in(case: ElementTree.Element) -> str:
    """Returns where and how a test of a JUnit file has failed; "" if it has passed."""
    found = [case.find(kind) for kind in ("failure", "error", "skipped")]
    bad = next((one for one in found if one is not None), None)
    if bad is None:
        return ""
    text = CHAINED.split(bad.text or "")[-1]
    said = re.findall(r"^E   +(\S.*)$", text, re.MULTILINE)
    place = re.findall(r"^\S*scenarios/(test_\w+\.py:\d+): in ", text, re.MULTILINE)
    lines = [line[:150] for line in said if not COMMENTARY.match(line)]
    # The output of a script follows all of the script.
    summary = " / ".join([*lines[:3], *lines[3:][-1:]])
    if "failed on setup" in bad.get("message", "") or not said or not DETECTED.match(said[0]):
        raise NotRun(f"the scenario did not fail by an assertion: {summary or bad.get('message')}")
    return f"{place[-1] if place else 'at the end'}: {summary}"


def outcome_of(mutant: Mutation, kernel: Path) -> tuple[str, str]:
    """Tries a mutation; returns detected, MISSED or error, and an explanation."""
    try:
        with applied(mutant):
            build(kernel)
            failure = run_scenario(mutant.scenario, mutant.pair, kernel)
    except NotRun as error:
        return "error", str(error)
    return ("detected", failure) if failure else ("MISSED", f"{mutant.scenario} has passed")


def store(mutant: Mutation, outcome: str, failure: str, seconds: int) -> None:
    """Adds a result to the file of results."""
    known = json.loads(mutation.RESULTS.read_text()) if mutation.RESULTS.exists() else {}
    known[mutant.name] = {
        "features": mutant.features,
        "scenario": mutant.scenario,
        "outcome": outcome,
        "failure": failure,
        "seconds": seconds,
        "version": mutant.version,
    }
    new = mutation.RESULTS.with_suffix(".new")
    new.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    new.rename(mutation.RESULTS)


def selected(names: list[str]) -> list[Mutation]:
    """Returns the mutations with these names, drivers, scenarios or features, or all.

    The name `untried` selects those that have not been detected since they were changed.
    """
    mutants = mutation.mutations()
    if names == ["untried"]:
        known = mutation.results()
        return [
            mutant for mutant in mutants if known.get(mutant.name, {}).get("outcome") != "detected"
        ]
    unknown = set(names).difference(*(mutant.labels for mutant in mutants))
    if unknown:
        sys.exit(f"mutation-test: no mutation, scenario or feature: {', '.join(sorted(unknown))}")
    return [mutant for mutant in mutants if not names or mutant.labels & set(names)]


def main() -> int:
    """Tries the selected mutations; returns 0 if all were detected."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check the patch files")
    parser.add_argument("--kernel", type=Path, help="directory of the prepared kernel")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    wrong = list(mutation.findings())
    if wrong or options.check:
        print("\n".join(wrong), end="\n" if wrong else "")
        return int(bool(wrong))
    refresh_copy()
    counts = {"detected": 0, "MISSED": 0, "error": 0}
    for mutant in selected(options.names):
        start = time.monotonic()
        outcome, failure = outcome_of(mutant, options.kernel)
        seconds = round(time.monotonic() - start)
        store(mutant, outcome, failure, seconds)
        counts[outcome] += 1
        rows = ", ".join(mutant.features) or "no row"
        print(f"{outcome:8} {mutant.name} ({rows}), {seconds} s")
        print(f"         {failure}", flush=True)
    print("mutations:", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(counts["detected"] != sum(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
