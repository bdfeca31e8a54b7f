# SPDX-License-Identifier: GPL-2.0-only
"""Four virtual CPUs write at once, each its own part of the disk; all but one go offline and back.

So does the CPU of dom0 with the threads and interrupts of the backend. Dom0's two share one of
QEMU's, which is enough for this test. A driver domain has one CPU.
"""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import FOUR_VCPUS
from harness.job import Job
from harness.toolstack import CODES
from harness.toolstack import directories
from harness.xenhost import XenHost

FIO = (
    "fio --filename=/dev/xvda --ioengine=libaio --iodepth=8 --direct=1 --rw=randwrite --bsrange=4k-64k "
    "--size=2M --offset_increment=8M --numjobs=4 --name=part --verify=crc32c --verify_fatal=1 "
    "--randseed=7 --output-format=terse"
)
EVENT_CPUS = r"""
for irq in $(sed -n 's/^ *\([0-9]*\):.*blkif.*/\1/p' /proc/interrupts); do
	cat /proc/irq/$irq/effective_affinity_list
done"""
"""The CPU that gets the events of each ring."""

BACKEND_TO_CPU1 = r"""
for irq in $(sed -n 's/^ *\([0-9]*\):.*blkif.*/\1/p' /proc/interrupts); do
	echo 1 > /proc/irq/$irq/smp_affinity_list
done
for thread in $(grep -l xvda /proc/[0-9]*/comm); do
	thread=${thread#/proc/}
	taskset -p 2 ${thread%/comm} > /dev/null
done"""
THREAD_CPUS = (
    r"sed -n 's/^Cpus_allowed_list:\t//p' $(grep -l xvda /proc/[0-9]*/comm | sed s/comm/status/)"
)
"""The CPUs that each thread of the backend may use."""
CPU1 = "/sys/devices/system/cpu/cpu1/online"


@pytest.mark.feature("FE-06", "FE-23", "FE-50", "BE-09", "BE-21", "BE-41")
def test_four_vcpus(xen: StartHost) -> None:
    host = xen(vcpus=2, waiting=FOUR_VCPUS)
    server = host.start_server()
    server.load_backend("max_queues=4")
    server.ram_disks()
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    assert guest.sh("nproc") == "4"
    front, back = directories(guest.domid, CODES["xvda"], server)
    offered = int(host.xenstore_read(f"{back}/multi-queue-max-queues") or 1)
    used = int(host.xenstore_read(f"{front}/multi-queue-num-queues") or 1)
    assert used == min(4, offered)
    queues = guest.sh("cd /sys/block/xvda/mq; for queue in *; do cat $queue/nr_tags; done").split()
    assert queues == ["32"] * used
    job = Job(guest, FIO)
    job.wait_for_pass()
    guest.sh("for cpu in 1 2 3; do echo 0 > /sys/devices/system/cpu/cpu$cpu/online; done")
    assert set(guest.sh(EVENT_CPUS).split()) == {"0"}
    job.wait_for_pass()
    guest.sh("for cpu in 1 2 3; do echo 1 > /sys/devices/system/cpu/cpu$cpu/online; done")
    job.wait_for_pass()

    if server is host:
        move_backend(host, job)
    job.stop()


def move_backend(host: XenHost, job: Job) -> None:
    """To another CPU of dom0, which leaves and comes back."""
    host.sh(BACKEND_TO_CPU1)
    for cpus in (EVENT_CPUS, THREAD_CPUS):
        assert set(host.sh(cpus).split()) == {"1"}
    job.wait_for_pass()
    host.sh(f"echo 0 > {CPU1}")
    assert set(host.sh(EVENT_CPUS).split()) == {"0"}
    job.wait_for_pass()
    host.sh(f"echo 1 > {CPU1}")
    job.wait_for_pass()
