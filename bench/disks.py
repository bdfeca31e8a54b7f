# SPDX-License-Identifier: GPL-2.0-only
"""Measures the cost of disks beside I/O: connecting, memory and wakeups.

For each number of disks a guest starts without any. They are attached while the
bus binds no driver by itself, so that their backends wait in state 2. Then the
frontend is bound to all of them, one after the other, and they connect together.

idle        connected, before the first I/O of a load
used        right after a load
root        a guest boots with disks and mounts the first one: from the start of its kernel on
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from collections.abc import Iterator
from string import ascii_lowercase
from typing import TYPE_CHECKING
from typing import Any

from plugin import LOAD_FLAGS
from plugin import compiled
from report import shown

from harness.leak_counts import backend_switches
from harness.leak_counts import free_kb
from harness.shell import MachineTrouble
from harness.xenhost import Disk
from harness.xenhost import XenHost
from harness.xenimage import root_disk

if TYPE_CHECKING:
    from harness.guest import Guest
    from harness.pairs import Pair
    from harness.snapshot import Snapshot

NUMBERS = (1, 8, 16)
ROOT_DISKS = 8
MEGABYTES = 4
IDLE_SECONDS = 10
SETTLED = 5
"""Seconds after which all disks are connected, which is checked, and memory was freed."""
COUNT = 2000
IOS = COUNT + COUNT // 4
"""Operations of load.c: a quarter more for warming up."""

BUS = "/sys/bus/xen"
SETTINGS = 'tsc_mode = "native"'
CONNECTED = ".*xvd.*indirect descriptors"
MOUNTED = r".*EXT4-fs \(xvda\): mounted"
"""Beginnings of lines in the guest's log."""

CLOCK = "now() { awk '/^now at/ { print $3; exit }' /proc/timer_list; }"
"""Nanoseconds; the machine runs one instruction in each."""

COLUMNS = {
    "connect": "connect (ms)",
    "guest idle": "guest idle (KiB)",
    "dom0 idle": "dom0 idle (KiB)",
    "guest used": "guest used (KiB)",
    "dom0 used": "dom0 used (KiB)",
    "wake-ups": "wake-ups (1/s)",
    "4k qd8": "4k read qd8, all",
    "there": "boot: disks (ms)",
    "root": "boot: root (ms)",
}
"""Titles of columns. Memory is per disk; wakeups are those of all threads of the backend."""


def measure_disks(
    options: argparse.Namespace, snapshot: Snapshot, pair: Pair, kind: str
) -> list[dict[str, Any]]:
    """Boots once and returns, for each number of disks, a row."""
    load = compiled("load.c", *LOAD_FLAGS)
    logs = f"{options.logs}/disks-{pair.name.replace('/', '')}-{kind}"
    host = XenHost(snapshot, pair, logs, programs=[load], image=root_disk())
    with host.running():
        host.load_backend()
        host.ram_disks(max(NUMBERS), MEGABYTES)
        host.sh(
            "for disk in /dev/ram*; do dd if=/dev/zero of=$disk bs=1M 2>/dev/null || true; done"
        )
        rows = [_measure(host, f"/programs/{load.name}", kind, number) for number in NUMBERS]
    return rows


