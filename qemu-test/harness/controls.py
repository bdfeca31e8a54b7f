# SPDX-License-Identifier: GPL-2.0-only
"""Results of controls, kept until something that went into them changes.

A control is a run of a scenario with the C pair. It tests the scenario, not our
drivers, and nothing of it changes when they do. So a control that passed is not
run again: its result and what it recorded are taken from the cache, where it is
named by all that it was made of. The report calls it KEPT, with the day of the
run. RBLKIF_CONTROLS=again runs them all.
"""

import json
import os
import subprocess
import time
from functools import cache

import pytest

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .image import PIECES
from .kernel import Kernel

CONTROL = "C/C"
PLACES = (
    "BUILD",
    "CACHE",
    "CONTROLS",
    "DOM0_KERNEL",
    "IN_ROOT",
    "KERNELS",
    "LOGS",
    "NAME",
    "TIERS",
)
"""RBLKIF_ variables that do not say what a scenario does, such as with how many disks."""
HARNESS = PIECES.parent
BOOKKEEPING = ("demo.py", "features.py", "matrix.py", "results.py", "try.py")
"""Of the harness, what chooses scenarios or counts results, and what is no part of one."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Reports a control that is kept, in place of running it."""
    place = _place(item)
    if place is None or not place.exists() or os.environ.get("RBLKIF_CONTROLS") == "again":
        return None
    os.utime(place)
    properties = json.loads(place.read_text())
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for when in ("setup", "call", "teardown"):
        report = pytest.TestReport(
            item.nodeid, item.location, {}, "passed", None, when, user_properties=properties
        )
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the item before has left for this one goes, but for what the next one needs. Without
    # this pytest refuses the next one if it is of another file.
    item.session._setupstate.teardown_exact(nextitem)
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Keeps a control whose steps, with the look at its machines at the end, all passed.

    One that did not is forgotten, if it was kept.
    """
    report = (yield).get_result()
    item.all_passed = getattr(item, "all_passed", True) and report.passed
    place = _place(item)
    if report.when == "teardown" and place is not None:
        place.unlink(missing_ok=True)
        if item.all_passed:
            properties = [*item.user_properties, ("kept", time.strftime("%Y-%m-%d"))]
            made_once(place, lambda path: path.write_text(json.dumps(properties)))


def pytest_report_teststatus(report):
    """What the list of results calls a control that was not run."""
    day = dict(getattr(report, "user_properties", ())).get("kept")
    if report.when == "call" and report.passed and day:
        return "passed", "k", f"KEPT of {day}"
    return None


def _place(item):
    """Where the result of `item` is kept; None if it is no control."""
    kernel, pair = item.callspec.params["run"]
    if pair != CONTROL:
        return None
    # Modules of rust/samples are ours: a control that takes some depends on them.
    ours = "test_modules" in item.fixturenames
    return CACHE / "controls" / key_of(item.nodeid, item.path, _parts(kernel, ours))


def _sources_of_samples():
    """What the modules of rust/samples are built from. A built one differs from place to place."""
    parts = ("bindings", "helpers", "kernel", "blkif", "samples")
    trees = [HARNESS.parent / "rust" / part for part in parts]
    files = [path for tree in trees for path in tree.rglob("*") if path.is_file()]
    return [*files, HARNESS.parent / "Kbuild", HARNESS.parent / "scripts" / "build-modules"]


@cache
def _parts(name, ours):
    """The key of all that the controls on a kernel share."""
    kernels = dict(item.split("=", 1) for item in os.environ["RBLKIF_KERNELS"].split())
    kernel = Kernel(kernels[name])
    packages = subprocess.run(["dpkg-query", "-W"], stdout=subprocess.PIPE, check=True).stdout
    programs = [*HARNESS.glob("*.py"), *HARNESS.glob("harness/*.py")]
    files = [path for path in programs if path.name not in BOOKKEEPING]
    files += PIECES.iterdir()
    files.append(HARNESS.parent / "scripts" / "initramfs-test")
    files += (path for path in (HARNESS.parent / "packaging").rglob("*") if path.is_file())
    if ours:
        files += _sources_of_samples()
    modules = [kernel.module(module) for module in ("xen-blkfront", "xen-blkback")]
    dom0 = "" if kernel.guest_type == "pv" else os.environ["RBLKIF_DOM0_KERNEL"]
    places = {f"RBLKIF_{name}" for name in PLACES}
    said = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith("RBLKIF_") and name not in places
    )
    return key_of(packages, kernel.release, kernel.vmlinux, dom0, *said, *modules, *sorted(files))
