# SPDX-License-Identifier: GPL-2.0-only
"""The peer writes invalid nodes to xenstore: there is a message, and nothing else is affected.

Dom0's shell plays the peer: it writes the nodes that a backend or a frontend would write. After
each invalid node a valid disk must work.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import DRIVER
from harness.guest import Guest
from harness.toolstack import PLAIN
from harness.toolstack import connect_disks
from harness.toolstack import create_device
from harness.toolstack import directories
from harness.toolstack import error_node
from harness.toolstack import remove_devices
from harness.toolstack import write_nodes
from harness.xenhost import Disk
from harness.xenhost import XenHost

CODE = 51728
"""Virtual device number of xvdb."""

HUGE = "99999999999999999999"
REFUSED = [
    ("sectors", None),
    ("sectors", "many"),
    ("sector-size", "five"),
    ("info", "-"),
]
"""Node and value, None for a missing node, of a disk that neither frontend takes."""
REFUSED_BY_OURS = [("sectors", HUGE), ("sectors", "-1"), ("sector-size", "0"), ("sector-size", "")]
"""xen-blkfront takes a part of these for a number."""
WRONG_STATES = ("99", "-1", "many")
"""What neither half may take for a state of the other one. The C pair stays as it is."""
NONSENSE = [
    {
        "feature-max-indirect-segments": "",
        "feature-persistent": "-1",
        "feature-flush-cache": "many",
        "feature-barrier": HUGE,
        "feature-discard": "",
        "discard-granularity": "-1",
        "discard-alignment": "many",
        "discard-secure": HUGE,
    },
    {
        "max-ring-page-order": HUGE,
        "multi-queue-max-queues": "-1",
        "physical-sector-size": "many",
        "removable": "",
    },
    {"online": "0x1"},
]
"""Nodes of disks that are taken as if these were missing."""
NONSENSE_OF_TOOLSTACK = {"trusted": "yes", "no-part-scan": ""}
DEFAULTS = {
    "queue/max_segments": "11",
    "queue/write_cache": "write through",
    "queue/discard_max_hw_bytes": "0",
    "queue/physical_block_size": "512",
    "removable": "0",
}
FLICKER = """(while [ ! -e /tmp/stop ]; do
	for value in many '' -1 512 0 4 99999999999999999999; do
		xenstore-write -- {back}/sectors "$value" {back}/sector-size "$value" \\
			{back}/info "$value" {back}/max-ring-page-order "$value" {back}/online "$value"
	done
done; rm /tmp/stop) > /dev/null 2>&1 &"""
"""Dom0 writes nodes all the time."""

GOOD_FRONT = {"ring-ref": "8", "event-channel": "4", "protocol": "x86_64-abi"}
"""Nodes that are good as far as the text goes."""
BAD_FRONTS = [
    ("protocol", "pdp11-abi"),
    ("multi-queue-num-queues", "0"),
    ("multi-queue-num-queues", "99"),
    ("ring-page-order", "9"),
    ("ring-ref", None),
    ("ring-ref", "eight"),
    ("ring-ref", "4000000000"),
    ("event-channel", None),
    ("event-channel", "-1"),
]
"""Node and value, None for a missing node, of a frontend that our backend refuses."""

ATTEMPT = """
xenstore-write {front}/state 3
until [ $(xenstore-read {back}/state) = 5 ]; do usleep 10000; done
xenstore-write {front}/state 6
until [ $(xenstore-read {back}/state) = 6 ]; do usleep 10000; done
"""
"""A frontend offers rings, is refused, and closes."""
ATTEMPTS = 32
AT_ONCE, A_SECOND = 16, 2
"""How often our backend lets a frontend connect: so often, and then so often in a second."""


def refuse(host: XenHost, guest: Guest, bad: Sequence[tuple[str, object]]) -> None:
    """Invalid disks: each is closed with a message that names the node and its value."""
    codes = [CODE + 16 * number for number in range(len(bad))]
    guest.sh("dmesg -c > /dev/null")
    for code in codes:
        create_device(host, guest.domid, code)
    for code, (node, value) in zip(codes, bad, strict=True):
        front, back = directories(guest.domid, code)
        host.wait_for(f"[ $(xenstore-read {front}/state) = 3 ]")
        write_nodes(host, back, {**PLAIN, node: value, "state": 4})
    fronts = [directories(guest.domid, code)[0] for code in codes]
    host.wait_for(" && ".join(f"[ $(xenstore-read {front}/state) -ge 5 ]" for front in fronts))
    said = guest.sh("dmesg")
    for code, (node, value) in zip(codes, bad, strict=True):
        text = message(directories(guest.domid, code)[1], node, value)
        assert text in said or guest.front == "xen-blkfront", (text, said)
    assert guest.sh("ls /sys/block | grep xvd || true") == ""
    remove_devices(host, guest, codes)


def message(directory: str, node: str, value: object) -> str:
    """What the guest's log has about a node."""
    return f"{directory}/{complaint(node, value)}"


