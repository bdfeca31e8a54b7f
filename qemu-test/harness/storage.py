# SPDX-License-Identifier: GPL-2.0-only
"""A driver domain: a DomU whose backend serves the disks of other DomUs.

xl in dom0 creates the devices, with the driver domain's name as `backend` of
a disk; `xl devd` in the driver domain runs the hotplug script.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .guest import Guest
from .image import module_at

if TYPE_CHECKING:
    from .guest import Kind
    from .xenhost import Disk
    from .xenhost import XenHost

XL = "/usr/lib/xen-4.20/bin/xl"
DEVD_PID = "/run/xen/devd.pid"
"""The file with the process id of `xl devd`."""
BALLOON = "/sys/devices/system/xen_memory/xen_memory0"
"""The balloon driver's directory in sysfs: current and target memory."""


class Storage(Guest):
    """A driver domain; after `start` `xl devd` runs, and no backend is loaded yet."""

    parts: tuple[str, ...] = ("/guest/initrd", "/guest/storage", "/payload/storage.cpio")
    serves = True

    def __init__(self, host: XenHost, name: str, settings: str = "") -> None:
        super().__init__(host, name, settings=f"driver_domain = 1\n{settings}")
        self._devd_runs = False

    def start(self, kind: Kind, disks: Iterable[Disk] = (), root: str | None = None) -> None:
        """Starts it like a guest, and `xl devd` in it."""
        super().start(kind, disks, root)
        self.sh("mkdir -p /var/log/xen /var/run /run/xen")
        self.start_devd()
        self._see_memory()

    def take_over(self, disks: Iterable[Disk] = ()) -> None:
        """Takes over the one of this name from the snapshot: like `start`, without a boot."""
        self.find_waiting()
        self._devd_runs = True
        self.unpack("/payload/storage.packed")
        self._see_memory()

    def _see_memory(self) -> None:
        self._memory_kb = self.sh(f"cat {BALLOON}/info/current_kb")

    def take_back_memory(self) -> None:
        """Gets back from Xen the memory that was given up for mapped pages.

        The debug kernel maps pages in place of its own memory, and after they are unmapped it does
        not ask Xen for memory for an hour.
        """
        self.sh(f"echo {self._memory_kb} > {BALLOON}/target_kb")
        self.wait_for(f"[ $(cat {BALLOON}/info/current_kb) = {self._memory_kb} ]")

    def start_devd(self) -> None:
        """Starts `xl devd`, which runs the hotplug script for new disks."""
        if not self._devd_runs:
            self.sh(f"{XL} devd -p {DEVD_PID}")
            self._devd_runs = True

    def stop_devd(self) -> None:
        """Stops `xl devd`, so that only the scenario writes nodes of disks.

        `xl devd` assumes that each disk is one of xl's: it removes the nodes of one that has
        closed, even if they belong to the next disk of that name by then.
        """
        if self._devd_runs:
            pid = self.sh(f"cat {DEVD_PID}")
            self.sh(f"kill {pid}")
            self.wait_for(f"[ ! -e /proc/{pid} ]")
            self.sh(f"rm -f {DEVD_PID}")
            self._devd_runs = False

    def restart_devd(self) -> None:
        """Restarts `xl devd`, so that it sees the present devices.

        A device that did not close stays in its list, and no script runs for the next one of its
        name.
        """
        self.stop_devd()
        self.start_devd()

    def load_backend(self, parameters: str = "") -> None:
        """Loads the pair's backend."""
        self.sh(f"insmod /modules/{self.back}.ko {parameters}")

    def unload_backend(self) -> None:
        """Unloads the pair's backend."""
        self.sh(f"rmmod {self.back}")

    def insmod(self, name: str, parameters: str = "") -> None:
        """Loads a module of the payload or of the kernel."""
        self.sh(module_at(name, parameters, "/modules"))

    def ram_disks(self, count: int = 1, megabytes: int = 64) -> None:
        """Makes /dev/ram0 and on: disks in its memory."""
        self.insmod("brd", f"rd_nr={count} rd_size={megabytes * 1024}")

    @property
    def back(self) -> str:
        """Returns the name of the pair's backend module."""
        if self.host.pair.storage is None:
            raise ValueError("the backend of this pair is QEMU in dom0")
        return self.host.pair.storage.name
