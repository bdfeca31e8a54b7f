# SPDX-License-Identifier: GPL-2.0
"""Whenever the power goes, the file system in the guest is sound.

QEMU logs what reaches dom0's disk, outside of both kernels, while the guest
makes a journaling file system and changes it. What the disk held at a flush is
put together from the log, its journal replayed, and then nothing may be wrong.
"""

import subprocess

from harness.evidence import assert_served_by_pair
from harness.writelog import read_log
from harness.xenhost import Disk

SIZE = 24 << 20
POINTS = 12
CHANGES = """
mount -t ext4 /dev/xvda /mnt
for i in $(seq 30); do
    mkdir -p /mnt/$((i % 5)); head -c $((i * 3000)) /dev/urandom > /mnt/$((i % 5))/$i
    [ $((i % 3)) != 0 ] || dd if=/dev/null of=/mnt/$((i % 5))/$i conv=fsync,notrunc 2>/dev/null
    [ $((i % 4)) != 0 ] || rm -f /mnt/$(((i - 2) % 5))/$((i - 2))
done
umount /mnt
"""


def test_flush_points(xen, tmp_path):
    """Rows: BE-46"""
    host = xen(log_writes=True)
    host.load_backend()
    guest = host.start_guest(disks=[Disk("xvda", "/dev/vdb")])
    assert_served_by_pair(host, guest)
    guest.sh(f"mkfs.ext4 -q -b 1024 /dev/xvda {SIZE >> 10}k")
    guest.sh(CHANGES, timeout=240)
    guest.shut_down()
    disk, flushes = bytearray(SIZE), 0
    entries = read_log(host.write_log)
    made = next(index for index, entry in enumerate(entries) if entry.is_flush)
    total = sum(entry.is_flush for entry in entries)
    assert total > POINTS
    for index, entry in enumerate(entries):
        disk[entry.sector * 512 : entry.sector * 512 + len(entry.data)] = entry.data
        if entry.is_flush:
            flushes += 1
            if index > made and flushes % (total // POINTS) == 0:
                check(tmp_path / "image", disk, f"flush {flushes} of {total}")


def check(image, content, where):
    """Replays the journal, then looks for anything that is wrong."""
    image.write_bytes(content)
    for options in (["-y", "-E", "journal_only"], ["-fn"]):
        result = subprocess.run(
            ["e2fsck", *options, image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        replayed = "-y" in options and result.returncode == 1
        assert replayed or result.returncode == 0, f"{where}:\n{result.stdout}"
