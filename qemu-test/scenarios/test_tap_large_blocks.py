# SPDX-License-Identifier: GPL-2.0-only
"""rblktap serves a device with blocks of 4096 bytes."""

from harness import rblkd
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.rblkd import RblkDisk

VERIFY = (
    "fio --name=part --filename=/dev/xvdb --ioengine=libaio --iodepth=16 --direct=1 "
    "--rw=randwrite --norandommap=0 --bsrange=4096-256k --blockalign=4096 --size=8M "
    "--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=3 --output-format=terse"
)
SUM_IN_GUEST = "dd if=/dev/xvdb bs=1M count=8 iflag=direct 2> /dev/null | sha256sum"
SUM_IN_DOM0 = "dd if=/dev/nullb0 bs=1M count=8 2> /dev/null | sha256sum"


def test_tap_large_blocks(xen: StartHost) -> None:
    """The disk has such blocks too, and what a guest writes is on the device."""
    host = xen(waiting=TWO_VCPUS, **rblkd.options())
    rblkd.install(host, mount=False)
    rblkd.start(host)
    host.insmod("configfs")
    host.insmod("null_blk", "nr_devices=1 gb=1 bs=4096 memory_backed=1")
    guest = host.start_guest(disks=[])
    host.attach(guest, RblkDisk("xvdb", "raw:/dev/nullb0"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    assert guest.sh("cat /sys/block/xvdb/queue/logical_block_size").strip() == "4096"
    guest.sh(VERIFY, timeout=600)
    inside = guest.sh(SUM_IN_GUEST)
    rblkd.detach(host, guest, "xvdb")
    assert host.sh(SUM_IN_DOM0) == inside
