# SPDX-License-Identifier: GPL-2.0-only
"""A guest is migrated to the same host, or checkpointed, while it reads, writes and flushes.

Each program checks what it reads; none may see an error.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness import held_disk
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import LOG
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.job import Job
from harness.job import wait_for_passes
from harness.verify import JOBS
from harness.verify import start_jobs
from harness.xenhost import XenHost

IMAGE = "/dev/vdb"
PVH = replace(TWO_VCPUS, type="pvh")
"""Xen refuses to log which pages of a PV guest are written."""
DRIVER = "/sys/bus/xen-backend/drivers/vbd"


def migrate(guest: Guest) -> None:
    """Migrates the guest to the same host, where it continues as another domain with new backends.

    xenconsoled names the log of a domain by the name that this has when it is created.
    """
    log, incoming = (LOG.format(name=f"{guest.name}{end}") for end in ("", "--incoming"))
    guest.host.sh(
        f"ln -sf {log} {incoming}; xl migrate -s '' {guest.name} 'xl migrate-receive'", timeout=600
    )
    guest.find_waiting()


def checkpoint(guest: Guest) -> None:
    """Saves the guest with `xl save -c`, after which it continues as the same domain."""
    domid = guest.domid
    guest.host.sh(f"xl save -c {guest.name} {IMAGE}", timeout=600)
    assert guest.host.sh(f"xl domid {guest.name}") == str(domid)


def go_on(host: XenHost, guest: Guest, jobs: Sequence[Job]) -> None:
    """What the guest had asked for is done, and so is what it asks for now."""
    wait_for_passes(jobs, 2)
    assert_served_by_pair(host, guest)


@pytest.mark.feature("FE-20", "FE-66")
def test_migrate(xen: StartHost, test_modules: Path) -> None:
    """First with I/O all the time; then with requests in flight, which fail when the guest has
    stopped.

    Xen-blkfront has no writes with a flush after them here: it makes a BUG of one in flight, as
    save_restore shows.
    """
    host, guest = held_disk.start(xen, test_modules, PVH)
    is_ours = guest.front == "rblkfront"
    jobs = start_jobs(guest, [name for name in JOBS if is_ours or name != "synced"])
    migrate(guest)
    go_on(host, guest, jobs)

    held_disk.hold(host.server, guest)
    held_disk.fail_when_stopped(host, guest)
    migrate(guest)
    held_disk.assert_failed(host.server)
    go_on(host, guest, jobs)
    for job in jobs:
        job.stop()


@pytest.mark.feature("FE-66")
def test_checkpoint(xen: StartHost, test_modules: Path) -> None:
    """The same backend serves the same rings: with I/O all the time, with requests in flight until
    the guest continues, and with a backend that is replaced meanwhile.
    """
    host, guest = held_disk.start(xen, test_modules)
    server, device = host.server, f"vbd-{guest.domid}-51712"
    jobs = start_jobs(guest)
    checkpoint(guest)
    go_on(host, guest, jobs)

    held_disk.hold(server, guest)
    checkpoint(guest)
    held_disk.release(server)
    go_on(host, guest, jobs)

    server.sh(f"echo {device} > {DRIVER}/unbind")
    server.unload_backend()
    checkpoint(guest)
    server.load_backend("max_queues=2")
    server.wait_for(f"[ -e {DRIVER}/{device} ] || echo {device} > {DRIVER}/bind")
    go_on(host, guest, jobs)
    for job in jobs:
        job.stop()
