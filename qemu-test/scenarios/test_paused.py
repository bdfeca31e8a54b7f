# SPDX-License-Identifier: GPL-2.0-only
"""xl pauses and reboots a guest and a driver domain while the guest reads and writes."""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import READY
from harness.guest import TWO_VCPUS
from harness.job import wait_for_passes
from harness.verify import start_jobs
from harness.xenhost import Disk

QUIET = "grep -q '^ *0 *0$' /sys/block/ram0/inflight"
WAITS = "set -- $(cat /sys/block/xvda/inflight); [ $(($1 + $2)) -gt 0 ]"
CPUS = "/sys/devices/system/cpu"
PATTERN = "yes pattern | dd of=/dev/xvda bs=4k count=256 iflag=fullblock conv=fsync"
SUM = "dd if=/dev/xvda bs=4k count=256 iflag=direct 2> /dev/null | sha256sum"


@pytest.mark.feature("FE-50")
def test_paused(xen: StartHost) -> None:
    """Pause the guest, then the driver domain; take a virtual CPU from the guest."""
    host = xen(waiting=TWO_VCPUS)
    storage = host.start_storage()
    storage.load_backend("max_queues=2")
    storage.ram_disks()
    guest = host.start_guest(disks=[Disk(backend="storage")])
    jobs = start_jobs(guest, ["data", "synced", "mixed"])

    host.sh(f"xl pause {guest.name}")
    storage.wait_for(QUIET)
    host.sh(f"xl unpause {guest.name}")
    wait_for_passes(jobs)

    host.sh(f"xl pause {storage.name}")
    guest.wait_for(WAITS)
    host.sh(f"xl unpause {storage.name}")
    wait_for_passes(jobs)

    host.sh(f"xl vcpu-set {guest.name} 1")
    guest.wait_for(f"[ $(cat {CPUS}/online) = 0 ]")
    wait_for_passes(jobs)
    host.sh(f"xl vcpu-set --ignore-host {guest.name} 2")
    guest.wait_for(f"[ -e {CPUS}/cpu1/online ]")
    guest.sh(f"echo 1 > {CPUS}/cpu1/online")
    wait_for_passes(jobs)
    for job in jobs:
        job.stop()
    assert_served_by_pair(host, guest, server=storage)


@pytest.mark.feature("FE-26")
def test_restarted(xen: StartHost) -> None:
    """The guest reboots with I/O in flight, and xl starts it again: what was written is there."""
    host = xen(waiting=None)
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    guest = host.start_guest(settings='on_reboot = "restart"', fio=True, vcpus=2)
    guest.wait_for_disk("xvda")
    guest.sh(PATTERN)
    written = guest.sh(SUM)
    start_jobs(guest, ["synced", "mixed"])
    ready, before = READY.format(name=guest.name), guest.domid
    host.sh(f"rm {ready}")
    guest.shell.send("reboot -f")
    host.wait_for(f"[ -e {ready} ]", timeout=1200)
    guest.find_waiting()
    assert guest.domid != before
    guest.wait_for_disk("xvda")
    assert guest.sh(SUM) == written
    assert_served_by_pair(host, guest)
