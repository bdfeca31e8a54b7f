# SPDX-License-Identifier: GPL-2.0-only
"""A QEMU process with a console, a line to the agent and a monitor.

The console (kernel and hypervisor messages) is the first serial line, written
to a file. QEMU dies with the harness: it lives in the process namespace that
`scripts/in-root` made.
"""

import os
import signal
import socket
import termios
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pexpect
from pexpect.fdpexpect import fdspawn

from .console_check import trouble_in
from .monitor import Monitor
from .monitor import MonitorError
from .shell import SLICE
from .shell import TIMEOUT
from .shell import CommandFailed
from .shell import MachineTrouble
from .shell import SerialShell

QEMU = "qemu-system-x86_64"
KILLED_S = 120
"""Time limit for QEMU to end after SIGKILL, in seconds."""

SERIAL_LINE = ("-serial", "chardev:agent")
"""The agent's line in a machine of any kernel: the second serial line, /dev/ttyS1."""
PORT = (
    "-device", "virtio-serial-pci,disable-legacy=on,iommu_platform=on",
    "-device", "virtserialport,chardev=agent",
    "-serial", "unix:{serial},server=on,wait=off",
)  # fmt: skip
"""The agent's line where the kernel has virtio_console: /dev/vportNp1. In a PV domain each byte of
a serial line is an instruction that Xen has to do for it; a port takes all of them at once. The
second serial line is there too, for another agent."""


def _typed(data: bytes) -> bytes:
    """Returns what was typed; raises `EOFError`, which pexpect ignores, at its end."""
    if not data:
        raise EOFError
    return data


