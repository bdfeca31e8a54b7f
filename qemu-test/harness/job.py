# SPDX-License-Identifier: GPL-2.0-only
"""Work that a guest repeats while a scenario does something to its disk.

A *pass* is one run of the work. It counts when it has ended without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .guest import Guest

PASS_S = 600
"""Time limit for passes, in seconds."""


class Job:
    """A shell command that a guest repeats until it fails or is told to stop."""

    def __init__(self, guest: Guest, command: str, name: str = "job") -> None:
        """Starts it; the command finds the number of its pass in `$pass`."""
        self.guest = guest
        self.files = f"/tmp/{name}"
        guest.sh(
            f"rm -f {self.files}.*; (pass=0; while [ ! -e {self.files}.stop ]; do pass=$((pass + 1)); "
            f"{command} || {{ echo $pass > {self.files}.failed; break; }}; echo >> {self.files}.passes; "
            f"done; echo > {self.files}.ended) > {self.files}.log 2>&1 &"
        )

    def wait_for_pass(self, number: int = 1) -> None:
        """Waits for that many more passes."""
        wait_for_passes([self], number)

    def stop(self) -> None:
        """Stops the job after its current pass."""
        self.guest.sh(f"echo > {self.files}.stop")
        self.wait_for(f"[ -e {self.files}.ended ]")

    def count(self) -> str:
        """Returns a shell word that expands to the number of completed passes."""
        # Lines are counted: a number in a file is not there while it is replaced.
        return f"$(cat {self.files}.passes 2> /dev/null | wc -l)"

    def wait_for(self, condition: str) -> None:
        """Waits until a shell condition holds in the guest; the command must not fail before."""
        self.guest.wait_for(f"[ -e {self.files}.failed ] || {condition}", PASS_S)
        failed = self.guest.run(f"[ -e {self.files}.failed ]")[0] == 0
        assert not failed, self.guest.sh(f"tail -n 20 {self.files}.log")


def wait_for_passes(jobs: Sequence[Job], number: int = 1) -> None:
    """Waits until each of a guest's jobs has completed that many more passes."""
    counts = jobs[0].guest.sh("echo " + " ".join(job.count() for job in jobs)).split()
    for job, count in zip(jobs, counts, strict=True):
        job.wait_for(f"[ {job.count()} -ge {int(count) + number} ]")
