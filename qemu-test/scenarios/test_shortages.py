# SPDX-License-Identifier: GPL-2.0-only
"""The backend lacks pages or mappings: requests wait for them, and do not fail."""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.leak_counts import KEEPS_PAGES
from harness.manual_toolstack import ManualDisk
from harness.xenhost import Disk

KEEP = 3
PARAMETERS = "/sys/module/rblk_ramdisk/parameters"

ONE_MIB = """
dd if=/dev/urandom of=/tmp/data bs=1M count=4
dd if=/tmp/data of=/dev/$DISK bs=1M oflag=direct
dd if=/dev/$DISK bs=1M count=4 iflag=direct | cmp - /tmp/data
"""
"""Each transfer is one request of 256 segments."""

BUDGET = 32
"""Pages that a queue adds to the budget of its domain."""
STUCK = 32
"""Requests of 11 pages, not beside each other: more than two queues' budget and the pages of one
request together."""
GET_STUCK = f"""
for at in $(seq {STUCK}); do
	dd if=/dev/zero of=/dev/xvdb bs=44k seek=$((2 * at)) count=1 oflag=direct 2> /tmp/error$at &
done
wait
cat /tmp/error* | grep -c '^1+0 records out' > /tmp/written
"""


@pytest.mark.feature("BE-54")
def test_largest_request(xen: StartHost, test_modules: Path) -> None:
    """A request of 256 segments uses 257 pages, and is served whatever other requests use.

    First the parameters allow no page but those of one request. Then the disk shares
    a budget with another one, which has used it up and does not answer.
    """
    host = xen(
        modules=[test_modules / "rblk_ramdisk.ko"], front_parameters="max_indirect_segments=256"
    )
    server = host.start_server()
    server.load_backend("max_persistent_grants=0 max_buffer_pages=0")
    server.insmod("rblk_ramdisk", "size_mib=4 only=2 timeout_ms=600000")
    server.ram_disks(2, megabytes=8)
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    assert guest.sh("cat /sys/block/xvda/queue/max_segments").strip() == "256"
    guest.sh(f"DISK=xvda\n{ONE_MIB}")
    # Each disk of the C frontend takes a quarter of the guest's memory.
    host.detach_and_wait(guest, "xvda")

    parameters = f"/sys/module/{host.pair.backend.name.replace('-', '_')}/parameters"
    server.sh(f"echo {BUDGET} > {parameters}/max_buffer_pages")
    host.attach(guest, Disk("xvdb", "/dev/rblk0"))
    host.attach(guest, Disk("xvdc", "/dev/ram1"))
    guest.wait_for("[ -b /dev/xvdb -a -b /dev/xvdc ]")
    server.sh(f"echo {KEEP} > {PARAMETERS}/mode; : < /dev/rblk0")
    guest.sh(f"({GET_STUCK}) > /dev/null 2>&1 &")
    numbers = f"{ManualDisk(host, guest, 'xvdb').device}/statistics"
    server.wait_for(f"[ $(cat {numbers}/oo_req) != 0 ] || [ $(cat {numbers}/wr_req) = {STUCK} ]")
    guest.sh(f"DISK=xvdc\n{ONE_MIB}")
    server.sh(f"echo 0 > {PARAMETERS}/mode; : < /dev/rblk0")
    guest.wait_for(f'[ "$(cat /tmp/written)" = {STUCK} ]')


FRAMES = 2
"""Pages of Xen for what the backend's domain maps, each for 256 mappings."""
SHORT = "Xen allows no more mappings"
WRITES = """
dd if=/dev/urandom of=/tmp/data-$DISK bs=$SIZE count=4
for pass in $(seq $PASSES); do
	dd if=/tmp/data-$DISK of=/dev/$DISK bs=$SIZE oflag=direct
	dd if=/dev/$DISK bs=$SIZE count=4 iflag=direct | cmp - /tmp/data-$DISK || exit 1
done
"""
"""Writes and compares requests of one SIZE, a number of times."""


@pytest.mark.feature("B-25")
def test_mapping_limit(xen: StartHost) -> None:
    """Xen lets the backend map no more pages: the I/O of all guests waits, and has no error.

    The pages of one guest's two disks stay mapped, and are three quarters of what Xen
    allows. When another guest needs half of it, they are unmapped. The C module answers such
    requests as failed.
    """
    host = xen(front_parameters="max_indirect_segments=256")
    storage = host.start_storage("tight", settings=f"max_maptrack_frames = {FRAMES}")
    storage.load_backend(KEEPS_PAGES)
    storage.ram_disks(3, megabytes=4)
    greedy = host.start_guest(
        disks=[
            Disk("xvda", "/dev/ram0", backend=storage.name),
            Disk("xvdb", "/dev/ram1", backend=storage.name),
        ]
    )
    other = host.start_guest("other", disks=[Disk("xvda", "/dev/ram2", backend=storage.name)])
    for guest in (greedy, other):
        assert_served_by_pair(host, guest, server=storage)
    greedy.sh(f"DISK=xvda SIZE=1M PASSES=1\n{WRITES}")
    greedy.sh(f"DISK=xvdb SIZE=512k PASSES=1\n{WRITES}")
    assert SHORT not in storage.sh("dmesg")
    other.sh(f"DISK=xvda SIZE=1M PASSES=1\n{WRITES}")
    assert SHORT in storage.sh("dmesg")
    for guest in (greedy, other):
        guest.sh(
            f"(DISK=xvda SIZE=1M PASSES=8\n{WRITES}\ntouch /tmp/good) > /tmp/said 2>&1 || "
            "touch /tmp/bad &"
        )
    for guest in (greedy, other):
        guest.wait_for("[ -e /tmp/good -o -e /tmp/bad ]")
        guest.sh("[ ! -e /tmp/bad ]")
    assert "a request has failed" not in storage.sh("dmesg")
