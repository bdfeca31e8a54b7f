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
from harness.xenhost import XenHost

XVDA = 51712
CYCLES = 3
CONFIGURATION = "/etc/rblk/rblkd.conf"


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


def logged(host: XenHost, text: str) -> None:
    """Waits until rblkd has written a text."""
    host.wait_for(f"grep -qF '{text}' {rblkd.LOG}")


def reload(host: XenHost) -> None:
    """Has rblkd read its configuration again."""
    host.sh("kill -HUP $(cat /run/rblkd.pid)")


def test_rblkd_state(xen: StartHost) -> None:
    """rblkd reports its start, storage and events, reads its configuration again, and ends."""
    images = rblktap.disk([Image("a.raw", 64), Image("check.raw", 1)])
    host = xen(waiting=None, image=images, **rblkd.options())
    rblkd.install(host)
    host.sh(f"mkdir -p /etc/rblk && echo storage san = raw:/tap/check.raw > {CONFIGURATION}")
    rblkd.start(host)
    guest = host.start_guest(disks=[RblkDisk("xvda", "a.raw")])
    assert_served_by_pair(host, guest)
    assert "start: ready" in host.sh("rblk host status")

    explanation = host.sh(f"rblk disk explain {guest.name}/xvda")
    assert "states     backend Connected, frontend Connected" in explanation, explanation
    assert "data path  pages stay mapped" in explanation, explanation
    process = rblktap.pid(host, guest, XVDA)
    assert f"process {process} has opened" in host.sh("rblk events")
    assert "rblk_disk_served{" in host.sh("rblk metrics")
    assert "rblk_storage_state{" in host.sh("rblk metrics")
    assert isinstance(rblkd.rblk(host, "check || true"), list)

    host.wait_for("rblk storage status | grep -q '^san *up '")
    host.sh("mv /tap/check.raw /tap/away")
    host.wait_for("rblk storage status | grep -q '^san *down .*/tap/check.raw'")
    host.sh("mv /tap/away /tap/check.raw")
    host.wait_for("rblk storage status | grep -q '^san *up '")

    host.sh(f"cp {CONFIGURATION} /tmp/valid && echo nonsense >> {CONFIGURATION}")
    reload(host)
    logged(host, f"{CONFIGURATION}:2: ")
    host.sh("rblk storage status | grep -q '^san '")
    host.sh(f"echo > {CONFIGURATION}")
    reload(host)
    logged(host, f"{CONFIGURATION} was read again")
    host.sh("! rblk storage status | grep -q '^san '")

    host.sh("kill -TERM $(cat /run/rblkd.pid)")
    host.wait_for("! kill -0 $(cat /run/rblkd.pid) 2> /dev/null")
    guest.sh("echo data | dd of=/dev/xvda conv=sync,fsync 2> /dev/null")
    rblkd.start(host)
    assert rblktap.pid(host, guest, XVDA) == process


SLOW = "/tmp/slow-rblktap"
GO = "/tmp/go"


def test_rblkd_slow_open(xen: StartHost) -> None:
    """An image takes longer to open than libxl waits for a backend; one never opens."""
    images = rblktap.disk([Image("a.raw", 64), Image("b.raw", 32)])
    host = xen(waiting=None, image=images, **rblkd.options())
    rblkd.install(host)
    script = f'#!/bin/sh\nwhile [ ! -e {GO} ]; do sleep 1; done\nexec {rblktap.PROGRAM} "$@"\n'
    host.sh(f"printf '{script}' > {SLOW} && chmod 755 {SLOW}")
    rblkd.start(host, SLOW)
    host.sh(f"touch {GO}")
    guest = host.start_guest(disks=[RblkDisk("xvda", "a.raw")])

    for name in ["block-rblk", None]:
        host.sh(f"rm {GO}")
        disk = RblkDisk("xvdb", "b.raw", script=name)
        attach = f"xl block-attach {guest.name} '{disk.specification(host)}'"
        host.sh(f"({attach}; echo $? > /tmp/status) > /tmp/attach 2>&1 &")
        host.wait_for("grep -q 'is not open yet' " + rblkd.LOG)
        # libxl would have given up after 10 seconds.
        host.sh(f"sleep 12; [ ! -e /tmp/status ] && touch {GO}")
        host.wait_for("[ -s /tmp/status ]")
        assert host.sh("cat /tmp/attach /tmp/status").strip() == "0"
        guest.wait_for_disk("xvdb")
        assert_served_by_pair(host, guest, "xvdb")
        guest.sh("echo data | dd of=/dev/xvdb conv=sync,fsync 2> /dev/null")
        assert host.sh("head -n 1 /tap/b.raw").strip() == "data"
        rblkd.detach(host, guest, "xvdb")
        host.sh(f"rm /tmp/status; : > {rblkd.LOG}")

    host.sh(f"rm {GO}")
    output = rblkd.refused(host, guest, RblkDisk("xvdb", "b.raw"))
    assert "has not been opened in 30 seconds" in output, output


def test_rblkd_guide(xen: StartHost) -> None:
    """The commands of the administrator guide, in its order."""
    images = rblktap.disk([Image("debian.raw", 64)], rblktap.QEMU_TOOLS)
    host = xen(waiting=None, image=images, **rblkd.options())
    rblkd.install(host)
    status, output = host.run("rblk check")
    assert status in {0, 6}, output
    rblkd.start(host)
    assert "disks " in host.sh("rblk host status")

    host.sh("rblk image create qcow2:/tap/data.qcow2 1G")
    host.sh("rblk image convert raw:/tap/debian.raw qcow2:/tap/web.qcow2")
    disks = [RblkDisk("xvda", "web.qcow2"), RblkDisk("xvdb", "data.qcow2")]
    guest = host.start_guest(disks=disks)
    assert_served_by_pair(host, guest)
    name = guest.name
    host.sh("rblk image create qcow2:/tap/more.qcow2 1G")
    target = "vdev=xvdc,backendtype=tap,script=block-rblk,target=qcow2:/tap/more.qcow2"
    host.sh(f"xl block-attach {name} {target}")
    guest.wait_for_disk("xvdc")
    assert host.sh("rblk disk list").count(" connected ") == len(disks) + 1
    host.sh(f"xl block-detach {name} xvdc")
    guest.wait_for("[ ! -b /dev/xvdc ]")

    host.sh("rblk image create raw:/tap/check 1M")
    host.sh(f"mkdir -p /etc/rblk; echo storage local = raw:/tap/check >> {CONFIGURATION}")
    reload(host)
    host.wait_for("rblk storage status | grep -q '^local *up '")
    assert "rblk_disk_served{" in host.sh("rblk metrics")
    assert "detached" in host.sh("rblk events")
    assert "OPERATION" in host.sh(f"rblk disk stats {name}/xvda")
    explanation = host.sh(f"rblk disk explain {name}/xvda")
    assert "image      qcow2:/tap/web.qcow2" in explanation, explanation

    process = rblktap.pid(host, guest, XVDA)
    host.sh(f"rblk disk restart {name}/xvda")
    assert rblktap.pid(host, guest, XVDA) != process
    guest.sh("echo data | dd of=/dev/xvdb conv=sync,fsync 2> /dev/null")
    host.sh(f"xl block-detach {name} xvdb")
    guest.wait_for("[ ! -b /dev/xvdb ]")
    host.sh("rblk image convert qcow2:/tap/data.qcow2 raw:/tap/data.raw")
    assert host.sh("head -n 1 /tap/data.raw").strip() == "data"
