# SPDX-License-Identifier: GPL-2.0-only
"""A second disk is attached and detached while the guest runs, idle and in use."""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.toolstack import CODES
from harness.xenhost import Disk
from harness.xenhost import XenHost

WRITER = (
    "while /usr/bin/dd if=/dev/zero of=/dev/xvdb bs=64k count=64 oflag=direct conv=nocreat,notrunc; "
    "do true; done"
)
"""Writes until the disk is gone, and makes no file of its name then."""


@pytest.mark.feature("FE-43", "FE-60", "FE-62", "FE-64", "FE-65")
def test_second_disk(host: XenHost) -> None:
    """The disk has no write cache, so no flush reaches the backend."""
    guest = host.start_guest(disks=[])
    for cycle in range(10):
        in_use = cycle % 2 == 1
        host.attach(guest, Disk("xvdb", "/dev/ram0"))
        guest.wait_for_disk("xvdb")
        if cycle == 0:
            assert_served_by_pair(host, guest, "xvdb")
        guest.sh(f"yes cycle-{cycle} | dd of=/dev/xvdb bs=4k count=64 iflag=fullblock conv=fsync")
        if cycle == 0:
            device = f"/sys/bus/xen-backend/devices/vbd-{guest.domid}-{CODES['xvdb']}"
            assert host.server.sh(f"cat {device}/statistics/f_req") == "0"
        assert f"cycle-{cycle}" in guest.sh(
            "dd if=/dev/xvdb bs=4k count=1 iflag=direct | head -n 1"
        )
        if in_use:
            guest.sh(f"({WRITER}) > /dev/null 2>&1 &")
            guest.allow("I/O error, dev xvdb")
            guest.allow("lost async page write")
        host.detach_and_wait(guest, "xvdb")
        guest.wait_for("! pidof dd")
