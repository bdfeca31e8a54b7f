# SPDX-License-Identifier: GPL-2.0-only
"""The device under the backend changes, refuses, or does not answer.

The device is the RAM disk of rust/samples/ramdisk, whose parameters say how requests are
completed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.leak_counts import KEEPS_PAGES
from harness.leak_counts import assert_idle
from harness.leak_counts import xen_counts
from harness.manual_toolstack import ManualDisk
from harness.ramdisk import unload
from harness.storage import Storage
from harness.toolstack import CODES
from harness.toolstack import directories
from harness.toolstack import error_node
from harness.xenhost import Disk
from harness.xenhost import XenHost

DRIVER = "/sys/bus/xen-backend/drivers/vbd"
XVDB_THREADS = "grep -q xvdb /proc/[0-9]*/comm"
"""Returns `True` if the backend has a thread for a disk xvdb."""
PARAMETERS = "/sys/module/rblk_ramdisk/parameters"
MIB = 1 << 20
READ, WRITE, DISCARD = 1, 2, 8
KEEP = 3


@pytest.fixture
def ramdisk_host(xen: StartHost, test_modules: Path) -> StartHost:
    """Makes a Xen host whose server has the backend and /dev/rblk0:
    `host = ramdisk_host(PARAMETERS)`.
    """

    def start(parameters: str, backend: str = "", **options: Any) -> XenHost:
        host = xen(modules=[test_modules / "rblk_ramdisk.ko"], **options)
        server = host.start_server()
        server.load_backend(backend)
        server.insmod("rblk_ramdisk", parameters)
        return host

    return start


def set_parameter(host: XenHost, **values: object) -> None:
    """Writes parameters of the RAM disk, and opens it, which gives them effect."""
    lines = [f"echo {value} > {PARAMETERS}/{name}" for name, value in values.items()]
    host.server.sh(" && ".join([*lines, "blockdev --getsz /dev/rblk0"]))


def device(guest: Guest, vdev: str = "xvda") -> str:
    """The backend's device in the server's sysfs."""
    return f"/sys/bus/xen-backend/devices/vbd-{guest.domid}-{CODES[vdev]}"


@pytest.mark.feature("BE-25", "BE-51", "B-13")
def test_resize_idle(ramdisk_host: StartHost, record_property: RecordProperty) -> None:
    """A resize is noticed with and without I/O, and an idle disk causes no wakeups to look for it.

    The C backend wakes each thread ten times a second.
    """
    host = ramdisk_host("size_mib=16", backend=KEEPS_PAGES)
    guest = host.start_guest(disks=[Disk("xvda", "/dev/rblk0")])
    assert_served_by_pair(host, guest)
    assert guest.sh("blockdev --getsize64 /dev/xvda") == str(16 * MIB)
    assert_idle(host, record_property)
    set_parameter(host, size_mib=32)
    guest.wait_for(f"[ $(blockdev --getsize64 /dev/xvda) = {32 * MIB} ]")
    guest.sh(
        "(while [ ! -e /tmp/stop ]; do dd if=/dev/xvda of=/dev/null bs=64k iflag=direct; done) "
        "> /dev/null 2>&1 &"
    )
    set_parameter(host, size_mib=48)
    guest.wait_for(f"[ $(blockdev --getsize64 /dev/xvda) = {48 * MIB} ]")
    guest.sh("touch /tmp/stop; dd if=/dev/zero of=/dev/xvda bs=1M count=1 seek=47 conv=fsync")


@pytest.mark.feature("FE-11", "FE-44", "BE-23", "BE-47", "B-08")
def test_discard(ramdisk_host: StartHost, record_property: RecordProperty) -> None:
    """Discards reach the device, and other I/O continues during a long one.

    The C backend waits for a discard before it does anything else.
    """
    host = ramdisk_host(
        f"only={DISCARD} secure_erase=1 discard_granularity=65536 discard_alignment=4096"
    )
    host.server.sh(
        "tr '\\0' x < /dev/zero | dd of=/dev/rblk0 bs=64k count=256 iflag=fullblock conv=fsync"
    )
    guest = host.start_guest(disks=[Disk("xvda", "/dev/rblk0")])
    assert_served_by_pair(host, guest)
    back = directories(guest.domid, CODES["xvda"], host.server)[1]
    nodes = ("feature-discard", "discard-granularity", "discard-alignment", "discard-secure")
    offered = [host.xenstore_read(f"{back}/{node}") for node in nodes]
    assert offered == ["1", "65536", "4096", "1"]
    assert guest.sh("cat /sys/block/xvda/queue/discard_granularity") == "65536"

    set_parameter(host, mode=KEEP)
    guest.sh(
        f"(blkdiscard -o {MIB} -l {2 * MIB} /dev/xvda; touch /tmp/discarded) > /dev/null 2>&1 &"
    )
    host.server.wait_for(f"[ $(cat {device(guest)}/statistics/ds_req) -ge 1 ]")
    guest.sh(
        "(dd if=/dev/xvda of=/tmp/read bs=4k count=1 iflag=direct; touch /tmp/has-read) "
        "> /dev/null 2>&1 &"
    )
    if host.pair.backend.name == "rblkback":
        guest.wait_for("[ -e /tmp/has-read ]")
    else:
        record_property("c_fails", "B-08")
    assert guest.run("[ -e /tmp/discarded ]")[0] != 0
    set_parameter(host, mode=0)
    guest.wait_for("[ -e /tmp/discarded -a -e /tmp/has-read ]")
    guest.sh(f"blkdiscard -s -o {4 * MIB} -l {MIB} /dev/xvda")
    guest.shut_down()
    whole = [f"dd if=/dev/rblk0 bs=1M skip={mib} count=1 2>/dev/null" for mib in range(6)]
    for part, byte in zip(whole, ("x", "\\0", "\\0", "x", "\\377", "x"), strict=True):
        assert host.server.sh(f"{part} | tr -d '{byte}' | wc -c") == "0", (part, byte)


@pytest.mark.feature("BE-04", "BE-43", "B-09")
def test_discard_forbidden(ramdisk_host: StartHost, record_property: RecordProperty) -> None:
    """A discard that the toolstack has forbidden is refused, even if the frontend sends one.

    The guest is paused while dom0 adds the offer that the backend did not make.
    The C backend discards.
    """
    host = ramdisk_host("")
    host.server.sh("echo precious | dd of=/dev/rblk0 conv=sync,fsync 2>/dev/null")
    guest = host.start_guest(disks=[])
    disk = ManualDisk(host, guest)
    disk.offer(discard_enable=0)
    disk.wait_for(front=3, back=2)
    host.sh(f"xl pause {guest.name}")
    disk.give("/dev/rblk0")
    disk.wait_for(back=4)
    assert host.xenstore_read(f"{disk.back}/feature-discard") in (None, "0")
    host.sh(f"xenstore-write {disk.back}/feature-discard 1; xl unpause {guest.name}")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.allow("xvdb")
    guest.run("blkdiscard /dev/xvdb")
    assert disk.statistic("ds_req") <= 1
    first = host.server.sh("dd if=/dev/rblk0 count=1 iflag=direct 2>/dev/null | head -c 8")
    kept = first == "precious"
    ours = host.pair.backend.name == "rblkback"
    assert kept == ours
    if not ours:
        record_property("c_fails", "B-09")


@pytest.mark.feature("BE-01", "BE-52", "B-20")
def test_disk_sequence(xen: StartHost) -> None:
    """A device number that was reused for another disk is not served.

    The C backend is no reference: it does not know sequence numbers.
    """
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    guest = host.start_guest(disks=[])
    number = server.sh("stat -L -c %t:%T /dev/ram0")
    sequence = int(server.sh("cat /sys/block/ram0/diskseq"))
    wrong, right = ManualDisk(host, guest, "xvdb"), ManualDisk(host, guest, "xvdc")
    for disk, given in ((wrong, sequence + 1), (right, sequence)):
        disk.offer()
        disk.wait_for(front=3)
        host.sh(f"xenstore-write {disk.back}/physical-device {given:x}@{number}")
    guest.wait_for_disk("xvdc")
    assert_served_by_pair(host, guest, "xvdc")
    node = error_node(wrong.back)
    host.wait_for(f"xenstore-exists {node}")
    error = host.xenstore_read(node) or ""
    assert f"{sequence + 1:x}@{number}" in error and "another disk" in error
    assert guest.run("[ -b /dev/xvdb ]")[0] != 0


@pytest.mark.feature("B-01")
def test_stuck_disk(ramdisk_host: StartHost) -> None:
    """A disk that does not complete I/O blocks its own guest only.

    The C backend is no reference: it frees the device while the disk still has its
    requests.
    """
    host = ramdisk_host(f"only={WRITE} timeout_ms=600000")
    host.server.ram_disks()
    guest = host.start_guest(disks=[Disk("xvda", "/dev/rblk0")])
    assert_served_by_pair(host, guest)
    set_parameter(host, mode=KEEP)
    guest.allow("xvda")
    guest.sh("(dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct) > /dev/null 2>&1 &")
    host.server.wait_for(f"[ $(cat {device(guest)}/statistics/wr_req) -ge 1 ]")
    front, back = directories(guest.domid, CODES["xvda"], host.server)
    host.sh(f"xenstore-write {back}/online 0 {back}/state 5")
    host.wait_for(f"[ $(xenstore-read {front}/state) -ge 5 ]")
    # Attached, used and detached while the other one is stuck.
    host.attach(guest, Disk("xvdb", "/dev/ram0"))
    guest.wait_for_disk("xvdb")
    guest.sh("dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct")
    host.detach(guest, "xvdb")
    assert host.xenstore_read(f"{back}/state") != "6"
    set_parameter(host, mode=0)
    # In a driver domain xl is quick to remove what has closed.
    host.wait_for(f'! state=$(xenstore-read {back}/state) || [ "$state" = 6 ]')
    host.run(f"xenstore-rm {back}; xenstore-rm {front}")
    host.server.wait_for(f"[ ! -e {device(guest)} ]")


@pytest.mark.feature("B-01")
def test_stuck_unbind(ramdisk_host: StartHost) -> None:
    """A backend is unbound from a disk that does not complete I/O; its requests are executed once.

    The backend stops waiting after half a minute. Nothing else uses the rings until the disk has
    completed its I/O; then the guest continues.

    The C backend is no reference: it frees the device while the disk still has its
    requests.
    """
    host = ramdisk_host(f"only={WRITE} timeout_ms=600000")
    guest = host.start_guest(disks=[Disk("xvda", "/dev/rblk0")])
    assert_served_by_pair(host, guest)
    set_parameter(host, mode=KEEP)
    guest.sh(
        "(yes new | dd of=/dev/xvda bs=4k count=1 iflag=fullblock oflag=direct; touch /tmp/done) "
        "> /dev/null 2>&1 &"
    )
    server = host.server
    server.wait_for(f"[ $(cat {device(guest)}/statistics/wr_req) -ge 1 ]")
    name = f"vbd-{guest.domid}-51712"
    server.sh(f"echo {name} > {DRIVER}/unbind")
    assert server.run(f"echo {name} > {DRIVER}/bind")[0] != 0
    set_parameter(host, mode=0)
    server.wait_for(f"echo {name} > {DRIVER}/bind")
    guest.wait_for("[ -e /tmp/done ]")
    assert guest.sh("dd if=/dev/xvda bs=4k count=1 iflag=direct 2>/dev/null | head -n 1") == "new"
    assert_served_by_pair(host, guest)


def detach_dirty(host: XenHost, guest: Guest, timeout: float) -> ManualDisk:
    """Begins to detach a mounted xvdb, which stops to answer with a file still to be written.

    The guest waits up to `timeout` seconds.
    """
    set_parameter(host, mode=0)
    disk = ManualDisk(host, guest)
    disk.offer()
    disk.give("/dev/rblk0")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh(
        f"echo {timeout} > /sys/module/rblkfront/parameters/detach_timeout\n"
        "echo 0 > /proc/sys/vm/dirty_writeback_centisecs\n"
        "mkdir -p /disk; mkfs.ext4 -q /dev/xvdb && sync && "
        "mount -t ext4 -o commit=300 /dev/xvdb /disk && echo kept > /disk/file"
    )
    set_parameter(host, mode=KEEP)
    written = disk.statistic("wr_req")
    host.sh(f"xenstore-write {disk.back}/online 0 {disk.back}/state 5")
    disk.wait_statistic("wr_req", written + 1)
    return disk


@pytest.mark.feature("F-40")
def test_detach_slow_disk(ramdisk_host: StartHost) -> None:
    """A mounted disk that does not complete I/O is detached.

    The guest waits for it up to the configured limit, and nothing is lost if it completes in time.
    If not, or if the disk is detached by force, the file system is shut down.

    The C frontend does not write anything back, so it is no reference.
    """
    host = ramdisk_host(f"only={WRITE} timeout_ms=600000")
    guest = host.start_guest(disks=[])
    guest.allow("xvdb")
    host.server.ram_disks()
    disk = detach_dirty(host, guest, timeout=600)
    # It waits for longer than another disk takes to come.
    host.attach(guest, Disk("xvdc", "/dev/ram0"))
    guest.wait_for_disk("xvdc")
    assert host.xenstore_read(f"{disk.front}/state") == "4"
    set_parameter(host, mode=0)
    disk.wait_for(front=6)
    disk.forget()
    guest.sh("umount /disk")
    assert host.server.sh("mount -t ext4 /dev/rblk0 /mnt && cat /mnt/file; umount /mnt") == "kept"

    disk = detach_dirty(host, guest, timeout=1)
    disk.wait_for(front=6)
    assert "the backend does not respond while the disk is written back" in guest.sh("dmesg")
    set_parameter(host, mode=0)
    disk.forget()
    guest.sh("umount /disk")

    disk = detach_dirty(host, guest, timeout=600)
    host.sh(f"xenstore-rm {disk.back}; xenstore-rm {disk.front}")
    guest.wait_for("[ ! -b /dev/xvdb ]")
    assert "the backend has disconnected while the disk was written back" in guest.sh("dmesg")
    set_parameter(host, mode=0)
    guest.sh("umount /disk")


@pytest.mark.feature("F-31", "F-40")
def test_detach_stuck_swap(ramdisk_host: StartHost) -> None:
    """A detach waits for the end of a use as swap, and the disk no longer completes I/O.

    A request of it fails as on a disk that is not being detached, and the disk is detached.

    The C frontend removes the disk at once, with the swapped pages.
    """
    host = ramdisk_host(f"only={READ} timeout_ms=600000")
    guest = host.start_guest(disks=[])
    guest.allow("xvdb")
    guest.allow("the backend does not respond")
    disk = ManualDisk(host, guest)
    disk.offer()
    disk.give("/dev/rblk0")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("echo 1000 > /sys/block/xvdb/queue/io_timeout; mkswap /dev/xvdb && swapon /dev/xvdb")
    host.sh(f"xenstore-write {disk.back}/online 0 {disk.back}/state 5")
    guest.wait_for("dmesg | grep -q 'the disk is used as swap space'")
    set_parameter(host, mode=KEEP)
    guest.sh(
        "(dd if=/dev/xvdb of=/dev/null bs=4k count=1 iflag=direct || echo > /tmp/failed) "
        "> /dev/null 2>&1 &"
    )
    guest.wait_for("[ -e /tmp/failed ]")
    assert "closing the connection, detaching the disk" in guest.sh("dmesg")
    set_parameter(host, mode=0)
    guest.sh("swapoff /dev/xvdb || :")
    disk.wait_for(front=6)
    disk.forget()


def idle(host: XenHost, guest: Guest) -> None:
    """The disk has nothing."""


def in_flight(host: XenHost, guest: Guest) -> None:
    """The disk has a write."""
    guest.sh(
        "(dd if=/dev/zero of=/dev/xvdb bs=4k count=1 oflag=direct || echo > /tmp/failed) "
        "> /dev/null 2>&1 &"
    )
    host.server.wait_for(f"[ $(cat {device(guest, 'xvdb')}/statistics/wr_req) -ge 1 ]")


def closing(host: XenHost, guest: Guest) -> None:
    """The disk has a write, and both halves of the device have begun to close."""
    in_flight(host, guest)
    front, back = directories(guest.domid, CODES["xvdb"], host.server)
    host.sh(f"xenstore-write {back}/online 0 {back}/state 5")
    host.wait_for(f"[ $(xenstore-read {front}/state) -ge 5 ]")


def attach_stuck(host: XenHost, guest: Guest, step: Callable[[XenHost, Guest], None]) -> None:
    """Attaches xvdb, which stops to answer before `step`."""
    set_parameter(host, mode=0)
    host.attach(guest, Disk("xvdb", "/dev/rblk0"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    set_parameter(host, mode=KEEP)
    host.server.sh("dmesg -c > /dev/null")
    step(host, guest)


def assert_only_threads_wait(host: XenHost, guest: Guest) -> None:
    """Of the device the thread is left, which has the request and the module; dmesg says so."""
    server = host.server
    if isinstance(server, Storage):
        # With the guest, xl leaves them to the driver domain, which waits for a closed disk.
        back = directories(guest.domid, CODES["xvdb"], server)[1]
        host.sh(f"xenstore-rm {back} || ! xenstore-exists {back}")
        server.restart_devd()
    server.wait_for(f"[ ! -e {device(guest, 'xvdb')} ]")
    assert "queues have not ended" in server.sh("dmesg")
    server.sh(XVDB_THREADS)
    assert server.run(f"rmmod {host.pair.backend.name}")[0] != 0


@pytest.mark.feature("FE-65", "B-01")
def test_stuck_removal(ramdisk_host: StartHost, record_property: RecordProperty) -> None:
    """A disk that does not complete I/O is detached by force, and finally with its domain.

    The device is gone at once, and the guest's request fails. Pages that the disk still has to
    write stay mapped until it completes, so a destroyed domain stays until then. Afterwards nothing
    is left.

    The C backend says that it has closed, and frees the device, while the disk still
    has its request. It is not asked for more.
    """
    host = ramdisk_host(f"only={WRITE} timeout_ms=600000")
    guest = host.start_guest(disks=[])
    guest.allow("xvdb")
    ours = host.pair.backend.name == "rblkback"
    before = xen_counts(host)
    for step in (idle, in_flight, closing):
        print(step.__name__)
        attach_stuck(host, guest, step)
        taken = host.run(f"xl block-detach --force {guest.name} xvdb")[0] == 0
        assert taken == (step is idle or not ours)
        if step is not idle:
            if not ours:
                host.server.wait_for(f"[ ! -e {device(guest, 'xvdb')} ]")
                record_property("c_fails", "B-01")
                return
            guest.wait_for("[ -e /tmp/failed ]")
            guest.sh("rm /tmp/failed")
            assert_only_threads_wait(host, guest)
        guest.wait_for("[ ! -e /dev/xvdb ]")
        set_parameter(host, mode=0)
        host.server.wait_for(f"! {XVDB_THREADS}")
        host.server.take_back_memory()
        assert xen_counts(host) == before
    attach_stuck(host, guest, in_flight)
    guest.destroy()
    assert_only_threads_wait(host, guest)
    assert host.sh("xl list | grep -c '(null)'") == "1"
    set_parameter(host, mode=0)
    host.wait_for("! xl list | grep -q '(null)'")
    host.server.unload_backend()
    unload(host.server)
