# SPDX-License-Identifier: GPL-2.0-only
"""The backend is removed at every step of a device's life, and so is the device; or it cannot start
serving."""

import time
from collections.abc import Callable

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.leak_counts import xen_counts
from harness.manual_toolstack import ManualDisk
from harness.shell import Target
from harness.toolstack import error_node

DRIVER = "/sys/bus/xen-backend/drivers/vbd"
WRITER = (
    "rm -f /tmp/rounds; (while /usr/bin/dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct "
    "conv=nocreat,notrunc; do echo x >> /tmp/rounds; done) > /dev/null 2>&1 &"
)
"""Writes until the disk is gone."""

WARNS = "WARNING: drivers/block/xen-blkback/xenbus.c"
HANGS = "pidof dd && grep -q freeze $(grep -lx xenwatch /proc/[0-9]*/comm | sed s/comm/stack/)"
"""The thread that removes devices waits for requests on a disk."""


def offered(disk: ManualDisk) -> None:
    """The toolstack has created the device; the disk is not known yet."""
    disk.offer()
    disk.wait_for(back=2)


def named(disk: ManualDisk) -> None:
    """The disk is open; there is no frontend."""
    offered(disk)
    disk.give("/dev/ram0")
    disk.server.wait_for(f"grep -q 1:0 {disk.device}/physical_device")


def front_first(disk: ManualDisk) -> None:
    """The frontend says that it has written its rings; there is no disk."""
    offered(disk)
    disk.host.sh(f"xenstore-write {disk.front}/state 3")


def no_rings(disk: ManualDisk) -> None:
    """The frontend says that it has written its rings, and has not."""
    front_first(disk)
    disk.give("/dev/ram0")
    disk.wait_for(back=5)


def closing(disk: ManualDisk) -> None:
    """The frontend closes before it was connected."""
    named(disk)
    disk.host.sh(f"xenstore-write {disk.front}/state 5")
    disk.wait_for(back=5)


def closed(disk: ManualDisk) -> None:
    """The frontend has closed, and may come back."""
    closing(disk)
    disk.host.sh(f"xenstore-write {disk.front}/state 6")
    disk.wait_for(back=6)


def connected(disk: ManualDisk) -> None:
    """The guest has the disk, and does nothing with it."""
    disk.guest.load_frontend()
    named(disk)
    disk.guest.wait_for_disk("xvdb")


def in_use(disk: ManualDisk) -> None:
    """The guest writes to the disk all the time."""
    connected(disk)
    assert_served_by_pair(disk.host, disk.guest, "xvdb")
    disk.guest.sh(WRITER)
    disk.guest.wait_for("[ -s /tmp/rounds ]")


STEPS = (offered, named, front_first, no_rings, closing, closed, connected, in_use)


@pytest.mark.feature("BE-05", "B-01", "B-18", "B-23")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_end_at_each_step(
    xen: StartHost, record_property: RecordProperty, step: Callable[[ManualDisk], None]
) -> None:
    """The backend is unbound, unloaded and loaded at a step; then the device is removed.

    A connected frontend continues in between. Nothing is left at the end, and the next disk works.

    The C backend warns, with a stack trace, of rings that it could not connect to,
    and else does the same. The C frontend, removed in use after its backend, waits
    for it forever, and blocks the guest's xenwatch thread.
    """
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    ours = host.pair.backend.name == "rblkback"
    if not ours:
        host.machine.allow(WARNS)
        host.machine.allow("Call Trace")
    guest = host.start_guest(disks=[])
    guest.unload_frontend()
    guest.allow("I/O error, dev xvdb")
    before = xen_counts(host)
    disk = ManualDisk(host, guest)
    step(disk)
    restart_backend(disk)
    if step is in_use:
        guest.sh("rm /tmp/rounds")
        guest.wait_for("[ -s /tmp/rounds ]")
    host.sh(f"xenstore-rm {disk.back}; xenstore-rm {disk.front}")
    server.wait_for(f"[ ! -e {disk.device} ] && ! grep -q xvdb /proc/[0-9]*/comm")
    # Without a disk, the C backend tries to connect if it reads the frontend's state in time.
    if ours or step is not front_first:
        assert (WARNS in host.sh("dmesg")) == (step is no_rings and not ours)
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


def restart_backend(disk: ManualDisk) -> None:
    """Unbinds the device from its backend, and unloads and loads that, which binds it again."""
    name = disk.device.split("/")[-1]
    disk.server.sh(f"echo {name} > {DRIVER}/unbind")
    disk.server.unload_backend()
    disk.server.load_backend()
    disk.server.wait_for(f"[ -e {DRIVER}/{name} ]")


