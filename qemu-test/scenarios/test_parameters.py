# SPDX-License-Identifier: GPL-2.0-only
"""Module parameters and the node `trusted` select the data path; data is right on all of them.

Names, permissions and defaults are those of xen-blkfront; the timeouts are our own.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.manual_toolstack import ManualDisk
from harness.xenhost import Disk
from harness.xenhost import XenHost

PARAMETERS = {
    "feature_persistent": ("644", "Y"),
    "max_indirect_segments": ("444", "32"),
    "max_queues": ("444", "2"),
    "max_ring_page_order": ("444", "0"),
    "trusted": ("644", "Y"),
}
"""Permissions, and value by default with two CPUs."""

OWN_PARAMETERS = {
    "detach_timeout": ("644", "8"),
    "io_timeout": ("644", "30"),
    "reconnect_timeout": ("644", "300"),
}
"""Those that xen-blkfront does not have."""

COMMON = {"protocol": "x86_64-abi", "feature-persistent": "1", "state": "4"}
TWO_RINGS = {
    **COMMON,
    "multi-queue-num-queues": "2",
    "ring-page-order": None,
    "queue-0/event-channel": "number",
    "queue-1/event-channel": "number",
    "queue-1/ring-ref": "number",
}
LARGE_RINGS = {
    **COMMON,
    "multi-queue-num-queues": "2",
    "ring-page-order": "2",
    "queue-1/event-channel": "number",
    "queue-1/ring-ref0": "number",
    "queue-1/ring-ref3": "number",
}
ONE_RING = {
    **COMMON,
    "multi-queue-num-queues": None,
    "ring-page-order": None,
    "event-channel": "number",
    "ring-ref": "number",
}

SAID = "persistent grants: {}; indirect descriptors: {}; bounce buffer: {}"
WAYS: list[tuple[str, int, dict[str, str | None], int, tuple[str, str, str]]] = [
    ("", 1, TWO_RINGS, 32, ("enabled", "enabled", "enabled")),
    (
        "feature_persistent=0 max_ring_page_order=2 max_indirect_segments=64",
        1,
        {**LARGE_RINGS, "feature-persistent": "0"},
        64,
        ("disabled", "enabled", "disabled"),
    ),
    (
        "feature_persistent=0 max_queues=1 max_indirect_segments=0",
        0,
        {**ONE_RING, "feature-persistent": "0"},
        11,
        ("disabled", "disabled", "enabled"),
    ),
    (
        "feature_persistent=0 trusted=0 max_queues=99 max_ring_page_order=9 max_indirect_segments=9999",
        1,
        {**LARGE_RINGS, "feature-persistent": "0", "ring-page-order": "4"},
        256,
        ("disabled", "enabled", "enabled"),
    ),
]
"""Parameters, the node trusted; nodes that are written, segments of a request, what is said."""

IRQ_CPUS = """
sed -n 's/^ *\\([0-9]*\\):.*blkif.*/\\1/p' /proc/interrupts | while read -r irq; do
	cat /proc/irq/$irq/smp_affinity_list
done
"""
"""Which CPUs get the events of each ring."""

DATA = """
head -c 4194816 /dev/urandom > /tmp/data
dd if=/tmp/data of=/dev/xvda bs=1M oflag=direct conv=notrunc count=4
dd if=/tmp/data of=/dev/xvda bs=512 skip=8192 seek=8192 oflag=direct conv=notrunc
dd if=/dev/xvda bs=1M count=5 iflag=direct | head -c 4194816 | cmp - /tmp/data
"""


def nodes_written(host: XenHost, directory: str, names: Iterable[str]) -> dict[str, str | None]:
    """What the frontend has written, numbers that differ each time as "number"."""
    script = "".join(f"xenstore-read {directory}/{name} 2>/dev/null || echo -\n" for name in names)
    values = dict(zip(names, host.sh(script).splitlines(), strict=True))
    return {
        name: None if value == "-" else "number" if "ring-ref" in name or "event" in name else value
        for name, value in values.items()
    }


def forget(host: XenHost, directory: str) -> None:
    """Removes what tells of several rings: xen-blkfront leaves it there when it has but one."""
    for name in ("multi-queue-num-queues", "ring-page-order"):
        host.run(f"xenstore-rm {directory}/{name}")


TAGS = "cd /sys/block/xvda/mq; for queue in *; do cat $queue/nr_tags; done"
"""How many requests each queue of the disk can have."""

PEEK = 11
"""The misbehaviour of rblk_hostile_back that refuses a write whose pages show more than its data.
"""
NEIGHBOURS = (
    "fio --name=neighbours --filename=/dev/xvdb --ioengine=libaio --direct=1 --rw=randwrite --bs=512 "
    "--iodepth=8 --iodepth_batch=8 --number_ios=8 --randseed=7 --output-format=terse"
)
"""Eight writes at once, whose data stands side by side in one page of fio's."""


