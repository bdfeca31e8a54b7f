# SPDX-License-Identifier: GPL-2.0-only
"""A driver is replaced on a running system without a change of the disk."""

import shutil
from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.job import Job
from harness.kernel import Kernel
from harness.pairs import Driver
from harness.pairs import Pair
from harness.pairs import other_driver
from harness.shell import CLOSE_KEPT
from harness.shell import keep_open
from harness.xenhost import Disk
from harness.xenhost import XenHost

DRIVER = "/sys/bus/xen-backend/drivers/vbd"
SUM = "dd if=/dev/xvda bs=4k count=256 iflag=direct 2>/dev/null | sha256sum"

LOST = {
    "rblkfront": "major 202 is taken: is xen_blkfront loaded?",
    "xen-blkfront": "can't get major 202",
    "rblkback": 'rblkback: another module has the driver "vbd": unload that one first',
    "xen-blkback": "Driver 'vbd' is already registered",
}
"""What is said when a driver comes second."""


@pytest.fixture
def others(pair: Pair, kernel: Kernel, build: Path) -> list[Driver]:
    """The drivers that could be in place of the pair's, built for the guests' kernel; none of
    them in a reference run.
    """
    if pair.name == "C/C":
        return []
    return [other_driver(driver, kernel, build) for driver in (pair.front, pair.backend)]


@pytest.fixture
def host(xen: StartHost, others: list[Driver], tmp_path: Path) -> XenHost:
    """As every `host`, with the others as other-NAME.ko."""
    files = [shutil.copy(other.file, tmp_path / f"other-{other.name}.ko") for other in others]
    host = xen(modules=files)
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    return host


def refuse(host: XenHost, guest: Guest, others: list[Driver]) -> None:
    """A second driver for the same devices is refused, and says why."""
    for machine, other in zip((guest, host.server), others, strict=False):
        file = f"/modules/other-{other.name}.ko"
        machine.sh("dmesg -c > /dev/null")
        assert machine.run(f"insmod $(ls {file} /payload{file} 2> /dev/null)")[0] != 0
        assert LOST[other.name] in machine.sh("dmesg"), other.name


@pytest.mark.feature("FE-60", "FE-64", "FE-65", "FE-68")
def test_reload_frontend(host: XenHost, others: list[Driver]) -> None:
    """Unloaded and loaded; then unbound and bound through sysfs while the disk is open.

    Other drivers for the same devices are refused meanwhile.
    """
    guest = host.start_guest()
    refuse(host, guest, others)
    guest.sh("yes pattern | dd of=/dev/xvda bs=4k count=256 iflag=fullblock conv=fsync")
    written = guest.sh(SUM)
    for _cycle in range(3):
        guest.reload_frontend()
        guest.wait_for_disk("xvda")
        assert guest.sh(SUM) == written
    for _cycle in range(2):
        guest.sh(keep_open("/dev/xvda"))
        guest.rebind_disk(51712)
        guest.wait_for_disk("xvda")
        assert guest.sh(SUM) == written
        guest.sh(CLOSE_KEPT)
    assert_served_by_pair(host, guest)


def test_reload_backend(host: XenHost, others: list[Driver]) -> None:
    """The guest continues to write: it sees a pause and no error.

    Other drivers for the same devices are refused meanwhile.
    """
    guest = host.start_guest()
    refuse(host, guest, others)
    assert_served_by_pair(host, guest)
    server, device = host.server, f"vbd-{guest.domid}-51712"
    job = Job(
        guest,
        "printf 'round %06d' $pass | "
        "dd of=/dev/xvda bs=4k seek=$((pass % 64)) conv=sync,fsync,notrunc 2> /dev/null",
    )
    for _cycle in range(3):
        job.wait_for_pass()
        server.sh(f"echo {device} > {DRIVER}/unbind")
        server.unload_backend()
        server.load_backend()
        server.wait_for(f"[ -e {DRIVER}/{device} ] || echo {device} > {DRIVER}/bind")
        job.wait_for_pass(3)
    job.stop()
    last = int(guest.sh(f"echo {job.count()}"))
    for round in range(max(1, last - 10), last + 1):
        assert (
            guest.sh(
                f"dd if=/dev/xvda bs=4k skip={round % 64} count=1 iflag=direct 2>/dev/null | head -c 12"
            )
            == f"round {round:06}"
        )
    assert_served_by_pair(host, guest)


UNLOADS = 10


@pytest.mark.feature("B-01")
def test_unload_over_loop(xen: StartHost) -> None:
    """The backend is unloaded repeatedly during I/O that is completed in a thread of the disk.

    Such a thread can be preempted anywhere, in the end of an I/O too, where it runs
    code of the module.
    """
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.sh(
        "dd if=/dev/zero of=/tmp/image bs=1M count=8 2>/dev/null; losetup /dev/loop0 /tmp/image"
    )
    guest = host.start_guest(disks=[Disk(target="/dev/loop0")])
    assert_served_by_pair(host, guest)
    device = f"vbd-{guest.domid}-51712"
    guest.sh("yes pattern | dd of=/tmp/data bs=64k count=16 iflag=fullblock 2> /dev/null")
    job = Job(guest, "dd if=/tmp/data of=/dev/xvda bs=4k oflag=direct 2> /dev/null")
    for _cycle in range(UNLOADS):
        job.wait_for_pass()
        server.sh(f"echo {device} > {DRIVER}/unbind")
        server.unload_backend()
        server.load_backend()
        server.wait_for(f"[ -e {DRIVER}/{device} ] || echo {device} > {DRIVER}/bind")
    job.wait_for_pass()
    job.stop()
    guest.sh("dd if=/dev/xvda bs=64k count=16 iflag=direct 2> /dev/null | cmp - /tmp/data")
