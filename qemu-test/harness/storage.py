# SPDX-License-Identifier: GPL-2.0-only
"""A driver domain: a DomU whose backend serves the disks of other DomUs.

xl in dom0 creates the devices, with the driver domain's name as `backend` of
a disk; `xl devd` in the driver domain runs the hotplug script.
"""

from .guest import Guest
from .image import module_at

XL = "/usr/lib/xen-4.20/bin/xl"
DEVD_PID = "/run/xen/devd.pid"
"""Where `xl devd` writes its process id."""
BALLOON = "/sys/devices/system/xen_memory/xen_memory0"
"""Where a domain's kernel says how much memory it has, and wants."""


class Storage(Guest):
    """A driver domain; after `start` `xl devd` runs, and no backend is loaded yet."""

    parts = ("/guest/initrd", "/guest/storage", "/payload/storage.cpio")
    serves = True

    def __init__(self, host, name, settings=""):
        super().__init__(host, name, settings=f"driver_domain = 1\n{settings}")
        self._devd_runs = False

    def start(self, kind):
        """As a guest; it also begins to serve disks."""
        super().start(kind)
        self.sh("mkdir -p /var/log/xen /var/run /run/xen")
        self.start_devd()
        self._see_memory()

    def take_over(self):
        """As `start`, where the one of this name has waited since before the scenario."""
        self.find_waiting()
        self._devd_runs = True
        self.unpack("/payload/storage.packed")
        self._see_memory()

    def _see_memory(self):
        self._memory_kb = self.sh(f"cat {BALLOON}/info/current_kb")

    def take_back_memory(self):
        """Takes back from Xen the memory that was given up for pages that were mapped.

        The kernel with checks maps pages in place of its own memory, and when they are
        unmapped it does not look for an hour whether there is something to take back.
        """
        self.sh(f"echo {self._memory_kb} > {BALLOON}/target_kb")
        self.wait_for(f"[ $(cat {BALLOON}/info/current_kb) = {self._memory_kb} ]")

    def start_devd(self):
        """Has `xl devd` run the hotplug script for the disks that come from now on."""
        if not self._devd_runs:
            self.sh(f"{XL} devd -p {DEVD_PID}")
            self._devd_runs = True

    def stop_devd(self):
        """Has nobody but the scenario write nodes of disks.

        `xl devd` takes every disk for one of xl's: it removes the nodes of one that has closed, be
        they of the next disk of that name by then.
        """
        if self._devd_runs:
            pid = self.sh(f"cat {DEVD_PID}")
            self.sh(f"kill {pid}")
            self.wait_for(f"[ ! -e /proc/{pid} ]")
            self.sh(f"rm -f {DEVD_PID}")
            self._devd_runs = False

    def restart_devd(self):
        """Has `xl devd` see the devices that there are: one that did not close stays in its list,
        and no script runs for the next one of that name.
        """
        self.stop_devd()
        self.start_devd()

    def load_backend(self, parameters=""):
        """Loads the pair's backend."""
        self.sh(f"insmod /modules/{self.back}.ko {parameters}")

    def unload_backend(self):
        """Unloads the pair's backend."""
        self.sh(f"rmmod {self.back}")

    def insmod(self, name, parameters=""):
        """Loads a module of the payload or of the kernel."""
        self.sh(module_at(name, parameters, "/modules"))

    def ram_disks(self, count=1, megabytes=64):
        """Makes /dev/ram0 and on: disks in its memory."""
        self.insmod("brd", f"rd_nr={count} rd_size={megabytes * 1024}")

    @property
    def back(self):
        """The name of the pair's backend module."""
        return self.host.pair.storage.name
