# SPDX-License-Identifier: GPL-2.0-only
"""The grant table of a guest is full when a disk is to connect.

The program hold-grants takes what is free of a table that is small from the
start.
"""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.image import compiled
from harness.job import Job
from harness.job import wait_for_passes
from harness.kernel import Kernel
from harness.toolstack import CODES
from harness.toolstack import directories
from harness.xenhost import Disk
from harness.xenhost import Server
from harness.xenhost import XenHost

FRONT = "trusted=0 feature_persistent=0"
"""Each request needs grants of a pool, and no backend keeps them mapped."""

SETTINGS = "max_grant_frames = 4"
"""2048 entries."""

WRITERS = 3
"""As many requests of 32 segments at a time; each needs 33 grants."""

LEFT = 50
"""Entries that the program leaves: enough for one more request, and not for a disk then."""


@pytest.fixture
def gntalloc(kernel: Kernel, tmp_path: Path) -> list[Path]:
    """The module of /dev/xen/gntalloc, if the kernel has not built it in."""
    try:
        content = kernel.module("xen-gntalloc")
    except LookupError:
        return []
    file = tmp_path / "xen-gntalloc.ko"
    file.write_bytes(content)
    return [file]


def hold_grants(guest: Guest, left: int, name: str) -> None:
    """Takes all free entries of the grant table but `left`, for as long as it runs."""
    guest.sh(f"/programs/hold-grants {left} > /tmp/{name}.held & echo $! > /tmp/{name}.pid")
    guest.wait_for(f"[ -s /tmp/{name}.held ]")


def release_grants(guest: Guest, name: str) -> None:
    """Ends the program."""
    guest.sh(f"kill $(cat /tmp/{name}.pid)")


@pytest.mark.feature("F-32", "F-33")
def test_grant_shortage(xen: StartHost, gntalloc: list[Path]) -> None:
    """A disk connects while another one uses up the grants, and again after grants came back.

    With xen-blkfront the disk never appears.
    """
    host = xen(
        modules=gntalloc, programs=[compiled("hold-grants")], front_parameters=FRONT, waiting=None
    )  # fmt: skip
    server = host.start_server()
    server.load_backend()
    server.ram_disks(2)
    guest = host.start_guest(disks=[Disk("xvda", "/dev/ram0")], settings=SETTINGS)
    assert_served_by_pair(host, guest)
    guest.allow("max_grant_frames reached")
    guest.allow("trying again")
    if gntalloc:
        guest.sh("insmod /modules/xen-gntalloc.ko")
    guest.sh("echo 65536 > /sys/module/xen_gntalloc/parameters/limit")

    hold_grants(guest, LEFT, "most")
    command = "/usr/bin/dd if=/dev/zero of=/dev/xvda bs=128k count=8 oflag=direct"
    jobs = [Job(guest, command, f"job{number}") for number in range(WRITERS)]
    wait_for_passes(jobs)
    host.attach(guest, Disk("xvdb", "/dev/ram1"))
    guest.wait_for_disk("xvdb")
    guest.sh("/usr/bin/dd if=/dev/zero of=/dev/xvdb bs=128k count=4 oflag=direct")
    wait_for_passes(jobs)
    for job in jobs:
        job.stop()

    come_back_without_grants(host, server, guest)
    release_grants(guest, "most")
    guest.unload_frontend()


def come_back_without_grants(host: XenHost, server: Server, guest: Guest) -> None:
    """The backend of xvdb is bound again, and there are no grants for a connection with it."""
    device = f"vbd-{guest.domid}-{CODES['xvdb']}"
    driver = "/sys/bus/xen-backend/drivers/vbd"
    front, back = directories(guest.domid, CODES["xvdb"], server)
    # Our backend says nothing when it is unbound, and its successor takes over the rings.
    server.sh(f"echo {device} > {driver}/unbind")
    host.sh(f"xenstore-write {back}/state 6")
    host.wait_for(f"[ $(xenstore-read {front}/state) = 1 ]")
    guest.sh("dmesg -c > /dev/null")
    hold_grants(guest, 0, "rest")
    guest.sh(
        "(/usr/bin/dd if=/dev/zero of=/dev/xvdb bs=128k count=4 oflag=direct && echo done > /tmp/end"
        " || echo failed > /tmp/end) 2> /dev/null &"
    )
    server.sh(f"echo {device} > {driver}/bind")
    # The other disk may free idle pages meanwhile, which suffice for rings.
    step = "\\(offer rings\\|connect\\)"
    guest.wait_for(f"dmesg | grep -q 'vbd-51728: .*cannot {step}: trying again'")
    assert guest.run("[ -s /tmp/end ]")[0] == 1
    release_grants(guest, "rest")
    guest.wait_for('[ "$(cat /tmp/end)" = done ]')