def complaint(node: str, value: object) -> str:
    """What our drivers say of a node that they cannot use."""
    return f"{node}: missing" if value is None else f'{node} = "{value}"'


def take(host: XenHost, guest: Guest, offers: Mapping[str, object]) -> None:
    """Invalid nodes that are optional: they are named and treated as missing."""
    guest.sh("dmesg -c > /dev/null")
    connect_disks(host, guest, {CODE: (offers, NONSENSE_OF_TOOLSTACK)})
    guest.wait_for("[ -b /dev/xvdb ]")
    back = directories(guest.domid, CODE)[1]
    facts = guest.sh(f"cd /sys/block/xvdb; cat {' '.join(DEFAULTS)}").splitlines()
    assert facts == list(DEFAULTS.values())
    said = guest.sh("dmesg")
    for directory, nodes in ((back, offers), (f"device/vbd/{CODE}", NONSENSE_OF_TOOLSTACK)):
        for node, value in nodes.items():
            assert message(directory, node, value) in said, (node, said)
    remove_devices(host, guest, [CODE])


def lose_way(host: XenHost, guest: Guest) -> None:
    """The backend writes unknown states: the device is closed with a message."""
    for state in WRONG_STATES:
        front, back = create_device(host, guest.domid, CODE)
        host.wait_for(f"[ $(xenstore-read {front}/state) = 3 ]")
        write_nodes(host, back, {"state": state})
        host.wait_for(f"[ $(xenstore-read {front}/state) -ge 5 ]")
        assert message(back, "state", state) in guest.sh("dmesg")
        remove_devices(host, guest, [CODE])


def flicker(host: XenHost, guest: Guest) -> None:
    """Nodes change while they are read: the device connects or is closed, and can be removed."""
    for _ in range(2):
        back = create_device(host, guest.domid, CODE)[1]
        host.sh(FLICKER.format(back=back))
        for state in (4, 6, 2, 4):
            host.sh(f"xenstore-write {back}/state {state}")
        host.sh("touch /tmp/stop")
        host.wait_for("[ ! -e /tmp/stop ]")
        remove_devices(host, guest, [CODE])


