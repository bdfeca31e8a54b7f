# SPDX-License-Identifier: GPL-2.0-only
"""Runs fio in a guest and verifies what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .job import Job
from .job import wait_for_passes

if TYPE_CHECKING:
    from .guest import Guest

FIO = (
    "fio --name={name} --filename=/dev/xvda --ioengine=libaio --direct=1 --offset={offset}M --size=1M "
    "--iodepth=16 --bsrange=512-128k --blockalign=512 --verify_fatal=1 --randseed=$pass --output-format=terse "
)
JOBS = {
    "data": "--rw=randwrite --verify=crc32c --do_verify=1 --norandommap=0",
    "synced": "--rw=randwrite --verify=crc32c --do_verify=1 --sync=dsync",
    "mixed": "--rw=randrw --verify=crc32c --verify_backlog=16",
    "trimmed": "--rw=trimwrite --bsrange=4k-128k --blockalign=4k",
}


def start_jobs(guest: Guest, names: Sequence[str] = tuple(JOBS), vdev: str = "xvda") -> list[Job]:
    """Starts jobs, each with its own part of the disk, which write other blocks in each pass."""
    fio = FIO.replace("/dev/xvda", f"/dev/{vdev}")
    jobs = [
        Job(guest, fio.format(name=name, offset=16 * number) + JOBS[name], f"{vdev}-{name}")
        for number, name in enumerate(JOBS)
        if name in names
    ]
    wait_for_passes(jobs)
    return jobs
