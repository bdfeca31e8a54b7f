# SPDX-License-Identifier: GPL-2.0-only
"""A disk is detached without force while it has dirty data.

`xl block-detach` without --force asks the guest to close the disk, and the backend serves it until
the guest has done so. So there is time for writeback. The same holds for a disk that is unbound
from its driver.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.guest import Guest
from harness.toolstack import CODES
from harness.toolstack import directories
from harness.xenhost import Disk
from harness.xenhost import XenHost

NO_WRITEBACK = "echo 0 > /proc/sys/vm/dirty_writeback_centisecs"
MOUNT = "mount -t ext4 -o commit=300"
"""Nothing is written to a file system but what something asks for."""


def attach(host: XenHost, guest: Guest) -> None:
    """Attaches /dev/ram0 as xvdb; the guest's kernel does not write back by itself."""
    host.attach(guest, Disk("xvdb"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh(f"{NO_WRITEBACK}; mkdir -p /disk /other")


def detach(host: XenHost, guest: Guest, mounts: str) -> None:
    """Detaches xvdb, after what is mounted of it was unmounted if the guest refuses."""
    if host.run(f"xl block-detach {guest.name} xvdb")[0] != 0:
        guest.sh(f"umount {mounts}")
        host.detach_and_wait(guest, "xvdb")
    guest.wait_for("[ ! -b /dev/xvdb ]")
    guest.run(f"umount {mounts}", timeout=60)


@pytest.mark.feature("FE-64", "F-40")
def test_detach_mounted(host: XenHost) -> None:
    """Either the guest refuses while the disk is mounted, or what its programs have written to
    files is on the disk afterwards.

    A disk of virtio that is taken away is synced first. The C frontend loses the data too.
    """
    guest = host.start_guest(disks=[])
    guest.allow("xvdb")
    attach(host, guest)
    guest.sh(
        f"mkfs.ext4 -q /dev/xvdb && sync && {MOUNT} /dev/xvdb /disk && "
        "mount -t ext4 /dev/xvdb /other && echo kept > /disk/file"
    )
    detach(host, guest, "/disk /other")
    # The backend closes the disk after xl has returned.
    host.server.wait_for("mount -t ext4 /dev/ram0 /mnt")
    _status, output = host.server.run("cat /mnt/file; umount /mnt")
    assert output.strip() == "kept", output


@pytest.mark.feature("F-40")
def test_detach_partitions(host: XenHost) -> None:
    """A file system on one partition, and the page cache of another one that a program has open.

    The C frontend loses both.
    """
    guest = host.start_guest(disks=[])
    guest.allow("xvdb")
    attach(host, guest)
    guest.sh("printf '2048,32768,L\\n,,L\\n' | sfdisk -q /dev/xvdb")
    guest.wait_for("[ -b /dev/xvdb2 ]")
    guest.sh(
        f"mkfs.ext4 -q /dev/xvdb1 && sync && {MOUNT} /dev/xvdb1 /disk && echo kept > /disk/file\n"
        "sleep 1000 9<> /dev/xvdb2 > /dev/null 2>&1 & echo $! > /tmp/opener\n"
        "echo kept | dd of=/dev/xvdb2 conv=sync,notrunc 2> /dev/null"
    )
    detach(host, guest, "/disk")
    guest.sh("kill $(cat /tmp/opener)")
    attach(host, guest)
    guest.wait_for("[ -b /dev/xvdb2 ]")
    guest.wait_for(f"{MOUNT} /dev/xvdb1 /disk")
    assert guest.sh("cat /disk/file; head -n 1 /dev/xvdb2; umount /disk") == "kept\nkept"


@pytest.mark.feature("F-40")
def test_detach_swap(host: XenHost) -> None:
    """A disk that is swap space is not detached: xl fails with a message.

    It is removed as soon as the guest stops swapping to it. What xl leaves is removed by force. The
    time until then does not count as an outage of the backend.

    The C frontend removes it with the swapped pages.
    """
    guest = host.start_guest(disks=[])
    attach(host, guest)
    guest.sh(
        "echo 2 > /sys/module/rblkfront/parameters/reconnect_timeout 2> /dev/null || :; "
        "mkswap /dev/xvdb && swapon /dev/xvdb"
    )
    assert host.run(f"xl block-detach {guest.name} xvdb")[0] != 0
    guest.sh("grep -q xvdb /proc/swaps && dd if=/dev/xvdb of=/dev/null bs=4k count=1 iflag=direct")
    assert "the disk is used as swap space or by another device" in guest.sh("dmesg")
    guest.sh("swapoff /dev/xvdb")
    guest.wait_for("[ ! -b /dev/xvdb ]")
    host.run(f"xl block-detach --force {guest.name} xvdb")
    host.server.wait_for(f"[ ! -e /sys/bus/xen-backend/devices/vbd-{guest.domid}-{CODES['xvdb']} ]")
    attach(host, guest)


@pytest.mark.feature("F-40")
def test_detach_withdrawn(host: XenHost) -> None:
    """The toolstack withdraws a detach that waits for the end of a use as swap: the disk stays.

    It has written Closing, so the disk connects again.

    The C frontend has removed the disk by then.
    """
    guest = host.start_guest(disks=[])
    attach(host, guest)
    guest.sh("mkswap /dev/xvdb && swapon /dev/xvdb")
    assert host.run(f"xl block-detach {guest.name} xvdb")[0] != 0
    front, back = directories(guest.domid, CODES["xvdb"], host.server)
    host.sh(f"xenstore-write {back}/online 1")
    host.wait_for(
        f"[ $(xenstore-read {front}/state) = 4 ] && [ $(xenstore-read {back}/state) = 4 ]"
    )
    guest.sh("swapoff /dev/xvdb && dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct")
    host.detach_and_wait(guest, "xvdb")


@pytest.mark.feature("FE-65")
def test_unbind_in_use(host: XenHost) -> None:
    """A disk is unbound while it is open and while it is mounted: written data is there after it is
    bound again.
    """
    guest = host.start_guest(disks=[])
    guest.allow("xvdb")
    attach(host, guest)
    guest.sh(
        "sleep 1000 9<> /dev/xvdb > /dev/null 2>&1 & echo $! > /tmp/opener\n"
        "yes written | dd of=/dev/xvdb bs=64k count=16 iflag=fullblock conv=notrunc 2> /dev/null"
    )
    guest.rebind_disk(CODES["xvdb"])
    guest.wait_for_disk("xvdb")
    guest.sh("kill $(cat /tmp/opener)")
    lines = guest.sh("dd if=/dev/xvdb bs=64k count=16 iflag=direct 2> /dev/null | sort -u")
    assert lines == "written", lines[:200]

    guest.sh(f"mkfs.ext4 -q /dev/xvdb && sync && {MOUNT} /dev/xvdb /disk && echo kept > /disk/file")
    guest.rebind_disk(CODES["xvdb"])
    guest.sh("umount /disk")
    guest.wait_for(f"{MOUNT} /dev/xvdb /disk")
    assert guest.sh("cat /disk/file; umount /disk") == "kept"
