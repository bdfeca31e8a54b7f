# SPDX-License-Identifier: GPL-2.0
"""A machine without Xen: one kernel, our modules, a shell."""

from pathlib import Path

from .counts import assert_checked
from .image import add_built_module
from .image import add_modules
from .image import base_archive
from .machine import Machine

PROGRAMS = (
    "/usr/bin/fio",
    "/usr/sbin/mkfs.ext4",
    "/usr/sbin/e2fsck",
    "/usr/sbin/blockdev",
    "/usr/bin/dd",
)

STEADY_TIME = ("-icount", "shift=2")
"""Time is counted instructions. By the host's clock, a kernel that measures one
clock against another while the host is busy may find a processor of 36 MHz."""


class PlainVm:
    """A machine; `modules` are .ko files, found in /modules there."""

    name = "the machine"

    def __init__(self, kernel, logs, modules=(), needs=("ext4",), cpus=2, memory=768, arguments=""):
        logs = Path(logs).resolve()
        logs.mkdir(parents=True, exist_ok=True)
        self._has_checks = kernel.has_checks
        archive = base_archive("vm-init", PROGRAMS)
        order = add_modules(archive, kernel, needs)
        archive.data("/lib/modules/order", "".join(f"{name}\n" for name in order))
        for module in modules:
            add_built_module(archive, f"/modules/{Path(module).name}", module)
        initrd = logs / "initrd"
        archive.write(initrd)
        command_line = f"console=ttyS0 panic=1 mitigations=off nokaslr loglevel=7 {arguments}"
        self.machine = Machine(
            ["-accel", "tcg", *STEADY_TIME, "-machine", "q35", "-cpu", "qemu64,+rdrand", "-smp", cpus,
             "-m", memory * kernel.memory_factor,
             "-kernel", kernel.vmlinux, "-initrd", initrd, "-append", command_line],
            logs,
        )  # fmt: skip

    def boot(self):
        """Waits until the machine answers."""
        self.machine.shell.wait_ready(timeout=300)

    def sh(self, command, timeout=120):
        """Runs a shell script in the machine; it must succeed."""
        return self.machine.shell.check(command, timeout)

    def run(self, command, timeout=120):
        """Runs a shell script in the machine; returns status and output."""
        return self.machine.shell.run(command, timeout)

    def insmod(self, name, parameters=""):
        """Loads one of our modules."""
        return self.sh(f"insmod /modules/{name}.ko {parameters}")

    def rmmod(self, name):
        """Unloads a module."""
        return self.sh(f"rmmod {name}")

    def finish(self):
        """Shuts the machine down; its console must be clean to the end."""
        self.machine.shell.check("sync")
        if self._has_checks:
            assert_checked(self)
        # A reset ends QEMU too, and our small kernels cannot switch the power off.
        self.machine.shell.send("reboot -f")
        self.machine.wait_end(timeout=60)

    def collect(self):
        """Keeps where its processors are: all that a machine that does not answer can tell."""
        try:
            text = self.machine.monitor("info registers -a")
        except OSError as problem:
            text = f"not available: {problem}\n"
        (self.machine.logs / "registers.txt").write_text(text)

    def close(self):
        """Ends the machine and removes what only it needed."""
        self.machine.kill()
        (self.machine.logs / "initrd").unlink(missing_ok=True)
