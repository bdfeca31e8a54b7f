# SPDX-License-Identifier: GPL-2.0-only
"""Boots Xen and dom0 once, so that every scenario can start from there.

A snapshot is QEMU's migration stream of a machine whose dom0 is ready. It is
named by the hash of everything in it. The files of a scenario are on disks whose content has not
been read when the snapshot is taken.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .machine import PORT
from .machine import QEMU
from .machine import Machine
from .monitor import MonitorError
from .shell import MachineTrouble
from .xenimage import dom0_initrd
from .xenimage import guest_disk
from .xenimage import xen_binary

if TYPE_CHECKING:
    from .guest import Kind

if TYPE_CHECKING:
    from .kernel import Kernel

XEN_ARGUMENTS = (
    "console=com1 com1=115200,8n1 dom0_mem=512M,max:512M dom0_max_vcpus={vcpus} noreboot bootscrub=0 "
    # Without eager-fpu dom0's user space is randomly corrupted under TCG.
    "spec-ctrl=no,eager-fpu edd=off vga=none vpmu=off iommu=no cpufreq=none loglvl=warning guest_loglvl=warning"
)
DOM0_ARGUMENTS = "console=hvc0 panic=1 loglevel=5 mitigations=off"
PROCESSOR = "qemu64,+svm,+npt,+rdrand"
ICOUNT = (
    "-icount", "shift=0,sleep=off", "-seed", "1", "-rtc", "base=2026-01-01T00:00:00,clock=vm",
)  # fmt: skip
"""Options for a machine whose clock is the number of executed instructions, one per nanosecond."""
DISK_SIZES = {"payload": 64 << 20, "disk": 1 << 30}
"""The disks of a scenario, /dev/vda and /dev/vdb in dom0; /dev/vdc has the guests' kernel."""

MADE_BY = [Path(__file__), Path(__file__).with_name("machine.py")]

SAVE_S = 300
"""How long saving a machine may take, in seconds."""

SAVES = 10
"""How often a machine is saved until its state can be loaded."""

LOAD_S = 120
"""How long loading a state may take, in seconds."""

BOOTS = 5
"""How often a boot is tried until dom0's clock is right."""


