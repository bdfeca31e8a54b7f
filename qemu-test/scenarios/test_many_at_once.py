# SPDX-License-Identifier: GPL-2.0-only
"""Several disks are attached at the same moment, and detached, while another one is in use."""

from collections.abc import Sequence

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.job import wait_for_passes
from harness.leak_counts import xen_counts
from harness.verify import start_jobs
from harness.xenhost import Disk
from harness.xenhost import XenHost

NAMES = [f"xvd{letter}" for letter in "bcdefg"]
WORK = """
head -c 1048576 /dev/urandom > /tmp/data
for disk in {disks}; do
	(cat /tmp/data; echo $disk) | dd of=/dev/$disk bs=64k iflag=fullblock conv=fsync &
done 2> /dev/null
wait
for disk in {disks}; do
	(cat /tmp/data; echo $disk) | cmp -n $((1048576 + ${{#disk}})) - /dev/$disk
done
"""
"""Writes all of them, each with its own name, and compares."""


def beside_each_other(commands: Sequence[str]) -> str:
    """A script that runs commands at the same time; it fails if one of them does."""
    started = "\n".join(f"({command}) || touch /tmp/failed &" for command in commands)
    return f"rm -f /tmp/failed\n{started}\nwait; [ ! -e /tmp/failed ]"


def come_and_go(host: XenHost, guest: Guest) -> None:
    """All come, are written, compared, and go."""
    disks = {vdev: Disk(vdev, f"/dev/ram{number}") for number, vdev in enumerate(NAMES, start=1)}
    attached = [
        f"xl block-attach {guest.name} '{disk.specification(host.server)}'"
        for disk in disks.values()
    ]
    detached = [f"xl block-detach {guest.name} {vdev}" for vdev in NAMES]
    host.sh(beside_each_other(attached), timeout=600)
    guest.wait_for(" && ".join(f"[ -b /dev/{vdev} ]" for vdev in NAMES), timeout=600)
    assert_served_by_pair(host, guest, NAMES[-1])
    guest.sh(WORK.format(disks=" ".join(NAMES)), timeout=600)
    host.sh(beside_each_other(detached), timeout=600)
    guest.wait_for(" && ".join(f"[ ! -b /dev/{vdev} ]" for vdev in NAMES))
    backs = f"/local/domain/{host.server.domid}/backend/vbd/{guest.domid}"
    host.wait_for(f'[ "$(xenstore-list {backs})" = 51712 ]')


@pytest.mark.feature("FE-60", "FE-65")
def test_many_at_once(xen: StartHost) -> None:
    """The second time leaves no more behind than the first, and the disk in use sees no error.

    By the clock of a busy host several xl at once would miss their deadlines.
    """
    host = xen(waiting=TWO_VCPUS, icount=True)
    server = host.start_server()
    server.load_backend()
    server.ram_disks(count=1 + len(NAMES), megabytes=64)
    server.start_devd()
    guest = host.start_guest()
    jobs = start_jobs(guest, ["data", "mixed"])
    come_and_go(host, guest)
    for job in jobs:
        job.stop()
    before = xen_counts(host)
    jobs = start_jobs(guest, ["data", "mixed"])
    come_and_go(host, guest)
    wait_for_passes(jobs)
    for job in jobs:
        job.stop()
    after = xen_counts(host)
    kept = ("grants", "events", "xenstore")
    assert [after[key] for key in kept] == [before[key] for key in kept]