class Machine:
    """A running QEMU; `arguments` say what hardware it has and what it boots."""

    def __init__(
        self, arguments: Iterable[str | Path], logs: str | Path, line: Iterable[str] = SERIAL_LINE
    ) -> None:
        self.arguments = [*arguments]
        self.line = (*line,)
        self.logs = Path(logs).resolve()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.console_log = self.logs / "console.log"
        monitor = self._short(self.logs / "monitor")
        self.monitor = Monitor(monitor)
        self._serial = self._short(self.logs / "serial")
        self._allowed: list[str] = []
        common = [
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{self.console_log}",
            "-chardev", f"stdio,id=agent,signal=off,logfile={self.logs / 'agent.log'}",
            *(argument.format(serial=self._serial) for argument in self.line),
            "-qmp", f"unix:{monitor},server=on,wait=off",
        ]  # fmt: skip
        command = [*common, *(str(argument) for argument in self.arguments)]
        (self.logs / "qemu.txt").write_text(" \\\n ".join([QEMU, *command]) + "\n")
        self._child = pexpect.spawn(
            QEMU,
            command,
            timeout=None,
            encoding="utf-8",
            codec_errors="replace",
            echo=False,
            cwd=self.logs,
        )
        self._child.delaybeforesend = None
        self.shell = SerialShell(self._child, self.watch)

    def console(self) -> str:
        """Returns the text of the console so far."""
        return self.console_log.read_text(errors="replace") if self.console_log.exists() else ""

    def allow(self, text: str) -> None:
        """Ignores console lines that contain `text`, which this scenario causes."""
        self._allowed.append(text)

    def watch(self) -> None:
        """Raises if the console shows trouble. Called while an answer is awaited."""
        self._stir()
        bad = trouble_in(self.console())
        bad = [line for line in bad if not any(text in line for text in self._allowed)]
        if bad:
            time.sleep(2)
            raise MachineTrouble("the console shows:\n" + "\n".join(bad[:20]))

    def wait_for_console(self, text: str, timeout: float) -> None:
        """Waits until `text` is on the console."""
        deadline = time.monotonic() + timeout
        while text not in self.console():
            self.watch()
            if time.monotonic() > deadline:
                raise MachineTrouble(f"{text!r} not on the console after {timeout} s")
            if not self._child.isalive():
                raise MachineTrouble(f"QEMU ended before {text!r}:\n{self._child.read()}")
            time.sleep(0.1)

    def wait_monitor(self, timeout: float) -> None:
        """Waits until QEMU has opened its monitor: it listens some time after the file is there."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.monitor.execute("query-status")
                return
            except MonitorError:
                if not self._child.isalive() or time.monotonic() > deadline:
                    raise MachineTrouble(f"QEMU did not start:\n{self._child.read()}") from None
            time.sleep(0.02)

    def status(self) -> str:
        """Returns QEMU's run state, such as "running"."""
        return str(self.monitor.execute("query-status")["status"])

    def throttle_writes(self, bytes_per_second: int) -> None:
        """Limits how fast QEMU writes to the disk "disk"; 0 is no limit."""
        limits = dict.fromkeys(("bps", "bps_rd", "iops", "iops_rd", "iops_wr"), 0)
        limits["bps_wr"] = bytes_per_second
        self.monitor.execute("block_set_io_throttle", {"device": "disk", **limits})

    def sleep(self, timeout: float = 240) -> None:
        """Suspends the machine to RAM (ACPI S3) through Linux, and wakes it up.

        Requests to the agent before Linux is awake are lost. A machine that was woken up before may
        wake up at once, because of a pending wake-up event. A virtio port does not work afterwards
        in Linux 7.3, so another agent on the serial line takes over.
        """
        self._take_serial_line()
        command = "echo mem > /sys/power/state"
        number = self.shell.send(command)
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.shell.await_end(number, SLICE, command)
            except CommandFailed:
                if time.monotonic() > deadline:
                    raise
            if self.status() == "suspended":
                self.monitor.execute("system_wakeup")

    def _take_serial_line(self) -> None:
        """Talks to an agent on the second serial line from now on."""
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(self._serial))
        child = fdspawn(self._line, timeout=None, encoding="utf-8", codec_errors="replace")
        child.delaybeforesend = None
        shell = SerialShell(child, self.watch)
        self.shell.check("agent < /dev/ttyS1 > /dev/ttyS1 &")
        shell.wait_ready(timeout=TIMEOUT)
        self.shell = shell

    def interact(self, command: str) -> None:
        """Gives this terminal to `command` on the agent's line until either ends."""
        self.shell.talk(f"{command}\npoweroff -f")
        with suppress(EOFError, termios.error):
            self._child.interact(escape_character=None, input_filter=_typed)

    def wait_end(self, timeout: float) -> None:
        """Waits until QEMU has ended by itself."""
        deadline = time.monotonic() + timeout
        while self._child.isalive():
            if time.monotonic() > deadline:
                raise MachineTrouble(f"the machine did not power off within {timeout} s")
            self._drain()
            self._stir()
        self.watch()

    def cpu_seconds(self) -> float:
        """Returns the CPU time that QEMU has used: the cost of a scenario on any host."""
        try:
            fields = Path(f"/proc/{self._child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except FileNotFoundError:
            return 0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """Kills QEMU; on a busy host it takes a while to free its memory."""
        self._child.kill(signal.SIGKILL)
        deadline = time.monotonic() + KILLED_S
        while self._child.isalive():
            if time.monotonic() > deadline:
                raise MachineTrouble(f"QEMU is there {KILLED_S} s after it was killed")
            time.sleep(0.05)
        self._child.close()
        self.monitor.close()

    def _stir(self) -> None:
        """Makes QEMU's main loop run once.

        With -icount, the loop sets the timer that wakes CPUs when all of them sleep. If it missed
        that they fell asleep, they would sleep until another event.
        """
        with suppress(MonitorError):
            self.status()

    def _drain(self) -> None:
        try:
            self._child.read_nonblocking(4096, timeout=0.2)
        except (pexpect.TIMEOUT, pexpect.EOF):
            pass

    def _short(self, path: Path) -> Path:
        """Returns a path that is short enough for a socket address."""
        return Path("/tmp") / f"rblkif-{abs(hash(str(path))):x}"