@pytest.mark.feature("F-42")
def test_shutdown_after_outage(xen: StartHost) -> None:
    """A guest that is powered off closes its disk first, although the disk had an outage before.

    The C frontend has none that it survives, and is powered off without.
    """
    host = xen(waiting=None)
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    guest = host.start_guest(disks=[], settings='on_poweroff = "preserve"')
    disk = ManualDisk(host, guest)
    named(disk)
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    if guest.front == "rblkfront":
        host.sh(f"xenstore-write {disk.back}/state 5")
        guest.wait_for("[ $(dmesg | grep -c 'xvdb: .*persistent grants') = 2 ]")
    disk.wait_for(front=4, back=4)
    guest.shell.send("poweroff -f")
    host.wait_for(f"xl list {guest.name} | grep -q -e '--s-- '")
    assert host.xenstore_read(f"{disk.front}/state") == "6"
    disk.wait_for(back=6)
    guest.destroy()


QUEUES = 2
ATTEMPTS = 5

FEW_THREADS = """
limit=/proc/sys/kernel/threads-max
usual=$(cat $limit)
mkfifo /tmp/limited
(
	until read -r state < {device}/state && [ "$state" = Connected ] || [ $((n += 1)) = 15 ]; do
		read -r -t 1 nothing <> /tmp/limited || true
	done
	echo $usual > $limit
	rm /tmp/limited
) > /dev/null 2>&1 &
read -r load load load threads last < /proc/loadavg
echo $((${{threads#*/}} - 1 + {spare})) > $limit
"""
"""Limits the threads that can be started after this shell ends, for 15 s or until the backend is
connected.

It waits without a program, for none would start; so it sees nothing but the state.
"""


@pytest.mark.feature("B-16")
def test_thread_limit(xen: StartHost) -> None:
    """The kernel refuses the thread of the first queue, or of the second: the toolstack is told,
    the frontend waits, and nothing is left of the attempt. When there are threads again, it is
    connected.

    The C backend is no reference: the frontend has been told by then that it is connected, and
    reads. Neither half gets away from that, and the backend does not close.
    """
    host = xen(waiting=TWO_VCPUS)
    server = host.start_server()
    server.load_backend(f"max_queues={QUEUES}")
    server.ram_disks()
    guest = host.start_guest(disks=[])
    guest.unload_frontend()
    before = xen_counts(host)
    disk = ManualDisk(host, guest)
    for spare in range(QUEUES):
        # Now and then a thread of the kernel's own ends in between.
        assert any(is_refused(disk, spare) for _ in range(ATTEMPTS))
    after = xen_counts(host)
    kept = ("grants", "events")
    assert [after[key] for key in kept] == [before[key] for key in kept]
    in_use(disk)
    assert host.xenstore_read(f"{disk.front}/multi-queue-num-queues") == str(QUEUES)


REFUSALS = "dmesg | grep -c 'starting a thread' || true"


def is_refused(disk: ManualDisk, spare: int) -> bool:
    """Returns `True` if the backend could not start its threads with this limit.

    The device goes after that.
    """
    host, server, guest = disk.host, disk.server, disk.guest
    front, error = f"/sys/bus/xen/devices/vbd-{disk.code}", error_node(disk.back)
    named(disk)
    before = server.sh(REFUSALS)
    server.sh(FEW_THREADS.format(device=disk.device, spare=spare))
    guest.load_frontend()
    guest.wait_for(f"grep -q -e Clos -e Connected {front}/state")
    assert "Connected" in guest.sh(f"cat {front}/state")
    wait_for_threads(server)
    refused = server.sh(REFUSALS) != before
    # The error holds no more.
    host.wait_for(f"! xenstore-exists {error}")
    guest.unload_frontend()
    server.wait_for("! grep -l xvdb /proc/[0-9]*/comm")
    host.sh(f"xenstore-rm {disk.back}; xenstore-rm {disk.front}; xenstore-rm {error} || true")
    server.wait_for(f"[ ! -e {disk.device} ]")
    guest.wait_for(f"[ ! -e {front} ]")
    return refused


def wait_for_threads(machine: Target) -> None:
    """Waits until a machine may start any number of threads again."""
    deadline = time.monotonic() + 300
    while machine.run("[ ! -e /tmp/limited ]")[0] != 0:
        assert time.monotonic() < deadline, "the backend did not close"
        time.sleep(0.1)
