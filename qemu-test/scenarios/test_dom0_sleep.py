# SPDX-License-Identifier: GPL-2.0-only
"""Dom0 and its disks are suspended to RAM and resumed while a guest writes."""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.job import Job
from harness.xenhost import Disk

WORK = (
    "dd if=/dev/urandom of=/tmp/data bs=64k count=16 && "
    "/usr/bin/dd if=/tmp/data of=/dev/xvda bs=64k oflag=direct conv=fsync,nocreat && "
    "/usr/bin/dd if=/dev/xvda bs=64k count=16 iflag=direct | cmp - /tmp/data"
)


@pytest.mark.feature("BE-41")
def test_dom0_sleep(xen: StartHost) -> None:
    """The device below is one that sleeps too: QEMU's disk, not memory."""
    host = xen()
    host.load_backend()
    guest = host.start_guest(disks=[Disk("xvda", "/dev/vdb")])
    assert_served_by_pair(host, guest)
    job = Job(guest, WORK)
    job.wait_for_pass()
    host.machine.sleep()
    assert "PM: suspend exit" in host.sh("dmesg")
    assert "Entering ACPI S3 state" in host.machine.console()
    # One that has begun since, too.
    job.wait_for_pass(2)
    job.stop()
    assert_served_by_pair(host, guest)