def show_the_data_alone(host: XenHost, guest: Guest, parameters: str) -> None:
    """A backend that is not trusted sees nothing else of the pages that contain data."""
    guest.allow("error, dev xvdb")
    for trusted in "YN":
        guest.sh(f"echo {trusted} > {parameters}/trusted")
        host.attach(guest, Disk("xvdb", "/dev/ram1"))
        guest.wait_for_disk("xvdb")
        refused = guest.run(NEIGHBOURS)[0] != 0
        assert refused == (trusted == "Y")
        host.detach_and_wait(guest, "xvdb")


def take_what_was_offered(host: XenHost, guest: Guest, record_property: RecordProperty) -> None:
    """A frontend may use a feature that was offered, even if the parameter was lowered afterwards.

    The C backend refuses it.
    """
    server, disk = host.server, ManualDisk(host, guest, "xvdc")
    guest.unload_frontend()
    host.attach(guest, Disk("xvdc", "/dev/ram1"))
    disk.wait_for(back=2)
    backend = host.pair.backend.name.replace("-", "_")
    server.sh(f"echo 1 > /sys/module/{backend}/parameters/max_queues")
    guest.load_frontend()
    host.wait_for(f"[ $(xenstore-read {disk.back}/state) -ge 4 ]")
    if host.pair.backend.name == "rblkback":
        guest.wait_for_disk("xvdc")
        guest.sh(DATA.replace("xvda", "xvdc"))
    else:
        assert host.xenstore_read(f"{disk.back}/state") in ("5", "6")
        record_property("c_fails", "B-17")
    assert host.xenstore_read(f"{disk.front}/multi-queue-num-queues") == "2"


@pytest.mark.feature(
    "FE-03",
    "FE-05",
    "FE-06",
    "FE-12",
    "FE-13",
    "FE-20",
    "FE-21",
    "FE-22",
    "FE-23",
    "FE-24",
    "FE-25",
    "FE-26",
    "FE-30",
    "FE-31",
    "FE-32",
    "FE-33",
    "FE-34",
    "FE-40",
    "FE-41",
    "FE-50",
    "FE-55",
    "FE-68",
    "F-17",
    "BE-08",
    "BE-10",
    "BE-11",
    "BE-20",
    "BE-48",
    "B-17",
)
def test_parameters(xen: StartHost, test_modules: Path, record_property: RecordProperty) -> None:
    host = xen(waiting=TWO_VCPUS, modules=[test_modules / "rblk_hostile_back.ko"])
    server = host.start_server()
    server.insmod("rblk_hostile_back", f"misbehaviour={PEEK}")
    server.load_backend("max_queues=2")
    server.ram_disks(2)
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    parameters = f"/sys/module/{guest.front.replace('-', '_')}/parameters"
    listed = guest.sh(f"cd {parameters}; for p in *; do echo $p $(stat -c %a $p) $(cat $p); done")
    shown = {name: (mode, value) for name, mode, value in map(str.split, listed.splitlines())}
    own = OWN_PARAMETERS if guest.front == "rblkfront" else {}
    assert shown == PARAMETERS | own
    if sorted(guest.sh(IRQ_CPUS).split()) != ["0", "1"]:
        assert guest.front == "xen-blkfront"
        record_property("c_fails", "F-17")
    directory = f"/local/domain/{guest.domid}/device/vbd/51712"
    # For the last way xen-blkfront wants a gigabyte of memory.
    ways = WAYS if guest.front == "rblkfront" else WAYS[:-1]
    for number, (options, trusted, nodes, segments, said) in enumerate(ways):
        if number:
            guest.unload_frontend()
            guest.wait_for_backends()
            host.sh(f"xenstore-write {directory}/trusted {trusted}")
            if guest.front == "xen-blkfront":
                forget(host, directory)
            guest.load_frontend(options)
            guest.ask_for_disks()
            guest.wait_for_disk("xvda")
        # The disk may be there before that is said.
        host.wait_for(f"[ $(xenstore-read {directory}/state) = 4 ]")
        assert nodes_written(host, directory, nodes) == nodes, options
        slots = 32 << int(nodes["ring-page-order"] or 0)
        rings = int(nodes["multi-queue-num-queues"] or 1)
        assert guest.sh(TAGS).split() == [str(slots)] * rings, options
        assert guest.sh("cat /sys/block/xvda/queue/max_segments") == str(segments), options
        assert SAID.format(*said) in guest.sh("dmesg | grep 'bounce buffer' | tail -n 1"), options
        guest.sh(DATA)
    show_the_data_alone(host, guest, parameters)
    take_what_was_offered(host, guest, record_property)
