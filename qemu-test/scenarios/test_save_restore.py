# SPDX-License-Identifier: GPL-2.0-only
"""A guest is saved and restored while it reads, writes, flushes and discards.

The disk holds reads, writes and flushes from before the guest is told to stop until it has
stopped, and then fails them: only a frontend that sends them again gets them done. Each
program checks what it reads; none may see an error. A discard cannot be in flight: Linux
waits for the task that has asked for it before it stops.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from harness import held_disk
from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.job import PASS_S
from harness.job import Job
from harness.job import wait_for_passes
from harness.manual_toolstack import ManualDisk
from harness.verify import FIO
from harness.verify import JOBS
from harness.verify import start_jobs
from harness.xenhost import XenHost

IMAGE = "/dev/vdb"
LESS = "max_queues=1 max_ring_page_order=0 feature_persistent=0"
"""Parameters of a backend that can do less."""
LESS_OF_DISK = (
    'xenstore-write "$XENBUS_PATH/feature-max-indirect-segments" 0 "$XENBUS_PATH/discard-enable" 0'
)
"""What the hotplug script writes first: both drivers look for it when the disk is there."""
LESS_SAID = "persistent grants: disabled; indirect descriptors: disabled; bounce buffer: disabled"
"""What our frontend says when it has connected to that."""
LARGE_READS = "dd if=/dev/xvda of=/dev/null bs=128k count=8 iflag=direct"
DIRECT_REQUESTS = 8 * 3
"""How many requests these are without indirect segments, of which each has eleven pages at most."""
FLUSHED = "--rw=randwrite --sync=dsync"
"""Nothing but writes with a flush after each."""
ATTEMPTS = 5
LIVES_ON = 300
"""Number of writes of a restored guest after which no older one is in flight."""


def save_in_use(host: XenHost, guest: Guest) -> None:
    """Saves the guest with requests in flight, which fail when it has stopped."""
    held_disk.hold(host.server, guest)
    held_disk.fail_when_stopped(host, guest)
    guest.save(IMAGE)
    held_disk.assert_failed(host.server)


def load_lesser_backend(host: XenHost, guest: Guest) -> None:
    """The guest is gone: another backend takes the place of the one that it had."""
    server = host.server
    server.wait_for(f"[ ! -e /sys/bus/xen-backend/devices/vbd-{guest.domid}-51712 ]")
    server.unload_backend()
    server.load_backend(LESS)
    server.sh(
        f"echo '{LESS_OF_DISK}' > /tmp/less; sed -i '/= add/r /tmp/less' /etc/xen/scripts/blk-min"
    )


def stop(host: XenHost, guest: Guest, jobs: Sequence[Job]) -> None:
    """The jobs end, with what they have read being right, and nothing is in flight."""
    for job in jobs:
        job.stop()
    assert sum(map(int, host.server.sh("cat /sys/block/rblk0/inflight").split())) == 0
    assert_served_by_pair(host, guest)


def crash(host: XenHost, guest: Guest, record_property: RecordProperty) -> None:
    """Checks what xen-blkfront does with a write in flight that a flush follows.

    Now and then all that was written has arrived, and only the flush is in flight. Then the guest
    lives, and is saved again. The job has the part of the disk of "synced", which does not run.
    """
    guest.allow("(guest)")
    flushed = Job(guest, FIO.format(name="flushed", offset=16) + FLUSHED, "flushed")
    flushed.wait_for_pass()
    alive = f"xl domid {guest.name} > /dev/null 2>&1"
    for _ in range(ATTEMPTS):
        save_in_use(host, guest)
        guest.restore(IMAGE)
        served = f"{ManualDisk(host, guest, 'xvda').device}/statistics/wr_req"
        host.wait_for(f"! {alive} || [ $(cat {served}) -gt {LIVES_ON} ]", PASS_S)
        if host.run(alive)[0] != 0:
            break
    assert "kernel BUG at block/blk-mq.c" in guest.console()
    record_property("c_fails", "F-24")
    record_property("c_not_asked", "F-06, F-10")
    host.guests.pop(guest.name)


@pytest.mark.feature("FE-20", "FE-21", "FE-42", "FE-44", "FE-66", "F-06", "F-10", "F-24")
def test_save_restore(xen: StartHost, test_modules: Path, record_property: RecordProperty) -> None:
    """To a backend that is as good as the old one; then to one with one ring of one page, no
    indirect requests, no persistent grants, no discard.

    xen-blkfront is asked for the first alone. It ends what is in flight before it sends it
    again as something else. If that is the write of a write with a flush after it, the
    block layer finds nothing left of that when the flush is done: a BUG.
    """
    host, guest = held_disk.start(xen, test_modules)
    is_ours = guest.front == "rblkfront"
    jobs = start_jobs(guest, [name for name in JOBS if is_ours or name != "synced"])
    save_in_use(host, guest)
    guest.restore(IMAGE)
    wait_for_passes(jobs)
    if not is_ours:
        crash(host, guest, record_property)
        return

    jobs.pop().stop()
    save_in_use(host, guest)
    load_lesser_backend(host, guest)
    guest.restore(IMAGE)
    wait_for_passes(jobs)
    front = f"/local/domain/{guest.domid}/device/vbd/51712"
    assert host.xenstore_read(f"{front}/multi-queue-num-queues") is None
    assert host.xenstore_read(f"{front}/ring-page-order") is None
    assert LESS_SAID in guest.sh("dmesg | grep 'bounce buffer' | tail -n 1")
    assert guest.sh("cat /sys/block/xvda/queue/discard_max_hw_bytes") == "0"
    stop(host, guest, jobs)
    disk = ManualDisk(host, guest, "xvda")
    before = disk.statistic("rd_req")
    guest.sh(LARGE_READS)
    assert disk.statistic("rd_req") - before == DIRECT_REQUESTS
