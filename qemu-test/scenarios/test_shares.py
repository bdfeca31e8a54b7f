# SPDX-License-Identifier: GPL-2.0-only
"""The page quota of a domain's disks, and the accounting of their I/O."""

import time
from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.leak_counts import mapped_pages
from harness.manual_toolstack import ManualDisk
from harness.toolstack import error_node
from harness.xenhost import Disk
from harness.xenhost import Server
from harness.xenhost import XenHost

PART = 32
"""Pages that a queue adds to the budget of its domain."""
DISKS = {"xvda": "/dev/rblk0", "xvdb": "/dev/ram0", "xvdc": "/dev/ram1"}
PARAMETERS = "/sys/module/rblk_ramdisk/parameters"
WRITE, KEEP = 2, 3
DRIVER = "/sys/bus/xen-backend/drivers/vbd"

WORK = """
yes "$DISKS" | head -c 2097152 > /tmp/data
for disk in $DISKS; do
	for part in 0 1 2 3; do
		dd if=/tmp/data of=/dev/$disk bs=512k skip=$part seek=$part count=1 oflag=direct &
	done
done 2> /dev/null
wait
for disk in $DISKS; do
	dd if=/dev/$disk bs=512k count=4 iflag=direct 2> /dev/null | cmp - /tmp/data || exit 1
done
"""
"""Writes 2 MiB of each disk by four processes at once, and compares it."""
WRITERS = 4

ONLY_WRITE = "dd if=/dev/zero of=/dev/xvda bs=512k count=4 oflag=direct"

GROUPS = """
mount -t cgroup2 none /sys/fs/cgroup
cd /sys/fs/cgroup
mkdir -p guests/named guests/moved
echo +io > cgroup.subtree_control
echo +io > guests/cgroup.subtree_control
"""


def mapped(host: XenHost, guest: Guest) -> int:
    """How many pages of a guest the backend has mapped, as Xen counts them."""
    return sum(mapped_pages(host, guest))


@pytest.mark.feature("BE-08", "BE-30", "BE-31", "BE-32", "BE-44", "BE-45", "B-11", "B-12", "B-15")
def test_budget(xen: StartHost, test_modules: Path, record_property: RecordProperty) -> None:
    """A busy disk may have the pages that other disks of its domain do not use now.

    They get them back when they need them, and together never have more. Pages that are not used
    for as long as the parameter says are unmapped. Requests beyond the quota wait. In the C module
    each queue has a limit of its own, and it maps pages to be written whose data it only reads.
    """
    front = "max_indirect_segments=128"
    host = xen(modules=[test_modules / "rblk_ramdisk.ko"], front_parameters=front)
    server = host.start_server()
    server.load_backend(
        f"max_persistent_grants={PART} max_buffer_pages={PART} persistent_grant_unused_seconds=0"
    )
    server.insmod("rblk_ramdisk", f"size_mib=2 only={WRITE} timeout_ms=600000")
    server.ram_disks(len(DISKS) - 1, megabytes=2)
    disks = [Disk(vdev, target) for vdev, target in DISKS.items()]
    guest = host.start_guest(disks=disks)
    assert_served_by_pair(host, guest)
    ours = host.pair.backend.name == "rblkback"
    idle = mapped(host, guest)
    guest.sh(ONLY_WRITE)
    read_only, writable = mapped_pages(host, guest)
    print(f"pages mapped after writes: {read_only} to be read only, {writable} to be written")
    assert (read_only > writable) == ours
    guest.sh(f"DISKS=xvda\n{WORK}")
    alone = mapped(host, guest) - idle
    print(f"pages mapped: idle {idle}, xvda alone {alone}")
    assert (alone > PART) == ours
    if not ours:
        record_property("c_fails", "B-11, B-12")
    for _round in range(2):
        guest.sh(f"DISKS='{' '.join(DISKS)}'\n{WORK}")
        together = mapped(host, guest) - idle
        print(f"pages mapped: together {together}")
        assert PART < together <= PART * len(DISKS)
    assert_unused_let_go(host, guest)
    if not ours:
        return
    wait_for_pages(host, guest, front)


