# SPDX-License-Identifier: GPL-2.0
"""Many disks at once: of one guest with four queues each, and of several guests.

The log has a table of the memory that they cost dom0.
"""

import os

from harness.counts import KEEPS_PAGES
from harness.counts import assert_idle
from harness.counts import free_kb
from harness.evidence import assert_served_by_pair
from harness.guest import FOUR_VCPUS
from harness.xenhost import Disk

DISKS = int(os.environ.get("RBLKIF_DISKS", 4))
QUEUES = FOUR_VCPUS.vcpus
RING_KB = 400
"""What a ring may cost dom0 at most; it takes some 130, and 1340 of the C module."""
GUESTS = int(os.environ.get("RBLKIF_GUESTS", 3))

WORK = """
yes "$NAME" | dd of=/tmp/data bs=32k count=8 iflag=fullblock 2> /dev/null
for disk in $(cd /sys/block; echo xvd*); do
	(echo $disk; cat /tmp/data) | dd of=/dev/$disk bs=32k count=8 iflag=fullblock oflag=direct &
done 2> /dev/null
wait
for disk in $(cd /sys/block; echo xvd*); do
	[ "$(dd if=/dev/$disk bs=32k count=8 iflag=direct | sha256sum)" = \
		"$( (echo $disk; cat /tmp/data) | head -c 262144 | sha256sum)" ] || exit 1
done 2> /dev/null
"""
"""Writes a piece of each disk, all at once, each with its own name, and compares it."""


def names(count):
    """The names of the first disks of a guest."""
    return [f"xvd{chr(ord('a') + number)}" for number in range(count)]


def filled_disks(host, count):
    """Makes RAM disks of a megabyte, all of whose memory is there already."""
    host.ram_disks(count, megabytes=1)
    host.sh(
        "for disk in /dev/ram*; do dd if=/dev/zero of=$disk bs=64k count=16 oflag=direct; done "
        "2> /dev/null"
    )


def show_memory(rows, disks, rings):
    """Prints what dom0 had free, as a table."""
    print(f"{disks} disks, {rings} rings: dom0's memory in KiB")
    print(f"{'':20}{'free':>10}{'used':>10}{'a disk':>10}{'a ring':>10}")
    first = rows[0][1]
    for name, free in rows:
        used = first - free
        print(f"{name:20}{free:10}{used:10}{used // disks:10}{used // rings:10}")


def test_many_disks(xen, record_property):
    """One guest, disks of four queues: all is what was written, nobody wakes for nothing.

    RBLKIF_DISKS says how many. The C module takes its memory when it connects, for
    the largest requests in each slot.

    Rows: BE-09, BE-21, BE-41, BE-53, B-13, B-15
    """
    # The host of four_vcpus: there is one snapshot for both.
    host = xen(vcpus=2, waiting=FOUR_VCPUS)
    host.load_backend(f"max_queues={QUEUES} {KEEPS_PAGES} feature_persistent=0")
    filled_disks(host, DISKS)
    guest = host.start_guest(disks=[])
    rows = [("before", free_kb(host))]
    host.sh(
        "\n".join(
            f"xl block-attach {guest.name} '{Disk(vdev, f'/dev/ram{number}').specification()}'"
            for number, vdev in enumerate(names(DISKS))
        ),
        timeout=300,
    )
    guest.wait_for(" && ".join(f"[ -b /dev/{vdev} ]" for vdev in names(DISKS)))
    assert_served_by_pair(host, guest)
    front = f"/local/domain/{guest.domid}/device/vbd"
    queues = host.sh(
        f"for disk in $(xenstore-list {front}); do "
        f"xenstore-read {front}/$disk/multi-queue-num-queues; done"
    )
    assert queues.split() == [str(QUEUES)] * DISKS
    rows.append(("connected", free_kb(host)))
    guest.sh("NAME=first\n" + WORK, timeout=600)
    rows.append(("after work", free_kb(host, drop=1)))
    assert_idle(host, record_property)
    rows.append(("memory is short", free_kb(host)))
    show_memory(rows, DISKS, DISKS * QUEUES)
    free = dict(rows)
    small = free["before"] - free["connected"] < RING_KB * DISKS * QUEUES
    assert small == (host.pair.back.name == "rblkback")
    if not small:
        record_property("c_fails", "B-13, B-15")


def test_many_guests(xen, record_property):
    """Several guests with a disk each; RBLKIF_GUESTS says how many.

    Rows: BE-41, B-13
    """
    host = xen(waiting=None)
    host.load_backend(KEEPS_PAGES)
    filled_disks(host, GUESTS)
    rows = [("before", free_kb(host))]
    guests = [
        host.start_guest(f"guest{number}", [Disk("xvda", f"/dev/ram{number}")], memory=104)
        for number in range(GUESTS)
    ]
    for guest in guests:
        guest.wait_for_disk("xvda")
        assert_served_by_pair(host, guest)
    # What a guest has booted from; its xl, a few megabytes, stays.
    host.sh("rm /run/*.initrd")
    rows.append(("connected", free_kb(host)))
    for guest in guests:
        guest.sh(f"(NAME={guest.name}\n{WORK}\ntouch /tmp/good) > /dev/null 2>&1 &")
    for guest in guests:
        guest.wait_for("[ -e /tmp/good ]")
    rows.append(("after work", free_kb(host, drop=1)))
    assert_idle(host, record_property)
    show_memory(rows, GUESTS, GUESTS)
