# SPDX-License-Identifier: GPL-2.0-only
"""A disk whose nodes the scenario writes itself, where xl would write them.

So the scenario decides when each node is written. The two drivers are the
pair's; the backend is that of the host's server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .toolstack import CODES
from .toolstack import directories

if TYPE_CHECKING:
    from .guest import Guest
    from .toolstack import Nodes
    from .xenhost import Server
    from .xenhost import XenHost


@dataclass
class ManualDisk:
    """A disk of a guest whose nodes are written one by one."""

    host: XenHost
    guest: Guest
    vdev: str = "xvdb"

    @property
    def code(self) -> int:
        """Returns the virtual device number."""
        return CODES[self.vdev]

    @property
    def front(self) -> str:
        """Returns the frontend's directory in xenstore."""
        return self._directories()[0]

    @property
    def back(self) -> str:
        """Returns the backend's directory in xenstore."""
        return self._directories()[1]

    def _directories(self) -> tuple[str, str]:
        return directories(self.guest.domid, self.code, self.server)

    @property
    def server(self) -> Server:
        """Returns the domain with the backend."""
        return self.host.server

    @property
    def device(self) -> str:
        """Returns the backend's device in the server's sysfs."""
        return f"/sys/bus/xen-backend/devices/vbd-{self.guest.domid}-{self.code}"

    def offer(self, mode: str = "w", kind: str = "disk", state: int = 1, **nodes: object) -> None:
        """Writes the toolstack's nodes before the hotplug script runs; `nodes` are more of the
        backend.

        `kind` is disk or cdrom. No driver binds to a backend whose `state` is not 1.
        """
        self.server.stop_devd()
        domid, server = self.guest.domid, self.server.domid
        back = {
            "frontend": self.front, "frontend-id": domid, "online": 1, "removable": 0,
            "bootable": 1, "type": "phy", "dev": self.vdev, "mode": mode, "device-type": kind,
            **{name.replace("_", "-"): value for name, value in nodes.items()},
        }  # fmt: skip
        front = {
            "backend": self.back, "backend-id": server, "virtual-device": self.code,
            "device-type": kind,
        }  # fmt: skip
        self.host.sh(
            f"{_writing(self.back, back)}; {_writing(self.front, front)}; "
            f"xenstore-chmod -r {self.back} n{server} r{domid}; "
            f"xenstore-chmod -r {self.front} n{domid} r{server}; "
            f"xenstore-write {self.back}/state {state} {self.front}/state 1"
        )

    def give(self, target: str) -> None:
        """Writes the node of the hotplug script: the number of the block device."""
        number = self.server.sh(f"stat -L -c %t:%T {target}")
        self.host.sh(
            f"xenstore-write {self.back}/physical-device {number}"
            f" {self.back}/hotplug-status connected"
        )

    def play(self, state: int, **nodes: object) -> None:
        """Writes nodes of a backend without a driver, its state last, see `offer`."""
        nodes = {name.replace("_", "-"): value for name, value in nodes.items()}
        self.host.sh(_writing(self.back, {**nodes, "state": state}))

    def play_until_connected(self, **nodes: object) -> None:
        """Plays a backend of an empty disk, and waits until the frontend has connected to it."""
        self.play(2, **nodes)
        self.wait_for(front=3)
        self.play(4, **{"sectors": 0, "sector_size": 512, "info": 0, **nodes})
        self.wait_for(front=4)

    def hand_over(self, **nodes: object) -> None:
        """Closes the backend that was played, so that a loaded driver takes its place.

        `nodes` are nodes that the driver does not write.
        """
        self.play(6, **nodes)
        self.wait_for(front=1)
        self.play(1)
        self.wait_for(front=4, back=4)

    def detach_and_wait(self) -> None:
        """Detaches the disk as `xl block-detach` does, and waits until it is gone."""
        self.host.sh(f"xenstore-write {self.back}/online 0 {self.back}/state 5")
        self.forget()

    def forget(self) -> None:
        """Waits for the backend to close, removes the nodes, and waits for its device to go."""
        self.wait_for(back=6)
        self.host.sh(f"xenstore-rm {self.back}; xenstore-rm {self.front}")
        self.server.wait_for(f"[ ! -e {self.device} ]")

    def wait_for(self, front: int | None = None, back: int | None = None) -> None:
        """Waits until the two halves are in these states."""
        for directory, state in ((self.front, front), (self.back, back)):
            if state is not None:
                self.host.wait_for(f'[ "$(xenstore-read {directory}/state)" = {state} ]')

    def statistic(self, name: str) -> int:
        """Returns a number of the backend's statistics."""
        return int(self.server.sh(f"cat {self.device}/statistics/{name}"))

    def wait_statistic(self, name: str, value: int) -> None:
        """Waits until the backend has counted this many requests."""
        self.server.wait_for(f"[ $(cat {self.device}/statistics/{name}) -ge {value} ]")


def _writing(directory: str, nodes: Nodes) -> str:
    pairs = " ".join(f"{directory}/{name} '{value}'" for name, value in nodes.items())
    return f"xenstore-write {pairs}"
