# SPDX-License-Identifier: GPL-2.0-only
"""The root file system of a guest is on /dev/xvda."""

import hashlib
import subprocess

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import DRIVER
from harness.guest import Guest
from harness.manual_toolstack import ManualDisk
from harness.xenhost import Disk
from harness.xenhost import XenHost
from harness.xenimage import file_in_image
from harness.xenimage import root_disk


def live_on_root_disk(xen: StartHost, type: str) -> None:
    """Boots from the disk, writes, powers off; then the host looks at the image."""
    host = xen(waiting=None, image=root_disk())
    host.load_backend()
    guest = host.start_guest(type=type, disks=[Disk("xvda", "/dev/vdb")], root="xvda")
    assert "/dev/xvda / ext4 rw" in guest.sh("cat /proc/mounts")
    assert_served_by_pair(host, guest)
    if type == "pvh":
        leave_drive_alone(host, guest)
    guest.sh(
        "dd if=/dev/urandom of=/work bs=64k count=48 conv=fsync && tar -cf /bin.tar /bin && sync"
    )
    guest_sum = guest.sh("sha256sum /work /bin.tar")
    guest.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert guest.sh("sha256sum /work /bin.tar") == guest_sum
    guest.shut_down()
    host.sh("blockdev --flushbufs /dev/vdb")
    host.machine.monitor.execute("stop")
    subprocess.run(["e2fsck", "-fn", host.disk], check=True)
    for path in ("/work", "/bin.tar"):
        assert hashlib.sha256(file_in_image(host.disk, path)).hexdigest() in guest_sum
    host.machine.monitor.execute("cont")


@pytest.mark.feature("FE-24", "FE-60", "FE-61", "FE-62")
def test_root_disk_pv(xen: StartHost) -> None:
    live_on_root_disk(xen, "pv")


def leave_drive_alone(host: XenHost, guest: Guest) -> None:
    """A CD-ROM drive is left to the emulated one, as in any guest that could have one."""
    drive, disk = ManualDisk(host, guest, "xvdb"), ManualDisk(host, guest, "xvdc")
    drive.offer(kind="cdrom")
    disk.offer()
    # The guest looks at one after the other.
    disk.wait_for(front=3)
    assert guest.run(f"[ -e {DRIVER}/vbd-{disk.code} ]")[0] == 0
    assert guest.run(f"[ -e {DRIVER}/vbd-{drive.code} ]")[0] != 0
    for device in (drive, disk):
        host.sh(f"xenstore-rm {device.back}; xenstore-rm {device.front}")
        host.wait_for(f"[ ! -e {device.device} ]")


@pytest.mark.feature("FE-02")
def test_root_disk_pvh(xen: StartHost) -> None:
    live_on_root_disk(xen, "pvh")
