# SPDX-License-Identifier: GPL-2.0-only
"""Many disks at once: of one guest with four queues each, and of several guests.

The log has a table of the memory that they cost the server.
"""

import os
from collections.abc import Sequence

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import FOUR_VCPUS
from harness.guest import Guest
from harness.guest import Kind
from harness.leak_counts import KEEPS_PAGES
from harness.leak_counts import assert_idle
from harness.leak_counts import free_kb
from harness.xenhost import Disk
from harness.xenhost import Server
from harness.xenhost import XenHost

DISKS = int(os.environ.get("RBLKIF_DISKS", 4))
QUEUES = FOUR_VCPUS.vcpus
RING_KB = 400
"""What a ring may cost the server at most; it takes some 130, and 1340 of the C module."""
GUESTS = int(os.environ.get("RBLKIF_GUESTS", 3))
GUEST_MB = min(128, 900 // GUESTS)
"""Memory of a guest. There are 900 MiB for all of them; one with 100 may find none when it boots.
"""

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


MORE_THAN_LETTERS = 28

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def names(count: int) -> list[str]:
    """The names of the first disks of a guest: xvda to xvdz, then xvdaa and on."""
    letters = [*LETTERS, *(first + second for first in LETTERS for second in LETTERS)]
    return [f"xvd{name}" for name in letters[:count]]


def attach_all(host: XenHost, guest: Guest, vdevs: Sequence[str]) -> None:
    """Attaches a RAM disk for each name."""
    host.sh(
        "\n".join(
            f"xl block-attach {guest.name} "
            f"'{Disk(vdev, f'/dev/ram{number}').specification(host.server)}'"
            for number, vdev in enumerate(vdevs)
        ),
        timeout=600,
    )
    guest.wait_for(" && ".join(f"[ -b /dev/{vdev} ]" for vdev in vdevs))


def filled_disks(server: Server, count: int) -> None:
    """Makes RAM disks of a megabyte, all of whose memory is there already."""
    server.ram_disks(count, megabytes=1)
    server.sh(
        "for disk in /dev/ram*; do dd if=/dev/zero of=$disk bs=64k count=16 oflag=direct; done "
        "2> /dev/null"
    )


def show_memory(rows: Sequence[tuple[str, int]], disks: int, rings: int) -> None:
    """Prints what the server had free, as a table."""
    print(f"{disks} disks, {rings} rings: the server's memory in KiB")
    print(f"{'':20}{'free':>10}{'used':>10}{'a disk':>10}{'a ring':>10}")
    first = rows[0][1]
    for name, free in rows:
        used = first - free
        print(f"{name:20}{free:10}{used:10}{used // disks:10}{used // rings:10}")


@pytest.mark.feature("BE-09", "BE-21", "BE-41", "BE-53", "B-13", "B-15")
def test_many_disks(xen: StartHost, record_property: RecordProperty) -> None:
    """One guest with disks of four queues: data is right, and idle threads do not wake up.

    RBLKIF_DISKS says how many. The C module takes its memory when it connects, for
    the largest requests in each slot.
    """
    # The host of four_vcpus: there is one snapshot for both.
    host = xen(vcpus=2, waiting=FOUR_VCPUS)
    server = host.start_server()
    server.load_backend(f"max_queues={QUEUES} {KEEPS_PAGES} feature_persistent=0")
    filled_disks(server, DISKS)
    guest = host.start_guest(disks=[])
    rows = [("before", free_kb(server))]
    attach_all(host, guest, names(DISKS))
    assert_served_by_pair(host, guest)
    front = f"/local/domain/{guest.domid}/device/vbd"
    queues = host.sh(
        f"for disk in $(xenstore-list {front}); do "
        f"xenstore-read {front}/$disk/multi-queue-num-queues; done"
    )
    assert queues.split() == [str(QUEUES)] * DISKS
    # Without what it would give back if memory were short.
    rows.append(("connected", free_kb(server, drop=1)))
    guest.sh("NAME=first\n" + WORK, timeout=600)
    rows.append(("after work", free_kb(server, drop=1)))
    assert_idle(host, record_property)
    rows.append(("memory is short", free_kb(server)))
    show_memory(rows, DISKS, DISKS * QUEUES)
    free = dict(rows)
    if host.has_checks:
        # They take memory too.
        return
    small = free["before"] - free["connected"] < RING_KB * DISKS * QUEUES
    assert small == (host.pair.backend.name == "rblkback")
    if not small:
        record_property("c_fails", "B-13, B-15")


@pytest.mark.feature("FE-01")
def test_more_disks_than_letters(xen: StartHost) -> None:
    """One guest has more than 26 disks: the 17th has a number of the extended form, the 27th has
    two letters, and each is the disk that it is named after.
    """
    # For 28 disks, xen-blkfront takes more memory than a guest has by default.
    host = xen(waiting=Kind(memory=320))
    server = host.start_server()
    server.load_backend()
    server.ram_disks(MORE_THAN_LETTERS, megabytes=1)
    guest = host.start_guest(disks=[])
    vdevs = names(MORE_THAN_LETTERS)
    attach_all(host, guest, vdevs)
    assert_served_by_pair(host, guest)
    numbers = guest.sh(f"cd /sys/block; for disk in {' '.join(vdevs)}; do cat $disk/dev; done")
    assert numbers.split() == [
        f"202:{number * (16 if number < 16 else 256)}" for number in range(MORE_THAN_LETTERS)
    ]
    guest.sh("NAME=first\n" + WORK, timeout=600)
    look = f"for number in $(seq 0 {MORE_THAN_LETTERS - 1}); do head -n 1 /dev/ram$number; done"
    assert server.sh(look).split() == vdevs
    host.detach(guest, vdevs[-1])
    guest.wait_for(f"[ ! -b /dev/{vdevs[-1]} ]")


@pytest.mark.feature("BE-41", "B-13")
def test_many_guests(xen: StartHost, record_property: RecordProperty) -> None:
    """Several guests with a disk each; RBLKIF_GUESTS says how many."""
    host = xen(waiting=None)
    server = host.start_server()
    server.load_backend(KEEPS_PAGES)
    filled_disks(server, GUESTS)
    rows = [("before", free_kb(server))]
    guests = [
        host.start_guest(f"guest{number}", [Disk("xvda", f"/dev/ram{number}")], memory=GUEST_MB)
        for number in range(GUESTS)
    ]
    for guest in guests:
        guest.wait_for_disk("xvda")
        assert_served_by_pair(host, guest)
    # What a guest has booted from; its xl, a few megabytes, stays.
    host.sh("rm /run/*.initrd")
    rows.append(("connected", free_kb(server)))
    for guest in guests:
        guest.sh(f"(NAME={guest.name}\n{WORK}\ntouch /tmp/good) > /dev/null 2>&1 &")
    for guest in guests:
        guest.wait_for("[ -e /tmp/good ]")
    rows.append(("after work", free_kb(server, drop=1)))
    assert_idle(host, record_property)
    show_memory(rows, GUESTS, GUESTS)