def wait_for_pages(host: XenHost, guest: Guest, front: str) -> None:
    """Checks that a request waits for pages while a disk that completes no I/O has them all.

    It is counted once, however often it is tried again.
    """
    server = host.server
    guest.unload_frontend()
    guest.load_frontend(f"feature_persistent=0 {front}")
    guest.wait_for_disk("xvda")
    disk = ManualDisk(host, guest, "xvda")
    written = disk.statistic("wr_req")
    started, waited = requests(disk), disk.statistic("oo_req")
    server.sh(f"echo {KEEP} > {PARAMETERS}/mode; : < /dev/rblk0")
    guest.sh(f"(DISKS=xvda\n{WORK}\ntouch /tmp/good) > /dev/null 2>&1 &")
    numbers = f"{disk.device}/statistics"
    server.wait_for(
        f"[ $(cat {numbers}/oo_req) != {waited} ] || "
        f"[ $(cat {numbers}/wr_req) -ge {written + WRITERS} ]"
    )
    assert disk.statistic("oo_req") != waited
    server.sh("sleep 5")
    server.sh(f"echo 0 > {PARAMETERS}/mode; : < /dev/rblk0")
    guest.wait_for("[ -e /tmp/good ]")
    assert disk.statistic("oo_req") - waited <= requests(disk) - started


def requests(disk: ManualDisk) -> int:
    """Returns the number of reads and writes that the backend has started."""
    return disk.statistic("rd_req") + disk.statistic("wr_req")


def assert_unused_let_go(host: XenHost, guest: Guest) -> None:
    """The backend is told for how long to keep pages: those that no disk uses are unmapped."""
    parameters = f"/sys/module/{host.pair.backend.name.replace('-', '_')}/parameters"
    kept = mapped(host, guest)
    host.server.sh(f"echo 1 > {parameters}/persistent_grant_unused_seconds")
    guest.sh(f"DISKS='{' '.join(DISKS)}'\n{WORK}")
    deadline = time.monotonic() + 120
    while (now := mapped(host, guest)) > kept - PART:
        assert time.monotonic() < deadline, f"pages mapped: {now}, and {kept} before"


def written(server: Server, group: str) -> int:
    """Bytes that are charged to a cgroup as written."""
    text = server.sh(f"cat /sys/fs/cgroup/guests/{group}/io.stat")
    return sum(int(word[7:]) for word in text.split() if word.startswith("wbytes="))


@pytest.mark.feature("B-14")
def test_io_owner(xen: StartHost, record_property: RecordProperty) -> None:
    """I/O is charged to the cgroup that the script names, with the priority that it names.

    One that is not there is an error, which does not end a disk in use. A person may also move a
    thread of the backend to a cgroup, as with the C module, which does not read these nodes.
    """
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks(2)
    server.sh(GROUPS)
    guest = host.start_guest(disks=[])
    named, plain, lost = (ManualDisk(host, guest, vdev) for vdev in ("xvdb", "xvdc", "xvdd"))
    named.offer(cgroup="/guests/named", io_priority="best-effort/7")
    plain.offer()
    lost.offer(cgroup="/guests/nowhere")
    for disk, target in ((named, "/dev/ram0"), (plain, "/dev/ram1"), (lost, "/dev/ram0")):
        disk.wait_for(front=3)
        disk.give(target)
    guest.wait_for("[ -b /dev/xvdb -a -b /dev/xvdc ]")
    assert_served_by_pair(host, guest, "xvdb")
    threads = {
        vdev: server.sh(f"grep -l '[.]{vdev}-0' /proc/[0-9]*/comm").split("/")[2]
        for vdev in ("xvdb", "xvdc")
    }
    server.sh(f"echo {threads['xvdc']} > /sys/fs/cgroup/guests/moved/cgroup.procs")
    for vdev in threads:
        guest.sh(f"dd if=/dev/zero of=/dev/{vdev} bs=64k count=16 oflag=direct")
    assert written(server, "moved") == 16 << 16
    if host.pair.backend.name != "rblkback":
        assert written(server, "named") == 0
        record_property("c_fails", "B-14")
        return
    assert written(server, "named") == 16 << 16
    assert server.sh(f"ionice -p {threads['xvdb']}") == "best-effort: prio 7"
    error = error_node(lost.back)
    host.wait_for(f"xenstore-exists {error}")
    assert 'cgroup = "/guests/nowhere"' in (host.xenstore_read(error) or "")
    assert guest.run("[ -b /dev/xvdd ]")[0] != 0
    rebind_without_group(named)


def rebind_without_group(disk: ManualDisk) -> None:
    """Checks that a disk in use outlives a wrong node of the toolstack, until that is corrected."""
    host, server = disk.host, disk.server
    name = disk.device.rpartition("/")[2]
    server.sh(f"echo {name} > {DRIVER}/unbind")
    host.sh(f"xenstore-write {disk.back}/cgroup /guests/nowhere")
    server.sh(f"echo {name} > {DRIVER}/bind")
    host.wait_for(f"xenstore-exists {error_node(disk.back)}")
    assert host.xenstore_read(f"{disk.back}/state") == "2"
    host.sh(f"xenstore-write {disk.back}/cgroup /guests/named")
    disk.wait_for(back=4)
    disk.guest.sh(f"dd if=/dev/zero of=/dev/{disk.vdev} bs=64k count=1 oflag=direct")
