# SPDX-License-Identifier: GPL-2.0-only
"""A guest with volumes on Ceph and GlusterFS moves from one Xen host to another one."""

from __future__ import annotations

from cluster import volumes
from cluster.daemons import GATEWAY
from cluster.daemons import Daemons
from cluster.daemons import xen_host
from cluster.volumes import VOLUMES
from cluster.volumes import Flushes
from harness.guest import LOG
from harness.guest import Guest
from harness.job import Job
from harness.xenhost import XenHost

PORT = 5000
"""Where the second host waits for the guest."""
COPY = "dd bs=64k 2> /dev/null"
CONNECT = f"exec 3<>/dev/tcp/{GATEWAY}/{PORT}; {COPY} <&3 & exec {COPY} >&3"
"""What `xl migrate` talks to. nc copies a kilobyte at a time, and takes minutes here; cat waits for
the socket with the pipe locked, and Linux calls xl a hung task."""
MIGRATE_S = 900
PVH = "pvh"
"""Xen refuses to log which pages of a PV guest are written."""


def migrate(guest: Guest, target: XenHost) -> Guest:
    """Migrates the guest to another host with `xl migrate`; returns it there.

    xenconsoled names the log of a domain by the name that this has when it is created.
    """
    log, incoming = (LOG.format(name=f"{guest.name}{end}") for end in ("", "--incoming"))
    target.sh(
        f"ln -sf {log} {incoming}; "
        f"nc -l -p {PORT} -e xl migrate-receive > /tmp/receive.log 2>&1 < /dev/null &"
    )
    target.wait_for(f"netstat -ltn | grep -q ':{PORT} '")
    guest.host.sh(f"xl migrate -s '' {guest.name} \"bash -c '{CONNECT}'\"", timeout=MIGRATE_S)
    del guest.host.guests[guest.name]
    moved = target.guests[guest.name] = Guest(target, guest.name)
    moved.find_waiting()
    return moved


def test_guest_on_volumes_migrates(daemons: Daemons) -> None:
    """No wrong byte and no error; the other host is the writer, and the images have all."""
    with xen_host(daemons, "xen1") as first, xen_host(daemons, "xen2", PORT) as second:
        volumes.create(first, daemons)
        guest = volumes.start_guest(first, type=PVH)
        flushes = Flushes(guest)
        jobs = [Job(guest, volumes.FILES)]
        flushes.wait()
        for volume in VOLUMES.values():
            first.sh(f"rblk volume hand-over {volume} xen2")
        flushes.start_measuring()
        moved = migrate(guest, second)
        for job in [*jobs, *flushes.jobs.values()]:
            job.guest = moved
        flushes.wait()
        flushes.report("migrated to another host")
        for volume in VOLUMES.values():
            assert volumes.info(first, volume)["writer"]["host"] == "xen2"
        # The former host enlarges them, and the agent of the new one notices.
        for vdev, volume in VOLUMES.items():
            if volume != volumes.ROOT:
                first.sh(f"rblk volume resize {volume} {2 * volumes.DATA_MIB}M")
                moved.wait_for(
                    f"[ $(blockdev --getsize64 /dev/{vdev}) = {volumes.DATA_MIB << 21} ]"
                )
        volumes.assert_served_without_errors(second, moved, jobs)
        for job in jobs:
            job.stop()
        flushes.stop(second, daemons)
        moved.shut_down()
        volumes.remove(first)
