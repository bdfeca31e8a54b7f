# SPDX-License-Identifier: GPL-2.0-only
"""A Xen host whose dom0 is a Debian system with systemd, as an administrator installs it.

`scripts/lib/host-image` makes the image of the system. It is booted once, and each host starts from
a snapshot of that. What a host writes to its file system stays over reboots, and is removed with
it. Guests boot the kernel of the other scenarios.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from harness.cache import CACHE
from harness.cache import key_of
from harness.cache import made_once
from harness.machine import PORT
from harness.machine import Machine
from harness.shell import announcement
from harness.snapshot import DISK_SIZES
from harness.snapshot import PROCESSOR
from harness.snapshot import XEN_ARGUMENTS
from harness.snapshot import Snapshot
from harness.snapshot import blank
from harness.snapshot import qemu_version
from harness.snapshot import resume
from harness.snapshot import save
from harness.xenhost import XenHost
from harness.xenimage import guest_disk
from harness.xenimage import xen_binary

if TYPE_CHECKING:
    from harness.kernel import Kernel
    from harness.pairs import Pair

BOOT_S = 1200
"""Time limit for a boot or a shutdown, in seconds."""

MEMORY, DOM0_MEMORY = 2048, 1024
"""Memory of the machine and of dom0, in MiB."""

ARGUMENTS = "rw console=hvc0 panic=1 loglevel=5 mitigations=off systemd.show_status=no"
"""The kernel command line of dom0."""

ROOT = "root.qcow2"

CLOCK_S = 5
"""Time for which the clock of dom0 is compared, in seconds."""

RATES = 0.7, 1.4
"""How fast the clock of dom0 may run; snapshot.py says why it may be wrong."""


def wait_started(machine: Machine) -> None:
    """Waits until systemd has started everything; nothing of it may have failed."""
    machine.shell.wait_ready(timeout=BOOT_S)
    status, state = machine.shell.run("systemctl is-system-running --wait", BOOT_S)
    if status != 0:
        units = machine.shell.check("systemctl list-units --failed; systemctl list-jobs")
        raise AssertionError(f"{state}{units}")


def clock_rate(machine: Machine) -> float:
    """Returns how fast the clock of dom0 runs."""

    def clocks() -> tuple[float, float]:
        dom0 = machine.shell.check("read now rest < /proc/uptime; echo $now")
        return time.monotonic(), float(dom0)

    first = clocks()
    time.sleep(CLOCK_S)
    last = clocks()
    return max(last[1] - first[1], 0.01) / (last[0] - first[0])


def copy_of(base: Path, form: str, path: Path) -> Path:
    """Creates an image whose contents are those of `base` until they are written."""
    path.unlink(missing_ok=True)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", form, "-b", str(base), str(path)]
    subprocess.run(command, check=True)
    return path


class DebianSystem(Snapshot):
    """The machine after its first boot."""

    def __init__(self, image: Path, kernel: Kernel) -> None:
        self.guest_type = kernel.guest_type
        self.has_checks = kernel.has_checks
        self.memory_factor = kernel.memory_factor
        self._image = image
        self._guest_disk = guest_disk(kernel)
        names = [Path(name) for name in (*DISK_SIZES, "root")]
        arguments = " ".join(self._arguments({path.name: path for path in names}))
        self.key = key_of(image.name, qemu_version(), arguments, Path(__file__))
        self._directory = CACHE / "snapshots" / self.key

    def start(
        self,
        logs: str | Path,
        disks: Mapping[str, Path],
        write_log: Path | None = None,
        extra: Sequence[str] = (),
    ) -> Machine:
        """Starts a machine from the snapshot, with a copy of the file system in `logs`."""
        directory = made_once(self._directory, self._make)
        root = copy_of(directory / ROOT, "qcow2", Path(logs) / ROOT)
        incoming = ("-incoming", f"exec:cat {directory / 'state'}")
        return Machine([*self._arguments({**disks, "root": root}), *extra, *incoming], logs, PORT)

    def boot_again(self, logs: Path, disks: Mapping[str, Path]) -> Machine:
        """Starts a machine that boots from the file system of an earlier one."""
        return Machine(self._arguments(disks), logs, PORT)

    def _boot_and_save(self, directory: Path, wrong: list[str]) -> bool:
        """Boots, and saves the machine unless its time is wrong: how wrong is added to `wrong`."""
        with tempfile.TemporaryDirectory(dir=directory) as place:
            disks = {name: blank(Path(place) / name, size) for name, size in DISK_SIZES.items()}
            disks["root"] = copy_of(self._image / "root.img", "raw", directory / ROOT)
            machine = Machine(self._arguments(disks), directory, PORT)
            try:
                wait_started(machine)
                rate = clock_rate(machine)
                if not RATES[0] < rate < RATES[1]:
                    wrong.append(f"a second took {1 / rate:.2f} s")
                    return False
                save(machine, directory)
            finally:
                machine.kill()
        return True

    def _arguments(self, disks: Mapping[str, Path], write_log: Path | None = None) -> list[str]:
        dom0 = f"{self._image / 'vmlinuz'} {ARGUMENTS}".replace(",", ",,")
        xen = XEN_ARGUMENTS.format(vcpus=1).replace("512M", f"{DOM0_MEMORY}M")
        arguments = [
            "-accel", "tcg", "-machine", "q35", "-cpu", PROCESSOR, "-m", str(MEMORY), "-smp", "1",
            "-kernel", str(xen_binary()), "-append", xen,
            "-initrd", f"{dom0},{self._image / 'initrd'}",
        ]  # fmt: skip
        drives = {name: f"format=raw,file={disks[name]}" for name in DISK_SIZES}
        drives["guest"] = f"format=raw,file={self._guest_disk},readonly=on"
        drives["root"] = f"format=qcow2,file={disks['root']},cache=unsafe"
        for name, drive in drives.items():
            arguments += [
                "-drive", f"if=none,id={name},{drive}",
                "-device", f"virtio-blk-pci,drive={name},disable-legacy=on,iommu_platform=on",
            ]  # fmt: skip
        return arguments


class DebianHost(XenHost):
    """A host with a Debian dom0; the payload is in /payload."""

    def __init__(self, system: DebianSystem, pair: Pair, logs: Path, **options: Any) -> None:
        super().__init__(system, pair, logs, **options)
        self._system = system
        self._boots = 1

    def boot(self) -> None:
        """Resumes from the snapshot and unpacks the payload."""
        resume(self.machine)
        # udev has read the disk before it had the payload.
        self.sh(
            f"{announcement(self.logs)}; blockdev --flushbufs /dev/vda; "
            "cd /payload && cpio -id < /dev/vda 2> /dev/null"
        )

    def reboot(self) -> None:
        """Reboots as an administrator does; the system stops the guests and starts them."""
        self.machine.shell.send("systemctl reboot")
        self.machine.wait_end(timeout=BOOT_S)
        self.machine.kill()
        self._boots += 1
        disks = {"payload": self.logs / "payload", "disk": self.disk, "root": self.logs / ROOT}
        self.machine = self._system.boot_again(self.logs / f"boot-{self._boots}", disks)
        wait_started(self.machine)

    def close(self) -> None:
        """Ends the machine and removes what only it needed."""
        super().close()
        (self.logs / ROOT).unlink(missing_ok=True)
