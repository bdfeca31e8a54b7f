# SPDX-License-Identifier: GPL-2.0-only
"""A frontend that breaks the ring protocol gets from rblktap the answers of rblkback."""

from pathlib import Path

from harness import hostile
from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.hostile import ALL
from harness.hostile import CLOSED
from harness.hostile import CODE
from harness.hostile import MOST_LINES
from harness.hostile import READ_ONLY
from harness.hostile import TROUBLE
from harness.hostile import Report
from harness.hostile import assert_answers
from harness.leak_counts import xen_counts
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.xenhost import XenHost


def play(host: XenHost, guest: Guest, number: int, mode: str = "rw") -> Report:
    """Plays a list on a fresh xvdb; returns its report."""
    hostile.choose(guest, number)
    host.attach(guest, RblkDisk("xvdb", "b.raw", mode))
    report = hostile.report_of(guest)
    log = f"/run/rblk/{guest.domid}-{CODE}.log"
    lines = int(host.sh(f"wc -l < {log}"))
    assert lines <= MOST_LINES, host.sh(f"tail -n 60 {log}")
    assert int(host.sh(f"grep -c '^rblktap: ' {log} || true")) == 0, host.sh(f"tail {log}")
    host.detach(guest, "xvdb")
    host.wait_for(f"! xenstore-exists backend/vbd3/{guest.domid}/{CODE}")
    guest.wait_for(f"[ ! -e /sys/bus/xen/devices/vbd-{CODE} ]")
    return report


def test_tap_hostile(xen: StartHost, test_modules: Path) -> None:
    """An invalid request is answered with an error, and a broken ring stops its own disk only."""
    image = rblktap.disk([Image("a.raw", 16), Image("b.raw", 16)])
    modules = [test_modules / "rblk_hostile_front.ko"]
    host = xen(modules=modules, image=image, **rblkd.options())
    rblkd.install(host)
    rblkd.start(host)
    guest = host.start_guest(disks=[])
    hostile.load(guest)
    before = xen_counts(host)
    host.attach(guest, RblkDisk("xvda", "a.raw"))
    guest.wait_for_disk("xvda")
    assert_served_by_pair(host, guest)
    order = f"/local/domain/{guest.domid}/device/vbd/51712/ring-page-order"
    assert host.xenstore_read(order) == "4"
    hostile.work_on_xvda(guest)

    requests, rest = hostile.split(play(host, guest, ALL))
    assert_answers(requests)
    assert_answers(play(host, guest, READ_ONLY, "r"))
    closing = {case for case in rest if rest[case][0] == "closing"} - {"toggle"}
    assert closing == CLOSED
    for case, result in rest.items():
        assert result == ("okay", "okay") or "abi" not in case, (case, result)
    assert rest["end"] == rest["lost-event"] == ("okay", "okay")
    assert play(host, guest, TROUBLE) == {"end": ("error", "okay")}

    hostile.assert_work_is_good(guest)
    rblkd.detach(host, guest, "xvda")
    after = xen_counts(host)
    assert [after[key] for key in ("grants", "events", "pages")] == [
        before[key] for key in ("grants", "events", "pages")
    ]
