# SPDX-License-Identifier: GPL-2.0-only
"""The backend's domain has dirty data of a disk in its page cache when the guest connects.

A toolstack that fills a volume, an emulated disk before the PV one, or an administrator with dd:
what they have written is in the page cache of the backend's domain. The backend goes past that
cache.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.guest import Guest
from harness.manual_toolstack import ManualDisk
from harness.shell import CLOSE_KEPT
from harness.shell import Target
from harness.shell import keep_open
from harness.xenhost import XenHost

DISK = "/dev/ram0"
DRIVER = "/sys/bus/xen-backend/drivers/vbd"
"""No dd is the last one to close the disk, which would sync."""
PARTITION = (
    "printf '\\000\\000\\000\\000\\203\\000\\000\\000\\000\\010\\000\\000\\000\\200\\000\\000' | "
    f"dd of={DISK} bs=1 seek=446 conv=notrunc 2> /dev/null; "
    f"printf '\\125\\252' | dd of={DISK} bs=1 seek=510 conv=notrunc 2> /dev/null"
)
"""A table of one partition, of 16 MiB at 1 MiB, where there is no sfdisk."""
NO_WRITEBACK = "echo 0 > /proc/sys/vm/dirty_writeback_centisecs"
"""Dirty pages stay in the page cache until they are synced."""


def put(machine: Target, disk: str, word: str, how: str) -> None:
    """Writes the first block of a disk."""
    machine.sh(f"printf {word} | dd of={disk} bs=4k conv=sync,notrunc{how} 2> /dev/null")


def word_of(guest: Guest, skip: int = 0) -> str:
    """What the guest reads of that block, or of another one, without a cache of its own."""
    return guest.sh(
        f"dd if=/dev/xvdb bs=4k count=1 skip={skip} iflag=direct 2> /dev/null | head -c 3"
    ).strip()


@pytest.mark.feature("BE-58")
def test_written_before(host: XenHost) -> None:
    """The guest reads the last data, and its own writes are not overwritten.

    The C backend syncs and forgets the cache when the frontend connects; a backend that has done
    so only when it opened the disk gives the guest old data, and lets the kernel write the new
    ones over the guest's later.
    """
    server = host.server
    server.sh(NO_WRITEBACK)
    put(server, DISK, "old", ",fsync")
    guest = host.start_guest(disks=[])
    guest.unload_frontend()
    disk = ManualDisk(host, guest)
    disk.offer()
    disk.give(DISK)
    # The backend has the disk open: no dd is the last one to close it, which would sync.
    server.wait_for(f"grep -q 1:0 {disk.device}/physical_device")
    put(server, DISK, "new", "")
    guest.load_frontend()
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    seen = word_of(guest)
    put(guest, "/dev/xvdb", "own", " oflag=direct")
    server.sh("sync")
    kept = word_of(guest)
    assert (seen, kept) == ("new", "own")


@pytest.mark.feature("BE-58")
def test_written_between(host: XenHost) -> None:
    """The same holds for each later connection: the frontend reconnects, or the backend is
    replaced.

    A disk that is only read is no exception.
    """
    server = host.server
    server.sh(NO_WRITEBACK)
    put(server, DISK, "old", ",fsync")
    guest = host.start_guest(disks=[])
    disk = ManualDisk(host, guest)
    for mode in ("w", "r"):
        disk.offer(mode=mode)
        disk.give(DISK)
        guest.wait_for_disk("xvdb")
        assert_served_by_pair(host, guest, "xvdb")
        guest.unload_frontend()
        disk.wait_for(back=6)
        put(server, DISK, f"1{mode}1", "")
        guest.load_frontend()
        guest.ask_for_disks()
        guest.wait_for_disk("xvdb")
        disk.wait_for(front=4, back=4)
        assert word_of(guest) == f"1{mode}1"

        name = disk.device.split("/")[-1]
        server.sh(f"echo {name} > {DRIVER}/unbind")
        server.unload_backend()
        put(server, DISK, f"2{mode}2", "")
        server.sh(keep_open(DISK))
        put(server, DISK, f"3{mode}3", "")
        server.load_backend()
        disk.wait_for(back=4)
        assert word_of(guest) == f"3{mode}3"
        server.sh(CLOSE_KEPT)
        disk.detach_and_wait()
        guest.wait_for("[ ! -b /dev/xvdb ]")


@pytest.mark.feature("BE-58")
def test_written_by_other_names(host: XenHost) -> None:
    """The backend's domain has written to a partition of the disk, or to the disk of the partition.

    Each has a page cache of its own, of which the C backend knows that of the disk that it serves.
    """
    server = host.server
    server.sh(f"{NO_WRITEBACK}; {PARTITION}; blockdev --rereadpt {DISK}")
    server.wait_for(f"[ -b {DISK}p1 ]")
    guest = host.start_guest(disks=[])
    for served, written, skip, seek in ((DISK, f"{DISK}p1", 256, 0), (f"{DISK}p1", DISK, 0, 256)):
        word = f"p{skip // 256}{seek // 256}"
        server.sh(f"sleep 100000 < {written} > /dev/null 2>&1 & echo $! > /tmp/keeper")
        disk = ManualDisk(host, guest)
        disk.offer()
        disk.wait_for(front=3)
        server.sh(
            f"printf {word} | dd of={written} bs=4k seek={seek} conv=sync,notrunc 2> /dev/null"
        )
        disk.give(served)
        guest.wait_for_disk("xvdb")
        assert_served_by_pair(host, guest, "xvdb")
        assert word_of(guest, skip) == word
        guest.sh(
            f"printf own | dd of=/dev/xvdb bs=4k seek={skip} conv=sync,notrunc oflag=direct 2> /dev/null"
        )
        server.sh("sync")
        assert word_of(guest, skip) == "own"
        disk.detach_and_wait()
        guest.wait_for("[ ! -b /dev/xvdb ]")
        server.sh(CLOSE_KEPT)
