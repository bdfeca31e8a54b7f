# SPDX-License-Identifier: GPL-2.0
"""Four virtual CPUs write at once, each its own part of the disk; all but one leave and come back."""

from harness.evidence import assert_served_by_pair

FIO = (
    "fio --filename=/dev/xvda --ioengine=libaio --iodepth=8 --direct=1 --rw=randwrite --bsrange=4k-64k "
    "--size=2M --offset_increment=8M --numjobs=4 --name=part --verify=crc32c --verify_fatal=1 "
    "--randseed=7 --output-format=terse"
)
WRITER = f"""(pass=0; while [ ! -e /tmp/stop ]; do
	{FIO} > /tmp/fio.log 2>&1 || touch /tmp/stop /tmp/failed
	pass=$((pass + 1)); echo $pass > /tmp/passes
done) > /dev/null 2>&1 &"""

EVENT_CPUS = r"""
for irq in $(sed -n 's/^ *\([0-9]*\):.*blkif.*/\1/p' /proc/interrupts); do
	cat /proc/irq/$irq/effective_affinity_list
done"""
"""The CPU that gets the events of each ring."""


def wait_for_pass(guest):
    """A pass ends, in which all parts are written and found to be right."""
    done = int(guest.sh("cat /tmp/passes 2> /dev/null || echo 0"))
    guest.wait_for(f"[ -e /tmp/failed ] || [ $(cat /tmp/passes) -gt {done} ]", timeout=600)
    assert guest.run("[ -e /tmp/failed ]")[0] != 0, guest.sh("cat /tmp/fio.log")


def test_four_vcpus(xen):
    """Rows: FE-06, FE-23, FE-50, BE-09, BE-21, BE-41"""
    host = xen(waiting=None)
    host.load_backend("max_queues=4")
    host.ram_disks()
    guest = host.start_guest(vcpus=4, fio=True)
    assert_served_by_pair(host, guest)
    assert guest.sh("nproc") == "4"
    back = f"/local/domain/0/backend/vbd/{guest.domid}/51712"
    offered = int(host.xenstore_read(f"{back}/multi-queue-max-queues") or 1)
    front = f"/local/domain/{guest.domid}/device/vbd/51712"
    used = int(host.xenstore_read(f"{front}/multi-queue-num-queues") or 1)
    assert 1 <= used <= offered
    guest.sh(WRITER)
    wait_for_pass(guest)
    guest.sh("for cpu in 1 2 3; do echo 0 > /sys/devices/system/cpu/cpu$cpu/online; done")
    assert set(guest.sh(EVENT_CPUS).split()) == {"0"}
    wait_for_pass(guest)
    guest.sh("for cpu in 1 2 3; do echo 1 > /sys/devices/system/cpu/cpu$cpu/online; done")
    wait_for_pass(guest)
    guest.sh("touch /tmp/stop")
    guest.wait_for("! pidof fio", timeout=600)
    assert guest.run("[ -e /tmp/failed ]")[0] != 0
