# SPDX-License-Identifier: GPL-2.0-only
"""A read-only disk can be read, and the guest cannot change it."""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.xenhost import Disk
from harness.xenhost import XenHost

SUM = "head -c 4M /dev/ram0 | sha256sum"
"""Of what there is to read; the guest tries to write to the first pages."""


@pytest.mark.feature("FE-54", "BE-02")
def test_read_only_disk(host: XenHost) -> None:
    server = host.server
    server.sh("yes precious | dd of=/dev/ram0 bs=1M count=4 iflag=fullblock conv=fsync")
    before = server.sh(SUM)
    guest = host.start_guest(disks=[Disk("xvda", "/dev/ram0", mode="r")])
    assert_served_by_pair(host, guest)
    assert guest.sh("blockdev --getro /dev/xvda") == "1"
    assert guest.sh("head -c 8 /dev/xvda") == "precious"
    status, _output = guest.run("dd if=/dev/zero of=/dev/xvda bs=4k count=1 conv=fsync")
    assert status != 0
    # Asking the kernel to forget that the disk is read-only does not open it.
    guest.allow("I/O error, dev xvda")
    guest.allow("lost async page write")
    guest.run(
        "blockdev --setrw /dev/xvda && dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct"
    )
    guest.shut_down()
    assert server.sh(SUM) == before
