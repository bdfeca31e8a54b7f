# SPDX-License-Identifier: GPL-2.0-only
"""A barrier orders the requests of all rings of a disk, and its data is durable when it ends.

QEMU logs what reaches dom0's disk, outside of both kernels, and can hold writes
back there, while flushes pass.

The disk has barriers and no flush. The backend writes all its features at once, so the guest is
paused while the node is rewritten.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.manual_toolstack import ManualDisk
from harness.writelog import read_log
from harness.xenhost import XenHost

BLOCK = "/usr/bin/dd of=/dev/xvdb bs=4k conv=notrunc 2>/dev/null"
APART = (0, 2, 4)
"""Positions of blocks that dom0's block layer cannot merge."""
FLUSH = "/usr/bin/dd if=/dev/null of=/dev/xvdb conv=notrunc,fsync 2>/dev/null"


def write(letter: str, seek: int, flags: str = "direct") -> str:
    """A shell command that writes one block full of a letter."""
    block = f"{BLOCK} iflag=fullblock count=1 seek={seek} oflag={flags}"
    return f"tr '\\0' {letter} < /dev/zero | {block}"


def on_cpu(cpu: int, command: str) -> str:
    """The command on one CPU, which has a ring of its own."""
    return f'taskset -c {cpu} sh -c "{command}"'


def connect_with_barrier_only(host: XenHost, guest: Guest) -> ManualDisk:
    """A disk that offers barriers and no flush."""
    disk = ManualDisk(host, guest)
    disk.offer()
    disk.wait_for(front=3, back=2)
    host.sh(f"xl pause {guest.name}")
    disk.give("/dev/vdb")
    disk.wait_for(back=4)
    assert host.xenstore_read(f"{disk.back}/feature-barrier") == "1"
    host.sh(f"xenstore-write {disk.back}/feature-flush-cache 0; xl unpause {guest.name}")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    assert host.xenstore_read(f"{disk.front}/multi-queue-num-queues") == "2"
    return disk


@pytest.mark.feature("BE-22", "BE-46", "B-02", "B-03")
def test_barrier(xen: StartHost, record_property: RecordProperty) -> None:
    """The C backend waits for its own ring alone, and flushes only before the data."""
    host = xen(waiting=TWO_VCPUS, log_writes=True)
    host.load_backend("max_queues=2")
    guest = host.start_guest(disks=[])
    disk = connect_with_barrier_only(host, guest)

    host.machine.throttle_writes(1)
    for seek in APART:
        guest.sh(f"({on_cpu(0, write('b', seek))}) > /dev/null 2>&1 &")
    disk.wait_statistic("wr_req", 3)
    guest.sh(f"({on_cpu(1, FLUSH)}) > /dev/null 2>&1 &")
    disk.wait_statistic("f_req", 1)
    guest.sh(f"({on_cpu(0, write('a', 10))}) > /dev/null 2>&1 &")
    guest.wait_for("awk '{exit $2 < 3}' /sys/block/xvdb/inflight")
    host.machine.throttle_writes(0)
    guest.wait_for("! pidof dd")
    guest.sh(write("x", 20, "direct,dsync"))
    guest.sh(f"{write('e', 30)}; {FLUSH}")
    guest.shut_down()

    entries = read_log(host.write_log)
    order = "".join("F" if entry.is_flush else entry.data[:1].decode() for entry in entries)
    ordered = order.rindex("b") < order.index("F") < order.index("a")
    # The guest flushes after such a write too; the other flush is the barrier's.
    flushes = order[order.index("x") : order.index("e")].count("F")
    durable = flushes == 2 or (guest.front == "rblkfront" and flushes == 1)
    ours = host.pair.backend.name == "rblkback"
    assert ordered == durable == ours, order
    if not ours:
        record_property("c_fails", "B-02, B-03")
