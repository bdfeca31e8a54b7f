# SPDX-License-Identifier: GPL-2.0-only
"""The volumes of a guest, and what the guest does with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.daemons import Daemons
from harness import rblkd
from harness.driver_check import assert_served_by_pair
from harness.guest import Guest
from harness.job import Job
from harness.job import wait_for_passes
from harness.rblkd import RblkDisk
from harness.xenhost import XenHost
from harness.xenimage import root_disk

ROOT_MIB, DATA_MIB = 384, 64
ROOT, GLUSTER, RBD = "fast/root", "slow/data", "fast/data"
BLOCKS = 256
"""The blocks of a disk that are written, flushed and checked, see flushes.c."""
VOLUMES = {"xvda": ROOT, "xvdb": GLUSTER, "xvdc": RBD}
FILES = (
    "dd if=/dev/urandom of=/work bs=64k count=16 conv=fsync 2> /dev/null && "
    "dd if=/work of=/copy bs=64k conv=fsync 2> /dev/null && "
    "dd if=/copy bs=64k iflag=direct 2> /dev/null | cmp - /work"
)
FIO = (
    "fio --output-format=terse --thread --ioengine=libaio --direct=1 --rw=randrw --bs=4k --offset=32M "
    "--size=256k --iodepth=4 --verify=crc32c --verify_backlog=16 --verify_fatal=1 --randseed=$pass "
    "--name=xvdb --filename=/dev/xvdb --name=xvdc --filename=/dev/xvdc"
)


def start_guest(host: XenHost, **kind: Any) -> Guest:
    """Starts a guest with its root disk, and attaches the others.

    On such a machine the client libraries take seconds to load, one after the other.
    """
    root, *others = [RblkDisk(vdev, f"vol:{volume}") for vdev, volume in VOLUMES.items()]
    guest = host.start_guest(disks=[root], root=root.vdev, **kind)
    assert f"/dev/{root.vdev} / ext4 rw" in guest.sh("cat /proc/mounts")
    for disk in others:
        host.attach(guest, disk)
        guest.wait_for_disk(disk.vdev)
    return guest


def create(host: XenHost, daemons: Daemons) -> None:
    """Creates the volumes as Documentation/volumes.rst says, and fills that of the root disk."""
    host.sh(f"rblk storage add fast rbd:rbd && rblk storage add slow {daemons.gluster}")
    for volume in VOLUMES.values():
        host.sh(f"rblk volume create {volume} {ROOT_MIB if volume == ROOT else DATA_MIB}M")
    daemons.command(f"fill {_image(host, ROOT)} {root_disk(f'{ROOT_MIB}M')}")


def remove(host: XenHost) -> None:
    """Removes the volumes, which no guest uses, and the storages."""
    for volume in VOLUMES.values():
        host.wait_for(f"rblk volume remove {volume} > /tmp/remove.log 2>&1")
    host.sh("rblk storage remove fast && rblk storage remove slow")


def info(host: XenHost, volume: str) -> dict[str, Any]:
    """Returns what the registry has about a volume."""
    found = rblkd.rblk(host, f"volume info {volume}")
    assert isinstance(found, dict)
    return found


def _image(host: XenHost, volume: str) -> str:
    return f"rblk-{info(host, volume)['uuid']}"


class Flushes:
    """Jobs of a guest that check what they have flushed, see flushes.c."""

    def __init__(self, guest: Guest) -> None:
        guest.unpack("/payload/programs.packed")
        self.jobs = {
            volume: Job(guest, f"/programs/flushes /dev/{vdev} {BLOCKS} $pass", f"{vdev}-flushes")
            for vdev, volume in VOLUMES.items()
            if volume != ROOT
        }
        self._reported = dict.fromkeys(self.jobs, 0)

    def passes(self, job: Job) -> int:
        """Returns how many passes a job has completed."""
        return int(job.guest.sh(f"echo {job.count()}"))

    def start_measuring(self) -> None:
        """Has the next report begin with the pass that runs."""
        self._reported = {volume: self.passes(job) for volume, job in self.jobs.items()}

    def report(self, what: str) -> None:
        """Prints the longest time that a request has taken, and begins again."""
        for volume, job in self.jobs.items():
            seen = f"tail -n +{self._reported[volume] + 1} {job.files}.log"
            longest = job.guest.sh(f"{seen} | sort -n | tail -n 1").strip()
            kind = "gluster" if volume == GLUSTER else "rbd"
            print(f"{kind}, a guest, {what}: longest stall: {longest} ms")

    def wait(self) -> None:
        """Waits until what was written before has been read again."""
        wait_for_passes([*self.jobs.values()], 2)

    def stop(self, host: XenHost, daemons: Daemons) -> None:
        """Detaches the disks of the jobs, and checks the images from outside."""
        for vdev, volume in VOLUMES.items():
            if job := self.jobs.get(volume):
                job.stop()
                number = self.passes(job)
                rblkd.detach(host, job.guest, vdev)
                daemons.command(f"verify {_uri(host, daemons, volume)} {BLOCKS} {number}")


def _uri(host: XenHost, daemons: Daemons, volume: str) -> str:
    """Returns the URI of a volume's image for the process that has the daemons."""
    image = _image(host, volume)
    if volume == GLUSTER:
        return f"{daemons.gluster}/rblk/{image}"
    return f"rbd:rbd/{image}?conf={daemons.ceph_conf}"


def assert_served_without_errors(host: XenHost, guest: Guest, jobs: Sequence[Job]) -> None:
    """Waits for a pass of each job, and checks that no request has failed."""
    wait_for_passes(jobs)
    for vdev in VOLUMES:
        assert_served_by_pair(host, guest, vdev)
        assert rblkd.statistics(host, guest, vdev)["errors"] == 0
    assert "I/O error" not in guest.sh("dmesg")
