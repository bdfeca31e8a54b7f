# SPDX-License-Identifier: GPL-2.0-only
"""The guest sees the properties of a disk that the backend writes, even if they change.

Dom0's shell plays backends with various properties. Their disks have no sectors while they connect,
because nothing would complete reads of a partition table.
"""

import errno
from collections.abc import Iterator

import pytest

from harness.driver_check import assert_front_of_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import DRIVER
from harness.guest import Guest
from harness.image import compiled
from harness.toolstack import PLAIN
from harness.toolstack import Nodes
from harness.toolstack import connect_disks
from harness.toolstack import create_device
from harness.toolstack import directories
from harness.toolstack import remove_devices
from harness.toolstack import write_nodes
from harness.xenhost import XenHost

FEATURES = {
    "feature-max-indirect-segments": 256,
    "feature-persistent": 1,
    "feature-discard": 1,
    "discard-granularity": 8192,
    "discard-alignment": 4096,
    "discard-secure": 1,
    "physical-sector-size": 4096,
}
SHOWN = {
    "ro": "0",
    "removable": "0",
    "queue/logical_block_size": "512",
    "queue/physical_block_size": "512",
    "queue/max_hw_sectors_kb": "44",
    "queue/max_segments": "11",
    "queue/max_segment_size": "4096",
    "queue/write_cache": "write through",
    "queue/fua": "0",
    "queue/discard_max_hw_bytes": "0",
    "queue/discard_granularity": "0",
    "queue/write_zeroes_max_bytes": "0",
}
INDIRECT = {"queue/max_hw_sectors_kb": "128", "queue/max_segments": "32"}
DISCARD = {"queue/discard_max_hw_bytes": str(0xFFFFFFFF << 9), "queue/discard_granularity": "8192"}
LARGE_BLOCKS = {"queue/logical_block_size": "4096", "queue/physical_block_size": "4096"}
CACHE = {"queue/write_cache": "write back"}

XVDF = 51792

MULTISESSION, CAPABILITY, EJECT, GEOMETRY = 0x5310, 0x5331, 0x5309, 0x301
"""ioctls of a CD-ROM, and that for the geometry."""
ASKED = [
    ("xvdc", CAPABILITY, "0 0"),
    ("xvda", CAPABILITY, f"-1 {errno.EINVAL}"),
    ("xvda", MULTISESSION, "0 0 0000000000000000"),
    ("xvdc", EJECT, "-1 "),
    ("xvda", GEOMETRY, "0 0 ff3f0000"),
]
"""Disk, ioctl, and how the answer begins: what it returns, the error, its first bytes."""


def disks(rust: bool) -> Iterator[tuple[str, int, Nodes, Nodes, dict[str, str]]]:
    """Name, number, features, the toolstack's nodes, and the expected properties."""
    # A barrier flushes before its data, not after: only C takes it for more than a flush.
    fua = {} if rust else {"queue/fua": "1"}
    ours = {"removable": "1"} if rust else {}
    yield "xvda", 51712, {}, {}, {}
    yield "xvdb", 51728, FEATURES, {}, {**INDIRECT, **DISCARD, "queue/physical_block_size": "4096"}
    yield (
        "xvdc",
        51744,
        {"sector-size": 4096, "info": 7},
        {},
        {
            **LARGE_BLOCKS,
            "ro": "1",
            "removable": "1",
        },
    )
    yield "xvdd", 51760, {"feature-barrier": 1, "feature-flush-cache": 1}, {}, CACHE
    yield "xvde", 51776, {"feature-barrier": 1}, {}, {**CACHE, **fua}
    yield "xvdf", XVDF, {"removable": 1}, {"no-part-scan": 1}, ours


