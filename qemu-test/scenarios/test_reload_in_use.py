# SPDX-License-Identifier: GPL-2.0-only
"""While the backend is replaced, another program claims the disk for a while.

Volume managers, multipath, swap and mounts of the backend's domain look for disks whenever one is
free: the moment in which no backend has it is theirs.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.job import Job
from harness.toolstack import CODES
from harness.toolstack import directories
from harness.toolstack import error_node
from harness.xenhost import XenHost

DRIVER = "/sys/bus/xen-backend/drivers/vbd"
WRITE = (
    "printf 'round %06d' $pass | "
    "dd of=/dev/xvda bs=4k seek=$((16 + pass % 64)) conv=sync,fsync,notrunc 2> /dev/null"
)
"""Leaves alone the first block, which says that the disk is swap space."""


@pytest.mark.feature("BE-55")
def test_reload_in_use(host: XenHost) -> None:
    """The guest sees a longer pause, and no error: the disk that it has is still there.

    The C backend serves the disk meanwhile. A backend that does not must not end the guest's disk
    for that, which has a root file system on it.
    """
    server = host.server
    server.sh("mkswap /dev/ram0")
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    back = directories(guest.domid, CODES["xvda"], server)[1]
    device = f"vbd-{guest.domid}-{CODES['xvda']}"
    job = Job(guest, WRITE)
    job.wait_for_pass()

    server.sh(f"echo {device} > {DRIVER}/unbind")
    server.unload_backend()
    server.sh("swapon /dev/ram0")
    server.load_backend()
    server.wait_for(f"[ -e {DRIVER}/{device} ] || echo {device} > {DRIVER}/bind")
    host.wait_for(f"xenstore-exists {error_node(back)} || [ $(xenstore-read {back}/state) = 4 ]")
    # Neither Closing nor Closed: the device tries to open the disk again.
    assert host.xenstore_read(f"{back}/state") in ("2", "4")
    server.sh("swapoff /dev/ram0")

    job.wait_for_pass(3)
    job.stop()
    assert_served_by_pair(host, guest)
