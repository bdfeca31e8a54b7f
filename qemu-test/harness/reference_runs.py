# SPDX-License-Identifier: GPL-2.0-only
"""Cached results of reference runs.

A reference run is a run of a scenario with the C pair. It tests the scenario, not our drivers,
and does not change when they do. So one that has passed is not repeated: its result and what it
recorded are taken from the cache, under a hash of everything that it depends on. The report says
CACHED, with the day of the run. RBLKIF_REFERENCE_RUNS=again repeats all of them.
"""

import json
import os
import subprocess
import time
from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .image import PIECES
from .kernel import Kernel

REFERENCE = "C/C"
PLACES = (
    "BUILD", "CACHE", "DOM0_KERNEL", "IN_ROOT", "KERNELS", "LOGS", "NAME", "REFERENCE_RUNS", "TIERS",
)  # fmt: skip
"""RBLKIF_ variables that do not change what a scenario does, unlike a number of disks."""
HARNESS = PIECES.parent
BOOKKEEPING = (
    "demo.py",
    "demo_tap.py",
    "features.py",
    "matrix.py",
    "mutation.py",
    "results.py",
    "run_mutations.py",
    "try.py",
)
"""Files that select scenarios or count results, and those that no scenario uses."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    """Takes a cached result, in which case no fixture of the scenario is set up."""
    entry = item.entry = _entry(item)
    again = os.environ.get("RBLKIF_REFERENCE_RUNS") == "again"
    item.cached = entry is not None and entry.exists() and not again
    if entry is not None and item.cached:
        os.utime(entry)
        item.user_properties += [tuple(one) for one in json.loads(entry.read_text())]
        item.fixturenames = []


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    """Skips the function of a scenario whose result is cached: it has passed."""
    return True if pyfuncitem.cached else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any) -> Generator[None, Any]:
    """Caches the result of a reference run if all its phases have passed.

    A result that is cached is removed if the run has failed now.
    """
    report = (yield).get_result()
    item.all_passed = getattr(item, "all_passed", True) and report.passed
    if report.when == "teardown" and item.entry is not None and not item.cached:
        item.entry.unlink(missing_ok=True)
        if item.all_passed:
            properties = [*item.user_properties, ("cached", time.strftime("%Y-%m-%d"))]
            made_once(item.entry, lambda path: path.write_text(json.dumps(properties)))


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Names the result of a reference run that is cached."""
    day = dict(getattr(report, "user_properties", ())).get("cached")
    if report.when == "call" and report.passed and day:
        return "passed", "c", f"CACHED on {day}"
    return None


def _entry(item: Any) -> Path | None:
    """Returns the file in the cache for the result of `item`; `None` if it is no reference run."""
    kernel, pair = item.callspec.params["run"]
    if pair != REFERENCE:
        return None
    # Modules of rust/samples are ours: a reference run that loads some depends on them.
    ours = "test_modules" in item.fixturenames
    return CACHE / "reference-runs" / key_of(item.nodeid, item.path, _parts(kernel, ours))


def _sources_of_samples() -> list[Path]:
    """Returns the sources of the modules of rust/samples; the built ones contain paths."""
    parts = ("bindings", "helpers", "kernel", "blkif", "samples")
    trees = [HARNESS.parent / "rust" / part for part in parts]
    files = [path for tree in trees for path in tree.rglob("*") if path.is_file()]
    return [*files, HARNESS.parent / "Kbuild", HARNESS.parent / "scripts" / "build-modules"]


@cache
def _parts(name: str, ours: bool) -> str:
    """Returns the hash of everything that the reference runs on a kernel share."""
    kernels = dict(item.split("=", 1) for item in os.environ["RBLKIF_KERNELS"].split())
    kernel = Kernel(kernels[name])
    packages = subprocess.run(["dpkg-query", "-W"], stdout=subprocess.PIPE, check=True).stdout
    programs = [*HARNESS.glob("*.py"), *HARNESS.glob("harness/*.py")]
    files = [path for path in programs if path.name not in BOOKKEEPING]
    files += PIECES.iterdir()
    files.append(HARNESS.parent / "scripts" / "lib" / "initramfs-test")
    files += (path for path in (HARNESS.parent / "packaging").rglob("*") if path.is_file())
    if ours:
        files += _sources_of_samples()
    modules = [kernel.module(module) for module in ("xen-blkfront", "xen-blkback")]
    dom0 = "" if kernel.can_be_dom0 else os.environ["RBLKIF_DOM0_KERNEL"]
    places = {f"RBLKIF_{name}" for name in PLACES}
    said = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith("RBLKIF_") and name not in places
    )
    return key_of(packages, kernel.release, kernel.vmlinux, dom0, *said, *modules, *sorted(files))
