# SPDX-License-Identifier: GPL-2.0-only
"""A disk is resized under I/O, and its memory follows its use."""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.job import Job
from harness.leak_counts import KEEPS_PAGES
from harness.leak_counts import free_kb
from harness.xenhost import Disk

SIZE = "/sys/module/rblk_ramdisk/parameters/size_mib"
KEPT = 4
"""Megabytes that are written and read all the time."""

WRITE = (
    f"yes pass $pass | head -c {KEPT << 20} > /tmp/pattern && "
    "dd if=/tmp/pattern of=/dev/xvda bs=256k oflag=direct conv=notrunc && "
    f"dd if=/dev/xvda bs=256k count={KEPT * 4} iflag=direct | cmp - /tmp/pattern"
)

IDLE_KB = 256
"""What an idle disk of one queue may cost."""
DISKS = 3
WORK = (
    "for i in 0 1 2 3 4 5; do dd if=/dev/xvda of=/dev/null bs=128k count=32 skip=$((i * 32)) "
    "iflag=direct 2> /dev/null & done; wait"
)


@pytest.mark.feature("FE-63", "FE-55")
def test_resize(xen: StartHost, test_modules: Path) -> None:
    """Up and down under I/O; what lies within both sizes is untouched."""
    host = xen(modules=[test_modules / "rblk_ramdisk.ko"])
    server = host.start_server()
    server.load_backend()
    server.insmod("rblk_ramdisk")
    guest = host.start_guest(disks=[Disk("xvda", "/dev/rblk0")])
    assert_served_by_pair(host, guest)
    job = Job(guest, WRITE)
    for size in (32, 8, 64):
        # It takes effect when the disk is opened.
        server.sh(f"echo {size} > {SIZE}; : < /dev/rblk0")
        guest.wait_for(f"[ $(cat /sys/block/xvda/size) = {size << 11} ]")
        guest.sh(
            f"dd if=/dev/zero of=/dev/xvda bs=1M seek={size - 1} count=1 oflag=direct conv=notrunc"
        )
    # One that has begun since, too.
    job.wait_for_pass(2)
    job.stop()
    assert f"Setting capacity to {64 << 11}" in guest.sh("dmesg | tail")


@pytest.mark.feature("F-14")
def test_idle_memory(xen: StartHost, record_property: RecordProperty) -> None:
    """An idle disk costs little, before and after it had much to do.

    xen-blkfront allocates at once for the largest load.
    """
    host = xen()
    host.load_backend("persistent_grant_unused_seconds=1")
    host.ram_disks(count=DISKS, megabytes=32)
    guest = host.start_guest(disks=[])
    before = free_kb(guest)
    for number, name in enumerate(["xvda", "xvdb", "xvdc"]):
        host.attach(guest, Disk(name, f"/dev/ram{number}"))
        guest.wait_for_disk(name)
    assert_served_by_pair(host, guest)
    idle = free_kb(guest)
    each = (before - idle) // DISKS
    if guest.front == "xen-blkfront":
        assert each > 8 * IDLE_KB
        record_property("c_fails", "F-14")
        return
    assert each < 2 * IDLE_KB, each
    guest.sh(WORK)
    for _look in range(40):
        if free_kb(guest) > idle - IDLE_KB:
            return
        guest.sh("sleep 2")
    raise AssertionError(f"{idle - free_kb(guest)} kB are not given back")


DEEP = (
    "fio --ioengine=libaio --direct=1 --iodepth=32 --iodepth_batch=32 --bs=32k --size=2M "
    "--offset_increment=2M --numjobs=2 --cpus_allowed=0-1 --cpus_allowed_policy=split "
    "--rw=randwrite --verify=crc32c --verify_fatal=1 --output-format=terse "
    "--name=a --filename=/dev/xvda --name=b --filename=/dev/xvdb"
)
"""Two disks, two rings each, and as many requests at once as a ring has slots."""
DEEP_KB = 2048
"""What such requests make our backend take at least; it takes 4000."""
FILL = "dd if=/dev/vdb of=/dev/null bs=1M count=320 2> /dev/null"
"""Reads a file, so to say, that is larger than what is free in dom0."""


@pytest.mark.feature("BE-36")
def test_short_memory(xen: StartHost) -> None:
    """Dom0 gets back the memory that the backend has allocated for many requests at once.

    Requests in flight are completed as usual. The C module has taken all
    that it wants before, and keeps it.
    """
    host = xen(waiting=TWO_VCPUS)
    host.load_backend(f"max_queues=2 feature_persistent=0 {KEEPS_PAGES}")
    host.ram_disks(count=2, megabytes=4)
    host.sh("for disk in 0 1; do dd if=/dev/zero of=/dev/ram$disk bs=1M count=4 oflag=direct; done")
    guest = host.start_guest(disks=[Disk("xvda", "/dev/ram0"), Disk("xvdb", "/dev/ram1")])
    guest.wait_for("[ -b /dev/xvda -a -b /dev/xvdb ]")
    assert_served_by_pair(host, guest)
    idle = free_kb(host)
    guest.sh(DEEP)
    taken = idle - free_kb(host, drop=1)

    host.sh(f"(until [ -e /tmp/enough ]; do {FILL}; echo >> /tmp/fills; done; touch /tmp/over) &")
    host.wait_for("[ -s /tmp/fills ]")
    guest.sh(DEEP)
    host.sh("touch /tmp/enough")
    host.wait_for("[ -e /tmp/over ]")
    host.sh(FILL)
    kept = idle - free_kb(host, drop=1)
    print(f"dom0's memory in KiB: taken {taken}, kept when it is short {kept}")
    assert (taken > DEEP_KB) == (host.pair.backend.name == "rblkback")
    assert kept < DEEP_KB // 2
