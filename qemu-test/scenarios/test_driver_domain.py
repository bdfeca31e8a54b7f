# SPDX-License-Identifier: GPL-2.0-only
"""A driver domain serves the disks.

On the debug kernel, which cannot be dom0, this checks both drivers with KASAN, lockdep and
kmemleak, so this scenario does most of what can be done with a disk.
"""

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.job import Job
from harness.leak_counts import xen_counts
from harness.storage import Storage
from harness.xenhost import Disk
from harness.xenhost import XenHost

DRIVER = "/sys/bus/xen-backend/drivers/vbd"
TRANSFERS = ("512 96", "4096 96", "28672 48", "1048576 2")
"""Size and number of transfers, each kind in a part of the disk of its own."""

WRITER = (
    "rm -f /tmp/rounds /tmp/stop /tmp/failed; (until [ -e /tmp/stop ]; do "
    "/usr/bin/dd if=/dev/zero of=/dev/xvdb bs=64k seek=384 count=16 oflag=direct "
    "conv=nocreat,notrunc || touch /tmp/failed /tmp/stop; echo >> /tmp/rounds; done) > /dev/null 2>&1 &"
)
"""Writes from 24 MiB on until it is stopped or the disk is gone."""


def in_each_part(script: str) -> str:
    """A script that does this for each kind of transfer, all at the same time."""
    kinds = " ".join(f"'{number} {kind}'" for number, kind in enumerate(TRANSFERS))
    return (
        f"for kind in {kinds}; do set -- $kind; at=$(($1 * 4194304)) size=$2 count=$3; "
        f"({script}) 2> /tmp/error$1 || cat /tmp/error$1 > /tmp/wrong & done; wait; "
        "[ ! -e /tmp/wrong ]"
    )


WRITE = in_each_part(
    "dd if=/dev/urandom of=/tmp/data$1 bs=$size count=$count && "
    "/usr/bin/dd if=/tmp/data$1 of=/dev/xvdb bs=$size seek=$at oflag=direct,seek_bytes conv=notrunc"
)
COMPARE = in_each_part(
    "/usr/bin/dd if=/dev/xvdb bs=$size skip=$at count=$count iflag=direct,skip_bytes | "
    "cmp - /tmp/data$1"
)


def life_of_a_disk(host: XenHost, storage: Storage, guest: Guest) -> None:
    """Attached, written, both drivers replaced, compared, taken away in use."""
    device = f"vbd-{guest.domid}-51728"
    host.attach(guest, Disk("xvdb", backend="storage"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb", storage)
    guest.sh(WRITE)
    guest.sh(COMPARE)

    guest.sh(WRITER)
    guest.wait_for("[ -s /tmp/rounds ]")
    storage.sh(f"echo {device} > {DRIVER}/unbind")
    storage.unload_backend()
    storage.load_backend()
    storage.wait_for(f"[ -e {DRIVER}/{device} ] || echo {device} > {DRIVER}/bind")
    guest.sh("rm /tmp/rounds")
    guest.wait_for("[ -s /tmp/rounds ]")
    guest.sh("touch /tmp/stop")
    guest.wait_for("! pidof dd")
    guest.sh("[ ! -e /tmp/failed ]")

    guest.reload_frontend()
    guest.wait_for_disk("xvdb")
    guest.sh(COMPARE)

    guest.sh(WRITER)
    guest.wait_for("[ -s /tmp/rounds ]")
    guest.allow("I/O error, dev xvdb")
    host.detach_and_wait(guest, "xvdb", storage)
    guest.wait_for("! pidof dd")


def test_driver_domain(xen: StartHost) -> None:
    """The second cycle leaves no more behind than the first, by Xen's counts.

    There is only one cycle on the debug kernel, which is slow.
    """
    host = xen()
    storage = host.start_storage()
    storage.load_backend()
    storage.ram_disks(megabytes=32)
    guest = host.start_guest(disks=[])
    life_of_a_disk(host, storage, guest)
    if host.has_checks:
        return
    before = xen_counts(host)
    life_of_a_disk(host, storage, guest)
    assert xen_counts(host) == before


def attach_from_new_domain(host: XenHost, guest: Guest) -> Storage:
    """Starts a driver domain and attaches xvdb, which it serves. Returns the domain."""
    storage = host.start_storage()
    storage.load_backend()
    storage.ram_disks(megabytes=32)
    host.attach(guest, Disk("xvdb", backend="storage"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb", storage)
    return storage


def test_driver_domain_replaced(xen: StartHost) -> None:
    """The driver domain is destroyed under I/O, and another one takes its place.

    The guest's other disk continues. xl does not give the disk whose backend is gone to another
    domain. When it detaches that disk, requests in flight fail; then the disk is attached again.
    With xen-blkfront the disk stays.
    """
    write = "dd if=/dev/zero of=/dev/{} bs=64k count=64 oflag=direct conv=notrunc,fsync"
    host = xen()
    host.load_backend()
    host.ram_disks()
    guest = host.start_guest()
    storage = attach_from_new_domain(host, guest)
    other = Job(guest, write.format("xvda"), name="other")
    lost = Job(guest, write.format("xvdb"), name="lost")
    lost.wait_for_pass(2)

    storage.destroy()
    other.wait_for_pass(2)
    assert guest.run(f"[ -e {lost.files}.ended ]")[0] != 0
    status, said = host.run(f"xl block-attach {guest.name} '{Disk('xvdb').specification(host)}'")
    assert status != 0 and "already exists" in said
    for text in ("error, dev xvdb", "I/O error"):
        guest.allow(text)
    host.sh(f"xl block-detach {guest.name} xvdb")
    guest.wait_for("[ ! -b /dev/xvdb ]")
    guest.wait_for(f"[ -e {lost.files}.ended ]")
    assert guest.run(f"[ -e {lost.files}.failed ]")[0] == 0

    attach_from_new_domain(host, guest)
    again = Job(guest, write.format("xvdb"), name="again")
    again.wait_for_pass(2)
    other.wait_for_pass(2)
    again.stop()
    other.stop()
