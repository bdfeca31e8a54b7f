# SPDX-License-Identifier: GPL-2.0-only
"""Compares the time of four queues on four virtual CPUs with our pair and with the C pair.

Time depends on the machine and its load, so only ratios are reported. The
pairs take turns; each round boots both from the same snapshot and gives one ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from plugin import LOAD_FLAGS
from plugin import compiled
from workloads import PARALLEL
from workloads import QUEUES

from harness.guest import FOUR_VCPUS
from harness.guest_snapshot import SnapshotWithGuest
from harness.xenhost import XenHost

if TYPE_CHECKING:
    from harness.kernel import Kernel
    from harness.pairs import Pair
    from harness.snapshot import Snapshot

ROUNDS = 5
WORKLOADS = PARALLEL["queues"]
MEASURES = {"processor": "processor time of QEMU", "clock": "clock of the guest"}

RATIOS: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "least": min,
    "most": max,
}


def measure_queues(
    options: argparse.Namespace, kernel: Kernel, pairs: Sequence[Pair]
) -> list[dict[str, Any]]:
    """Returns the ratios of the second pair to the first, for each workload and measure."""
    snapshot = SnapshotWithGuest(kernel, waiting=FOUR_VCPUS, guest_kernel=kernel)
    ratios: dict[tuple[str, str], list[float]] = {
        (workload.name, measure): [] for workload in WORKLOADS for measure in MEASURES
    }
    for number in range(ROUNDS):
        reference, ours = (_boot(options, snapshot, pair) for pair in pairs)
        for key, found in ratios.items():
            found.append(ours[key] / reference[key])
        print(
            f"  round {number + 1}: {[round(found[-1], 3) for found in ratios.values()]}",
            file=sys.stderr,
        )
    return [
        {"load": load, "measure": measure, **{name: brief(found) for name, brief in RATIOS.items()}}
        for (load, measure), found in ratios.items()
    ]


def _boot(
    options: argparse.Namespace, snapshot: Snapshot, pair: Pair
) -> dict[tuple[str, str], float]:
    """Boots once and returns what each load takes, by each measure."""
    load = compiled("load.c", *LOAD_FLAGS)
    logs = f"{options.logs}/queues-{pair.name.replace('/', '')}"
    host = XenHost(snapshot, pair, logs, programs=[load])
    took: dict[tuple[str, str], float] = {}
    with host.running():
        host.load_backend(f"max_queues={QUEUES}")
        host.ram_disks()
        host.sh("dd if=/dev/zero of=/dev/ram0 bs=1M 2>/dev/null || true")
        guest = host.start_guest()
        guest.sh(f"[ $(ls /sys/block/xvda/mq | wc -l) = {QUEUES} ]")
        guest.sh("echo none > /sys/block/xvda/queue/scheduler")
        for workload in WORKLOADS:
            start = host.machine.cpu_seconds()
            output = guest.sh(
                f"/programs/{load.name} {workload.arguments('/dev/xvda', 0)}", timeout=1200
            )
            took[workload.name, "processor"] = host.machine.cpu_seconds() - start
            took[workload.name, "clock"] = int(output.split()[1])
    return took
