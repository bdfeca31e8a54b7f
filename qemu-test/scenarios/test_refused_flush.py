# SPDX-License-Identifier: GPL-2.0-only
"""The device under the backend fails flushes, although it has a write cache.

It is unknown then whether data is durable: each fsync in the guest fails, the backend withdraws the
feature, and other I/O continues. xen-blkfront completes them as done. Our backend alone serves
this: xen-blkback sleeps where it must not when a flush is refused.
"""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.toolstack import CODES
from harness.toolstack import directories
from harness.xenhost import Disk

MODE = "/sys/module/rblk_ramdisk/parameters/mode"
REFUSE, SERVE = 7, 0
SYNC = "dd if=/dev/zero of=/dev/xvda bs=4k count=1 conv=fsync,notrunc"


@pytest.mark.feature("FE-42", "F-22", "BE-22", "BE-50", "B-04")
def test_refused_flush(xen: StartHost, test_modules: Path, record_property: RecordProperty) -> None:
    host = xen(modules=[test_modules / "rblk_ramdisk.ko"])
    server = host.start_server()
    server.load_backend()
    server.insmod("rblk_ramdisk", "only=4")
    guest = host.start_guest(disks=[Disk("xvda", "/dev/rblk0")])
    assert_served_by_pair(host, guest)
    for machine in (host.machine, guest, server):
        machine.allow("error, dev")
        machine.allow("rror on dev")
    node = f"{directories(guest.domid, CODES['xvda'], server)[1]}/feature-flush-cache"
    assert host.xenstore_read(node) == "1"
    guest.sh(SYNC)
    server.sh(f"echo {REFUSE} > {MODE}")
    refused = [guest.run(SYNC)[0] != 0 for _time in range(3)]
    host.wait_for(f"[ $(xenstore-read {node}) = 0 ]", timeout=30)
    guest.sh("dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct")
    server.sh(f"echo {SERVE} > {MODE}")
    if guest.front == "xen-blkfront":
        assert not any(refused)
        record_property("c_fails", "F-22")
        return
    assert all(refused)
    guest.sh(SYNC)
