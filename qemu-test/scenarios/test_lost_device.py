# SPDX-License-Identifier: GPL-2.0-only
"""The block device behind a disk is removed while the disk is in use.

As when a drive is pulled out or an iSCSI session is lost. null_blk removes its device with requests
in flight.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.job import Job
from harness.xenhost import Disk
from harness.xenhost import XenHost

DEVICE = "/sys/kernel/config/nullb/lost"
NODE = "/dev/lost"
MAKE = f"""
mount -t configfs configfs /sys/kernel/config 2> /dev/null || true
mkdir {DEVICE}
cd {DEVICE}
echo 1 > memory_backed
echo 64 > size
# Answers by a timer, after 20 ms: some requests are in flight at any moment.
echo 2 > irqmode
echo 20000000 > completion_nsec
echo 1 > power
"""
BAD_SECTORS = f"echo {{}}2048-2055 > {DEVICE}/badblocks"
"""Makes I/O to these sectors fail (+), or succeed again (-)."""
BAD_IO = "dd {} bs=4k count=1 {}=256 {}flag=direct"
REMOVE = f"echo 0 > {DEVICE}/power"
WRITE = "dd if=/dev/zero of=/dev/{} bs=64k count=64 oflag=direct conv=notrunc,fsync"


@pytest.mark.feature("B-01", "BE-50")
def test_lost_device(host: XenHost) -> None:
    """First sectors are bad, then the whole device is gone: the guest gets errors for its requests,
    and its other disk continues.

    The disk can be detached then, and the device can come back and be attached.
    """
    server = host.server
    server.insmod("configfs")
    server.insmod("null_blk", "nr_devices=0")
    server.sh(MAKE)
    guest = host.start_guest(disks=[Disk(), Disk("xvdb", NODE)])
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    for machine in (guest, server):
        machine.allow("error, dev")
        machine.allow("I/O error")
    server.sh(BAD_SECTORS.format("+"))
    for words in (
        ("if=/dev/zero of=/dev/xvdb", "seek", "o"),
        ("if=/dev/xvdb of=/dev/null", "skip", "i"),
    ):
        status, output = guest.run(BAD_IO.format(*words))
        assert status != 0 and "Input/output error" in output, output
    server.sh(BAD_SECTORS.format("-"))
    other = Job(guest, WRITE.format("xvda"), name="other")
    lost = Job(guest, WRITE.format("xvdb"), name="lost")
    lost.wait_for_pass(2)

    server.sh(REMOVE)
    guest.wait_for(f"[ -e {lost.files}.ended ]")
    assert guest.run(f"[ -e {lost.files}.failed ]")[0] == 0
    # A device that was removed has no size: to read there is to find the end.
    assert guest.run("dd if=/dev/zero of=/dev/xvdb bs=4k count=1 oflag=direct")[0] != 0
    assert guest.sh("dd if=/dev/xvdb bs=4k count=1 iflag=direct 2> /dev/null | wc -c") == "0"
    other.wait_for_pass(2)
    host.detach_and_wait(guest, "xvdb")
    # Nothing holds the device any more.
    server.sh(f"rmdir {DEVICE} && rmmod null_blk")

    server.insmod("null_blk", "nr_devices=0")
    server.sh(MAKE)
    host.attach(guest, Disk("xvdb", NODE))
    guest.wait_for_disk("xvdb")
    guest.sh(
        "yes again | dd of=/dev/xvdb bs=64k count=16 iflag=fullblock oflag=direct 2> /dev/null"
    )
    assert (
        guest.sh("dd if=/dev/xvdb bs=64k count=16 iflag=direct 2> /dev/null | head -c 5") == "again"
    )
    other.wait_for_pass(2)
    other.stop()
    assert_served_by_pair(host, guest, "xvdb")
