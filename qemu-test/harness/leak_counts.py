# SPDX-License-Identifier: GPL-2.0-only
"""Counts of what a driver could leak, as Xen and the kernels have them.

Xen's debug key `g` prints every active grant, `e` every event channel and `q`
every domain with its pages. The counts are totals by domain.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from .guest import Guest
    from .shell import Target
    from .xenhost import XenHost

MODULE_ADDRESS = re.compile(
    r"\[(rblk|xen_blk)\w+\]|^ +(\[<[0-9a-f]+>\] )?0xffffffff[a-f]", re.MULTILINE
)
"""A line of a backtrace in a driver of the pair, or in a module that is gone."""


def xen_counts(host: XenHost) -> dict[str, object]:
    """Grants, event channels and pages by domain, and xenstore's nodes."""
    return {
        "grants": _by_domain(host.xen_messages("g"), r"for remote d(\d+)", r"\[0x[0-9a-f]+\]"),
        "events": _by_domain(host.xen_messages("e"), r"for domain (\d+)", r"\[\d/\d/"),
        "pages": re.findall(r"nr_pages=(\d+)", host.xen_messages("q")),
        "xenstore": host.sh("xenstore-ls | wc -l"),
    }


def mapped_pages(host: XenHost, guest: Guest) -> tuple[int, int]:
    """Returns how many pages of a guest others have mapped read-only, and how many writable.

    Xen counts the uses of a grant in the column `pin`, those that may write in its lowest byte.
    """
    _, _, grants = host.xen_messages("g").partition(f"for remote d{guest.domid} ")
    grants, _, _ = grants.partition("for remote")
    pins = [int(pin, 16) for pin in re.findall(r"\[0x\w+\] +\d+ 0x\w+ 0x(\w{8})", grants)]
    written = sum(pin & 0xFF != 0 for pin in pins)
    return len(pins) - written, written


def free_kb(machine: Target, drop: int = 3) -> int:
    """Returns the free memory, including the pages in per-CPU lists, which MemFree leaves out.

    Caches are dropped first: `drop` 1 drops the page cache, 3 also runs the shrinkers of drivers.
    """
    return 4 * int(
        machine.sh(
            f"sync; echo {drop} > /proc/sys/vm/drop_caches; usleep 500000; "
            "awk '$1 ~ /^(nr_free_pages|count:)$/ { sum += $2 } END { print sum }' /proc/zoneinfo"
        )
    )


def kernel_counts(machine: Target) -> dict[str, Any]:
    """Returns the numbers of kernel threads, memory, and modules with their reference counts."""
    machine.sh("sync; echo 3 > /proc/sys/vm/drop_caches; sleep 1")
    return {
        "free_kb": free_kb(machine),
        "threads": int(machine.sh("ps | grep '\\[.*\\]$' | grep -vc kworker")),
        "slab_kb": int(machine.sh("sed -n 's/^SUnreclaim: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")),
        "modules": machine.sh("cut -d' ' -f1,3 /proc/modules | sort"),
    }


def backend_switches(host: XenHost, vdev: str = "xvd") -> int:
    """Returns how often the threads of the server's backend, or of one disk, have gone to sleep."""
    return int(
        host.server.sh(
            f"cat $(grep -l {vdev} /proc/[0-9]*/comm | sed s/comm/status/) | "
            "awk '/^voluntary/ {sum += $2} END {print sum}'"
        )
    )


KEEPS_PAGES = "persistent_grant_unused_seconds=0"
"""Parameters of a backend that does not wake up after a minute to free unused pages."""


def assert_idle(host: XenHost, record_property: Callable[[str, object], None]) -> None:
    """Checks that idle threads of the backend do not wake up; those of the C module do.

    The backend was loaded with `KEEPS_PAGES`.
    """
    before = backend_switches(host)
    host.server.sh("sleep 3")
    ours = host.pair.backend.name == "rblkback"
    assert (backend_switches(host) == before) == ours
    if not ours:
        record_property("c_fails", "B-13")


def assert_checked(machine: Target) -> None:
    """Checks that lockdep is still active and kmemleak reports nothing."""
    machine.sh("grep -q '^ debug_locks: *1$' /proc/lockdep_stats")
    assert_no_lost_memory(machine)


def assert_no_lost_memory(machine: Target) -> None:
    """Checks that kmemleak reports no memory of a driver.

    An allocation counts if it is five seconds old and two scans have not found a pointer to it.
    The backtrace of one whose module was unloaded has addresses without names.
    """
    found = machine.sh(
        "cd /sys/kernel/debug && sleep 6 && echo scan > kmemleak && echo scan > kmemleak && "
        "cat kmemleak",
        timeout=300,
    )
    reports = re.split(r"^(?=unreferenced object)", found, flags=re.MULTILINE)
    ours = [report for report in reports if MODULE_ADDRESS.search(report)]
    assert not ours, f"memory that nothing points to in {machine.name}:\n" + "".join(ours[:5])


def _by_domain(text: str, domain_pattern: str, item_pattern: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    domain = None
    for line in text.splitlines():
        match = re.search(domain_pattern, line)
        if match:
            domain = match.group(1)
            counts.setdefault(domain, 0)
        elif domain is not None and re.search(item_pattern, line):
            counts[domain] += 1
    return counts
