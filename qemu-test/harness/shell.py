# SPDX-License-Identifier: GPL-2.0
"""Commands run inside a machine, over a serial line to its agent."""

import base64
import re
import time
import zlib

import pexpect

SLICE = 1.0
"""Seconds between two looks at the console while an answer is awaited."""

TIMEOUT = 120
"""Seconds a command may take: ten times what the slowest quiet one takes."""


class CommandFailed(AssertionError):
    """A command ended with a status other than 0, or did not end."""


class MachineTrouble(AssertionError):
    """A console shows what no healthy machine prints, or QEMU is gone."""


class Shell:
    """The asker's side of `image/agent`.

    `child` is a pexpect child whose terminal is the serial line; `watch` is
    called while waiting and raises when the machine is in trouble.
    """

    def __init__(self, child, watch):
        self._child = child
        self._watch = watch
        self._number = 0

    def wait_ready(self, timeout):
        """Waits until the agent has started."""
        self._await(r"#agent ready", timeout, "the agent did not start")

    def wake(self):
        """Gives the line a blank to lose: the first byte after a restore is."""
        self._child.send("\n")

    def run(self, command, timeout=TIMEOUT):
        """Runs a shell script; returns its exit status and output."""
        self._number += 1
        number = self._number
        text = base64.b64encode(command.encode()).decode()
        request = text
        for _attempt in range(4):
            self._child.send(f"{number} {request}\n")
            answer = self._answer(number, timeout, command)
            if answer is not None:
                return answer
            request = "again"
        raise CommandFailed(f"no undamaged answer to: {command}")

    def check(self, command, timeout=TIMEOUT):
        """Runs a shell script that must succeed; returns its output, stripped."""
        status, output = self.run(command, timeout)
        if status != 0:
            raise CommandFailed(f"status {status} from: {command}\n{output}")
        return output.strip()

    def send(self, command):
        """Starts a shell script and awaits no answer: the machine goes away."""
        self._number += 1
        text = base64.b64encode(command.encode()).decode()
        self._child.send(f"{self._number} {text}\n")

    def _answer(self, number, timeout, command):
        end = rf"#end {number} (\d+) ([0-9a-f]+)\r?\n"
        self._await(end, timeout, f"no answer within {timeout} s to: {command}")
        status, checksum = self._child.match.groups()
        body = self._child.before.rsplit(f"#begin {number}", 1)[-1]
        lines = [line.strip() for line in body.splitlines()]
        lines = [line for line in lines if re.fullmatch(r"[A-Za-z0-9+/=]+", line)]
        encoded = "".join(line + "\n" for line in lines)
        if zlib.crc32(encoded.encode()) != int(checksum, 16):
            return None
        return int(status), base64.b64decode(encoded).decode(errors="replace")

    def _await(self, pattern, timeout, failure):
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

