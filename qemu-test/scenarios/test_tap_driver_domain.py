# SPDX-License-Identifier: GPL-2.0-only
"""rblkd and rblktap in a driver domain: xl's backend type tap with `backend=`.

`xl devd` runs no hotplug script for such a disk: rblkd finds it by itself.
"""

from harness import rblkd
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.kernel import Kernel
from harness.rblkd import RblkDisk
from harness.storage import Storage
from harness.xenhost import XenHost

XVDB = 51728
MEMORY = 320
"""Memory of the driver domain in MiB: the image is in its memory too."""
WRITE = "dd if=/dev/urandom of=/tmp/data bs=64k count=16 && dd if=/tmp/data of=/dev/xvdb oflag=direct bs=64k"
COMPARE = "dd if=/dev/xvdb bs=64k count=16 iflag=direct | cmp - /tmp/data"


def cycle(host: XenHost, storage: Storage, guest: Guest, disk: RblkDisk) -> None:
    """Attaches the disk, writes it, has it served by another process, compares, and detaches it."""
    host.attach(guest, disk)
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb", storage)
    guest.sh(WRITE)
    node = f"backend/vbd3/{guest.domid}/{XVDB}/kthread-pid"
    process = storage.sh(f"xenstore-read {node}")
    storage.sh(f"kill -9 {process}")
    storage.wait_for(f'[ "$(xenstore-read {node})" != {process} ]')
    guest.sh(COMPARE)
    host.detach(guest, "xvdb")
    guest.wait_for("[ ! -b /dev/xvdb ]")
    storage.wait_for(
        f'[ -z "$(ls /run/rblk | grep {XVDB})" ] && ! xenstore-exists {node.rsplit("/", 1)[0]}'
    )


def test_tap_driver_domain(xen: StartHost, kernel: Kernel) -> None:
    """A disk is attached twice, and in use when the guest is destroyed: nothing is left of it."""
    host = xen(waiting=None, storage_files=rblkd.storage_files(kernel))
    storage = host.start_storage(memory=MEMORY)
    rblkd.start_in(storage)
    storage.sh("truncate -s 16M /srv/a.raw")
    disk = RblkDisk("xvdb", "raw:/srv/a.raw", backend="storage")
    guest = host.start_guest(disks=[])
    cycle(host, storage, guest, disk)
    cycle(host, storage, guest, disk)
    host.attach(guest, disk)
    guest.wait_for_disk("xvdb")
    guest.sh(WRITE)
    guest.destroy()
    storage.wait_for(f'[ -z "$(ls /run/rblk | grep {XVDB})" ]')
    assert storage.run("pidof rblktap")[0] != 0