class Snapshot:
    """The Xen host for one kernel, booted up to "dom0 ready". No guest waits on it.

    The machine has one CPU, whatever the `vcpus` of dom0. Linux looks for these in the
    machine's ACPI tables, which have empty sockets for the others.

    `guest_kernel` is what guests boot, if not dom0's. `icount` makes a machine
    that measures time in instructions, see ICOUNT.
    """

    waiting: Kind | None = None

    def __init__(
        self,
        kernel: Kernel,
        vcpus: int = 1,
        guest_kernel: Kernel | None = None,
        icount: bool = False,
    ) -> None:
        guest_kernel = guest_kernel or kernel
        self._vcpus = vcpus
        self._icount = icount
        self.guest_type = guest_kernel.guest_type
        self.has_checks = guest_kernel.has_checks
        self.memory_factor = guest_kernel.memory_factor
        self._xen = xen_binary()
        self._initrd = dom0_initrd(kernel)
        self._guest_disk = guest_disk(guest_kernel)
        self._vmlinux = kernel.vmlinux
        arguments = " ".join(self._arguments({name: Path(name) for name in DISK_SIZES}))
        key = key_of(
            self._initrd.name,
            self._xen.name,
            self._guest_disk.name,
            self._vmlinux,
            qemu_version(),
            arguments,
            *MADE_BY,
        )
        self.key = key
        self._directory = CACHE / "snapshots" / key

    def start(
        self,
        logs: str | Path,
        disks: Mapping[str, Path],
        write_log: Path | None = None,
        extra: Sequence[str] = (),
    ) -> Machine:
        """Starts a machine from the snapshot, see `resume`.

        `disks` are the images, by name.
        With `write_log`, QEMU logs the writes to the disk "disk" in that file.
        `extra` are more arguments for QEMU, such as a plugin.
        """
        directory = made_once(self._directory, self._make)
        arguments = [*self._arguments(disks, write_log), *extra]
        machine = Machine([*arguments, "-incoming", f"exec:cat {directory / 'state'}"], logs, PORT)
        shutil.copy(directory / "console.log", machine.logs / "console-boot.log")
        return machine

    def _make(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        wrong: list[str] = []
        for _attempt in range(BOOTS):
            if self._boot_and_save(directory, wrong):
                return
        raise MachineTrouble(
            f"after each of {BOOTS} boots dom0 kept wrong time: {'; '.join(wrong)}.\n"
            "This machine was too busy while Xen measured its clocks: try again when it is not.\n"
            f"The last console: {directory / 'console.log'}"
        )

    def _boot_and_save(self, directory: Path, wrong: list[str]) -> bool:
        """Boots, and saves the machine unless its time is wrong: how wrong is added to `wrong`."""
        with tempfile.TemporaryDirectory(dir=directory) as place:
            disks = {name: blank(Path(place) / name, size) for name, size in DISK_SIZES.items()}
            machine = Machine(self._arguments(disks), directory, PORT)
            try:
                machine.wait_for_console("init: dom0 ready", timeout=300)
                machine.shell.wait_ready(timeout=60)
                if not self._icount:
                    rate, nap = _time(machine)
                    if not 0.7 < rate < 1.4 or nap > 1.0:
                        wrong.append(
                            f"a second took {1 / rate:.2f} s, half a second's nap {nap:.2f} s"
                        )
                        return False
                save(machine, directory)
            finally:
                machine.kill()
        return True

    def _arguments(self, disks: Mapping[str, Path], write_log: Path | None = None) -> list[str]:
        def comma(text: object) -> str:
            return str(text).replace(",", ",,")

        vmlinux = comma(f"{self._vmlinux} {DOM0_ARGUMENTS}")
        arguments = [
            "-accel", "tcg,thread=single" if self._icount else "tcg", "-machine", "q35",
            "-cpu", PROCESSOR + ",-x2apic" * self._icount, *ICOUNT * self._icount,
            "-m", str(1536 * self.memory_factor), "-smp", f"1,maxcpus={self._vcpus}",
            "-kernel", str(self._xen),
            "-append", XEN_ARGUMENTS.format(vcpus=self._vcpus),
            "-initrd", f"{vmlinux},{comma(self._initrd)}",
        ]  # fmt: skip
        drives = {name: f"format=raw,file={disks[name]}" for name in DISK_SIZES}
        drives["guest"] = f"format=raw,file={self._guest_disk},readonly=on"
        if write_log:
            write_log.touch()
            drives["disk"] = (
                f"driver=blklogwrites,file.driver=file,file.filename={disks['disk']},"
                f"log.driver=file,log.filename={write_log}"
            )
        for name, drive in drives.items():
            arguments += [
                "-drive", f"if=none,id={name},{drive}",
                "-device", f"virtio-blk-pci,drive={name},disable-legacy=on,iommu_platform=on",
            ]  # fmt: skip
        return arguments


def qemu_version() -> bytes:
    """Returns QEMU's description of its version."""
    return subprocess.run([QEMU, "--version"], stdout=subprocess.PIPE, check=True).stdout


def _time(machine: Machine) -> tuple[float, float]:
    """Returns how fast dom0's clock runs, and how long a timer of half a second takes by it.

    Xen calibrates one clock against another at boot. If QEMU is preempted at that moment, the
    result is wrong by any factor, and would stay wrong in everything that starts from the snapshot.
    """

    def nap() -> tuple[float, float, float]:
        """Returns the middle of a sleep by the host's clock and by dom0's, and its length."""
        before = time.monotonic()
        text = machine.shell.check(
            "read a _ < /proc/uptime; usleep 500000; read b _ < /proc/uptime; echo $a $b"
        )
        start, end = (float(part) for part in text.split())
        return (before + time.monotonic()) / 2, (start + end) / 2, end - start

    naps = [nap() for _ in range(5)]
    (host, guest, _), (host_end, guest_end, _) = naps[0], naps[-1]
    return max(guest_end - guest, 0.01) / (host_end - host), min(length for _, _, length in naps)


def save(machine: Machine, directory: Path) -> None:
    """Stops a machine and writes its state where `Snapshot.start` finds it.

    QEMU does not load the state of a CPU that runs a PVH or HVM guest at that moment. So
    the state is loaded once, and if that fails, the machine continues and is saved again.
    """
    state = directory / "state"
    machine.shell.check("sync")
    for _attempt in range(SAVES):
        machine.monitor.execute("stop")
        _write_state(machine, state)
        trouble = _load_trouble(machine, state)
        if not trouble:
            return
        machine.monitor.execute("cont")
        machine.shell.check("sync")
    raise MachineTrouble(f"QEMU cannot load any of {SAVES} states that it has saved: {trouble}")


def _load_trouble(machine: Machine, state: Path) -> str:
    """Returns why a machine like this one cannot load a state, "" if it can."""
    # The last "-incoming" counts: the machine may have been started from another state.
    arguments = [*machine.arguments, "-incoming", f"exec:cat {state}"]
    with tempfile.TemporaryDirectory() as logs:
        copy = Machine(arguments, logs, machine.line)
        try:
            await_load(copy)
        except (MachineTrouble, MonitorError) as error:
            return str(error)
        finally:
            copy.kill()
    return ""


def _write_state(machine: Machine, state: Path) -> None:
    machine.monitor.execute("migrate", {"uri": f"exec:cat > {state}"})
    deadline = time.monotonic() + SAVE_S
    migration: dict[str, Any] = {}
    while migration.get("status") not in ("completed", "failed", "cancelled"):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
        migration = machine.monitor.execute("query-migrate")
    if migration.get("status") != "completed":
        raise MachineTrouble(f"the snapshot was not saved within {SAVE_S} s: {migration}")


def await_load(machine: Machine) -> None:
    """Waits until a machine that was started from a snapshot has loaded it."""
    machine.wait_monitor(timeout=60)
    deadline = time.monotonic() + LOAD_S
    while machine.status() == "inmigrate":
        if time.monotonic() > deadline:
            raise MachineTrouble(f"QEMU has not loaded the snapshot after {LOAD_S} s")
        time.sleep(0.05)


def resume(machine: Machine) -> None:
    """Resumes a machine that was started from a snapshot, once that is loaded."""
    await_load(machine)
    machine.monitor.execute("cont")
    machine.shell.skip_numbers()
    machine.shell.wake()


def blank(path: Path, size: int) -> Path:
    """Makes a sparse file of `size` bytes, or grows one to it; returns its path."""
    with open(path, "ab") as file:
        file.truncate(size)
    return path
