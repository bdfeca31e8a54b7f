# SPDX-License-Identifier: GPL-2.0-only
"""Frontend and backend of a scenario: the C drivers or ours.

A pair is written FRONT/BACK with C for the kernel's own driver and R for the
Rust driver. C/C is the reference run: it tests the scenario itself. As BACK, Q is QEMU
in dom0, see qdisk.py, and T is rblktap, see rblktap.py; neither is a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .kernel import build_id

if TYPE_CHECKING:
    from .kernel import Kernel


@dataclass
class Driver:
    """One driver module: its name without .ko, the file, and the build id in it."""

    name: str
    file: Path
    build_id: str


@dataclass
class Pair:
    """The two drivers of a scenario."""

    name: str
    front: Driver
    back: Driver | None
    """The backend in dom0; None if that is no module."""
    storage: Driver | None
    """The backend in a driver domain: the same, built for the guests' kernel."""

    @property
    def backend(self) -> Driver:
        """Returns the backend in dom0; raises `ValueError` if that is no module."""
        if self.back is None:
            raise ValueError(f"the backend of {self.name} is no module")
        return self.back


QDISK = "Q"
TAP = "T"
NAMES = {"C": ("xen-blkfront", "xen-blkback"), "R": ("rblkfront", "rblkback")}


def pair(
    name: str, kernel: Kernel, build: str | Path, dom0: tuple[Kernel, Path] | None = None
) -> Pair:
    """Returns the pair called `name` for `kernel`; our modules are in directory `build`.

    `dom0` is (kernel, build) of dom0 if it runs another kernel than its guests.
    """
    front, back = name.split("/")
    front_driver = _driver(NAMES[front][0], front, kernel, build)
    if back in (QDISK, TAP):
        return Pair(name, front_driver, None, None)
    return Pair(
        name,
        front_driver,
        _driver(NAMES[back][1], back, *(dom0 or (kernel, build))),
        _driver(NAMES[back][1], back, kernel, build),
    )


def other_driver(driver: Driver, kernel: Kernel, build: str | Path) -> Driver:
    """Returns the other driver for the same devices."""
    ours = driver.name in NAMES["R"]
    own, kind = ("R", "C") if ours else ("C", "R")
    side = NAMES[own].index(driver.name)
    return _driver(NAMES[kind][side], kind, kernel, build)


def _driver(name: str, kind: str, kernel: Kernel, build: str | Path) -> Driver:
    if kind == "R":
        file = Path(build) / f"{name}.ko"
        return Driver(name, file, build_id(file))
    content = kernel.module(name)
    file = CACHE / "images" / f"{name}-{key_of(content)}.ko"
    made_once(file, lambda path: path.write_bytes(content))
    return Driver(name, file, build_id(file))
