# SPDX-License-Identifier: GPL-2.0-only
"""A disk with a write cache reconnects to a backend without flush: no flush is completed as done.

Dom0's shell plays the backends. They have no ring, so a flush that is sent to one stays in flight.
"""

from collections.abc import Mapping

import pytest

from harness.driver_check import assert_front_of_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.toolstack import connect_disks
from harness.toolstack import directories
from harness.toolstack import remove_devices
from harness.toolstack import write_nodes
from harness.xenhost import XenHost

XVDB, XVDC = 51728, 51744
CACHE, NO_CACHE = {"feature-flush-cache": 1}, {"feature-flush-cache": 0}
BARRIER = {"feature-barrier": 1}

FLUSH = "/usr/bin/dd if=/dev/null of=/dev/{0} conv=notrunc,fsync"
"""A flush, and nothing else: there is no data."""
FLUSHER = f"""
rm -f /tmp/ended
({FLUSH} && echo durable > /tmp/ended || echo failed > /tmp/ended) > /dev/null 2>&1 &
"""
IN_FLIGHT = "grep -q '^State:.D' /proc/$(pidof dd)/status"


def start_flush(guest: Guest, vdev: str) -> None:
    """A flush is in flight."""
    guest.sh(FLUSHER.format(vdev))
    guest.wait_for(IN_FLIGHT)


def replace_backend(host: XenHost, guest: Guest, code: int, offers: Mapping[str, object]) -> None:
    """The backend closes, and one with these offers takes its place."""
    front, back = directories(guest.domid, code)
    for state, expected in ((6, 1), (2, 3)):
        write_nodes(host, back, {"state": state})
        host.wait_for(f"[ $(xenstore-read {front}/state) = {expected} ]")
    write_nodes(host, back, {**offers, "state": 4})
    host.wait_for(f"[ $(xenstore-read {front}/state) = 4 ]")


def has_cache(guest: Guest, vdev: str) -> bool:
    """Returns `True` if the block layer sends flushes."""
    return guest.sh(f"cat /sys/block/{vdev}/queue/write_cache") == "write back"


@pytest.mark.feature("F-26")
def test_flush_lost(xen: StartHost) -> None:
    """A flush that was in flight, and one after the reconnect, fail; with a backend that can flush
    again they are sent to it. A disk that never had a cache has nothing to flush.

    xen-blkfront is not asked: it ends the disk when the backend closes. After a restore it reports
    such a flush done.
    """
    host = xen()
    guest = host.start_guest(disks=[])
    assert_front_of_pair(host, guest)
    guest.allow("I/O error, dev xvdb")
    for offers in (CACHE, BARRIER):
        connect_disks(host, guest, {XVDB: (offers, {})})
        guest.wait_for_disk("xvdb")
        start_flush(guest, "xvdb")
        replace_backend(host, guest, XVDB, {**NO_CACHE, "feature-barrier": 0})
        guest.wait_for("[ -s /tmp/ended ]")
        assert guest.sh("cat /tmp/ended") == "failed"
        assert "an earlier one had a write cache" in guest.sh("dmesg | tail")
        # Writes that were acknowledged before may be lost, whoever asks.
        assert has_cache(guest, "xvdb")
        assert guest.run(FLUSH.format("xvdb"))[0] != 0
        replace_backend(host, guest, XVDB, {**NO_CACHE, "feature-barrier": 0})
        assert guest.run(FLUSH.format("xvdb"))[0] != 0
        replace_backend(host, guest, XVDB, offers)
        start_flush(guest, "xvdb")
        remove_devices(host, guest, [XVDB])
        guest.wait_for('[ "$(cat /tmp/ended)" = failed ]')

    connect_disks(host, guest, {XVDC: (NO_CACHE, {})})
    guest.wait_for_disk("xvdc")
    guest.sh(FLUSH.format("xvdc"))
    replace_backend(host, guest, XVDC, NO_CACHE)
    guest.sh(FLUSH.format("xvdc"))
    assert not has_cache(guest, "xvdc")
    remove_devices(host, guest, [XVDC])
