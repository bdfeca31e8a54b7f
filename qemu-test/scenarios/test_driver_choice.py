# SPDX-License-Identifier: GPL-2.0-only
"""The driver that a system loads if both are installed, and if ours cannot be loaded.

The guest and dom0 have kmod, udevd and a module directory as an installed system has. What loads
a driver is the device that the toolstack makes. The scenario makes it, because xl waits for ten
seconds only, which is not much for udevd and kmod on a busy machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.cpio import Archive
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.image import add_built_module
from harness.image import add_program
from harness.kernel import Kernel
from harness.manual_toolstack import ManualDisk
from harness.pairs import NAMES
from harness.pairs import Pair
from harness.xenhost import XenHost

SYSTEM = "/payload/system"
UDEVD = "/usr/lib/systemd/systemd-udevd"
LIBKMOD = "/usr/lib/x86_64-linux-gnu/libkmod.so.2"
"""Opened by udevd by its name."""


def system(kernel: Kernel, build: Path, modprobe_d: Path) -> bytes:
    """An archive with kmod, udevd, and both pairs below /lib/modules, as bytes; our files are in
    /packaging.
    """
    archive = Archive()
    for program in ("/usr/bin/kmod", "/usr/bin/udevadm", LIBKMOD):
        add_program(archive, program)
    for name in ("modprobe", "depmod"):
        archive.link(f"/sbin/{name}", "/usr/bin/kmod")
    archive.link(UDEVD, "/usr/bin/udevadm")
    rules = "/usr/lib/udev/rules.d/80-drivers.rules"
    archive.file(rules, rules)
    directory = f"/lib/modules/{kernel.release}"
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        archive.file(f"{directory}/{name}", kernel.directory / "modules" / name)
    # kmod prefers modules that are where modules.order says.
    order = (kernel.directory / "modules/modules.order").read_text().split()
    for name in NAMES["C"]:
        place = next(path for path in order if path.endswith(f"/{name}.ko"))
        archive.data(f"{directory}/{place}", kernel.module(name))
    for name in NAMES["R"]:
        add_built_module(archive, f"/packaging/{name}.ko", build / f"{name}.ko")
        archive.file(f"/packaging/{name}.conf", modprobe_d / f"{name}.conf")
    return archive.to_bytes()


class Machine:
    """A guest or dom0 with such a system, and the names of both drivers for its devices."""

    def __init__(self, machine: Guest | XenHost, half: int, release: str) -> None:
        self.machine = machine
        self.c_driver, self.ours = (names[half] for names in (NAMES["C"], NAMES["R"]))
        self._updates = f"/lib/modules/{release}/updates"
        machine.sh(f"mkdir -p {self._updates} /etc/modprobe.d")
        self._restart_udevd()

    def install(self, change: str = "") -> None:
        """Installs our module and its file as documented; `change` alters the module."""
        file = f"{self._updates}/{self.ours}.ko"
        self.machine.sh(
            f"cp /packaging/{self.ours}.ko {file} && cp /packaging/{self.ours}.conf /etc/modprobe.d/\n"
            f"{change.format(file=file)}"
        )
        self._restart_udevd()

    def configure(self, lines: str) -> None:
        """Writes another file of modprobe.d."""
        self.machine.sh(f"printf '{lines}\\n' > /etc/modprobe.d/local.conf")
        self._restart_udevd()

    def remove_module(self) -> None:
        """As a kernel that our module was never installed for; the file stays."""
        self.machine.sh(f"rm {self._updates}/{self.ours}.ko")
        self._restart_udevd()

    def _restart_udevd(self) -> None:
        """Starts a udevd that has read the files.

        A running one may ignore a request to reload: it wants to know the user who sent it, but the
        kernel tells that only to a socket with SO_PASSCRED, which udevd sets after accept().
        """
        self.machine.sh(
            "/sbin/depmod\n"
            "for pid in $(pidof systemd-udevd); do kill $pid; done\n"
            "rm -f /run/udev/control"
        )
        self.machine.wait_for('[ -z "$(pidof systemd-udevd)" ]')
        self.machine.sh(f"{UDEVD} --daemon")
        self.machine.wait_for("udevadm control --ping")

    def loaded(self) -> list[str]:
        """Which of the two drivers are loaded."""
        names = (self.c_driver, self.ours)
        text = self.machine.sh("cut -d ' ' -f 1 /proc/modules").split()
        return [name for name in names if name.replace("-", "_") in text]

    def unload(self) -> None:
        """Unloads the driver that is loaded."""
        for name in self.loaded():
            self.machine.sh(f"rmmod {name}")


Machines = tuple[XenHost, Guest, list[Machine]]
"""The host, its guest, and both as `Machine`."""


@pytest.fixture
def machines(xen: StartHost, kernel: Kernel, build: Path, modprobe_d: Path) -> Machines:
    """The host, its guest, and both as `Machine`."""
    host = xen(waiting=None, files={"system": system(kernel, build, modprobe_d)})
    host.sh(f"cd / && cpio -id < {SYSTEM} 2> /dev/null")
    host.ram_disks()
    guest = host.start_guest(disks=[], initramfs=f"/guest/initrd {SYSTEM}")
    return host, guest, [Machine(guest, 0, kernel.release), Machine(host, 1, kernel.release)]


@contextmanager
def attached(host: XenHost, guest: Guest) -> Iterator[None]:
    """The guest has a disk meanwhile."""
    disk = ManualDisk(host, guest)
    disk.offer()
    disk.give("/dev/ram0")
    guest.wait_for_disk(disk.vdev)
    yield
    disk.detach_and_wait()
    guest.wait_for(f"[ ! -b /dev/{disk.vdev} ]")


def driven_by(host: XenHost, guest: Guest, machines: list[Machine]) -> list[str]:
    """Attaches a disk; returns the names of the drivers that this has loaded, and unloads them."""
    with attached(host, guest):
        loaded = [name for machine in machines for name in machine.loaded()]
    for machine in machines:
        machine.unload()
    return loaded


def test_driver_choice(machines: Machines, pair: Pair) -> None:
    """Our driver is loaded if it is installed and can be loaded, otherwise the C driver.

    In a reference run nothing of ours is installed.
    """
    host, guest, both = machines
    if pair.name == "C/C":
        assert driven_by(host, guest, both) == list(NAMES["C"])
        return

    for machine in both:
        machine.install()
        machine.configure(f"options {machine.c_driver} max_ring_page_order=1")
    with attached(host, guest):
        for machine in both:
            assert machine.loaded() == [machine.ours]
            # What is configured for the C driver is meant for its replacement too.
            order = f"/sys/module/{machine.ours}/parameters/max_ring_page_order"
            assert machine.machine.sh(f"cat {order}") == "1"
    for machine in both:
        machine.unload()
        # By name, as Xen's scripts do it.
        machine.machine.sh(f"/sbin/modprobe {machine.c_driver}")
        assert machine.loaded() == [machine.ours]
        machine.unload()

    for machine in both:
        machine.configure(f"blacklist {machine.ours}")
    assert driven_by(host, guest, both) == list(NAMES["C"])

    for machine in both:
        machine.configure("")
        machine.install(change="sed -i s/vermagic=7/vermagic=6/ {file}")
    assert driven_by(host, guest, both) == list(NAMES["C"])
    for machine in both:
        assert "version magic" in machine.machine.sh("dmesg")

    for machine in both:
        machine.remove_module()
    assert driven_by(host, guest, both) == list(NAMES["C"])
    for machine in both:
        machine.machine.sh(f"/sbin/modprobe {machine.c_driver}")
        assert machine.loaded() == [machine.c_driver]
        machine.unload()
