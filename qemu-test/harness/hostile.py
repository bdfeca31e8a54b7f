# SPDX-License-Identifier: GPL-2.0-only
"""The frontend that breaks the ring protocol, rblk_hostile_front, beside another disk.

It binds to xvdb and runs lists of cases. Its report has a line for each: the case, its result, and
that of the valid requests that followed. What is written to xvda, a disk of the pair's frontend, is
read back meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .guest import Guest

CODE = 51728
"""Virtual device number of xvdb."""

REPORT = f"/sys/bus/xen/devices/vbd-{CODE}/report"
PARAMETERS = "/sys/module/rblk_hostile_front/parameters"

ALL, READ_ONLY, TROUBLE = range(3)
"""Lists of the module."""

FLOOD = 512
"""Wrong requests in a row."""

NOT_SUPPORTED = {
    "unknown-operation-4",
    "unknown-operation-255",
    "discard-secure",
    "flood",
}
OKAY = {
    "valid",
    "write-from-read-only-grant",
    "same-grant-twice",
    "same-id-twice",
    "response-in-a-full-slot",
    "indirect",
    "flush",
    "flush-with-data",
    "discard",
    "discard-unknown-flag",
    "read-only-flush",
    "read-only-read",
    "end",
}
"""Cases whose answer is another one than an error."""

CLOSED = {"req-prod-ahead", "req-prod-far", "req-prod-back", "born-broken"}
"""What makes a backend close the disk."""

MOST_LINES = 200
"""Lines that may be printed for a list, with some 700 wrong requests and 40 connections in it."""

TIMEOUT_MS = 2000
"""How long the module waits for a backend that takes no notice of a broken ring."""

WORK_ON_XVDA = """
dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null
while [ ! -e /tmp/stop ]; do
    dd if=/tmp/data of=/dev/xvda bs=64k oflag=direct 2>/dev/null &&
    dd if=/dev/xvda bs=64k count=4 iflag=direct 2>/dev/null | cmp -s - /tmp/data || exit 1
    echo x >> /tmp/rounds
    usleep 1000000
done
"""

Report = dict[str, tuple[str, str]]
"""The result of each case, and that of the valid requests after it."""


def load(guest: Guest) -> None:
    """Loads the module before the pair's frontend, so that it gets xvdb."""
    guest.unload_frontend()
    guest.sh(f"insmod /modules/rblk_hostile_front.ko device={CODE} timeout_ms={TIMEOUT_MS}")
    guest.load_frontend("max_ring_page_order=4")


def work_on_xvda(guest: Guest) -> None:
    """Starts the work on the other disk."""
    work = f"(sh -c '{WORK_ON_XVDA}' && echo good > /tmp/end || echo bad > /tmp/end)"
    guest.sh(f"{work} > /dev/null 2>&1 &")


def assert_work_is_good(guest: Guest) -> None:
    """Stops the work, which must not have failed."""
    guest.sh("touch /tmp/stop")
    guest.wait_for("[ -s /tmp/end ]")
    assert guest.sh("cat /tmp/end") == "good"


def choose(guest: Guest, number: int) -> None:
    """Chooses the list for the next xvdb."""
    guest.sh(f"echo {number} > {PARAMETERS}/list; rm -f /tmp/rounds")


def report_of(guest: Guest) -> Report:
    """Waits for the end of a list, and returns its report."""
    guest.wait_for(f"grep -q '^end ' {REPORT} && grep -q x /tmp/rounds", timeout=300)
    report = guest.sh(f"cat {REPORT}")
    print(report)
    return {case: (outcome, after) for case, outcome, after in map(str.split, report.splitlines())}


def split(report: Report) -> tuple[Report, Report]:
    """Splits the report of all cases into that of requests, and that of connections."""
    end = list(report).index("flood") + 1
    cases = list(report.items())
    return dict(cases[:end]), dict(cases[end:])


def assert_answers(report: Mapping[str, tuple[str, str]], excused: Iterable[str] = ()) -> None:
    """Checks that each request is completed as blkif.h says, and affects nothing else."""
    for case, (outcome, after) in report.items():
        wanted = "notsupp" if case in NOT_SUPPORTED else "okay" if case in OKAY else "error"
        assert outcome == wanted or case in excused, (case, outcome)
        assert after == "okay", (case, after)
