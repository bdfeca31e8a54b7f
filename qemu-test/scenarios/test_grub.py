# SPDX-License-Identifier: GPL-2.0-only
"""A boot loader with its own blkif frontend reads kernel and initramfs from the disk.

GRUB's frontend connects, reads, closes; then Linux connects to the same device.
"""

import gzip
from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.kernel import Kernel
from harness.xenhost import Disk
from harness.xenimage import domu_archive
from harness.xenimage import grub
from harness.xenimage import grub_disk


def boot(xen: StartHost, kernel: Kernel, loader: str, linux: Path, type: str) -> list[str]:
    """Boots a guest by GRUB; the layouts of the rings of GRUB and of Linux."""

    def image(front: bytes) -> Path:
        # GRUB is slow to read, and waits for each piece.
        return grub_disk(linux, gzip.compress(domu_archive(kernel) + front, mtime=0))

    host = xen(waiting=None, files={"grub": grub(loader)}, image=image)
    host.load_backend()
    guest = host.start_guest(
        type=type, disks=[Disk("xvda", "/dev/vdb")], memory=320, loader="/payload/grub"
    )
    assert_served_by_pair(host, guest)
    layouts = host.sh("dmesg | grep -o 'x86_[36][24]-abi'").split()
    guest.sh(
        "mount -t ext4 /dev/xvda /mnt && dd if=/dev/zero of=/mnt/new bs=64k count=16 conv=fsync && "
        "umount /mnt && e2fsck -fn /dev/xvda"
    )
    return layouts


@pytest.mark.feature("BE-05", "BE-07", "BE-42")
def test_grub_pvh(xen: StartHost, kernel: Kernel) -> None:
    """GRUB for PVH is a 32-bit program and uses the ring in that layout."""
    layouts = boot(xen, kernel, "grub-i386-xen_pvh.bin", kernel.vmlinuz, "pvh")
    assert layouts == ["x86_32-abi", "x86_64-abi"]


@pytest.mark.feature("BE-05", "BE-07")
def test_grub_pv(xen: StartHost, kernel: Kernel) -> None:
    """GRUB for PV guests cannot unpack Debian's kernel, so it gets what is in it."""
    layouts = boot(xen, kernel, "grub-x86_64-xen.bin", kernel.vmlinux, "pv")
    assert layouts == ["x86_64-abi"] * 2
