# SPDX-License-Identifier: GPL-2.0-only
"""A backend that breaks the ring protocol, and a guest that must not be harmed.

The backend is the module rblk_hostile_back, which serves xvdb correctly until its parameter selects
a misbehaviour. The pair's own backend serves xvda
meanwhile.
"""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.xenhost import Disk
from harness.xenhost import Server
from harness.xenhost import XenHost

CODE = 51728
"""Virtual device number of xvdb."""

MISBEHAVIOUR = "/sys/module/rblk_hostile_back/parameters/misbehaviour"

HONEST, UNKNOWN_STATUS, UNSUPPORTED_WRITE, UNSUPPORTED_FLUSH = range(4)
KEEP, SILENCE = 9, 10
BREAKS = {
    4: "unexpected response",
    5: "unexpected response",
    6: "unexpected response",
    7: "has broken the ring",
    8: "has broken the ring",
    KEEP: "still has the pages of a completed request",
}
"""Misbehaviours that end the disk: unknown id, id twice, operation, too many and too few answers,
pages kept; and what the frontend says."""

ERRORS = ("Input/output error", "No space left on device")
"""What a write ends with that was not done; the second is that of a disk that is gone."""

WRITE = "/usr/bin/dd if=/dev/zero of=/dev/xvdb bs=4k count=2"
WRITE_BEHIND = f"({WRITE} oflag=direct && echo done > /tmp/end || echo failed > /tmp/end) &"


def write(server: Server, guest: Guest, misbehaviour: int, how: str = "oflag=direct") -> bool:
    """Writes to xvdb under a misbehaviour. Whether that was done; if not, dd says why."""
    server.sh(f"echo {misbehaviour} > {MISBEHAVIOUR}")
    status, output = guest.run(f"{WRITE} {how} 2>&1")
    server.sh(f"echo {HONEST} > {MISBEHAVIOUR}")
    assert status == 0 or any(error in output for error in ERRORS), output
    return status == 0


def renew(host: XenHost, server: Server, guest: Guest) -> None:
    """Checks that the frontend has closed xvdb, and that a new xvdb works."""
    back = f"/local/domain/{server.domid}/backend/vbd/{guest.domid}/{CODE}"
    guest.wait_for("[ ! -b /dev/xvdb ]")
    host.wait_for(f"[ $(xenstore-read {back}/state) = 6 ]")
    host.sh(f"xenstore-write /local/domain/{guest.domid}/device/vbd/{CODE}/state 1")
    guest.wait_for_disk("xvdb")
    assert write(server, guest, HONEST)


def refuse_barrier(
    host: XenHost, server: Server, guest: Guest, record_property: RecordProperty
) -> None:
    """A backend has barriers only, and refuses them: the write fails.

    xen-blkfront sends data with the barrier, and reports what was refused as done.
    """
    server.sh("echo Y > /sys/module/rblk_hostile_back/parameters/barrier")
    host.attach(guest, Disk("xvdb", "/dev/ram1"))
    guest.wait_for_disk("xvdb")
    assert write(server, guest, HONEST, "oflag=direct,dsync")
    done = write(server, guest, UNSUPPORTED_FLUSH, "oflag=direct,dsync")
    assert done == (guest.front == "xen-blkfront")
    if done:
        record_property("c_fails", "F-02")
    host.detach_and_wait(guest, "xvdb")
    server.sh("echo N > /sys/module/rblk_hostile_back/parameters/barrier")


def park(server: Server, guest: Guest, record_property: RecordProperty) -> None:
    """What xen-blkfront makes of a broken ring: a request that never ends."""
    server.sh(f"echo {next(iter(BREAKS))} > {MISBEHAVIOUR}")
    guest.sh(f"dmesg -c > /dev/null\n{WRITE_BEHIND}")
    guest.wait_for("dmesg | grep -q 'disabled for further use'")
    assert guest.run("[ -e /tmp/end ]")[0] != 0
    record_property("c_fails", "F-03")
    record_property("c_not_asked", "F-19")
    guest.destroy()


@pytest.mark.feature("FE-64", "F-02", "F-03", "F-19")
def test_hostile_backend(
    xen: StartHost, test_modules: Path, record_property: RecordProperty
) -> None:
    """Requests with invalid responses fail, and a broken ring stops its own disk only.

    xen-blkfront takes a flush for done that was refused. Of what breaks the ring
    it makes a disk that can neither work nor be closed: of these it gets one.
    """
    host = xen(modules=[test_modules / "rblk_hostile_back.ko"])
    server = host.start_server()
    server.insmod("rblk_hostile_back", f"device={CODE}")
    server.load_backend()
    server.ram_disks(2, megabytes=16)
    guest = host.start_guest(disks=[Disk("xvda", "/dev/ram0")])
    assert_served_by_pair(host, guest)
    guest.allow("error, dev xvdb")

    refuse_barrier(host, server, guest, record_property)
    host.attach(guest, Disk("xvdb", "/dev/ram1"))
    guest.wait_for_disk("xvdb")
    assert write(server, guest, HONEST)
    for misbehaviour in (UNKNOWN_STATUS, UNSUPPORTED_WRITE):
        assert not write(server, guest, misbehaviour), misbehaviour
        assert write(server, guest, HONEST), misbehaviour
    if guest.front == "xen-blkfront":
        park(server, guest, record_property)
        return

    assert not write(server, guest, UNSUPPORTED_FLUSH, "conv=fsync")
    assert write(server, guest, HONEST, "conv=fsync")
    for misbehaviour, message in BREAKS.items():
        guest.sh("dmesg -c > /dev/null")
        assert not write(server, guest, misbehaviour), misbehaviour
        renew(host, server, guest)
        said = [line for line in guest.sh("dmesg").splitlines() if message in line]
        assert len(said) == 1 and "xvdb" in said[0], said
    server.sh(f"echo {SILENCE} > {MISBEHAVIOUR}")
    guest.sh(WRITE_BEHIND)
    guest.wait_for("grep -q '[1-9]' /sys/block/xvdb/inflight")
    host.detach_and_wait(guest, "xvdb")
    guest.wait_for("grep -q failed /tmp/end")
    guest.sh("dd if=/dev/urandom of=/dev/xvda bs=64k count=4 oflag=direct")
    guest.unload_frontend()
