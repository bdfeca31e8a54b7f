# SPDX-License-Identifier: GPL-2.0-only
"""Data that was written is read back, over the whole disk, in requests of all sizes."""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS

FIO = (
    "fio --name=whole --filename=/dev/xvda --ioengine=libaio --iodepth=16 --direct=1 "
    "--rw=randwrite --norandommap=0 --bsrange=512-1M --blockalign=512 --size=100% "
    "--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 --output-format=terse"
)


@pytest.mark.feature("FE-12", "FE-40", "FE-41", "BE-44", "BE-46")
def test_write_verify(xen: StartHost) -> None:
    host = xen(waiting=TWO_VCPUS)
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    guest.sh(FIO, timeout=600)
