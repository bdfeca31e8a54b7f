# SPDX-License-Identifier: GPL-2.0-only
"""A domain is destroyed at each step of its disk's connection; nothing of it is left."""

from collections.abc import Callable
from typing import Any

import pytest

from harness.driver_check import assert_served_by_pair
from harness.guest import Guest
from harness.leak_counts import kernel_counts
from harness.leak_counts import xen_counts
from harness.manual_toolstack import ManualDisk
from harness.xenhost import Disk
from harness.xenhost import XenHost

IMAGE = "/dev/vdb"
BESIDE = "(touch /tmp/beside; xl {command}; rm /tmp/beside) > /dev/null 2>&1 &"
"""Runs an xl command for the guest during the block."""
HOLD = "/tmp/hold"
"""While it is there, the hotplug script does not say which disk it is."""
WRITER = (
    "(while /usr/bin/dd if=/dev/zero of=/dev/xvda bs=64k count=16 oflag=direct conv=nocreat,notrunc; "
    "do echo x >> /tmp/rounds; done) > /dev/null 2>&1 &"
)
"""Writes until the disk is gone."""
SLACK_KB = 512
"""Memory of the server may differ by this much, caches of the rest of the system."""


def held(disk: ManualDisk) -> None:
    """The device exists, and the disk is not known yet."""
    disk.server.sh(f"touch {HOLD}")
    disk.host.attach(disk.guest, Disk("xvda"))


def stopped(disk: ManualDisk) -> None:
    """The guest does not run, and so has not seen its device."""
    disk.host.sh(f"xl pause {disk.guest.domid}")
    held(disk)
    disk.wait_for(front=1, back=2)


def offered(disk: ManualDisk) -> None:
    """The frontend has offered its rings; there is no disk."""
    held(disk)
    disk.wait_for(front=3, back=2)


def half_connected(disk: ManualDisk) -> None:
    """The backend serves the rings of a guest that has been stopped meanwhile."""
    offered(disk)
    disk.host.sh(f"xl pause {disk.guest.domid}")
    disk.give("/dev/ram0")
    disk.wait_for(front=3, back=4)


def connected(disk: ManualDisk) -> None:
    """The guest has the disk."""
    disk.host.attach(disk.guest, Disk("xvda"))
    disk.guest.wait_for_disk("xvda")


def in_use(disk: ManualDisk) -> None:
    """The guest writes to the disk all the time."""
    connected(disk)
    disk.guest.sh(WRITER)
    disk.guest.wait_for("[ -s /tmp/rounds ]")


def half_closed(disk: ManualDisk) -> None:
    """The toolstack wants the disk back, and the guest does not run."""
    in_use(disk)
    disk.host.sh(f"xl pause {disk.guest.domid}")
    disk.host.sh(BESIDE.format(command=f"block-detach {disk.guest.domid} xvda"))
    disk.wait_for(front=4, back=5)


def at_once(disk: ManualDisk) -> None:
    """The toolstack has just written the nodes."""
    disk.server.start_devd()
    specification = Disk("xvda").specification(disk.server)
    disk.host.sh(BESIDE.format(command=f"block-attach {disk.guest.domid} '{specification}'"))
    disk.host.wait_for(f"xenstore-exists {disk.back}")


STEPS = (stopped, offered, half_connected, connected, in_use, half_closed, at_once)


def life(host: XenHost, guest: Guest, step: Callable[[ManualDisk], None]) -> None:
    """Creates the domain, and destroys it at this step."""
    print(step.__name__)
    guest.restore(IMAGE)
    disk = ManualDisk(host, guest, "xvda")
    back = disk.back
    step(disk)
    host.sh(f"xl destroy {guest.domid}")
    host.server.sh(f"rm -f {HOLD}")
    host.wait_for(f"[ ! -e /tmp/beside ] && ! xenstore-exists {back} && ! xl list | grep -q null")
    host.server.wait_for(f"[ ! -e {disk.device} ] && ! grep -q xvda /proc/[0-9]*/comm")


@pytest.mark.feature("BE-11")
def test_destroyed(host: XenHost) -> None:
    """A domain is destroyed at each step; nothing is left, and the next one gets its disk."""
    guest = host.start_guest(disks=[])
    server = host.server
    server.sh(f"sed -i '/= add/a [ ! -e {HOLD} ] || exit 0' /etc/xen/scripts/blk-min")
    guest.save(IMAGE)
    life(host, guest, in_use)

    def counts() -> tuple[dict[str, object], dict[str, Any]]:
        server.take_back_memory()
        return xen_counts(host), kernel_counts(server)

    before = counts()
    for step in STEPS:
        life(host, guest, step)
    after = counts()
    print(before, after, sep="\n")
    guest.restore(IMAGE)
    connected(ManualDisk(host, guest, "xvda"))
    assert_served_by_pair(host, guest)
    assert after[0] == before[0]
    assert after[1]["threads"] <= before[1]["threads"]
    assert after[1]["modules"] == before[1]["modules"]
    if not host.has_checks:
        assert before[1]["free_kb"] - after[1]["free_kb"] <= SLACK_KB
