# SPDX-License-Identifier: GPL-2.0-only
"""The workloads."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Workload:
    """One workload, as load.c runs it, and its disk."""

    name: str
    kind: str
    bytes: int
    depth: int
    count: int
    disk: str = "xvda"
    jobs: int = 1

    def arguments(self, device: str, window: int) -> str:
        """Returns the command line of load.c."""
        return f"{device} {self.kind} {self.bytes} {self.depth} {self.count} {window} {self.jobs}"


WORKLOADS = (
    Workload("4k read qd1", "randread", 4 * KIB, 1, 1000),
    Workload("4k read qd8", "randread", 4 * KIB, 8, 4000),
    Workload("4k read qd32", "randread", 4 * KIB, 32, 8000),
    Workload("4k write qd1", "randwrite", 4 * KIB, 1, 1000),
    Workload("4k write qd8", "randwrite", 4 * KIB, 8, 4000),
    Workload("4k write qd32", "randwrite", 4 * KIB, 32, 8000),
    Workload("4k mixed qd32", "mixed", 4 * KIB, 32, 8000),
    Workload("4k write+flush qd1", "flushed", 4 * KIB, 1, 500, "xvdb"),
    Workload("null_blk read qd1", "randread", 4 * KIB, 1, 1000, "xvdc"),
    Workload("null_blk read qd32", "randread", 4 * KIB, 32, 8000, "xvdc"),
    Workload("null_blk write qd32", "randwrite", 4 * KIB, 32, 8000, "xvdc"),
    Workload("128k read qd8", "read", 128 * KIB, 8, 800),
    Workload("128k write qd8", "write", 128 * KIB, 8, 800),
    Workload("1m read qd4", "read", 1024 * KIB, 4, 120),
    Workload("1m write qd4", "write", 1024 * KIB, 4, 120),
    Workload("idle second", "idle", 0, 0, 20),
)

QUEUES = 4
"""Rings of a disk, and virtual CPUs of the guest, where there are several."""

PARALLEL = {
    "queues": (
        Workload("4k read 4 x qd1", "randread", 4 * KIB, 1, 1000, jobs=QUEUES),
        Workload("4k read 4 x qd8", "randread", 4 * KIB, 8, 4000, jobs=QUEUES),
        Workload("4k write 4 x qd8", "randwrite", 4 * KIB, 8, 4000, jobs=QUEUES),
        Workload("128k read 4 x qd2", "read", 128 * KIB, 2, 400, jobs=QUEUES),
    ),
    "large-ring": (
        Workload("1m read 4 x qd1", "read", 1024 * KIB, 1, 60, jobs=QUEUES),
        Workload("1m read 4 x qd8", "read", 1024 * KIB, 8, 60, jobs=QUEUES),
    ),
}
"""Workloads of settings with several queues: each job runs on a virtual CPU of its own."""

DEFAULT = ("4k read qd1", "4k write qd1", "4k read qd32", "128k read qd8")
"""The workloads that are measured with default settings too."""


def chosen(text: str, setting: str) -> list[Workload]:
    """Returns the workloads whose names contain one of the comma-separated texts."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    workloads = [
        workload
        for workload in PARALLEL.get(setting, WORKLOADS)
        if (setting != "default" or workload.name in DEFAULT)
        and (setting != "qcow2" or workload.disk == "xvda")
    ]
    return [
        workload
        for workload in workloads
        if not parts or any(part in workload.name for part in parts)
    ]
