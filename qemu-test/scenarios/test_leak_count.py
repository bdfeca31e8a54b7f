# SPDX-License-Identifier: GPL-2.0-only
"""Attach, use and detach leave nothing behind, by the counts of Xen and of the kernels."""

import os
from collections.abc import Mapping
from typing import Any

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.leak_counts import kernel_counts
from harness.leak_counts import xen_counts
from harness.manual_toolstack import ManualDisk
from harness.shell import Target
from harness.xenhost import Disk
from harness.xenhost import XenHost

CYCLES = int(os.environ.get("RBLKIF_CYCLES", "20"))
"""How often the disk is attached and detached between the two counts."""
SLACK_KB = 256
"""Memory may differ by this much, caches of the rest of the system; dom0's by twice as much, as it
keeps what the consoles said.
"""

SLOW_DISK = "irqmode=2 completion_nsec=50000000 gb=1"
"""Answers each request after a while, so that some are in flight at any moment."""
USER = """(while [ ! -e /tmp/stop ]; do
	if [ -b /dev/xvdb ]; then
		/usr/bin/dd if=/dev/xvdb of=/dev/null bs=64k iflag=direct &
		/usr/bin/dd if=/dev/zero of=/dev/xvdb bs=256k oflag=direct conv=nocreat || true
		wait
	else
		usleep 50000
	fi
done) > /dev/null 2>&1 &"""
"""Reads and writes the disk whenever there is one."""


def cycle(disk: ManualDisk) -> None:
    """Attaches a disk, and detaches it while it is in use."""
    disk.offer()
    disk.give("/dev/nullb0")
    disk.server.wait_for("grep -q '[1-9]' /sys/block/nullb0/inflight")
    disk.detach_and_wait()
    disk.guest.wait_for("[ ! -b /dev/xvdb ] && ! pidof dd")


def reload(host: XenHost, guest: Guest) -> None:
    """Unloads both drivers and loads them again."""
    guest.unload_frontend()
    host.server.unload_backend()
    host.server.load_backend()
    guest.load_frontend()


def counts(host: XenHost, machines: Mapping[str, Target]) -> dict[str, dict[str, Any]]:
    """Returns the counts of Xen and of the kernels."""
    host.server.take_back_memory()
    return {"Xen": xen_counts(host)} | {
        name: kernel_counts(machine) for name, machine in machines.items()
    }


@pytest.mark.feature("FE-65", "FE-68")
def test_leak_count(xen: StartHost) -> None:
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.insmod("configfs")
    server.insmod("null_blk", SLOW_DISK)
    guest = host.start_guest(disks=[])
    guest.allow("rror, dev xvdb")
    guest.sh(USER)
    disk = ManualDisk(host, guest)
    for _ in range(2):
        cycle(disk)
        reload(host, guest)
    machines: dict[str, Target] = {machine.name: machine for machine in (host, server, guest)}
    before = counts(host, machines)
    for _ in range(CYCLES):
        cycle(disk)
    reload(host, guest)
    after = counts(host, machines)
    for name in before:
        print(f"{name}, before and after {CYCLES} cycles:", before[name], after[name], sep="\n")
    assert after["Xen"] == before["Xen"]
    for name in machines:
        now, then = after[name], before[name]
        assert now["threads"] <= then["threads"]
        assert now["modules"] == then["modules"]
        # KASAN keeps what is freed for a while.
        assert host.has_checks or now["slab_kb"] <= then["slab_kb"] + SLACK_KB
        # A page of the guest that is given up while it is mapped in dom0 is missing here too: its
        # kernel frees ten such pages a second.
        lost = then["free_kb"] - now["free_kb"]
        assert host.has_checks or lost <= (2 if machines[name] is host else 1) * SLACK_KB, name
    guest.sh("touch /tmp/stop")
    host.attach(guest, Disk("xvdb", "/dev/nullb0"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