@pytest.mark.feature("FE-07", "FE-26", "F-09", "F-11")
def test_bad_offers(xen: StartHost, record_property: RecordProperty) -> None:
    """Invalid nodes of the backend: the frontend names them, and closes or ignores them.

    xen-blkfront reads a block size of 65536 as 0, and its default is 512.
    """
    host = xen()
    guest = host.start_guest(disks=[])
    refuse(host, guest, REFUSED)
    if guest.front == "rblkfront":
        refuse(host, guest, REFUSED_BY_OURS)
        create_device(host, guest.domid, CODE, 2, **{"virtual-device": "many"})
        guest.wait_for("dmesg | grep -q 'virtual-device = \"many\"'")
        remove_devices(host, guest, [CODE])
        # Messages of one kind are limited to ten in five seconds.
        for offers in NONSENSE:
            guest.sh("sleep 5")
            take(host, guest, offers)
        lose_way(host, guest)
        flicker(host, guest)
    large = {"sector-size": 65536, "feature-max-indirect-segments": 32}
    connect_disks(host, guest, {CODE: (large, {})})
    guest.wait_for("[ -b /dev/xvdb ]")
    seen = guest.sh("cat /sys/block/xvdb/queue/logical_block_size")
    if guest.front == "xen-blkfront":
        assert seen == "512"
        record_property("c_fails", "F-11")
    else:
        assert seen == "65536"
    remove_devices(host, guest, [CODE])
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    host.attach(guest, Disk("xvdb", "/dev/ram0"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct")


@pytest.mark.feature("BE-07", "BE-09", "BE-10", "BE-11", "B-18")
def test_bad_frontend(host: XenHost) -> None:
    """Invalid nodes of the frontend: the error is in xenstore, and the next frontend connects.

    The error names the node and its value. The backend has not said what the disk is
    then, which comes along with Connected.

    The C backend is no reference here: it warns, with a stack trace, when it is
    detached from a frontend that it never connected to.
    """
    guest = host.start_guest(disks=[])
    guest.unload_frontend()
    front, back = directories(guest.domid, CODE, host.server)
    error = error_node(back)
    bad = [(node, value, {**GOOD_FRONT, node: value, "state": 3}) for node, value in BAD_FRONTS]
    bad += [("state", state, {"state": state}) for state in WRONG_STATES]
    for node, value, nodes in bad:
        host.attach(guest, Disk("xvdb", "/dev/ram0"))
        write_nodes(host, front, nodes)
        host.wait_for(f"xenstore-exists {error}")
        assert complaint(node, value) in (host.xenstore_read(error) or "")
        assert host.xenstore_read(f"{back}/sectors") is None
        host.sh(f"xl block-detach --force {guest.name} xvdb; xenstore-rm {error}")
        host.wait_for(f"! xenstore-exists {back}")
    host.attach(guest, Disk("xvdb", "/dev/ram0"))
    guest.load_frontend()
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct")


@pytest.mark.feature("B-24")
def test_eager_frontend(xen: StartHost, record_property: RecordProperty) -> None:
    """A frontend that reconnects permanently is slowed down; other disks are not. In the end it
    is served.

    The machine counts its time: by the host's clock it would be too slow to be made to wait.
    """
    host = xen(icount=True)
    server = host.start_server()
    server.load_backend()
    server.ram_disks(2)
    guest = host.start_guest(disks=[Disk("xvdb", "/dev/ram0")])
    guest.wait_for_disk("xvdb")
    guest.sh(f"echo vbd-{CODE} > {DRIVER}/unbind")
    front, back = directories(guest.domid, CODE, server)
    host.wait_for(f"[ $(xenstore-read {back}/state) = 6 ]")
    write_nodes(host, front, {"protocol": "pdp11-abi"})
    attempt = ATTEMPT.format(front=front, back=back)
    ours = host.pair.backend.name == "rblkback"
    assert must_wait(host, attempt) == ours
    if ours:
        assert "connects too often" in server.sh("dmesg")
        use_another_disk(host, guest, attempt)
    else:
        record_property("c_fails", "B-24")
    # The guest takes that for a new device.
    host.sh(f"xenstore-write {front}/state 1")
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct")


def must_wait(host: XenHost, attempt: str) -> bool:
    """Returns `True` if a frontend cannot connect more often than our backend allows."""
    uptime = "cut -d' ' -f1 /proc/uptime"
    times = host.sh(
        f"{uptime}; for number in $(seq {ATTEMPTS}); do {attempt} done; {uptime}", timeout=300
    )
    start, end = map(float, times.split())
    print(f"{ATTEMPTS} attempts in {end - start:.1f} s")
    return ATTEMPTS <= AT_ONCE + A_SECOND * (end - start) + 1


def use_another_disk(host: XenHost, guest: Guest, attempt: str) -> None:
    """Attaches and writes another disk while this frontend keeps reconnecting."""
    host.sh(f"(until [ -e /tmp/stop ]; do {attempt} done; rm /tmp/stop) > /dev/null 2>&1 &")
    host.attach(guest, Disk("xvdc", "/dev/ram1"))
    guest.wait_for_disk("xvdc")
    guest.sh("dd if=/dev/zero of=/dev/xvdc bs=64k count=16 oflag=direct")
    host.sh("touch /tmp/stop")
    host.wait_for("[ ! -e /tmp/stop ]")
