# SPDX-License-Identifier: GPL-2.0-only
"""A machine without Xen: one kernel, our modules, a shell."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .image import add_built_module
from .image import add_modules
from .image import base_archive
from .leak_counts import assert_checked
from .machine import Machine
from .shell import MachineTrouble
from .shell import announcement
from .snapshot import qemu_version
from .snapshot import resume
from .snapshot import save

if TYPE_CHECKING:
    from .kernel import Kernel

PROGRAMS = (
    "/usr/bin/fio",
    "/usr/sbin/mkfs.ext4",
    "/usr/sbin/e2fsck",
    "/usr/sbin/blockdev",
    "/usr/bin/dd",
)

END = "reboot: Restarting system"
"""The last message of Linux."""

BOOT_S = 300
"""How long a boot may take, in seconds."""

STEADY_TIME = ("-icount", "shift=2")
"""The clock is the number of instructions. With the host's clock, a kernel that calibrates one
clock against another on a busy host may find a CPU of 36 MHz."""


MADE_BY = [Path(__file__).with_name(name) for name in ("native.py", "machine.py", "snapshot.py")]


class NativeVm:
    """A machine; `modules` are .ko files, found in /modules there.

    A machine that is `shared` by scenarios is booted once, and resumed from there in each.
    """

    name = "the machine"

    def __init__(
        self,
        kernel: Kernel,
        logs: str | Path,
        modules: Sequence[str | Path] = (),
        needs: Sequence[str] = ("ext4",),
        cpus: int = 2,
        memory: int = 768,
        shared: bool = False,
    ) -> None:
        logs = Path(logs).resolve()
        logs.mkdir(parents=True, exist_ok=True)
        self.has_checks = kernel.has_checks
        archive = base_archive("vm-init", PROGRAMS)
        order = add_modules(archive, kernel, needs)
        archive.data("/lib/modules/order", "".join(f"{name}\n" for name in order))
        for module in modules:
            add_built_module(archive, f"/modules/{Path(module).name}", module)
        initrd = logs / "initrd"
        archive.write(initrd)
        self._hardware: list[str] = [
            "-accel", "tcg", *STEADY_TIME, "-machine", "q35", "-cpu", "qemu64,+rdrand", "-smp", str(cpus),
            "-m", str(memory * kernel.memory_factor),
            "-append", "console=ttyS0 panic=1 mitigations=off nokaslr loglevel=7",
        ]  # fmt: skip
        self._boots: list[str | Path] = ["-kernel", kernel.vmlinux, "-initrd", initrd]
        self._shared = shared
        self.machine = self._go_on(logs) if shared else self._start(logs)

    def _start(self, logs: Path, *more: str) -> Machine:
        return Machine([*self._hardware, *self._boots, *more], logs)

    def _go_on(self, logs: Path) -> Machine:
        """Starts the machine from its snapshot, see `resume`."""
        key = key_of(*self._hardware, *map(Path, self._boots[1::2]), qemu_version(), *MADE_BY)
        directory = made_once(CACHE / "snapshots" / key, self._boot_and_save)
        shutil.copy(directory / "console.log", logs / "console-boot.log")
        return self._start(logs, "-incoming", f"exec:cat {directory / 'state'}")

    def _boot_and_save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        machine = self._start(directory)
        try:
            machine.shell.wait_ready(timeout=BOOT_S)
            save(machine, directory)
        finally:
            machine.kill()

    def boot(self) -> None:
        """Waits until the machine answers."""
        if self._shared:
            resume(self.machine)
        else:
            self.machine.shell.wait_ready(timeout=BOOT_S)
        self.sh(announcement(self.machine.logs))

    def sh(self, command: str, timeout: float = 120) -> str:
        """Runs a shell script in the machine; it must succeed."""
        return self.machine.shell.check(command, timeout)

    def run(self, command: str, timeout: float = 120) -> tuple[int, str]:
        """Runs a shell script in the machine; returns status and output."""
        return self.machine.shell.run(command, timeout)

    def insmod(self, name: str, parameters: str = "") -> str:
        """Loads one of our modules."""
        return self.sh(f"insmod /modules/{name}.ko {parameters}")

    def finish(self) -> None:
        """Shuts the machine down; its console must be clean to the end."""
        self.machine.shell.check("sync")
        if self.has_checks:
            assert_checked(self)
        # A reset ends QEMU too, and our small kernels cannot switch the power off.
        self.machine.shell.send("reboot -f")
        self.machine.wait_end(timeout=60)
        if END not in self.machine.console():
            raise MachineTrouble(f"{self.name} ended without {END!r} on its console")

    def collect(self) -> None:
        """Keeps where its processors are: all that a machine that does not answer can tell."""
        try:
            # QMP has no command of its own for registers.
            text = self.machine.monitor.execute(
                "human-monitor-command", {"command-line": "info registers -a"}
            )
        except OSError as problem:
            text = f"not available: {problem}\n"
        (self.machine.logs / "registers.txt").write_text(text)

    def close(self) -> None:
        """Ends the machine and removes what only it needed."""
        self.machine.kill()
        (self.machine.logs / "initrd").unlink(missing_ok=True)