@pytest.mark.feature(
    "FE-01",
    "FE-04",
    "FE-07",
    "FE-08",
    "FE-09",
    "FE-10",
    "FE-11",
    "FE-13",
    "FE-24",
    "FE-26",
    "FE-51",
    "FE-52",
    "FE-53",
    "FE-54",
    "FE-60",
    "FE-61",
    "FE-63",
    "F-08",
    "F-20",
)
def test_disk_facts(xen: StartHost, record_property: RecordProperty) -> None:
    """Features in sysfs while disks connect and later; names and numbers of disks."""
    host = xen(programs=[compiled("ioctl")])
    guest = host.start_guest(disks=[])
    assert_front_of_pair(host, guest)
    rust = guest.front == "rblkfront"
    listed = list(disks(rust))
    connect_disks(host, guest, {code: (offers, nodes) for _, code, offers, nodes, _ in listed})
    guest.wait_for(" && ".join(f"[ -b /dev/{name} ]" for name, *_ in listed))
    names = " ".join(name for name, *_ in listed)
    look = f"for d in {names}; do cd /sys/block/$d; cat {' '.join(SHOWN)}; done"
    seen = guest.sh(look).splitlines()
    for name, _code, offers, nodes, facts in listed:
        shown = dict(zip(SHOWN, seen[: len(SHOWN)], strict=True))
        assert shown == {**SHOWN, **facts}, (name, offers, nodes)
        seen = seen[len(SHOWN) :]
    if not rust:
        record_property("c_fails", "F-20")
    # That of a disk by xl is written by xl already.
    protocol = f"{directories(guest.domid, XVDF)[0]}/protocol"
    assert host.xenstore_read(protocol) == "x86_64-abi"
    for disk, number, answer in ASKED:
        assert guest.sh(f"/programs/ioctl /dev/{disk} {number}").startswith(answer), (disk, number)
    follow_changes(host, guest, rust)
    follow_another_backend(host, guest, 51712)
    remove_devices(host, guest, [code for _, code, *_ in listed])
    follow_names(host, guest)
    refuse_what_is_no_disk(host, guest)
    rebind_before_the_backend(host, guest)
    refuse_name(host, guest, record_property)


def follow_changes(host: XenHost, guest: Guest, rust: bool) -> None:
    """Changes size and write protection of a connected disk; invalid values change nothing."""
    back = directories(guest.domid, XVDF)[1]
    for sectors in (8192, 6144, 0):
        write_nodes(host, back, {"sectors": sectors, "state": 4})
        guest.wait_for(f"[ $(cat /sys/block/xvdf/size) = {sectors} ]")
    write_nodes(host, back, {"info": 4, "sectors": 2048, "state": 4})
    guest.wait_for("[ $(cat /sys/block/xvdf/size) = 2048 ]")
    assert guest.sh("cat /sys/block/xvdf/ro; dmesg -c > /dev/null") == ("1" if rust else "0")
    write_nodes(host, back, {"sectors": "many", "state": 4})
    write_nodes(host, back, {"sectors": 1024, "sector-size": 4096, "info": 0, "state": 4})
    guest.wait_for("[ $(cat /sys/block/xvdf/size) = 1024 ]")
    assert guest.sh("cd /sys/block/xvdf; cat queue/logical_block_size ro").split() == ["512", "0"]
    if rust:
        said = guest.sh("dmesg | tail")
        assert "sector-size = 4096" in said, said
    write_nodes(host, back, {"sectors": 0, "state": 4})
    guest.wait_for("[ $(cat /sys/block/xvdf/size) = 0 ]")


NAMES = [
    {
        51712: ("xvda", "202:0"),
        51729: ("xvdb1", "202:17"),
        5632: ("xvdc", "202:32"),
        2096: ("xvdd", "202:48"),
        16640: ("xvdq", "202:256"),
        (1 << 28) + 256 * 30: ("xvdae", "202:7680"),
    },
    {768: ("xvda", "202:0"), 2064: ("xvdb", "202:16")},
]
"""Names and numbers of disks by virtual device number: xvd, hd, sd and extended form."""

NOWHERE = [9 << 8, 3 << 28, (1 << 28) + (1 << 20)]
"""Virtual device numbers of no disk."""


