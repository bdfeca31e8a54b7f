# SPDX-License-Identifier: GPL-2.0
"""The other side writes nonsense into xenstore: a message, an end, no harm.

Dom0's shell plays the other side: it writes the nodes that a backend or a
frontend would write. After each piece of nonsense a good disk must work.
"""

from harness.evidence import assert_served_by_pair
from harness.toolstack import create_device
from harness.toolstack import remove_devices
from harness.toolstack import write_nodes
from harness.xenhost import Disk

CODE = 51728
"""Virtual device number of xvdb."""

OFFERS = {"sectors": "2048", "sector-size": "512", "info": "0", "feature-flush-cache": "1"}
BAD_OFFERS = [("sectors", None), ("sectors", "many"), ("sector-size", "five"), ("info", "-")]
BAD_FRONTS = [
    {"ring-ref": "4000000000", "event-channel": "4000", "protocol": "x86_64-abi"},
    {"ring-ref": "8", "event-channel": "4000000", "protocol": "x86_64-abi"},
    {"ring-ref": "8", "event-channel": "4", "protocol": "pdp11-abi"},
    {"event-channel": "4", "protocol": "x86_64-abi"},
    {"ring-ref": "eight", "event-channel": "4", "protocol": "x86_64-abi"},
]


def test_bad_offers(xen):
    """Nonsense from the backend: the frontend names it and closes.

    Rows: FE-07, FE-26, F-09, F-11
    """
    host = xen()
    guest = host.start_guest(disks=[])
    for node, value in BAD_OFFERS:
        front, back = create_device(host, guest.domid, CODE)
        host.wait_for(f"[ $(xenstore-read {front}/state) = 3 ]")
        guest.sh("dmesg -c > /dev/null")
        write_nodes(host, back, {**OFFERS, node: value, "state": 4})
        host.wait_for(f"[ $(xenstore-read {front}/state) -ge 5 ]")
        said = guest.sh("dmesg")
        if host.pair.front.name == "rblkfront":
            assert node in said and (value or "missing") in said, said
        assert guest.run("[ -b /dev/xvdb ]")[0] != 0
        remove_devices(host, guest, [CODE])
    host.load_backend()
    host.ram_disks()
    host.attach(guest, Disk("xvdb", "/dev/ram0"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct")


def test_bad_frontend(host):
    """Nonsense from the frontend: an error in xenstore, and the next one connects.

    The C backend is no control here: it warns, with a stack trace, when it is
    detached from a frontend that it never connected to.
    """
    guest = host.start_guest(disks=[])
    guest.unload_frontend()
    domid = guest.domid
    error = f"/local/domain/0/error/backend/vbd/{domid}/{CODE}"
    for nodes in BAD_FRONTS:
        host.attach(guest, Disk("xvdb", "/dev/ram0"))
        write_nodes(host, f"/local/domain/{domid}/device/vbd/{CODE}", {**nodes, "state": 3})
        host.wait_for(f"xenstore-exists {error}/error")
        host.sh(f"xl block-detach --force {guest.name} xvdb; xenstore-rm {error}")
        host.wait_for(f"! xenstore-exists /local/domain/0/backend/vbd/{domid}/{CODE}")
    host.attach(guest, Disk("xvdb", "/dev/ram0"))
    guest.load_frontend()
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    guest.sh("dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct")
