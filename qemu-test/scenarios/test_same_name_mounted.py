# SPDX-License-Identifier: GPL-2.0-only
"""A mounted disk is removed, and another one with the same name is attached.

The virtual device number determines the device number in Linux, so the new disk has the number of
the old one, whose dead file system is still mounted.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.xenhost import Disk
from harness.xenhost import XenHost

DISKS = {"first": "/dev/ram0", "second": "/dev/ram1"}
WHICH = "which"
"""The file with the name of the disk."""
READ = f"cat /new/{WHICH} 2>&1 || true"


def attach(host: XenHost, guest: Guest, name: str) -> None:
    """Attaches one of the disks as xvdb."""
    host.attach(guest, Disk("xvdb", DISKS[name]))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")


def number(guest: Guest) -> str:
    """The device number of xvdb."""
    return guest.sh("stat -c %t:%T /dev/xvdb")


@pytest.mark.feature("F-41")
def test_same_name_mounted(xen: StartHost) -> None:
    """Mounting the new disk mounts that one, or fails.

    It must not show the files of the old one. The old one can be unmounted, and then the number is
    used again.

    With the C frontend the new disk shows the files of the old one.
    """
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks(len(DISKS), megabytes=16)
    guest = host.start_guest(disks=[])
    guest.allow("xvdb")
    guest.sh("mkdir -p /old /new")
    for name in DISKS:
        attach(host, guest, name)
        guest.sh(
            "mkfs.ext4 -q /dev/xvdb && mount -t ext4 /dev/xvdb /old && "
            f"echo {name} > /old/{WHICH} && umount /old"
        )
        host.detach_and_wait(guest, "xvdb")

    attach(host, guest, "first")
    usual = number(guest)
    guest.sh("mount -t ext4 /dev/xvdb /old && sync")
    host.detach_and_wait(guest, "xvdb")
    attach(host, guest, "second")
    assert number(guest) != usual
    mounted = guest.run("mount -t ext4 /dev/xvdb /new")[0] == 0
    seen = guest.sh(READ)
    if mounted:
        guest.sh("umount /new", timeout=60)
    guest.sh("umount /old", timeout=60)
    guest.sh("mount -t ext4 /dev/xvdb /new")
    later = guest.sh(READ)
    guest.sh("umount /new")
    assert later == "second", later
    assert not mounted or seen == "second", seen
    host.detach_and_wait(guest, "xvdb")
    attach(host, guest, "first")
    assert number(guest) == usual
