# SPDX-License-Identifier: GPL-2.0-only
"""The RAM disk of rust/samples/ramdisk, in any machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .guest import wait_in

if TYPE_CHECKING:
    from .shell import Target

DISK = "/dev/rblk0"
MODULE = "/sys/module/rblk_ramdisk"


def pull_out(machine: Target) -> None:
    """Removes the disk; the parameter takes effect when the disk is opened."""
    machine.sh(f"echo 1 > {MODULE}/parameters/gone")
    machine.run(f"blockdev --getsz {DISK}")
    wait_in(machine, f"[ ! -e {DISK} ]", 60)


def unload(machine: Target) -> None:
    """Removes the disk, which holds the module, and unloads that. Nothing has the disk open."""
    pull_out(machine)
    wait_in(machine, f"[ $(cat {MODULE}/refcnt) = 0 ]", 60)
    machine.sh("rmmod rblk_ramdisk")
