# SPDX-License-Identifier: GPL-2.0-only
"""rblktap and rblkd are killed again and again while a guest verifies what it writes."""

import os

from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.job import wait_for_passes
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.verify import start_jobs

KILLS = int(os.environ.get("RBLKIF_KILLS", "30"))
"""How often a process rblktap is killed, one disk after the other."""
AGENT_EACH = 5
"""rblkd is killed together with each fifth of them."""
XVDA, XVDB = 51712, 51728
JOBS = ["data", "synced", "mixed"]


def test_tap_kills(xen: StartHost) -> None:
    """No error in the guest, no wrong byte, and a consistent image, raw and qcow2."""
    images = [Image("a.raw", 64), Image("b.qcow2", 64)]
    image = rblktap.disk(images, rblktap.QEMU_TOOLS, "512M")
    host = xen(waiting=TWO_VCPUS, image=image, **rblkd.options())
    rblkd.install(host)
    rblkd.start(host)
    disks = [RblkDisk("xvda", "a.raw"), RblkDisk("xvdb", "b.qcow2")]
    guest = host.start_guest(disks=disks)
    jobs = start_jobs(guest, JOBS, "xvda") + start_jobs(guest, JOBS, "xvdb")
    for number in range(KILLS):
        device = (XVDA, XVDB)[number % 2]
        process = rblktap.pid(host, guest, device)
        if number % AGENT_EACH == 0:
            rblkd.kill(host)
        host.sh(f"kill -9 {process}")
        if number % AGENT_EACH == 0:
            rblkd.start(host)
        host.wait_for(rblkd.replaced(host, guest, device, process))
        if number % 10 == 9:
            wait_for_passes(jobs)
    wait_for_passes(jobs)
    for job in jobs:
        job.stop()
    for disk in disks:
        assert_served_by_pair(host, guest, disk.vdev)
        adopted = rblkd.statistics(host, guest, disk.vdev)
        print(disk.vdev, adopted)
        assert adopted["errors"] == 0
        rblkd.detach(host, guest, disk.vdev)
    assert "I/O error" not in guest.sh("dmesg")
    host.sh("qemu-img check /tap/b.qcow2")
