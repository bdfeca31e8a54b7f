# SPDX-License-Identifier: GPL-2.0-only
"""File systems in the guest are consistent after a power failure at any point.

QEMU logs what reaches dom0's disk, outside of both kernels, while the guest
changes two journaling file systems. The content of the disk at each
flush is rebuilt from the log, the journals are replayed, and the file systems are checked.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from harness import xfs
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.kernel import Kernel
from harness.writelog import read_log
from harness.xenhost import Disk
from harness.xenhost import XenHost

EXT4_START, EXT4_SIZE = 1 << 20, 24 << 20
POINTS, XFS_POINTS = 12, 4
"""How often to look. To replay the journal of xfs dom0 has to mount it."""
CHANGES = """
change() {
    mkdir /tmp/$1; mount -t $1 /dev/$2 /tmp/$1; cd /tmp/$1
    for i in $(seq 30); do
        mkdir -p $((i % 5)); head -c $((i * 3000)) /dev/urandom > $((i % 5))/$i
        [ $((i % 3)) != 0 ] || dd if=/dev/null of=$((i % 5))/$i conv=fsync,notrunc 2>/dev/null
        [ $((i % 4)) != 0 ] || rm -f $(((i - 2) % 5))/$((i - 2))
    done
    cd /; umount /tmp/$1; touch /tmp/$1-done
}
change ext4 xvda & change xfs xvdb & wait
[ -e /tmp/ext4-done -a -e /tmp/xfs-done ]
"""


@pytest.mark.feature("BE-46")
def test_flush_points(xen: StartHost, kernel: Kernel, tmp_path: Path) -> None:
    image = xfs.partitioned_disk((EXT4_START, EXT4_SIZE))
    module = kernel.module("xfs")
    # A loop device has whole sectors.
    module += bytes(-len(module) % 512)
    host = xen(log_writes=True, image=image, files={"xfs.ko": module})
    host.load_backend()
    host.sh("blockdev --rereadpt /dev/vdb; insmod /payload/xfs.ko")
    host.sh("losetup /dev/loop0 /payload/xfs.ko")
    disks = {"xvda": "/dev/vdb1", "xvdb": "/dev/vdb2", "xvdc": "/dev/loop0"}
    guest = host.start_guest(disks=[Disk(vdev, target) for vdev, target in disks.items()])
    guest.wait_for(" && ".join(f"[ -b /dev/{vdev} ]" for vdev in disks))
    assert_served_by_pair(host, guest)
    guest.sh("cat /dev/xvdc > /tmp/xfs.ko; insmod /tmp/xfs.ko")
    guest.sh("mkfs.ext4 -q -b 1024 /dev/xvda")
    guest.sh(CHANGES, timeout=240)
    guest.shut_down()

    disk = tmp_path / "disk"
    shutil.copy(image, disk)
    entries, flushes = read_log(host.write_log), 0
    made = next(index for index, entry in enumerate(entries) if entry.is_flush)
    total = sum(entry.is_flush for entry in entries)
    assert total > POINTS
    with open(disk, "r+b", buffering=0) as file:
        for index, entry in enumerate(entries):
            file.seek(entry.sector * 512)
            file.write(entry.data)
            flushes += entry.is_flush
            where = f"flush {flushes} of {total}"
            if entry.is_flush and index > made and flushes % (total // POINTS) == 0:
                check_ext4(disk, where)
            if entry.is_flush and index > made and flushes % (total // XFS_POINTS) == 0:
                check_xfs(host, disk, where)
    assert "Ending recovery" in host.sh("dmesg")


def check_ext4(disk: Path, where: str) -> None:
    """Replays the journal, then looks for anything that is wrong."""
    image = disk.with_name("ext4")
    with open(disk, "rb") as file:
        file.seek(EXT4_START)
        image.write_bytes(file.read(EXT4_SIZE))
    for options in (["-y", "-E", "journal_only"], ["-fn"]):
        result = subprocess.run(
            ["e2fsck", *options, image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        replayed = "-y" in options and result.returncode == 1
        assert replayed or result.returncode == 0, f"{where}:\n{result.stdout}"


def check_xfs(host: XenHost, disk: Path, where: str) -> None:
    """The same; dom0, whose disk has that content for a while, replays the journal."""
    subprocess.run(["cp", "--sparse=always", disk, host.disk], check=True)
    status, output = host.run("mount -t xfs /dev/vdb2 /mnt && umount /mnt || (dmesg | tail; false)")
    assert status == 0, f"{where}:\n{output}"
    xfs.assert_sound(host.disk, where)
