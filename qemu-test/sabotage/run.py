# SPDX-License-Identifier: GPL-2.0-only
"""Takes features away from our drivers, and sees whether the scenarios notice.

A scenario that is green with a driver that cannot do what the scenario shows has
shown nothing. So for each row of the feature table there is a sabotage: a small
change of our drivers that takes away what the row says, see lists.py. Each is
made in a copy of the sources below build/, the modules are built from that, and
the scenario must fail with them.

What counts is an assertion, trouble on a console, or a command that is not
answered, after the machines have started. Anything else is an error of the
sabotage.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

TREE = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TREE / "qemu-test"))

from harness import features
from sabotage import lists

SPACE = TREE / "build" / "sabotage"
COPY = SPACE / "tree"
SOURCES = ("Kbuild", "rust")
"""What modules are built from."""
IDLE_TALK = re.compile(r"Omitting|Differing items|Use -v|Full diff")
"""Lines of pytest about a failure that say nothing of it."""
CHAINED = re.compile(r"^(?:During handling of the|The) above exception.*:$", re.MULTILINE)
"""What pytest puts between an exception and the one that came of it."""
NOTICED = re.compile(
    r"(?:[\w.]*\.)?(?:assert|AssertionError|CommandFailed|MachineTrouble|Failed)\b"
)


class NotRun(Exception):
    """A sabotage could not be tried."""


def sources(root):
    """Path below `root` of each file that modules are built from."""
    tops = [root / name for name in SOURCES]
    files = [file for top in tops for file in (top, *top.rglob("*")) if file.is_file()]
    return {file.relative_to(root) for file in files}


def refresh_copy():
    """Makes the copy as the tree is.

    Only what differs is written, for Kbuild builds anew what is newer than its object. An
    interrupted run may have left a sabotage there: that differs too.
    """
    for path in sources(TREE):
        write(COPY / path, (TREE / path).read_bytes())
    for path in sources(COPY) - sources(TREE):
        (COPY / path).unlink()


def write(path, content):
    """Gives a file that content, unless it has it."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@contextmanager
def sabotaged(entry):
    """The copy has this sabotage in it."""
    path = COPY / entry["file"]
    healthy = path.read_text()
    if healthy.count(entry["old"]) != 1:
        raise NotRun(f"what it changes is not there once in {entry['file']}")
    write(path, healthy.replace(entry["old"], entry["new"]).encode())
    try:
        yield
    finally:
        write(path, healthy.encode())


def build(kernel):
    """Builds the modules of the copy where the harness looks for them."""
    release = (kernel / "O/include/config/kernel.release").read_text().strip()
    objects = SPACE / release
    objects.mkdir(parents=True, exist_ok=True)
    command = ["make", "-s", "-C", kernel / "O", f"M={COPY}", f"MO={objects}"]
    command += [f"-j{os.cpu_count()}", "modules"]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode != 0:
        errors = [line for line in made.stdout.splitlines() if "error" in line]
        raise NotRun(f"does not build: {errors[0] if errors else made.stdout[-300:]}")


def run_scenario(scenario, pair, kernel):
    """Runs a scenario with the modules of the copy; its failure, or "" if it has none."""
    files = {name: path for name, path, _features in features.scenarios()}
    name = lists.RUN[0]
    results = SPACE / "scenario.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-B", "-m", "pytest", "-c", "qemu-test/pytest.ini"]
    command += ["--rootdir", "qemu-test", f"--junitxml={results}"]
    command += [f"{files[scenario]}::test_{scenario}[{name}-{pair}]"]
    environment = os.environ | {
        "RBLKIF_KERNELS": f"{name}={kernel}",
        "RBLKIF_BUILD": str(SPACE),
        "RBLKIF_TIERS": "daily full",
    }
    with (SPACE / "scenario.log").open("w") as log:
        ended = subprocess.run(command, cwd=TREE, env=environment, stdout=log, stderr=log)
    if ended.returncode not in (0, 1):
        raise NotRun(f"pytest ended with status {ended.returncode}, see {SPACE / 'scenario.log'}")
    return failure_in(next(ElementTree.parse(results).iter("testcase")))


def failure_in(case):
    """What a test of a JUnit file failed with, and where; "" if it passed."""
    found = [case.find(kind) for kind in ("failure", "error", "skipped")]
    bad = next((one for one in found if one is not None), None)
    if bad is None:
        return ""
    text = CHAINED.split(bad.text or "")[-1]
    said = re.findall(r"^E   +(\S.*)$", text, re.MULTILINE)
    place = re.findall(r"^\S*scenarios/(test_\w+\.py:\d+): in ", text, re.MULTILINE)
    lines = [line[:150] for line in said if not IDLE_TALK.match(line)]
    # What a script has said comes last, after all of the script.
    summary = " / ".join([*lines[:3], *lines[3:][-1:]])
    if "failed on setup" in bad.get("message", "") or not said or not NOTICED.match(said[0]):
        raise NotRun(f"the scenario did not fail by an assertion: {summary or bad.get('message')}")
    return f"{place[-1] if place else 'at the end'}: {summary}"


def outcome_of(entry, kernel):
    """(outcome, what there is to say of it) of a sabotage: red, GREEN or error."""
    try:
        with sabotaged(entry):
            build(kernel)
            failure = run_scenario(entry["scenario"], entry["pair"], kernel)
    except NotRun as error:
        return "error", str(error)
    return ("red", failure) if failure else ("GREEN", f"{entry['scenario']} does not notice")


def keep(entry, outcome, failure, seconds):
    """Adds a result to those that are there."""
    known = json.loads(lists.RESULTS.read_text()) if lists.RESULTS.exists() else {}
    known[entry["name"]] = {
        "rows": entry["rows"],
        "scenario": entry["scenario"],
        "outcome": outcome,
        "failure": failure,
        "seconds": seconds,
        "version": lists.version(entry),
    }
    new = lists.RESULTS.with_suffix(".new")
    new.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    new.rename(lists.RESULTS)


def chosen(names):
    """The sabotages that the names mean: their own, of their list, scenario or rows."""
    entries = lists.entries()
    keys = [{entry["name"], entry["list"], entry["scenario"], *entry["rows"]} for entry in entries]
    unknown = set(names) - set().union(*keys)
    if unknown:
        sys.exit(f"sabotage: nothing is called {', '.join(sorted(unknown))}")
    return [
        entry for entry, has in zip(entries, keys, strict=True) if not names or has & set(names)
    ]


def main():
    """Runs what was chosen; 0 if the scenarios have noticed all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only look at the lists")
    parser.add_argument("--kernel", type=Path, help="directory of the prepared kernel")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    wrong = list(lists.findings())
    if wrong or options.check:
        print("\n".join(wrong), end="\n" if wrong else "")
        return bool(wrong)
    refresh_copy()
    counts = {"red": 0, "GREEN": 0, "error": 0}
    for entry in chosen(options.names):
        start = time.monotonic()
        outcome, failure = outcome_of(entry, options.kernel)
        seconds = round(time.monotonic() - start)
        keep(entry, outcome, failure, seconds)
        counts[outcome] += 1
        print(f"{outcome:5} {entry['name']} ({', '.join(entry['rows'])}), {seconds} s")
        print(f"      {failure}", flush=True)
    print("sabotage:", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return counts["red"] != sum(counts.values())


if __name__ == "__main__":
    sys.exit(main())
