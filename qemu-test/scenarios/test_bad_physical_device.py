# SPDX-License-Identifier: GPL-2.0-only
"""A disk that cannot be served fails with a message; nothing else suffers."""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.manual_toolstack import ManualDisk
from harness.toolstack import directories
from harness.toolstack import error_node
from harness.xenhost import Disk
from harness.xenhost import XenHost

NONSENSE = {"xen-blkback": ("fff:ffff",), "rblkback": ("fff:ffff", "nonsense", "1:zz")}
"""What does not look like a device number at all, the C backend waits for to become one."""

SWAP = (
    "dd if=/dev/zero of=/tmp/swap bs=1M count=4 2>/dev/null; losetup /dev/loop0 /tmp/swap; "
    "mkswap /dev/loop0; swapon /dev/loop0"
)


def error_of(host: XenHost, guest: Guest, code: int) -> str:
    """What the backend says is wrong with a disk; nothing if it serves it."""
    back = directories(guest.domid, code, host.server)[1]
    node = error_node(back)
    host.wait_for(f"xenstore-exists {node} || [ $(xenstore-read {back}/state) = 4 ]")
    return host.xenstore_read(node) or ""


def offer_mode(host: XenHost, guest: Guest) -> ManualDisk:
    """Offers a disk with the mode "x". The C backend takes that for read-only."""
    disk = ManualDisk(host, guest)
    host.sh(f"xenstore-rm {error_node(disk.back)} || true")
    disk.offer(mode="x")
    return disk


def assert_refused(host: XenHost, guest: Guest, disk: ManualDisk) -> None:
    """Both sides close, and the error says why."""
    assert 'mode = "x"' in error_of(host, guest, disk.code)
    disk.wait_for(front=6)
    assert guest.run("[ -b /dev/xvdb ]")[0] != 0
    disk.forget()


def refuse_to_one_who_waits(host: XenHost, guest: Guest) -> None:
    """The backend notices the error after the frontend has offered its rings."""
    disk = offer_mode(host, guest)
    disk.wait_for(front=3)
    disk.give("/dev/ram0")
    assert_refused(host, guest, disk)


def refuse_to_one_who_comes_late(host: XenHost, guest: Guest) -> None:
    """The backend has failed before the frontend looks, which takes that for an earlier connection.

    It closes, comes back and offers its rings, and hears of it then.
    """
    host.run(f"xl pause {guest.name}")
    disk = offer_mode(host, guest)
    disk.give("/dev/ram0")
    disk.wait_for(back=5)
    host.sh(f"xenstore-rm {error_node(disk.back)}")
    host.run(f"xl unpause {guest.name}")
    assert_refused(host, guest, disk)


@pytest.mark.feature("BE-01", "BE-52", "B-22")
def test_bad_physical_device(host: XenHost, record_property: RecordProperty) -> None:
    """A disk that does not exist, or that dom0 itself uses. The C backend serves the latter."""
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    for number, nonsense in enumerate(NONSENSE[host.pair.backend.name]):
        vdev, code = f"xvd{'bcd'[number]}", 51728 + 16 * number
        disk = Disk(vdev, nonsense).specification(host.server)
        host.run(f"xl block-attach {guest.name} '{disk}'")
        assert error_of(host, guest, code)
        assert guest.run(f"[ -b /dev/{vdev} ]")[0] != 0
        host.sh(f"xl block-detach --force {guest.name} {vdev}")
    if host.pair.backend.name == "rblkback":
        refuse_to_one_who_waits(host, guest)
        refuse_to_one_who_comes_late(host, guest)
    guest.sh("dd if=/dev/zero of=/dev/xvda bs=64k count=16 conv=fsync")
    host.attach(guest, Disk("xvde", "/dev/ram0", mode="r"))
    guest.wait_for_disk("xvde")

    server = host.server
    server.sh(SWAP)
    host.attach(guest, Disk("xvdf", "/dev/loop0"))
    if host.pair.backend.name == "rblkback":
        assert "in use here" in error_of(host, guest, 51792)
        host.sh(f"xl block-detach --force {guest.name} xvdf")
        server.sh("swapoff /dev/loop0")
        host.attach(guest, Disk("xvdf", "/dev/loop0"))
        guest.wait_for_disk("xvdf")
        assert server.run("swapon /dev/loop0")[0] != 0
    else:
        guest.wait_for_disk("xvdf")
        record_property("c_fails", "B-22")
        server.sh("swapoff /dev/loop0")


@pytest.mark.feature("BE-56")
def test_unclaimed_disk(xen: StartHost) -> None:
    """A disk that dom0 has mounted is served with mode "w!", as by Xen's own scripts, to two
    guests.

    With mode "w" it is refused; the C backend takes the two for the same.
    """
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    guest = host.start_guest(disks=[])
    server.sh("mkswap /dev/ram0; swapon /dev/ram0")
    disk = ManualDisk(host, guest, "xvdb")
    disk.offer(mode="w")
    disk.give("/dev/ram0")
    refused = "in use here" in error_of(host, guest, disk.code)
    assert refused == (host.pair.backend.name == "rblkback")
    if refused:
        disk.forget()
    else:
        disk.detach_and_wait()
    guest.wait_for("[ ! -e /sys/bus/xen/devices/vbd-51728 ]")
    for vdev in ("xvdb", "xvdc"):
        disk = ManualDisk(host, guest, vdev)
        disk.offer(mode="w!")
        disk.give("/dev/ram0")
        guest.wait_for_disk(vdev)
        assert_served_by_pair(host, guest, vdev)
        assert server.sh(f"cat {disk.device}/mode") == "w!"
    guest.sh("printf new | dd of=/dev/xvdb bs=4k seek=9 conv=sync,notrunc oflag=direct")
    word = guest.sh("dd if=/dev/xvdc bs=4k skip=9 count=1 iflag=direct 2> /dev/null | head -c 3")
    assert word == "new"
    server.sh("swapoff /dev/ram0")
