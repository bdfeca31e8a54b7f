# SPDX-License-Identifier: GPL-2.0-only
"""A disk whose data take long to be synced is offered, and another guest's disk after it.

What is in the page cache of a disk must be on it before the backend serves it. Where that is said
to a slow disk, a thin volume that is being filled or a server that does not answer, it lasts.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.manual_toolstack import ManualDisk
from harness.shell import CLOSE_KEPT
from harness.shell import keep_open
from harness.xenhost import Disk

NO_WRITEBACK = "echo 0 > /proc/sys/vm/dirty_writeback_centisecs"
FILL_CACHE = (
    f"{NO_WRITEBACK}; {keep_open('/dev/vdb')}; "
    "dd if=/dev/zero of=/dev/vdb bs=64k count=64 conv=notrunc 2> /dev/null"
)
"""Another program has the disk open, so that dd does not sync when it closes it."""
DEADLINE_S = 30


@pytest.mark.feature("B-31")
def test_slow_open(xen: StartHost) -> None:
    """The second disk is connected at once: the xenwatch thread does not wait for the first.

    The C backend waits in that thread too, when it connects.
    """
    host = xen()
    host.load_backend()
    host.ram_disks()
    guest = host.start_guest(disks=[])
    host.sh(FILL_CACHE)
    host.machine.throttle_writes(1)
    slow = ManualDisk(host, guest, "xvdb")
    slow.offer()
    slow.wait_for(front=3)
    slow.give("/dev/vdb")
    attach = f"xl block-attach {guest.name} '{Disk('xvdc').specification(host)}'"
    status, output = host.run(attach)
    assert status == 0, output
    guest.wait_for_disk("xvdc", DEADLINE_S)
    guest.sh("dd if=/dev/xvdc of=/dev/null bs=64k count=16 iflag=direct", timeout=DEADLINE_S)
    # This has shown something only if the first disk still waited.
    assert host.xenstore_read(f"{slow.back}/state") != "4"
    host.machine.throttle_writes(0)
    guest.wait_for_disk("xvdb", 300)
    assert_served_by_pair(host, guest, "xvdb")
    host.sh(CLOSE_KEPT)


@pytest.mark.feature("B-30")
def test_detach_slow_open(xen: StartHost) -> None:
    """The toolstack detaches the disk while its backend waits for the page cache, before it
    connects.

    The backend does not connect any more: what it would write for that is written together with
    Connected, or not at all. The guest is paused, so that the frontend still offers its rings.
    """
    host = xen()
    host.load_backend()
    guest = host.start_guest(disks=[])
    host.sh(FILL_CACHE)
    host.machine.throttle_writes(1)
    disk = ManualDisk(host, guest)
    disk.offer()
    disk.wait_for(front=3)
    disk.give("/dev/vdb")
    host.wait_for("set -- $(cat /sys/block/vdb/inflight) && [ $2 -gt 0 ]")
    host.sh(f"xl pause {guest.name}")
    host.sh(f"xenstore-write {disk.back}/online 0 {disk.back}/state 5")
    host.machine.throttle_writes(0)
    host.sh(f"blockdev --flushbufs /dev/vdb && xl unpause {guest.name}")
    disk.wait_for(back=6)
    assert host.xenstore_read(f"{disk.back}/sectors") is None
    disk.forget()
    guest.wait_for("[ ! -e /sys/bus/xen/devices/vbd-51728 ]")
    host.sh(CLOSE_KEPT)

    host.ram_disks()
    disk.offer()
    disk.give("/dev/ram0")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
