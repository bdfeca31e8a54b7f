# SPDX-License-Identifier: GPL-2.0
"""Dom0's shell plays the toolstack and a backend, as far as xenstore shows them.

There is no ring behind such a backend: a disk of it must not be read.
"""


def directories(domid, code):
    """The frontend's and the backend's directory of a virtual device number."""
    front = f"/local/domain/{domid}/device/vbd/{code}"
    return front, f"/local/domain/0/backend/vbd/{domid}/{code}"


def write_nodes(host, directory, nodes):
    """Writes xenstore nodes below a directory, in this order; None removes one."""
    commands = (
        f"xenstore-rm {directory}/{name} || true"
        if value is None
        else f"xenstore-write {directory}/{name} '{value}'"
        for name, value in nodes.items()
    )
    host.sh("\n".join(commands))


def create_device(host, domid, code, kind="disk", **nodes):
    """What the toolstack and a backend that waits would write; gives both directories."""
    front, back = directories(domid, code)
    write_nodes(
        host, back, {"frontend": front, "frontend-id": domid, "online": 1, "mode": "w", "state": 2}
    )
    write_nodes(
        host,
        front,
        {"backend": back, "backend-id": 0, "virtual-device": code, "device-type": kind, **nodes},
    )
    host.sh(
        f"xenstore-chmod -r {back} n0 r{domid}; xenstore-chmod -r {front} n{domid} r0; xenstore-write {front}/state 1"
    )
    return front, back


def remove_device(host, guest, code):
    """The device goes away for good."""
    front, back = directories(guest.domid, code)
    host.sh(f"xenstore-write {back}/online 0 {back}/state 6")
    host.run(f"xenstore-rm {front}; xenstore-rm {back}")
    guest.wait_for(f"[ ! -e /sys/bus/xen/devices/vbd-{code} ]")
