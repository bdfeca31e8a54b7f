# SPDX-License-Identifier: GPL-2.0-only
"""A guest whose disks are volumes on Ceph and GlusterFS, whose daemons die and come back."""

from __future__ import annotations

import time

from cluster import volumes
from cluster.daemons import Daemons
from cluster.daemons import xen_host
from cluster.volumes import Flushes
from harness.job import Job
from harness.job import wait_for_passes

OUTAGES = {
    "the OSD": ["osd"],
    "the monitor": ["mon"],
    "one brick": ["brick0"],
    "two bricks": ["brick1", "brick2"],
    "all daemons": ["osd", "mon", "brick0", "brick1", "brick2", "glusterd", "etcd"],
}
MEMORY = 320
"""Memory of the guest in MiB, with fio and its libraries in the cache."""
DOWN_S = 2
"""How long the daemons are down, in seconds, besides the time that they take to start."""


def test_guest_on_volumes(daemons: Daemons) -> None:
    """No wrong byte and no error, and the images have what the guest has flushed."""
    with xen_host(daemons, "xen1") as host:
        volumes.create(host, daemons)
        guest = volumes.start_guest(host, memory=MEMORY)
        flushes = Flushes(guest)
        jobs = [Job(guest, volumes.FILES, "files"), Job(guest, volumes.FIO, "fio")]
        wait_for_passes(jobs)
        for what, names in OUTAGES.items():
            flushes.start_measuring()
            daemons.command(f"kill {' '.join(names)}")
            time.sleep(DOWN_S)
            daemons.command("start")
            flushes.wait()
            flushes.report(f"{what} killed")
            wait_for_passes(jobs)
        volumes.assert_served_without_errors(host, guest, jobs)
        for job in jobs:
            job.stop()
        flushes.stop(host, daemons)
        guest.shut_down()
        volumes.remove(host)
