# SPDX-License-Identifier: GPL-2.0-only
"""Runs commands inside a machine or a DomU through the agent there.

The agent (`image/agent.c`) reads requests, a line each, and answers with exit
status and output between marker lines. `Shell` is the client, independent
of the transport; `SerialShell` uses a serial line.
"""

import base64
import gzip
import re
import time
import zlib
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from typing import Protocol

import pexpect

SLICE = 1.0
"""Interval in seconds of console checks while waiting for an answer."""

TIMEOUT = 120
"""Time limit of a command in seconds, ten times what the slowest takes on an idle host."""

KEEPER = "/tmp/keeper"
CLOSE_KEPT = f"kill $(cat {KEEPER})"
"""Ends what `keep_open` has started."""

END = r"#end {number} (\d+) {form} (\w+)\r?\n"
"""The last line of an answer: exit status, encoding of the output, and its CRC-32."""


class CommandFailed(AssertionError):
    """A command ended with a status other than 0, or did not end."""


class MachineTrouble(AssertionError):
    """A console shows what no healthy machine prints, or QEMU is gone."""


class Target(Protocol):
    """A machine, dom0 or guest in which shell scripts are run."""

    @property
    def name(self) -> str:
        """Returns its name in messages."""

    @property
    def has_checks(self) -> bool:
        """Returns `True` if its kernel is the debug kernel."""

    def sh(self, command: str, timeout: float = ...) -> str:
        """Runs a shell script that must succeed, and returns its output."""

    def run(self, command: str, timeout: float = ...) -> tuple[int, str]:
        """Runs a shell script, and returns its status and output."""


class Shell:
    """The client of an agent; subclasses implement the transport."""

    def __init__(self) -> None:
        self._number = 0

    def exchange(self, number: int, request: str, timeout: float, command: str) -> str:
        """Sends "number request"; returns all up to and with the end marker."""
        raise NotImplementedError

    def run(self, command: str, timeout: float = TIMEOUT) -> tuple[int, str]:
        """Runs a shell script; returns its exit status and output."""
        number = self.next_number()
        request = f"run {encode(command)}"
        for _attempt in range(4):
            answer = self.exchange(number, request, timeout, command)
            decoded = _decode(number, answer)
            if decoded is not None:
                return decoded
            request = "again"
        raise CommandFailed(f"no undamaged answer to: {command}")

    def check(self, command: str, timeout: float = TIMEOUT) -> str:
        """Runs a shell script that must succeed; returns its output, stripped."""
        status, output = self.run(command, timeout)
        if status != 0:
            raise CommandFailed(f"status {status} from: {command}\n{output}")
        return output.strip()

    def skip_numbers(self) -> None:
        """Skips numbers that were used before a restore."""
        self._number += 1000

    def next_number(self) -> int:
        """Returns a number that no earlier request had."""
        self._number += 1
        return self._number


