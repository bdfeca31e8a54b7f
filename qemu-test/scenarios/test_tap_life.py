# SPDX-License-Identifier: GPL-2.0-only
"""Operations of xl and rblk on disks that rblktap serves, and other frontends than Linux."""

import gzip
from collections.abc import Sequence
from pathlib import Path

from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.job import wait_for_passes
from harness.kernel import Kernel
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.verify import start_jobs
from harness.xenhost import XenHost
from harness.xenimage import domu_archive
from harness.xenimage import grub
from harness.xenimage import grub_disk

SAVED = "/tap/saved"
MIB = 64


def start(
    xen: StartHost,
    images: Sequence[Image],
    disks: Sequence[RblkDisk],
    size: str = rblktap.SIZE,
) -> tuple[XenHost, Guest]:
    """Starts a host whose dom0 serves `disks`, and a guest with them."""
    image = rblktap.disk(images, size=size)
    host = xen(waiting=TWO_VCPUS, image=image, **rblkd.options())
    rblkd.install(host)
    rblkd.start(host)
    guest = host.start_guest(disks=disks)
    for disk in disks:
        assert_served_by_pair(host, guest, disk.vdev)
    return host, guest


def test_tap_save(xen: StartHost) -> None:
    """Save and restore a guest that verifies what it writes, and resize its disk."""
    images = [Image("a.raw", MIB)]
    host, guest = start(xen, images, [RblkDisk("xvda", "a.raw")], size="900M")
    jobs = start_jobs(guest, ["data", "synced", "mixed"])
    for _cycle in range(2):
        guest.save(SAVED)
        guest.restore(SAVED)
        wait_for_passes(jobs)
        assert_served_by_pair(host, guest)
    for mib in (MIB + 16, MIB + 32):
        host.sh(f"truncate -s {mib}M /tap/a.raw")
        rblkd.rblk(host, f"disk resize {guest.name}/xvda")
        guest.wait_for(f"[ $(cat /sys/block/xvda/size) = {mib << 11} ]")
        guest.sh(
            f"echo end | dd of=/dev/xvda bs=1M seek={mib - 1} conv=sync,fsync,notrunc 2> /dev/null"
        )
        wait_for_passes(jobs)
    for job in jobs:
        job.stop()
    assert "I/O error" not in guest.sh("dmesg")


def test_tap_grub(xen: StartHost, kernel: Kernel) -> None:
    """GRUB as the frontend reads kernel and initramfs; then Linux connects to the same disk."""

    def image(front: bytes) -> Path:
        return grub_disk(kernel.vmlinux, gzip.compress(domu_archive(kernel) + front, mtime=0))

    options = rblkd.options()
    options["files"] |= {"grub": grub("grub-x86_64-xen.bin")}
    host = xen(waiting=None, image=image, **options)
    rblkd.install(host, mount=False)
    rblkd.start(host)
    guest = host.start_guest(
        type="pv", disks=[RblkDisk("xvda", "raw:/dev/vdb")], memory=320, loader="/payload/grub"
    )
    assert_served_by_pair(host, guest)
    guest.sh(
        "mount -t ext4 /dev/xvda /mnt && dd if=/dev/zero of=/mnt/new bs=64k count=16 conv=fsync && "
        "umount /mnt && e2fsck -fn /dev/xvda"
    )
