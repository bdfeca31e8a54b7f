# SPDX-License-Identifier: GPL-2.0-only
"""Disks are attached while their server is short of memory."""

from collections.abc import Callable

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.job import wait_for_passes
from harness.leak_counts import xen_counts
from harness.toolstack import CODES
from harness.toolstack import directories
from harness.verify import start_jobs
from harness.xenhost import Disk
from harness.xenhost import XenHost

EXHAUST = """
(while [ ! -e /tmp/enough ]; do
	free=$(sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
	(echo 1000 > /proc/self/oom_score_adj; echo >> /tmp/rounds
	dd if=/dev/zero bs=$((free + 16384))k count=1 | sleep 1)
done; touch /tmp/over) > /dev/null 2>&1 &
"""
"""Allocates all memory again and again, until the kernel kills the process that has it."""
FIRST, SECOND = Disk("xvda", "/dev/ram0"), Disk("xvdb", "/dev/ram1")
MEGABYTES = 8
ATTEMPTS = 4


def attach_if_possible(host: XenHost, guest: Guest) -> bool:
    """Attaches the second disk. Returns `False` if xl has failed, and removes what it has left."""
    back = directories(guest.domid, CODES[SECOND.vdev])[1]
    status, said = host.run(f"xl block-attach {guest.name} '{SECOND.specification(host.server)}'")
    if status == 0:
        return True
    print(said)
    host.run(f"xl block-detach {guest.name} {SECOND.vdev}")
    host.wait_for(f"! xenstore-exists {back}")
    return False


def life_of_two_disks(host: XenHost, guest: Guest, between: Callable[[], None]) -> None:
    """Attaches both disks, does something, and detaches them."""
    host.attach(guest, FIRST)
    host.attach(guest, SECOND)
    for disk in (FIRST, SECOND):
        guest.wait_for_disk(disk.vdev)
        assert_served_by_pair(host, guest, disk.vdev)
    host.detach_and_wait(guest, SECOND.vdev)
    between()
    host.detach_and_wait(guest, FIRST.vdev)


def attach_without_memory(host: XenHost, guest: Guest) -> None:
    """Attaches the second disk while dom0 is short of memory, and the first one is in use."""
    jobs = start_jobs(guest, ["data"])
    host.sh(EXHAUST)
    host.wait_for("[ $(wc -l < /tmp/rounds) -gt 3 ]")
    attached = 0
    for _attempt in range(ATTEMPTS):
        if attach_if_possible(host, guest):
            attached += 1
            guest.wait_for_disk(SECOND.vdev)
            guest.sh("dd if=/dev/xvdb of=/dev/null bs=64k count=16 iflag=direct 2> /dev/null")
            host.detach_and_wait(guest, SECOND.vdev)
        wait_for_passes(jobs)
    host.sh("touch /tmp/enough")
    host.wait_for("[ -e /tmp/over ]")
    print(f"{attached} of {ATTEMPTS} attaches have succeeded")
    assert int(host.sh("dmesg | grep -c 'Out of memory'")) > 0
    for job in jobs:
        job.stop()


def test_short_attach(xen: StartHost) -> None:
    """Each attach succeeds, or xl reports a failure and nothing of the disk is left.

    The other disk of the guest sees no error, and an attach succeeds when there is memory again.
    """
    host = xen(waiting=TWO_VCPUS)
    host.load_backend()
    host.ram_disks(count=2, megabytes=MEGABYTES)
    # brd allocates its memory when it is written to.
    host.sh(
        "for disk in 0 1; do dd if=/dev/zero of=/dev/ram$disk bs=1M "
        f"count={MEGABYTES} oflag=direct; done"
    )
    host.allow("Call Trace")
    guest = host.start_guest(disks=[])
    life_of_two_disks(host, guest, lambda: None)
    before = xen_counts(host)
    life_of_two_disks(host, guest, lambda: attach_without_memory(host, guest))
    after = xen_counts(host)
    assert (after["grants"], after["events"]) == (before["grants"], before["events"])
    life_of_two_disks(host, guest, lambda: None)
