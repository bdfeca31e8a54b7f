# SPDX-License-Identifier: GPL-2.0-only
"""A frontend that breaks the ring protocol, beside a disk that must not be affected.

See harness/hostile.py. The pair's own frontend serves xvda meanwhile, on a ring of 16 pages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import hostile
from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.hostile import ALL
from harness.hostile import CLOSED
from harness.hostile import CODE
from harness.hostile import FLOOD
from harness.hostile import MOST_LINES
from harness.hostile import PARAMETERS
from harness.hostile import READ_ONLY
from harness.hostile import TROUBLE
from harness.hostile import Report
from harness.hostile import assert_answers
from harness.leak_counts import backend_switches
from harness.leak_counts import xen_counts
from harness.xenhost import Disk
from harness.xenhost import Server
from harness.xenhost import XenHost


def start(xen: StartHost, test_modules: Path) -> tuple[XenHost, Server, Guest, dict[str, object]]:
    """A host, who serves its two RAM disks, and a guest whose xvda works without end."""
    host = xen(modules=[test_modules / "rblk_hostile_front.ko"])
    server = host.start_server()
    server.load_backend()
    server.ram_disks(2, megabytes=16)
    guest = host.start_guest(disks=[])
    hostile.load(guest)
    before = xen_counts(host)
    host.attach(guest, Disk("xvda", "/dev/ram0"))
    guest.wait_for_disk("xvda")
    assert_served_by_pair(host, guest)
    order = f"/local/domain/{guest.domid}/device/vbd/51712/ring-page-order"
    assert host.xenstore_read(order) == "4"
    hostile.work_on_xvda(guest)
    return host, server, guest, before


def remove(host: XenHost, server: Server, guest: Guest, vdev: str, code: int) -> None:
    """Detaches a disk; nothing of it stays."""
    host.detach(guest, vdev)
    back = f"/local/domain/{server.domid}/backend/vbd/{guest.domid}/{code}"
    host.wait_for(f"! xenstore-exists {back}")
    guest.wait_for(f"[ ! -e /sys/bus/xen/devices/vbd-{code} ]")


@contextmanager
def playing(
    host: XenHost, server: Server, guest: Guest, number: int, mode: str = "rw"
) -> Iterator[Report]:
    """Plays a list on a fresh xvdb; gives its report, {case: (outcome, after)}, at its end, when
    the disk is still connected.
    """
    hostile.choose(guest, number)
    lines = int(server.sh("dmesg | wc -l"))
    host.attach(guest, Disk("xvdb", "/dev/ram1", mode))
    yield hostile.report_of(guest)
    remove(host, server, guest, "xvdb", CODE)
    printed = int(server.sh("dmesg | wc -l")) - lines
    assert printed <= MOST_LINES, server.sh("dmesg | tail -n 60")


def play(host: XenHost, server: Server, guest: Guest, number: int, mode: str = "rw") -> Report:
    """Like `playing`, but only checks the report."""
    with playing(host, server, guest, number, mode) as report:
        return report


def trouble(host: XenHost, server: Server, guest: Guest) -> int:
    """Wrong requests, then events alone; how often the backend slept at the former.

    Linux counts the events that brought nothing, as a driver says when it gives them back, and
    gives them back late. A disk in use has few of them.
    """
    with playing(host, server, guest, TROUBLE) as report:
        assert report == {"end": ("error", "okay")}
        slept = backend_switches(host, "xvdb")
        server.wait_for(f"[ $(cat {event_counts(guest, CODE)}/jiffies_eoi_delayed) -gt 0 ]")
        in_use = event_counts(guest, 51712)
        events, alone = map(int, server.sh(f"cat {in_use}/events {in_use}/spurious_events").split())
    print(f"the backend slept {slept} times; xvda had {events} events, {alone} of them for nothing")
    assert alone < events / 2
    return slept


def event_counts(guest: Guest, code: int) -> str:
    """Where Linux shows what it counts of the events of a backend's device."""
    return f"/sys/bus/xen-backend/devices/vbd-{guest.domid}-{code}/xenbus"


def play_read_only_later(host: XenHost, server: Server, guest: Guest) -> None:
    """A disk becomes read-only while it is open for writing: it is so for the next connection."""
    bound = "/sys/bus/xen/drivers/vbd-hostile"
    with playing(host, server, guest, READ_ONLY):
        server.sh("blockdev --setro /dev/ram1")
        guest.sh(f"echo vbd-{CODE} > {bound}/unbind")
        guest.sh(f"echo vbd-{CODE} > {bound}/bind")
        assert_answers(hostile.report_of(guest))
    server.sh("blockdev --setrw /dev/ram1")


@pytest.mark.feature("BE-07", "BE-10", "BE-40", "BE-42", "BE-43", "BE-49", "BE-50", "B-10", "B-19")
def test_hostile_frontend(
    xen: StartHost, test_modules: Path, record_property: RecordProperty
) -> None:
    """Every invalid request is completed with an error, and a broken ring stops its own disk only.

    The C backend is the reference for what a request must be answered by. It takes
    a secure discard for an ordinary one where none was offered, and refuses to
    flush a disk that is read-only. It does not close a disk whose ring is broken,
    warns, with a stack trace, of one that it cannot connect to, and does not know
    the Arm layout. It sleeps at each wrong request.
    """
    host, server, guest, before = start(xen, test_modules)
    ours = host.pair.backend.name == "rblkback"
    if not ours:
        record_property("c_fails", "B-10, B-19")

    guest.sh(f"echo {int(not ours)} > {PARAMETERS}/gentle")
    report = play(host, server, guest, ALL)
    requests, rest = hostile.split(report)
    assert_answers(requests, () if ours else ("discard-secure",))
    assert_answers(play(host, server, guest, READ_ONLY, "r"), () if ours else ("read-only-flush",))
    if ours:
        play_read_only_later(host, server, guest)
    closing = {case for case in rest if rest[case][0] == "closing"} - {"toggle"}
    assert closing == (CLOSED if ours else {"arm-abi-0"})
    for case, result in rest.items():
        layout = "abi" in case and (ours or "arm" not in case)
        assert result == ("okay", "okay") or not layout, (case, result)
    # Also a request whose event comes late.
    assert rest["end"] == rest["lost-event"] == ("okay", "okay")

    assert (trouble(host, server, guest) >= FLOOD) != ours

    hostile.assert_work_is_good(guest)
    remove(host, server, guest, "xvda", 51712)
    server.take_back_memory()
    after = xen_counts(host)
    assert [after[key] for key in ("grants", "events", "pages")] == [
        before[key] for key in ("grants", "events", "pages")
    ]
