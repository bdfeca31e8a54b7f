# SPDX-License-Identifier: GPL-2.0-only
"""rblktap in dom0 is the backend, on the slot of blktap: vbd3."""

from collections.abc import Sequence

from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.job import wait_for_passes
from harness.rblktap import Image
from harness.rblktap import TapDisk
from harness.verify import start_jobs
from harness.xenhost import Disk
from harness.xenhost import XenHost

VERIFY = (
    "fio --name=part --filename=/dev/{vdev} --ioengine=libaio --iodepth=16 --direct=1 "
    "--rw=randwrite --norandommap=0 --bsrange=512-256k --blockalign=512 --size=8M "
    "--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 --output-format=terse"
)
VERIFIED_KB = 8192
"""The size of the area that `VERIFY` writes."""
METADATA_KB = 1024
"""More than an image without data occupies."""
XVDA, XVDB = 51712, 51728
KILLS = 3


def start(xen: StartHost, disks: Sequence[Disk]) -> tuple[XenHost, Guest]:
    """Starts a host whose dom0 serves `disks` with rblktap, and a guest with them."""
    images = rblktap.disk([Image("a.raw", 64), Image("b.raw", 32)])
    host = xen(waiting=TWO_VCPUS, image=images, files=rblktap.files())
    rblktap.start_agent(host)
    guest = host.start_guest(disks=disks)
    for disk in disks:
        assert_served_by_pair(host, guest, disk.vdev)
    return host, guest


def verify_and_discard(host: XenHost, guest: Guest, vdev: str, image: str) -> None:
    """Verifies what fio writes, and that a discard frees the blocks of the image."""
    guest.sh(VERIFY.format(vdev=vdev), timeout=600)
    assert rblktap.allocated_kb(host, image) >= VERIFIED_KB
    guest.sh(f"dd if=/dev/zero of=/dev/{vdev} bs=4k count=1 conv=notrunc,fsync 2> /dev/null")
    guest.sh(f"blkdiscard /dev/{vdev}")
    assert rblktap.allocated_kb(host, image) < METADATA_KB


def test_tap(xen: StartHost) -> None:
    """Confinement; write and verify, flush, discard, attach and detach, a read-only disk."""
    host, guest = start(xen, [TapDisk("xvda", "a.raw")])
    rblktap.assert_confined(host, guest, XVDA)
    assert "write back" in guest.sh("cat /sys/block/xvda/queue/write_cache")
    verify_and_discard(host, guest, "xvda", "a.raw")
    version, _, _, reads, _, _, _, writes, *_ = rblktap.xentop_counters(host, guest, XVDA)
    assert version == 1
    assert reads > 0
    assert writes > 0
    for _cycle in range(2):
        host.attach(guest, TapDisk("xvdb", "b.raw"))
        guest.wait_for_disk("xvdb")
        assert_served_by_pair(host, guest, "xvdb")
        verify_and_discard(host, guest, "xvdb", "b.raw")
        process = rblktap.pid(host, guest, XVDB)
        host.detach(guest, "xvdb")
        guest.wait_for("[ ! -b /dev/xvdb ]")
        host.wait_for(f"[ ! -e /proc/{process} ]")
    host.attach(guest, TapDisk("xvdb", "b.raw", mode="r"))
    guest.wait_for_disk("xvdb")
    assert guest.sh("blockdev --getro /dev/xvdb").strip() == "1"
    host.detach(guest, "xvdb")


def test_tap_killed(xen: StartHost) -> None:
    """Kill the process while the guest verifies what it writes: a successor takes over the ring.

    Writes of the dead process stay in dom0's kernel until the successor waits for them.
    """
    host, guest = start(xen, [TapDisk("xvda", "a.raw")])
    jobs = start_jobs(guest, ["data", "synced", "mixed"])
    for number in range(KILLS):
        host.machine.throttle_writes(1)
        rblktap.wait_in_flight(host, guest, XVDA)
        rblktap.replace(host, guest, XVDA)
        assert rblktap.log(host, guest, XVDA).count(rblktap.SERVED) == number + 1
        host.machine.throttle_writes(0)
        assert rblktap.wait_served(host, guest, XVDA, number + 2) > 0
        assert_served_by_pair(host, guest)
        wait_for_passes(jobs)
    for job in jobs:
        job.stop()
    assert "I/O error" not in guest.sh("dmesg")
