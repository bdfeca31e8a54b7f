# SPDX-License-Identifier: GPL-2.0-only
"""A disk reconnects to a backend with fewer or other features.

The first one is played by the shell and has no ring: requests stay in flight. The second one is
rblk_hostile_back, which has one ring of 32 slots, no indirect requests, and a write cache.
xen-blkfront is not asked: it ends the disk when the backend closes.
"""

from pathlib import Path

import pytest

from harness.driver_check import assert_front_of_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.manual_toolstack import ManualDisk

MISBEHAVIOUR = "/sys/module/rblk_hostile_back/parameters/misbehaviour"
HONEST, UNSUPPORTED_FLUSH, LAG = 0, 3, 14

SECTORS = 2048
WRITE = "/usr/bin/dd if=/dev/zero of=/dev/xvdb bs={} count=1 oflag=direct"
IN_BACKGROUND = (
    "({0} && echo written > /tmp/end{1} || echo failed > /tmp/end{1}) > /dev/null 2>&1 &"
)
IN_FLIGHT = "[ \"$(awk '{{print $9}}' /sys/block/xvdb/stat)\" -ge {} ]"

SMALL = """
fio --name=small --filename=/dev/xvdb --rw=randwrite --bs=4k --size=1M --ioengine=libaio --direct=1 \\
	--cpus_allowed={} --iodepth=32 --time_based --runtime=1200 > /tmp/fio.log 2>&1 &
echo $! > /tmp/fio
"""
"""Keeps as many small writes in flight as the ring has slots."""
LARGE = 2


@pytest.fixture
def disk(xen: StartHost, test_modules: Path) -> ManualDisk:
    """xvdb, whose backend is played; rblk_hostile_back is loaded and has nothing to do yet."""
    host = xen(
        modules=[test_modules / "rblk_hostile_back.ko"],
        waiting=TWO_VCPUS,
        front_parameters="max_indirect_segments=256",
    )
    server = host.start_server()
    guest = host.start_guest(disks=[])
    assert_front_of_pair(host, guest)
    disk = ManualDisk(host, guest)
    disk.offer(state=6)
    server.insmod("rblk_hostile_back", f"device={disk.code}")
    return disk


def set_misbehaviour(disk: ManualDisk, misbehaviour: int) -> None:
    """What the backend does wrong from now on."""
    disk.server.sh(f"echo {misbehaviour} > {MISBEHAVIOUR}")


def connect(disk: ManualDisk, **offers: object) -> None:
    """The disk is there, without partitions, and nothing of it is answered."""
    disk.play_until_connected(**offers)
    disk.guest.wait_for_disk("xvdb")
    disk.play(4, sectors=SECTORS)
    disk.guest.wait_for(f"[ $(cat /sys/block/xvdb/size) = {SECTORS} ]")


@pytest.mark.feature("F-06")
def test_large_among_small(disk: ManualDisk) -> None:
    """A write of 1 MiB that was one request takes 24 slots of 32. It ends although small writes
    want each slot that gets free, and these go on.

    Each size has a hardware queue of its own, as blk-mq dispatches nothing of a queue before a
    request of it that was refused. The backend leaves the last 16 writes unanswered until no more
    follow, so 24 slots are free only if the driver refuses small writes.
    """
    guest = disk.guest
    connect(disk, feature_max_indirect_segments=256, multi_queue_max_queues=2)
    small_cpu, large_cpu = map(int, guest.sh("cat /sys/block/xvdb/mq/*/cpu_list").split())
    set_misbehaviour(disk, LAG)
    for number in range(LARGE):
        write = f"taskset {1 << large_cpu:x} {WRITE.format('1M')}"
        guest.sh(IN_BACKGROUND.format(write, number))
    guest.wait_for(IN_FLIGHT.format(LARGE))
    guest.sh(SMALL.format(small_cpu))
    guest.wait_for(IN_FLIGHT.format(LARGE + 16))
    disk.hand_over(feature_max_indirect_segments=0, multi_queue_max_queues=1)
    for number in range(LARGE):
        guest.wait_for(f'[ "$(cat /tmp/end{number})" = written ]')
    done = int(guest.sh("awk '{print $5}' /sys/block/xvdb/stat"))
    guest.wait_for(f"[ \"$(awk '{{print $5}}' /sys/block/xvdb/stat)\" -ge {done + 100} ]")
    guest.sh("kill $(cat /tmp/fio)")
    guest.wait_for("[ ! -e /proc/$(cat /tmp/fio) ]")
    set_misbehaviour(disk, HONEST)
    disk.detach_and_wait()
    # The second queue lost its ring with a request in flight, and waits for nothing.
    assert "the backend does not respond" not in guest.sh("dmesg")


@pytest.mark.feature("F-26")
def test_gained_cache(disk: ManualDisk) -> None:
    """The first backend had no write cache, and the second one has: each write is flushed before it
    is reported done. The block layer has dropped FUA from what was in flight.
    """
    guest = disk.guest
    guest.allow("error, dev xvdb")
    connect(disk)
    guest.sh(IN_BACKGROUND.format(WRITE.format("4k") + ",dsync", ""))
    guest.wait_for(IN_FLIGHT.format(1))
    set_misbehaviour(disk, UNSUPPORTED_FLUSH)
    disk.hand_over()
    guest.wait_for("[ -s /tmp/end ]")
    assert guest.sh("cat /tmp/end") == "failed"
    assert "each write is flushed" in guest.sh("dmesg | tail -n 30")
    assert guest.run(WRITE.format("4k"))[0] != 0
    guest.sh("dd if=/dev/xvdb of=/dev/null bs=4k count=1 iflag=direct")
    set_misbehaviour(disk, HONEST)
    guest.sh(WRITE.format("64k"))
    guest.sh(WRITE.format("1M") + ",dsync")
    assert guest.sh("cat /sys/block/xvdb/queue/write_cache") == "write through"
    disk.detach_and_wait()
    disk.offer()
    guest.wait_for_disk("xvdb")
    assert guest.sh("cat /sys/block/xvdb/queue/write_cache") == "write back"
    disk.detach_and_wait()