def follow_another_backend(host: XenHost, guest: Guest, code: int) -> None:
    """Gives the device another backend; nodes of the old one have no effect any more."""
    front, old = directories(guest.domid, code)
    new = f"{old}0"
    nodes = {"frontend": front, "frontend-id": guest.domid, "online": 1, "state": 2}
    write_nodes(host, new, nodes)
    host.sh(f"xenstore-chmod -r {new} n0 r{guest.domid}")
    write_nodes(host, front, {"backend": new, "state": 1})
    host.wait_for(f"[ $(xenstore-read {front}/state) = 3 ]")
    write_nodes(host, new, {**PLAIN, "state": 4})
    host.wait_for(f"[ $(xenstore-read {front}/state) = 4 ]")
    write_nodes(host, old, {"sectors": 2048, "state": 6})
    write_nodes(host, new, {"sectors": 4096, "state": 4})
    guest.wait_for("[ $(cat /sys/block/xvda/size) = 4096 ]")
    write_nodes(host, new, {"sectors": 0, "state": 4})
    guest.wait_for("[ $(cat /sys/block/xvda/size) = 0 ]")
    write_nodes(host, new, {"online": 0, "state": 6})
    host.wait_for(f"[ $(xenstore-read {front}/state) = 6 ]")
    host.sh(f"xenstore-rm {new}")


def number_of(code: int) -> Nodes:
    """The node that has the number of a disk, if it is not that of all others."""
    return {"virtual-device": None, "virtual-device-ext": code} if code >> 28 else {}


def follow_names(host: XenHost, guest: Guest) -> None:
    """Checks name and minors of each form of virtual device number; duplicates are refused."""
    for names in NAMES:
        connect_disks(host, guest, {code: ({}, number_of(code)) for code in names})
        for name, number in names.values():
            guest.wait_for(f'[ "$(cat /sys/block/{name}/dev)" = {number} ]')
        if 768 in names:
            refuse_clash(host, guest)
        remove_devices(host, guest, names)


def refuse_what_is_no_disk(host: XenHost, guest: Guest) -> None:
    """Checks that a number that is no disk's creates none."""
    for code in NOWHERE:
        create_device(host, guest.domid, code)
    guest.wait_for(" && ".join(f"[ -e /sys/bus/xen/devices/vbd-{code} ]" for code in NOWHERE))
    assert guest.sh("ls -d /sys/block/xvd* 2>/dev/null || true") == ""
    remove_devices(host, guest, NOWHERE)


def refuse_clash(host: XenHost, guest: Guest) -> None:
    """51712 and 768 are both xvda: the second is closed, the first stays."""
    front, back = create_device(host, guest.domid, 51712)
    host.wait_for(f"[ $(xenstore-read {front}/state) = 3 ]")
    write_nodes(host, back, {**PLAIN, "state": 4})
    host.wait_for(f"[ $(xenstore-read {front}/state) -ge 5 ]")
    assert guest.sh("readlink -f /sys/block/xvda").split("/")[-3] == "vbd-768"
    remove_devices(host, guest, [51712])


def rebind_before_the_backend(host: XenHost, guest: Guest) -> None:
    """Checks that a device that is unbound and bound while it waits for its backend still waits."""
    front, back = create_device(host, guest.domid, 51712, backend_state=1)
    guest.wait_for(f"[ -e {DRIVER}/vbd-51712 ]")
    guest.rebind_disk(51712)
    guest.wait_for(f"[ -e {DRIVER}/vbd-51712 ]")
    write_nodes(host, back, {"state": 2})
    host.wait_for(f"[ $(xenstore-read {front}/state) = 3 ]")
    remove_devices(host, guest, [51712])


def refuse_name(host: XenHost, guest: Guest, record_property: RecordProperty) -> None:
    """Two forms of number give the name xvdb, with minors of their own: the second is closed.

    xen-blkfront continues to use a disk that it has freed.
    """
    first, second = 51728, (1 << 28) + 256
    connect_disks(host, guest, {first: ({}, {})})
    guest.wait_for("[ -b /dev/xvdb ]")
    if guest.front == "xen-blkfront":
        record_property("c_not_asked", "F-08")
        remove_devices(host, guest, [first])
        return
    # The kernel shows from where a name was to be used again.
    guest.allow("Call Trace")
    front, back = create_device(host, guest.domid, second)
    host.wait_for(f"[ $(xenstore-read {front}/state) = 3 ]")
    write_nodes(host, back, {**PLAIN, "state": 4})
    host.wait_for(f"[ $(xenstore-read {front}/state) -ge 5 ]")
    assert "adding disk xvdb" in guest.sh("dmesg | tail -n 60")
    assert guest.sh("cat /sys/block/xvdb/dev") == "202:16"
    remove_devices(host, guest, [second, first])
