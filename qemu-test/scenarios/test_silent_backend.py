# SPDX-License-Identifier: GPL-2.0-only
"""A backend that does not respond: requests end when the disk is removed.

Dom0's shell plays the backend, which has no ring.
"""

import pytest

from harness.driver_check import assert_front_of_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.toolstack import connect_disks
from harness.toolstack import directories
from harness.toolstack import remove_devices
from harness.toolstack import write_nodes
from harness.xenhost import XenHost

XVDB = 51728
OFFERS = {"feature-persistent": 1, "feature-flush-cache": 1}
READER = """
rm -f /tmp/ended
(if /usr/bin/dd if=/dev/xvdb of=/dev/null bs=4k count=1 iflag=direct; then
	echo read
else
	echo failed
fi > /tmp/ended) 2> /dev/null &
until [ "$(awk '{print $9}' /sys/block/xvdb/stat)" -ge 1 ]; do usleep 100000; done
"""
"""Reads, and waits until that is in flight."""


def start_reader(host: XenHost, guest: Guest) -> str:
    """Attaches a disk and starts a read without a response; returns the backend's directory."""
    connect_disks(host, guest, {XVDB: (OFFERS, {})})
    guest.wait_for_disk("xvdb")
    back = directories(guest.domid, XVDB)[1]
    write_nodes(host, back, {"sectors": 2048, "state": 4})
    guest.wait_for("[ $(cat /sys/block/xvdb/size) = 2048 ]")
    guest.sh(READER)
    return back


def wait_for_front(host: XenHost, guest: Guest, state: int) -> None:
    """Waits for a state of the frontend."""
    front = directories(guest.domid, XVDB)[0]
    host.wait_for(f"[ $(xenstore-read {front}/state) = {state} ]")


def come_back_while_limits_change(host: XenHost, guest: Guest, back: str) -> None:
    """A program changes queue limits and waits for the request in flight; the backend reconnects
    with other limits: the disk continues without them.
    """
    guest.sh(
        "(echo 8 > /sys/block/xvdb/queue/max_sectors_kb; touch /tmp/changed) > /dev/null 2>&1 & "
        "echo $! > /tmp/changer"
    )
    guest.wait_for("grep -q freeze /proc/$(cat /tmp/changer)/wchan")
    write_nodes(host, back, {"state": 6})
    wait_for_front(host, guest, 1)
    write_nodes(host, back, {"state": 2})
    wait_for_front(host, guest, 3)
    write_nodes(host, back, {"feature-discard": 1, "state": 4})
    wait_for_front(host, guest, 4)
    assert guest.run("[ -e /tmp/changed ]")[0] != 0


@pytest.mark.feature("F-04", "F-05")
def test_silent_backend(xen: StartHost, record_property: RecordProperty) -> None:
    """Detached with a request in flight; and back with blocks that the disk's users cannot follow.

    xen-blkfront waits forever in the first case, and does not continue in the second.
    """
    host = xen()
    guest = host.start_guest(disks=[])
    assert_front_of_pair(host, guest)
    guest.allow("I/O error, dev xvdb")
    guest.allow("rror on dev xvdb")
    back = start_reader(host, guest)
    write_nodes(host, back, {"online": 0, "state": 5})
    wait_for_front(host, guest, 6)
    if guest.front == "xen-blkfront":
        # It is Closed, and its reader waits forever.
        assert guest.run("[ -s /tmp/ended ]")[0] == 1
        record_property("c_fails", "F-04")
        record_property("c_not_asked", "F-05")
        guest.destroy()
        return
    guest.wait_for('[ "$(cat /tmp/ended)" = failed ]')
    remove_devices(host, guest, [XVDB])

    back = start_reader(host, guest)
    come_back_while_limits_change(host, guest, back)
    write_nodes(host, back, {"state": 6})
    wait_for_front(host, guest, 1)
    write_nodes(host, back, {"state": 2})
    wait_for_front(host, guest, 3)
    assert guest.run("[ -s /tmp/ended ]")[0] == 1
    write_nodes(host, back, {"sector-size": 4096, "state": 4})
    guest.wait_for('[ "$(cat /tmp/ended)" = failed ]')
    assert "logical block size from 512 to 4096" in guest.sh("dmesg | tail")
    guest.wait_for("[ -e /tmp/changed ]")
    remove_devices(host, guest, [XVDB])
