# SPDX-License-Identifier: GPL-2.0-only
"""An fsync in the guest is a flush of the device under the backend, in order.

QEMU logs every write and flush of dom0's disk, outside of both kernels. For
each step the guest writes a block, calls fsync, then writes the next block. In
the log a flush must stand between the two: the first was asked to be durable
before the second was even written.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.writelog import read_log
from harness.xenhost import Disk

STEPS = 20


@pytest.mark.feature("FE-10", "FE-42", "BE-22", "BE-46")
def test_flush_ordering(xen: StartHost) -> None:
    host = xen(log_writes=True)
    host.load_backend()
    guest = host.start_guest(disks=[Disk("xvda", "/dev/vdb")])
    assert_served_by_pair(host, guest)
    assert "write back" in guest.sh("cat /sys/block/xvda/queue/write_cache")
    steps = " ".join(str(step) for step in range(STEPS))
    guest.sh(
        f"for step in {steps}; do "
        "printf 'step %04d' $step | dd of=/dev/xvda bs=4k seek=$step conv=sync,fsync,notrunc 2>/dev/null; done"
    )
    guest.shut_down()
    entries = read_log(host.write_log)
    position = {
        entry.data[:9]: index for index, entry in enumerate(entries) if entry.data[:5] == b"step "
    }
    assert len(position) == STEPS
    for step in range(STEPS - 1):
        here, there = position[b"step %04d" % step], position[b"step %04d" % (step + 1)]
        assert here < there
        assert any(entry.is_flush for entry in entries[here + 1 : there + 1]), (
            f"no flush after step {step}"
        )
    assert any(entry.is_flush for entry in entries[position[b"step %04d" % (STEPS - 1)] :])
