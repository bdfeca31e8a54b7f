# SPDX-License-Identifier: GPL-2.0-only
"""Writes the xenstore nodes of a toolstack and of a backend from dom0's shell.

There is no ring behind such a backend: a disk of it must not be read.

code    a virtual device number, such as 51712 for xvda
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .shell import until

if TYPE_CHECKING:
    from .guest import Guest
    from .xenhost import Server
    from .xenhost import XenHost

CODES = {"xvda": 51712, "xvdb": 51728, "xvdc": 51744, "xvdd": 51760}
"""Virtual device numbers by name."""

PLAIN = {"sectors": 0, "sector-size": 512, "info": 0}
"""An empty disk, which is not scanned for partitions."""

Nodes = Mapping[str, object]
"""Values of xenstore nodes by name; None removes a node."""

_STATE = until(
    '[ "$(xenstore-read $1/state)" = $2 ]', 60, '{ echo "$1/state is not $2"; exit 9; }', 200000
)
_WAIT = f"wait_for_state() {{ {_STATE}; }}\n"


def directories(domid: int, code: int, server: Server | None = None) -> tuple[str, str]:
    """Returns the frontend's and the backend's directory of a virtual device number.

    The backend is in dom0, or in `server`.
    """
    front = f"/local/domain/{domid}/device/vbd/{code}"
    back = f"/local/domain/{server.domid if server else 0}/backend/vbd/{domid}/{code}"
    return front, back


def error_node(back: str) -> str:
    """Returns the node for error messages of the backend with this directory."""
    return back.replace("/backend/", "/error/backend/", 1) + "/error"


def write_nodes(host: XenHost, directory: str, nodes: Nodes) -> None:
    """Writes xenstore nodes below a directory in one script; `None` removes one."""
    host.sh(_writing(directory, nodes))


def create_device(
    host: XenHost, domid: int, code: int, backend_state: int = 2, **nodes: object
) -> tuple[str, str]:
    """Writes the nodes of the toolstack and of a waiting backend; returns both directories."""
    host.sh(_creating(domid, code, backend_state, nodes))
    return directories(domid, code)


def connect_disks(host: XenHost, guest: Guest, disks: Mapping[int, tuple[Nodes, Nodes]]) -> None:
    """Connects disks: by number, the features of the backend and the nodes of the toolstack."""
    script = _WAIT
    for code, (_offers, nodes) in disks.items():
        script += _creating(guest.domid, code, 2, nodes)
    for code, (offers, _nodes) in disks.items():
        front, back = directories(guest.domid, code)
        script += f"wait_for_state {front} 3\n"
        script += _writing(back, {**PLAIN, **offers, "state": 4})
    for code in disks:
        script += f"wait_for_state {directories(guest.domid, code)[0]} 4\n"
    host.sh(script)


def remove_devices(host: XenHost, guest: Guest, codes: Iterable[int]) -> None:
    """Removes the devices."""
    script, gone = "", []
    for code in codes:
        front, back = directories(guest.domid, code)
        script += f"xenstore-write {back}/online 0 {back}/state 6\n"
        script += f"xenstore-rm {front} || true; xenstore-rm {back} || true\n"
        gone.append(f"[ ! -e /sys/bus/xen/devices/vbd-{code} ]")
    host.sh(script)
    guest.wait_for(" && ".join(gone))


def _writing(directory: str, nodes: Nodes) -> str:
    written = [
        f"{directory}/{name} '{value}'" for name, value in nodes.items() if value is not None
    ]
    removed = [f"{directory}/{name}" for name, value in nodes.items() if value is None]
    script = f"xenstore-write -- {' '.join(written)}\n" if written else ""
    return script + "".join(f"xenstore-rm {path} || true\n" for path in removed)


def _creating(domid: int, code: int, backend_state: int, nodes: Nodes) -> str:
    front, back = directories(domid, code)
    served = {"frontend": front, "frontend-id": domid, "online": 1, "state": backend_state}
    used = {
        "backend": back,
        "backend-id": 0,
        "virtual-device": code,
        "device-type": "disk",
        **nodes,
    }
    return (
        _writing(back, served)
        + _writing(front, used)
        + f"xenstore-chmod -r {back} n0 r{domid}; xenstore-chmod -r {front} n{domid} r0\n"
        + f"xenstore-write {front}/state 1\n"
    )
