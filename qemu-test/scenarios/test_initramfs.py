# SPDX-License-Identifier: GPL-2.0-only
"""A guest boots from an initramfs that a distribution's tool made.

`scripts/lib/initramfs-test` makes them with initramfs-tools and with dracut, and `make
test-packages` those of a system with our package. udev loads what a Xen disk asks for, and the
system has both drivers where it can.

All names have "initramfs" in them, because `make test T=NAME` makes the initramfs for those only.
"""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.kernel import build_id
from harness.pairs import Driver
from harness.pairs import Pair
from harness.xenhost import Disk
from harness.xenimage import root_disk


def boot(xen: StartHost, initramfs: Path, settings: str = "") -> Guest:
    """Boots a guest whose root disk the initramfs has to find; the pair's frontend must serve it.
    Returns the guest.

    `settings` are more lines for the xl configuration.
    """
    host = xen(waiting=None, image=root_disk(), files={"initramfs": initramfs.read_bytes()})
    host.load_backend()
    guest = host.start_guest(
        disks=[Disk("xvda", "/dev/vdb")],
        root="xvda",
        initramfs="/payload/initramfs",
        settings=settings,
    )
    assert "/dev/xvda / ext4 rw" in guest.sh("cat /proc/mounts")
    assert_served_by_pair(host, guest)
    return guest


@pytest.mark.feature("FE-60", "FE-62")
def test_initramfs(xen: StartHost, pair: Pair, build: Path) -> None:
    """Made as the documentation says; for the reference run, of a system without our files."""
    guest = boot(xen, build / f"initramfs-{pair.front.name}")
    # Written by udev below the /run that the initramfs hands over; dracut clears it.
    assert "E:ID_FS_TYPE=ext4" in guest.sh("cat /run/udev/data/b202:0")


def test_initramfs_dracut(xen: StartHost, pair: Pair, build: Path) -> None:
    """The same, made by dracut."""
    boot(xen, build / f"dracut-{pair.front.name}")


def test_initramfs_kernel_upgrade(xen: StartHost, build: Path) -> None:
    """Made by a system with our files for a kernel that rblkfront is not installed for.

    The guest boots with xen-blkfront: the frontend of the pair is the C driver.
    """
    boot(xen, build / "initramfs-kernel-upgrade")


def test_initramfs_dracut_kernel_upgrade(xen: StartHost, build: Path) -> None:
    """The same, made by dracut."""
    boot(xen, build / "dracut-kernel-upgrade")


def test_initramfs_fallback(xen: StartHost, build: Path) -> None:
    """Made for our driver, and booted once with the C driver: the frontend of the pair."""
    line = "console=hvc0 panic=1 root=/dev/xvda rw module_blacklist=rblkfront"
    guest = boot(xen, build / "initramfs-rblkfront", settings=f'cmdline = "{line}"')
    assert "Module rblkfront is blacklisted" in guest.sh("dmesg")


def test_initramfs_package_installed(xen: StartHost, pair: Pair, build: Path) -> None:
    """Made by a Debian system in which apt has installed rblkif-dkms: DKMS has built rblkfront."""
    installed = build / "installed-rblkfront.ko"
    pair.front = Driver(pair.front.name, installed, build_id(installed))
    boot(xen, build / "initrd-installed")


def test_initramfs_package_removed(xen: StartHost, build: Path) -> None:
    """Made by that system when apt has removed rblkif-dkms again: the C driver serves the disk."""
    boot(xen, build / "initrd-removed")