def show(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Returns the table as lines of text."""
    yield f"{'disks':6}{'pair':5}" + "".join(f"{title:>18}" for title in COLUMNS.values())
    for row in rows:
        yield f"{row['disks']:<6}{row['pair']:5}" + "".join(
            f"{shown(row[name]):>18}" for name in COLUMNS
        )


def _measure(host: XenHost, load: str, kind: str, number: int) -> dict[str, Any]:
    guest = host.start_guest(type=kind, memory=320, disks=[], settings=SETTINGS)
    disks = [f"xvd{letter}" for letter in ascii_lowercase[:number]]
    # What the start of the guest has freed comes back with a delay.
    guest.sh(f"sleep {SETTLED}")
    before = free_kb(guest), free_kb(host)
    guest.sh(f"echo 0 > {BUS}/drivers_autoprobe")
    for place, name in enumerate(disks):
        host.attach(guest, Disk(name, f"/dev/ram{place}"))
    connect = _connect(guest, disks)
    guest.sh("for disk in /sys/block/xvd*; do echo none > $disk/queue/scheduler; done")
    idle = free_kb(guest), free_kb(host)
    switches = backend_switches(host)
    host.sh(f"sleep {IDLE_SECONDS}", timeout=600)
    switches = backend_switches(host) - switches
    small = _io(guest, disks, f"{load} /dev/$disk randread 4096 8 {COUNT} 0 1")
    _io(guest, disks, f"{load} /dev/$disk read 131072 8 64 0 1")
    used = free_kb(guest), free_kb(host)
    guest.shut_down()
    there, root = _boot(host, kind, number) if number == ROOT_DISKS else (None, None)
    row = {
        "pair": host.pair.name,
        "type": kind,
        "disks": number,
        "connect": connect / 1000,
        "guest idle": (before[0] - idle[0]) / number,
        "dom0 idle": (before[1] - idle[1]) / number,
        "guest used": (before[0] - used[0]) / number,
        "dom0 used": (before[1] - used[1]) / number,
        "wake-ups": switches / IDLE_SECONDS,
        "4k qd8": small / number / IOS,
        "there": there,
        "root": root,
    }
    print(f"  {host.pair.name} {kind}: {row}", file=sys.stderr)
    return row


def _connect(guest: Guest, disks: list[str]) -> int:
    """Microseconds from the first disk that is bound until the frontend has said of all what they
    are.
    """
    guest.wait_for(f"[ $(ls -d {BUS}/devices/vbd-* | wc -l) = {len(disks)} ]")
    guest.sh(
        f"dmesg -c >/dev/null; echo start > /dev/kmsg; for disk in $(ls {BUS}/devices | grep vbd); do "
        f"echo $disk > {BUS}/drivers/vbd/bind; done; sleep {SETTLED}",
        timeout=600,
    )
    guest.sh(" && ".join(f"[ -b /dev/{disk} ]" for disk in disks))
    times = _stamps(guest, f"start|{CONNECTED}")
    if len(times) != len(disks) + 1:
        raise MachineTrouble(f"{len(times) - 1} of {len(disks)} disks have connected")
    return times[-1] - times[0]


def _boot(host: XenHost, kind: str, number: int) -> tuple[float, float]:
    """Milliseconds from the start of a guest's kernel until the last disk is there, and to its
    root.
    """
    disks = [Disk("xvda", "/dev/vdb")]
    for place, letter in enumerate(ascii_lowercase[1:number]):
        disks.append(Disk(f"xvd{letter}", f"/dev/ram{place}"))
    guest = host.start_guest(type=kind, memory=320, disks=disks, root="xvda", settings=SETTINGS)
    there, root = _stamps(guest, CONNECTED), _stamps(guest, MOUNTED)
    guest.shut_down()
    if len(there) != number or len(root) != 1:
        raise MachineTrouble(f"of {number} disks {len(there)} have connected; root: {root}")
    return there[-1] / 1000, root[0] / 1000


def _stamps(guest: Guest, pattern: str) -> list[int]:
    """Returns the times of lines in the guest's log that begin with a text, in microseconds."""
    found = re.findall(rf"^\[ *(\d+)\.(\d{{6}})\] (?:{pattern})", guest.sh("dmesg"), re.MULTILINE)
    return [int(seconds) * 1000000 + int(rest) for seconds, rest in found]


def _io(guest: Guest, disks: list[str], command: str) -> int:
    """Nanoseconds that a load takes that runs on all disks at once."""
    return int(
        guest.sh(
            f"{CLOCK}; start=$(now); for disk in {' '.join(disks)}; do {command} >/dev/null & done; "
            "wait; echo $(($(now) - start))",
            timeout=1200,
        )
    )
