# SPDX-License-Identifier: GPL-2.0-only
"""The events of a busy disk are not ended as spurious.

Linux delays the next event of a device whose events are spurious, by up to a second. A backend that
ends the event of a request that it has taken as spurious makes a disk slow.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.xenhost import Disk

READ = (
    "fio --name=read --filename=/dev/xvdb --rw=randread --bs=4k --size=8M --ioengine=libaio "
    "--direct=1 --thread --iodepth={} --number_ios=2000 > /tmp/fio.log"
)


@pytest.mark.feature("BE-40")
def test_spurious_events(xen: StartHost) -> None:
    """The frontend has no persistent grants: a completion wakes the backend, which then takes
    requests whose event is on its way.

    With one processor in dom0 that is rare.
    """
    host = xen(vcpus=2, waiting=None, front_parameters="feature_persistent=0")
    host.load_backend()
    guest = host.start_guest(disks=[Disk("xvdb", "/dev/vdb")], fio=True)
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    counts = f"/sys/bus/xen-backend/devices/vbd-{guest.domid}-51728/xenbus"
    for depth in (2, 4, 8):
        guest.sh(READ.format(depth), timeout=600)
    events, spurious = map(int, host.sh(f"cat {counts}/events {counts}/spurious_events").split())
    assert spurious < events / 500, f"{spurious} of {events} events were ended as spurious"
