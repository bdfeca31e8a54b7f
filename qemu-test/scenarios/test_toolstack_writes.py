# SPDX-License-Identifier: GPL-2.0-only
"""The toolstack detaches a disk at the moment when the backend writes its state.

What the backend wants to write must not replace the toolstack's Closing: xen-blkfront, which has
closed, takes Connected for a new life of the backend and crashes. rblkfront reads `online` too,
and does not show it.
"""

from pathlib import Path

import pytest

from harness import held_disk
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.manual_toolstack import ManualDisk
from harness.shell import until
from harness.xenhost import Server
from harness.xenhost import XenHost

SIZE = "/sys/module/rblk_ramdisk/parameters/size_mib"
TURNS = 6
WRITER = """
(dd if=/dev/zero bs=4k count=1; exec sleep 1200) > /dev/rblk0 2> /dev/null &
echo $! > /tmp/writer
"""
"""Writes to the disk, and keeps it open, so that nothing is written back yet."""
END_WRITER = "kill $(cat /tmp/writer)"
DECIDES_S = 5
"""Time for the backend to write Connected, in seconds, which it must not."""


def detach(disk: ManualDisk) -> str:
    """A shell command that does what `xl block-detach` does first."""
    return f"xenstore-write {disk.back}/online 0 {disk.back}/state 5"


def keep_resizing(server: Server) -> None:
    """Changes the size of the disk again and again, from before this returns on.

    A new size takes effect when the device is opened.
    """
    change = " ".join(f"echo {size} > {SIZE}; : < /dev/rblk0;" for size in (32, 8))
    server.sh(
        f": > /tmp/resizing; (while [ -e /tmp/resizing ]; do {change} : > /tmp/resized; done;"
        " rm /tmp/resized) > /dev/null 2>&1 &"
    )
    server.wait_for("[ -e /tmp/resized ]")


def stop_resizing(server: Server) -> None:
    """Ends the changes that keep_resizing() has begun."""
    server.sh("rm /tmp/resizing")
    server.wait_for("[ ! -e /tmp/resized ]")


@pytest.mark.feature("B-30")
def test_resize_detach(xen: StartHost, test_modules: Path) -> None:
    """A disk is detached while it is being resized.

    The C backend writes its state again to tell of the size, whatever it finds: with the C
    frontend, the guest's xenwatch thread dies of it in one of the turns.
    """
    host = xen(modules=[test_modules / "rblk_ramdisk.ko"])
    server = host.start_server()
    server.load_backend()
    server.insmod("rblk_ramdisk")
    guest = host.start_guest(disks=[])
    disk = ManualDisk(host, guest)
    for turn in range(TURNS):
        disk.offer()
        disk.give("/dev/rblk0")
        guest.wait_for_disk("xvdb")
        if turn == 0:
            assert_served_by_pair(host, guest, "xvdb")
        keep_resizing(server)
        host.sh(detach(disk))
        disk.forget()
        guest.wait_for("[ ! -b /dev/xvdb ] && [ ! -e /sys/bus/xen/devices/vbd-51728 ]")
        stop_resizing(server)


def begin_to_connect(disk: ManualDisk) -> None:
    """Makes the backend connect to a waiting frontend. First it writes back what was written to the
    disk in its domain, which does not complete.
    """
    server = disk.server
    disk.offer()
    disk.wait_for(front=3)
    server.sh(f"echo 3 > {held_disk.MODE}\n{WRITER}")
    disk.give("/dev/rblk0")
    server.wait_for("! grep -q '^ *0 *0$' /sys/block/rblk0/inflight")


@pytest.mark.feature("B-30")
def test_detach_while_connecting(xen: StartHost, test_modules: Path) -> None:
    """A disk is detached after its backend has begun to connect, and before it writes Connected.

    First the guest does not run, so only the node of the backend tells that the disk is detached.
    Then the frontend has closed.
    """
    host = xen(modules=[test_modules / "rblk_ramdisk.ko"])
    server = host.start_server()
    server.load_backend()
    server.insmod("rblk_ramdisk", held_disk.DISK)
    guest = host.start_guest(disks=[])
    disk = ManualDisk(host, guest)
    for runs in (False, True):
        begin_to_connect(disk)
        if not runs:
            host.sh(f"xl pause {guest.domid}")
        host.sh(detach(disk))
        if runs:
            disk.wait_for(front=6)
        held_disk.release(server)
        server.sh(END_WRITER)
        connected = f'[ "$(xenstore-read {disk.back}/state)" = 4 ]'
        assert host.run(until(connected, DECIDES_S, "exit 9"))[0] == 9
        if not runs:
            host.sh(f"xl unpause {guest.domid}")
        disk.forget()
        guest.wait_for("[ ! -b /dev/xvdb ] && [ ! -e /sys/bus/xen/devices/vbd-51728 ]")
    disk.offer()
    disk.give("/dev/rblk0")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("dd if=/dev/xvdb of=/dev/null bs=64k count=16 iflag=direct")


@pytest.mark.feature("BE-57")
def test_no_online_node(host: XenHost) -> None:
    """A toolstack that writes no node `online` can attach and detach a disk."""
    guest = host.start_guest(disks=[])
    disk = ManualDisk(host, guest)
    disk.offer()
    host.sh(f"xenstore-rm {disk.back}/online")
    disk.give("/dev/ram0")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("dd if=/dev/xvdb of=/dev/null bs=64k count=16 iflag=direct")
    host.sh(f"xenstore-write {disk.back}/state 5")
    guest.unload_frontend()
    disk.wait_for(back=6)
    host.server.wait_for(f"[ ! -e {disk.device} ]")
    host.sh(f"xenstore-rm {disk.back}; xenstore-rm {disk.front}")
