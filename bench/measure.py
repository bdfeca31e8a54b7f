# SPDX-License-Identifier: GPL-2.0-only
"""Computes the costs of one I/O from the counts of a window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from plugin import KERNEL
from plugin import MODULES
from plugin import XEN_END
from plugin import XEN_TEXT

if TYPE_CHECKING:
    from plugin import Symbols
    from plugin import Window
    from report import Result
    from workloads import Workload

PROFILE_LENGTH = 60
"""Number of functions in a profile, those with the most instructions."""

GRANT_OPERATIONS = {0: "map", 1: "unmap", 5: "copy"}
SEND = 4
"""The operation of event_channel_op that notifies another domain."""


def measured(
    window: Window,
    dom0: int,
    where: str,
    workload: Workload,
    ios: int,
    nanoseconds: int,
    symbols: tuple[Symbols, Symbols],
    modules: Mapping[str, Symbols],
    users: Mapping[str, Symbols],
) -> Result:
    """Returns the costs of one I/O of a window.

    `modules` and `users` are the functions of modules and of programs, by domain.
    `dom0` is the slot of dom0; `where` the workload ran is pair, guest (baseline) or dom0
    (baseline).
    """
    named = window.places(dom0)
    instructions, profile = _instructions(window, named, symbols, modules, users)
    result = {
        "where": where,
        "workload": workload.name,
        "bytes": workload.bytes,
        "ios": ios,
        "clock": round(nanoseconds / ios, 1),
        "instructions": {name: round(count / ios, 1) for name, count in instructions.items()},
        "profile": [
            [*key, round(count / ios, 1)] for key, count in profile.most_common(PROFILE_LENGTH)
        ],
    }
    return result | {
        group: {name: round(count / ios, 4) for name, count in sorted(counts.items())}
        for group, counts in _events(window, named).items()
    }


def _instructions(
    window: Window,
    named: Mapping[int, str],
    symbols: tuple[Symbols, Symbols],
    modules: Mapping[str, Symbols],
    users: Mapping[str, Symbols],
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    xen, linux = symbols
    totals: Counter[str] = Counter()
    profile: Counter[tuple[str, str]] = Counter()
    for address, count, slot in window.blocks:
        domain = named[slot]
        if XEN_TEXT <= address < XEN_END:
            where, name = "xen", xen.name(address)
            totals["xen"] += count
        elif address < KERNEL:
            where = domain
            name = users[domain].name(address) if domain in users else "(user)"
            totals[domain] += count
        else:
            where = domain
            known = modules[domain] if address >= MODULES and domain in modules else linux
            name = known.name(address)
            totals[domain] += count
        profile[(where, name)] += count
    return totals, profile


def _events(window: Window, named: Mapping[int, str]) -> dict[str, Counter[str]]:
    hypercalls: Counter[str] = Counter()
    grants: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for name, slot, key, runs, amount, empty in window.events:
        domain = named.get(slot, "idle")
        if name.startswith("hc:"):
            hypercalls[f"{domain}:{name[3:]}"] += runs
        else:
            others[f"{domain}:{name}"] += runs
        if name == "hc:grant_table_op":
            operation = GRANT_OPERATIONS.get(key, f"operation {key}")
            grants[f"{operation} calls"] += runs
            grants[f"{operation} pages"] += amount
            grants["empty calls"] += empty
        if name == "hc:event_channel_op" and key == SEND:
            others[f"{domain}:notifications"] += runs
        if name in ("copied", "xen_copied"):
            others[f"{domain}:{name} bytes"] += amount
    return {"hypercalls": hypercalls, "grants": grants, "events": others}
