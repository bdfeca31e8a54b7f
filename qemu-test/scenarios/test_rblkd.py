# SPDX-License-Identifier: GPL-2.0-only
"""rblkd starts, adopts and replaces the processes that serve disks, and xl says what fails."""

from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.verify import start_jobs

XVDA = 51712
CYCLES = 3


def test_rblkd(xen: StartHost) -> None:
    """Kill rblkd and rblktap under verified I/O; attach by both scripts; errors; rblk."""
    images = rblktap.disk([Image("a.raw", 64), Image("b.raw", 32), Image("c.raw", 64)])
    host = xen(waiting=TWO_VCPUS, image=images, **rblkd.options())
    rblkd.install(host)
    rblkd.start(host)
    guest = host.start_guest(disks=[RblkDisk("xvda", "a.raw")])
    assert_served_by_pair(host, guest)
    jobs = start_jobs(guest, ["data", "synced", "mixed"])

    for cycle in range(CYCLES):
        process = rblktap.pid(host, guest, XVDA)
        rblkd.kill(host)
        for job in jobs:
            job.wait_for_pass()
        rblkd.start(host)
        assert rblktap.pid(host, guest, XVDA) == process
        host.sh(f"kill -9 {process}")
        host.wait_for(f"rblk disk list | grep -q 'connected.* {cycle + 1} '")
        for job in jobs:
            job.wait_for_pass()

    assert isinstance(rblkd.rblk(host, f"disk restart {guest.name}/xvda"), int)
    for job in jobs:
        job.wait_for_pass()
        job.stop()
    assert "I/O error" not in guest.sh("dmesg")

    output = rblkd.refused(host, guest, RblkDisk("xvdb", "missing.raw"))
    assert "script: " in output and "/tap/missing.raw" in output, output
    output = rblkd.refused(host, guest, RblkDisk("xvdb", "a.raw"))
    assert "script: " in output and "/tap/a.raw" in output, output

    assert rblkd.attach(host, guest, RblkDisk("xvdb", "b.raw", script=None)) == (0, "")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("echo data | dd of=/dev/xvdb conv=sync,fsync 2> /dev/null")
    assert host.sh("head -n 1 /tap/b.raw").strip() == "data"
    host.detach(guest, "xvdb")
    host.wait_for('[ -z "$(ls /run/rblk | grep 51728)" ]')
    output = rblkd.refused(host, guest, RblkDisk("xvdb", "missing.raw", script=None))
    assert "Could not open" in output, output

    host.sh(f"rblk disk pause {guest.name}/xvda && cp /tap/a.raw /tap/c.raw")
    host.sh(f"rblk disk retarget {guest.name}/xvda raw:/tap/c.raw")
    guest.sh("echo moved | dd of=/dev/xvda conv=sync,fsync 2> /dev/null")
    assert host.sh("head -n 1 /tap/c.raw").strip() == "moved"
    status, output = host.run(f"rblk disk retarget {guest.name}/xvda raw:/tap/missing.raw")
    assert status == 5, output
    guest.sh("echo again | dd of=/dev/xvda conv=sync,fsync 2> /dev/null")
    assert host.sh("head -n 1 /tap/c.raw").strip() == "again"
    assert host.run(f"rblk disk pause {guest.name}/xvdz")[0] == 3
