# SPDX-License-Identifier: GPL-2.0-only
"""rblktap in dom0 as the backend of a guest's disks: xl's backend type tap.

The program is linked statically and comes with the payload. The disk images are in a file
system on dom0's /dev/vdb, mounted at /tap. A shell loop in dom0 stands in for the agent: it starts
a process for each directory below backend/vbd3.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .xenhost import Disk
from .xenimage import ext4_image

if TYPE_CHECKING:
    from .guest import Guest
    from .xenhost import Server
    from .xenhost import XenHost

TREE = Path(__file__).resolve().parents[2]
TARGET = "x86_64-unknown-linux-gnu"
PACKAGES = ("rblktap", "agent", "cli")
PROGRAM = "/payload/rblktap"
PLACE = "/tap"
"""Mount point in dom0."""
SIZE = "256M"
"""Size of the file system."""
SERVED = "requests adopted"
"""Printed when a frontend is connected, behind the number of requests of a predecessor."""
AGENT = f"""
start() {{
	{PROGRAM} $1 $2 $3 >> /tmp/rblktap-$1-$2.log 2>&1 &
}}
xenstore-watch backend/vbd3 | while IFS=/ read -r _ _ domain device node; do
	[ "$node" = params ] || continue
	uri=$(xenstore-read backend/vbd3/$domain/$device/params 2> /dev/null) || continue
	start $domain $device $uri
done
"""


def program(name: str = "rblktap") -> bytes:
    """Builds the programs of user space, all in one go, and returns one of them."""
    packages = [f"--package={package}" for package in PACKAGES]
    command = ["cargo", "build", "--locked", "--release", f"--target={TARGET}", *packages]
    subprocess.run(
        command,
        cwd=TREE,
        env={**os.environ, "RUSTFLAGS": "-Ctarget-feature=+crt-static"},
        check=True,
    )
    return (TREE / "target" / TARGET / "release" / name).read_bytes()


def disk(images: Sequence[tuple[str, int]]) -> Path:
    """Returns an ext4 image for dom0's /dev/vdb with raw `images`: names, and sizes in MiB."""

    def fill(directory: Path) -> None:
        for name, mib in images:
            with open(directory / name, "wb") as file:
                file.truncate(mib << 20)

    key = key_of(*(f"{name} {mib}" for name, mib in images), SIZE)
    return made_once(CACHE / "images" / f"tap-{key}.img", lambda path: ext4_image(path, SIZE, fill))


@dataclass
class TapDisk(Disk):
    """A disk that rblktap serves; `target` is the name of an image passed to `disk`."""

    def specification(self, _server: Server) -> str:
        """Returns the disk in xl's syntax."""
        return (
            f"format=raw,vdev={self.vdev},access={self.mode},backendtype=tap,"
            f"script=blk-min,target={PLACE}/{self.target}"
        )


def files() -> dict[str, str | bytes]:
    """Returns what the payload of dom0 has to contain."""
    return {"rblktap": program(), "tap-agent": AGENT}


def start_agent(host: XenHost) -> None:
    """Mounts the images, and starts processes for disks from now on."""
    host.sh(
        f"mkdir -p {PLACE} /dev/shm && mount -t ext4 /dev/vdb {PLACE} && chmod 755 {PROGRAM} && "
        "setsid sh /payload/tap-agent > /tmp/tap-agent.log 2>&1 < /dev/null &"
    )


def pid(host: XenHost, guest: Guest, device: int) -> int:
    """Returns the process that serves a disk."""
    path = f"/local/domain/0/backend/vbd3/{guest.domid}/{device}/kthread-pid"
    return int(host.sh(f"xenstore-read {path}"))


def wait_in_flight(host: XenHost, guest: Guest, device: int) -> None:
    """Waits until a disk has started writes that are not complete."""
    file = f"/dev/shm/td3-{pid(host, guest, device)}/vbd-{guest.domid}-{device}"
    host.wait_for(f"set -- $(od -An -v -t u8 -N 96 {file}) && [ $7 != $8 ]")


def replace(host: XenHost, guest: Guest, device: int) -> None:
    """Kills the process of a disk and starts a successor, which waits for I/O that is in flight."""
    host.sh(
        f"kill -9 {pid(host, guest, device)}; setsid {PROGRAM} --lock-seconds 100 {guest.domid} {device} "
        f"$(xenstore-read backend/vbd3/{guest.domid}/{device}/params) "
        f">> /tmp/rblktap-{guest.domid}-{device}.log 2>&1 < /dev/null &"
    )


def wait_served(host: XenHost, guest: Guest, device: int, count: int) -> int:
    """Waits until a process has connected for the `count`th time.

    Returns how many requests of a predecessor it has adopted.
    """
    file = f"/tmp/rblktap-{guest.domid}-{device}.log"
    host.wait_for(f"[ $(grep -c '{SERVED}' {file}) = {count} ]")
    *_, last = re.findall(rf"(\d+) {SERVED}", log(host, guest, device))
    return int(last)


def log(host: XenHost, guest: Guest, device: int) -> str:
    """Returns what the processes of a disk have printed."""
    return host.sh(f"cat /tmp/rblktap-{guest.domid}-{device}.log")


def allocated_kb(host: XenHost, image: str) -> int:
    """Returns how many KiB of dom0's file system an image occupies."""
    return int(host.sh(f"sync; du -k {PLACE}/{image}").split()[0])


def xentop_counters(host: XenHost, guest: Guest, device: int) -> list[int]:
    """Returns the 64-bit numbers of the file that xentop reads."""
    file = f"/dev/shm/td3-{pid(host, guest, device)}/vbd-{guest.domid}-{device}"
    return [int(number) for number in host.sh(f"od -An -v -t u8 -N 96 {file}").split()]