class SerialShell(Shell):
    """An agent at the other end of a pexpect child's terminal.

    `watch` is called while waiting, and raises an exception if the machine has failed.
    """

    def __init__(self, child: Any, watch: Callable[[], None]) -> None:
        super().__init__()
        self._child = child
        self._watch = watch

    def wait_ready(self, timeout: float) -> None:
        """Waits until the agent has started."""
        self._await(r"#agent ready", timeout, "the agent did not start")

    def wake(self) -> None:
        """Sends an empty line, because the first byte after a restore is lost."""
        self._child.send("\n\n")

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Disables the console check while a failure is examined."""
        watch, self._watch = self._watch, lambda: None
        try:
            yield
        finally:
            self._watch = watch

    def send(self, command: str) -> int:
        """Starts a shell script, and returns its number: the machine goes away meanwhile."""
        number = self.next_number()
        self._child.send(f"{number} run {encode(command)}\n")
        return number

    def talk(self, command: str) -> None:
        """Starts a shell script on a terminal that this line is the other end of."""
        self._child.send(f"{self.next_number()} talk {encode(command)}\n")

    def exchange(self, number: int, request: str, timeout: float, command: str) -> str:
        """Sends one line over the serial line and awaits the end marker."""
        self._child.send(f"{number} {request}\n")
        self.await_end(number, timeout, command)
        return str(self._child.before + self._child.match.group(0))

    def await_end(self, number: int, timeout: float, command: str) -> None:
        """Awaits the end marker of a request."""
        failure = f"no answer within {timeout} s to: {command}"
        self._await(END.format(number=number, form="(?:plain|gzip)"), timeout, failure)

    def pass_on(self, terminal: str, seconds: int, line: str) -> tuple[int, str]:
        """Passes a line through this agent to the one at a terminal of its machine.

        Returns 0 and the answer, or another status if there was no output for that many
        seconds. With 0 seconds it does not wait for an answer.
        """
        number = self.next_number()
        self._child.send(f"{number} pass {terminal} {seconds} {line}\n")
        failure = f"nothing came back within {seconds + 30} s from {terminal}, for: {line}"
        self._await(END.format(number=number, form="passed"), seconds + 30, failure)
        answer = self._child.before.rsplit(f"#begin {number}", 1)[-1]
        return int(self._child.match.group(1)), answer

    def _await(self, pattern: str, timeout: float, failure: str) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                self._child.expect(pattern, timeout=SLICE)
                return
            except pexpect.TIMEOUT:
                self._watch()
            except pexpect.EOF:
                self._watch()
                raise MachineTrouble(f"QEMU ended: {failure}\n{self._child.before}") from None
        raise CommandFailed(failure)


def keep_open(path: str) -> str:
    """Returns a shell script that opens a file and keeps it open until `CLOSE_KEPT`."""
    return (
        f"exec 9< {path}; sleep 100000 < /dev/null > /dev/null 2>&1 & echo $! > {KEEPER}; exec 9<&-"
    )


def until(condition: str, seconds: int, otherwise: str, pause_us: int = 800000) -> str:
    """Returns a shell script that waits for `condition`, or does `otherwise` after `seconds`.

    It polls often at first, then every `pause_us`, because starting programs takes CPU time from
    what is waited for.
    """
    now = "read now rest < /proc/uptime; now=${now%.*}"
    return (
        f"{now}; end=$((now + {seconds})) pause=100000; until {condition}; do "
        f"{now}; [ $now -lt $end ] || {otherwise}; usleep $pause; "
        f"[ $pause -ge {pause_us} ] || pause=$((pause * 2)); done"
    )


def announcement(logs: Path) -> str:
    """Returns a shell command that writes the name of a test to the kernel log."""
    return f"echo 'rblkif-test: {logs.name}' > /dev/kmsg"


def encode(command: str) -> str:
    """Returns a shell script in the agent's form: on one line, and valid between single quotes."""
    text = re.sub(r"[^ -&(-[\]-~]", _escape, command)
    return re.sub(r"^ | $", _escape, text)


def _escape(match: re.Match[str]) -> str:
    return "".join(f"\\0{byte:03o}" for byte in match[0].encode())


def _decode(number: int, answer: str) -> tuple[int, str] | None:
    """Status and output of an answer, or None if it is damaged."""
    end = re.search(END.format(number=number, form="(plain|gzip)"), answer)
    if not end:
        return None
    body = answer[: end.start()].rsplit(f"#begin {number}", 1)[-1]
    lines = [line.strip() for line in body.splitlines()]
    encoded = "".join(line for line in lines if re.fullmatch(r"[A-Za-z0-9+/=]+", line))
    status, form, checksum = end.groups()
    try:
        output = base64.b64decode(encoded)
        if zlib.crc32(output) != int(checksum, 16):
            return None
    except ValueError:
        return None
    if form == "gzip":
        output = gzip.decompress(output)
    return int(status), output.decode(errors="replace")
