# SPDX-License-Identifier: GPL-2.0-only
"""Disks with large blocks and of large size, with partitions and file systems.

The disk of 3 TiB is a RAM disk, which takes memory for what is written alone.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.image import compiled
from harness.shell import Target
from harness.xenhost import Disk

FILE_SYSTEM = """
set -e
mkfs.ext4 -q /dev/xvda1
mount /dev/xvda1 /mnt
head -c 3000000 /dev/urandom > /mnt/file
md5sum /mnt/file > /tmp/sum
umount /mnt
mount -o ro /dev/xvda1 /mnt
md5sum -c /tmp/sum
umount /mnt
"""
WHOLE = "dd if={} bs=1M iflag=direct 2> /dev/null | md5sum"

MIB = 1 << 20
DISK_MIB = 3 << 20
BOUNDARY = 2 << 20
"""2 TiB in MiB: the first sector whose number has more than 32 bits."""
PLACES = {
    "first": 0,
    "beyond": DISK_MIB - 1 - BOUNDARY,
    "below": BOUNDARY - 1,
    "above": BOUNDARY,
    "last": DISK_MIB - 1,
}
"""Where a MiB is written, in MiB; what a number cut to 32 bits leads to is among them."""
SUM = "dd if={disk} bs=1M skip={mib} count=1 iflag=direct 2> /dev/null | md5sum"
PARTITION_START = (BOUNDARY + 16) * 2048
PARTITION_TABLE = f"label: gpt\\nstart={PARTITION_START},size=131072\\n"


def sums(machine: Target, disk: str, places: Iterable[int]) -> list[str]:
    """The sum of the MiB at each of these places."""
    return machine.sh("\n".join(SUM.format(disk=disk, mib=mib) for mib in places)).split("\n")


@pytest.mark.feature("FE-07", "F-27")
def test_large_blocks(xen: StartHost, test_modules: Path, record_property: RecordProperty) -> None:
    """Partitions, a file system, and direct I/O from memory that is aligned as statx says.

    blkif.h asks for whole blocks in each segment. xen-blkfront has the block layer align memory to
    512 bytes all the same, and what that allows fails in xen-blkback.
    """
    host = xen(modules=[test_modules / "rblk_ramdisk.ko"], programs=[compiled("dio")])
    server = host.start_server()
    server.load_backend()
    server.insmod("rblk_ramdisk", "block_size=4096 size_mib=32")
    guest = host.start_guest(disks=[Disk("xvda", "/dev/rblk0")])
    assert_served_by_pair(host, guest)
    assert guest.sh("cat /sys/block/xvda/queue/logical_block_size") == "4096"

    guest.allow("error, dev xvda")
    status, said = guest.run("/programs/dio /dev/xvda 2>&1")
    if guest.front == "rblkfront":
        assert (status, said.strip()) == (0, "4096 4096"), said
    elif status != 0:
        record_property("c_fails", "F-27")

    guest.sh("printf '1024,4096,L\\n,,L\\n' | sfdisk -q /dev/xvda")
    for partition in ("xvda1", "xvda2"):
        guest.wait_for_disk(partition)
    sizes = guest.sh("cat /sys/block/xvda/xvda1/start /sys/block/xvda/xvda1/size").split()
    assert sizes == [str(1024 * 8), str(4096 * 8)]
    guest.sh(FILE_SYSTEM)
    assert guest.sh(WHOLE.format("/dev/xvda")) == server.sh(WHOLE.format("/dev/rblk0"))


@pytest.mark.feature("FE-07", "FE-11", "BE-23")
def test_large_disk(xen: StartHost) -> None:
    """Written at both sides of 2 TiB and at the end, discarded, partitioned, with a file system."""
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks(megabytes=DISK_MIB)
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    assert guest.sh("cat /sys/block/xvda/size") == str(DISK_MIB * 2048)
    for name, mib in PLACES.items():
        guest.sh(
            f"yes {name} | dd of=/dev/xvda bs=1M count=1 seek={mib} iflag=fullblock oflag=direct"
        )
    seen = sums(guest, "/dev/xvda", PLACES.values())
    assert len(set(seen)) == len(PLACES)
    assert sums(server, "/dev/ram0", PLACES.values()) == seen

    if guest.sh("cat /sys/block/xvda/queue/discard_max_bytes") != "0":
        guest.sh(f"blkdiscard -o {PLACES['last'] * MIB} -l {MIB} /dev/xvda")
        cut = (
            "dd if=/dev/ram0 bs=1M skip={} count=1 iflag=direct 2> /dev/null | tr -d '\\0' | wc -c"
        )
        assert server.sh(cut.format(PLACES["last"])) == "0"
        assert sums(server, "/dev/ram0", list(PLACES.values())[:-1]) == seen[:-1]

    guest.sh(f"printf '{PARTITION_TABLE}' | sfdisk -q /dev/xvda")
    guest.wait_for_disk("xvda1")
    assert guest.sh("cat /sys/block/xvda/xvda1/start") == str(PARTITION_START)
    guest.sh(FILE_SYSTEM)
