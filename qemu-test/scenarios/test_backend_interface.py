# SPDX-License-Identifier: GPL-2.0-only
"""The backend has the same interfaces in sysfs, xenstore and the log as the C module."""

from collections.abc import Mapping

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.manual_toolstack import ManualDisk
from harness.toolstack import CODES
from harness.xenhost import Disk
from harness.xenhost import Server
from harness.xenhost import XenHost

XENTOP = "/usr/lib/xen-4.20/bin/xentop"
PARAMETERS = """\
buffer_squeeze_duration_ms 644 10
feature_persistent 644 Y
log_stats 644 0
max_buffer_pages 644 1024
max_persistent_grants 644 1056
max_queues 644 2
max_ring_page_order 444 3
persistent_grant_unused_seconds 644 60"""
"""With those that it is loaded with."""
DESCRIPTION = {
    "feature-max-indirect-segments": "256",
    "multi-queue-max-queues": "1",
    "max-ring-page-order": "3",
    "feature-persistent": "0",
    "sectors": "131072",
    "info": "5",
    "sector-size": "512",
    "physical-sector-size": "4096",
}
"""What is written of a read-only RAM disk that is a CD-ROM drive to the guest, with what the
parameters allow by then."""
STATISTICS = "ds_req f_req oo_req rd_req rd_sect wr_req wr_sect"

READER = (
    "while [ ! -e /tmp/stop ]; do dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct; "
    "usleep 500000; done"
)
LOGGED = "oo .*rd .*wr .*f .*ds "
"""What is printed of a ring every ten seconds if log_stats is set."""


@pytest.mark.feature(
    "BE-01",
    "BE-02",
    "BE-03",
    "BE-06",
    "BE-20",
    "BE-21",
    "BE-24",
    "BE-30",
    "BE-31",
    "BE-32",
    "BE-33",
    "BE-34",
    "BE-35",
    "BE-36",
    "BE-37",
    "BE-41",
)
def test_backend_interface(xen: StartHost) -> None:
    """Parameters, files in sysfs, nodes, names of threads, and the numbers of xentop.

    Writable parameters apply to the next disk. A new device number of a disk in use is ignored.
    """
    host = xen(waiting=TWO_VCPUS, tools=[XENTOP])
    server = host.start_server()
    server.load_backend("max_queues=2 max_ring_page_order=3")
    server.ram_disks(2)
    guest = host.start_guest(disks=[Disk("xvda", "/dev/ram0"), Disk("xvdb", "/dev/ram1", mode="r")])
    assert_served_by_pair(host, guest)
    parameters = f"/sys/module/{host.pair.backend.name.replace('-', '_')}/parameters"
    look = f"cd {parameters}; for name in *; do echo $name $(stat -c %a $name) $(cat $name); done"
    assert server.sh(look) == PARAMETERS
    prefix = f"/sys/bus/xen-backend/devices/vbd-{guest.domid}-"
    devices = {vdev: f"{prefix}{CODES[vdev]}" for vdev in ("xvda", "xvdb")}
    look_at_names(server, guest, devices)
    look_at_numbers(host, guest, devices)

    host.sh(f"xenstore-write {ManualDisk(host, guest, 'xvda').back}/physical-device 1:1")
    server.sh(
        f"cd {parameters}; echo 0 > feature_persistent; echo 1 > max_queues; echo 1 > log_stats"
    )
    take_a_drive(host, guest)
    # The backend has heard of that before it heard of xvdc.
    assert server.sh(f"cat {devices['xvda']}/physical_device") == "1:0"

    guest.sh(f"({READER}) > /dev/null 2>&1 &")
    server.wait_for(f"dmesg | grep -q '{guest.domid}[.]xvda-.*{LOGGED}'", timeout=100)
    guest.sh("touch /tmp/stop")


def look_at_names(server: Server, guest: Guest, devices: Mapping[str, str]) -> None:
    """What is in the files of two disks, and the names of files and threads."""
    assert server.sh(f"cat {devices['xvda']}/physical_device {devices['xvda']}/mode") == "1:0\nw"
    assert server.sh(f"cat {devices['xvdb']}/physical_device {devices['xvdb']}/mode") == "1:1\nr"
    assert server.sh(f"ls {devices['xvda']}/statistics | xargs") == STATISTICS
    threads = server.sh("cat /proc/[0-9]*/comm | grep -o '[0-9]*[.]xvd.*' | sort").split()
    assert threads == [f"{guest.domid}.{vdev}-{queue}" for vdev in devices for queue in (0, 1)]


def look_at_numbers(host: XenHost, guest: Guest, devices: Mapping[str, str]) -> None:
    """Checks that reads and writes of the guest are counted, and that xentop shows them."""
    server = host.server
    before = statistics(server, devices["xvda"])
    guest.sh(
        "dd if=/dev/xvda of=/dev/null bs=4k count=16 iflag=direct; "
        "dd if=/dev/zero of=/dev/xvda bs=4k count=8 oflag=direct"
    )
    after = statistics(server, devices["xvda"])
    grown = {name: after[name] - before[name] for name in after}
    counted = ("rd_req", "rd_sect", "wr_req", "wr_sect")
    assert [grown[name] for name in counted] == [16, 128, 8, 64]
    if server is host:
        # It reads the files of its own domain, which must be dom0.
        assert xentop(host, guest) == [
            sum(statistics(host, device)[name] for device in devices.values())
            for name in ("oo_req", "rd_req", "wr_req", "rd_sect", "wr_sect")
        ]


def take_a_drive(host: XenHost, guest: Guest) -> None:
    """Checks that a disk that is a CD-ROM drive uses the current parameters."""
    disk = ManualDisk(host, guest, "xvdc")
    disk.offer(mode="r")
    disk.wait_for(front=3)
    # After the frontend has looked: that of a PVH guest leaves a drive alone.
    host.sh(f"xenstore-write {disk.front}/device-type cdrom")
    disk.give("/dev/ram1")
    guest.wait_for_disk("xvdc")
    nodes = "\n".join(f"xenstore-read {disk.back}/{name}" for name in DESCRIPTION)
    assert host.sh(nodes).split() == list(DESCRIPTION.values())


def statistics(server: Server, device: str) -> dict[str, int]:
    """The numbers of a disk, by name."""
    names = STATISTICS.split()
    values = server.sh(f"cd {device}/statistics; cat {STATISTICS}").split()
    return dict(zip(names, map(int, values), strict=True))


def xentop(host: XenHost, guest: Guest) -> list[int]:
    """What xentop shows of a guest's disks: requests that waited, read, written; sectors."""
    places = "find /payload -name '*.so*' | sed 's,/[^/]*$,,' | sort -u | tr '\\n' ':'"
    lines = host.sh(f"LD_LIBRARY_PATH=$({places}) /payload{XENTOP} -b -i 1").splitlines()
    head, rows = lines[0].split(), [line.split() for line in lines[1:]]
    row = next(row for row in rows if row[0] == guest.name)
    # From the end: a limit of memory that is not there is two words.
    names = ("VBD_OO", "VBD_RD", "VBD_WR", "VBD_RSECT", "VBD_WSECT")
    return [int(row[head.index(name) - len(head)]) for name in names]
