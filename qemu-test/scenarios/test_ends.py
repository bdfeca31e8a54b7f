# SPDX-License-Identifier: GPL-2.0
"""The backend goes away at every point of a device's life, and so does the device."""

from harness.counts import xen_counts
from harness.evidence import assert_served_by_pair
from harness.handmade import HandMade

DRIVER = "/sys/bus/xen-backend/drivers/vbd"
WRITER = (
    "rm -f /tmp/rounds; (while /usr/bin/dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct "
    "conv=nocreat,notrunc; do echo x >> /tmp/rounds; done) > /dev/null 2>&1 &"
)
"""Writes until the disk is gone."""

WARNS = "WARNING: drivers/block/xen-blkback/xenbus.c"
HANGS = "pidof dd && grep -q freeze $(grep -lx xenwatch /proc/[0-9]*/comm | sed s/comm/stack/)"
"""The thread that removes devices waits for requests on a disk."""


def offered(disk):
    """The toolstack has made the device; nobody has named the disk."""
    disk.offer()
    disk.wait_for(back=2)


def named(disk):
    """The disk is open; there is no frontend."""
    offered(disk)
    disk.give("/dev/ram0")
    disk.server.wait_for(f"grep -q 1:0 {disk.device}/physical_device")


def front_first(disk):
    """The frontend says that it has written its rings; there is no disk."""
    offered(disk)
    disk.host.sh(f"xenstore-write {disk.front}/state 3")


def no_rings(disk):
    """The frontend says that it has written its rings, and has not."""
    front_first(disk)
    disk.give("/dev/ram0")
    disk.wait_for(back=5)


def closing(disk):
    """The frontend closes before it was connected."""
    named(disk)
    disk.host.sh(f"xenstore-write {disk.front}/state 5")
    disk.wait_for(back=5)


def closed(disk):
    """The frontend has closed, and may come back."""
    closing(disk)
    disk.host.sh(f"xenstore-write {disk.front}/state 6")
    disk.wait_for(back=6)


def connected(disk):
    """The guest has the disk, and does nothing with it."""
    disk.guest.load_frontend()
    named(disk)
    disk.guest.wait_for_disk("xvdb")


def in_use(disk):
    """The guest writes to the disk all the time."""
    connected(disk)
    assert_served_by_pair(disk.host, disk.guest, "xvdb")
    disk.guest.sh(WRITER)
    disk.guest.wait_for("[ -s /tmp/rounds ]")


STEPS = (offered, named, front_first, no_rings, closing, closed, connected, in_use)


def test_end_at_each_step(xen, record_property):
    """Unbound, unloaded, loaded at each step, and then the directories of the device vanish.

    A frontend that was connected goes on in between. Nothing is left at the end,
    and the disk works as ever.

    The C backend warns, with a stack trace, of rings that it could not connect to,
    and else does the same. The C frontend, removed in use after its backend, waits
    for that for ever, and the guest's xenwatch thread with it.

    Rows: BE-05, B-01, B-18, B-23
    """
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    ours = host.pair.back.name == "rblkback"
    if not ours:
        host.machine.allow(WARNS)
        host.machine.allow("Call Trace")
    guest = host.start_guest(disks=[])
    guest.unload_frontend()
    guest.allow("I/O error, dev xvdb")
    before = xen_counts(host)
    disk = HandMade(host, guest)
    name = disk.device.split("/")[-1]
    for step in STEPS:
        print(step.__name__)
        step(disk)
        server.sh(f"echo {name} > {DRIVER}/unbind")
        server.unload_backend()
        server.load_backend()
        server.wait_for(f"[ -e {DRIVER}/{name} ]")
        if step is in_use:
            guest.sh("rm /tmp/rounds")
            guest.wait_for("[ -s /tmp/rounds ]")
        host.sh(f"xenstore-rm {disk.back}; xenstore-rm {disk.front}")
        server.wait_for(f"[ ! -e {disk.device} ] && ! grep -q xvdb /proc/[0-9]*/comm")
        if step is no_rings:
            assert (WARNS in host.sh("dmesg")) != ours
        if step is in_use and guest.front == "xen-blkfront":
            guest.wait_for(HANGS)
            record_property("c_fails", "F-04, B-23")
            record_property("c_not_asked", "B-01, B-18")
            guest.destroy()
            return
        if step in (connected, in_use):
            guest.wait_for("[ ! -b /dev/xvdb ] && ! pidof dd")
            guest.unload_frontend()
    after = xen_counts(host)
    kept = ("grants", "events")
    assert [after[key] for key in kept] == [before[key] for key in kept]
    in_use(disk)
