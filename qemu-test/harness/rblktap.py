# SPDX-License-Identifier: GPL-2.0-only
"""rblktap in dom0 as the backend of a guest's disks: xl's backend type tap.

The program is linked statically and comes with the payload. The disk images are in a file
system on dom0's /dev/vdb, mounted at /tap, with the programs that some kinds of images need. A
shell loop in dom0 stands in for the agent: it starts a process for each directory below
backend/vbd3.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .image import copy_programs
from .xenhost import Disk
from .xenimage import ext4_image
from .xenimage import file_in_image

if TYPE_CHECKING:
    from .guest import Guest
    from .xenhost import Server
    from .xenhost import XenHost

TREE = Path(__file__).resolve().parents[2]
TARGET = "x86_64-unknown-linux-gnu"
RUSTFLAGS = "-Ctarget-feature=+crt-static"
PACKAGES = ("rblktap", "agent", "cli")
PROGRAM = "/payload/rblktap"
PLACE = "/tap"
"""Mount point in dom0."""
SIZE = "256M"
"""Size of the file system."""
QEMU_TOOLS = ("/usr/bin/qemu-storage-daemon", "/usr/bin/qemu-img")
"""Serve and check images with a format."""
FORMATS = {"vhd": "vpc"}
"""QEMU's names of formats, where they differ from the suffix of an image."""
UID_BASE = 1895825408
"""The user of the process that serves a disk of domain 0."""
TOOLS_UID_BASE = UID_BASE + 32768
"""The user of QEMU's programs for images of domain 0."""
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
    command = [
        "cargo", "build", "--quiet", "--locked", "--release", f"--target={TARGET}", *packages,
    ]  # fmt: skip
    subprocess.run(
        command,
        cwd=TREE,
        env={**os.environ, "RUSTFLAGS": RUSTFLAGS},
        check=True,
    )
    return (TREE / "target" / TARGET / "release" / name).read_bytes()


@dataclass(frozen=True)
class Image:
    """An image in dom0; the suffix of its name (raw, qcow2, vhd) is the format."""

    name: str
    mib: int = 0
    source: Path | None = None
    """The raw image that it is copied from; an image without one is empty."""
    backing: str | None = None
    """The name of an image before it in the list, whose size it has."""

    @property
    def format(self) -> str:
        """Returns QEMU's name of the format."""
        suffix = self.name.split(".")[-1]
        return FORMATS.get(suffix, suffix)

    def make(self, directory: Path) -> None:
        """Creates the file in a directory, which has the backing image."""
        path = directory / self.name
        if self.source:
            qemu_img("convert", "-O", self.format, self.source, path)
        elif self.backing:
            backing = Image(self.backing)
            qemu_img(
                "create", "-q", "-f", self.format,
                "-b", backing.name, "-F", backing.format, path,
            )  # fmt: skip
        else:
            qemu_img("create", "-q", "-f", self.format, path, f"{self.mib}M")


def qemu_img(*arguments: str | Path) -> str:
    """Runs qemu-img in the build root; returns its output."""
    result = subprocess.run(
        ["qemu-img", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if result.returncode != 0:
        raise RuntimeError(f"qemu-img {' '.join(map(str, arguments))} failed:\n{result.stdout}")
    return result.stdout


def disk(images: Sequence[Image], tools: Sequence[str] = (), size: str = SIZE) -> Path:
    """Returns an ext4 image for dom0's /dev/vdb with `images` and the programs `tools`."""

    def fill(directory: Path) -> None:
        copy_programs(tools, directory)
        for image in images:
            image.make(directory)

    key = key_of(*map(repr, images), *tools, size)
    return made_once(CACHE / "images" / f"tap-{key}.img", lambda path: ext4_image(path, size, fill))


def mount(host: XenHost) -> None:
    """Mounts the images, and copies the programs from there."""
    host.sh(f"mkdir -p {PLACE} && mount -t ext4 /dev/vdb {PLACE} && chmod 755 {PROGRAM}")
    install_tools(host, PLACE)


def install_tools(host: XenHost, place: str) -> None:
    """Copies programs and their libraries from a directory of `copy_programs`.

    A program that serves an image is confined, and sees the directories of the system only.
    """
    host.sh(
        f"mkdir -p /dev/shm && for tool in {place}/bin/*; do [ ! -e $tool ] || cp $tool /usr/bin/; "
        f"done && for library in {place}/lib/*; do name=/lib/x86_64-linux-gnu/${{library##*/}}; "
        "[ ! -e $library ] || [ -e $name ] || cp $library $name; done"
    )


def pattern(mib: int) -> Path:
    """Returns a file of random bytes, the same each time."""
    path = CACHE / "images" / f"pattern-{mib}"
    return made_once(path, lambda path: path.write_bytes(random.Random(mib).randbytes(mib << 20)))


def sum_of(host: XenHost, image: Image, mib: int) -> str:
    """Returns the checksum of the first bytes of an image, as QEMU reads it."""
    return host.sh(
        f"qemu-img dd -U -f {image.format} -O raw bs=1M count={mib} if={PLACE}/{image.name} "
        "of=/tmp/part > /dev/null && sha256sum < /tmp/part && rm /tmp/part"
    )


def take_out(host: XenHost, name: str, directory: Path) -> Path:
    """Unmounts the images, which no process uses, and copies one of them into `directory`."""
    host.wait_for(f"! grep -q ' {PLACE} ' /proc/mounts || umount {PLACE}")
    host.sh("blockdev --flushbufs /dev/vdb")
    path = directory / name
    path.write_bytes(file_in_image(host.disk, f"/{name}"))
    return path


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
    mount(host)
    host.sh("setsid sh /payload/tap-agent > /tmp/tap-agent.log 2>&1 < /dev/null &")


def pid(host: XenHost, guest: Guest, device: int) -> int:
    """Returns the process that serves a disk."""
    path = f"/local/domain/0/backend/vbd3/{guest.domid}/{device}/kthread-pid"
    return int(host.sh(f"xenstore-read {path}"))


def children(host: XenHost, guest: Guest, device: int) -> dict[str, Path]:
    """Returns the directories below /proc of the processes that the one of a disk has started.

    They are `rblktap`, which serves the guest, and those of QEMU.
    """
    parent = f"'^PPid:[[:space:]]*{pid(host, guest, device)}$'"
    files = host.sh(f"grep -ls {parent} /proc/[0-9]*/status || :").split()
    return {host.sh(f"cat {Path(file).parent}/comm"): Path(file).parent for file in files}


def assert_confined(host: XenHost, guest: Guest, device: int) -> None:
    """Checks that the processes of a disk have users of their own, and can do little else."""
    others = children(host, guest, device)
    server = others.pop("rblktap")
    assert_restricted(host, server, UID_BASE + guest.domid, "0" * 16)
    assert host.sh(f"ls {server}/root/") == ""
    for process in others.values():
        # It may use files of any user.
        assert_restricted(host, process, TOOLS_UID_BASE + guest.domid, "2".zfill(16))


def assert_restricted(host: XenHost, process: Path, user: int, capabilities: str) -> None:
    """Checks the user of a process, its capabilities, its namespaces, and what files it sees.

    The image may be the device ram0.
    """
    lines = host.sh(f"cat {process}/status").splitlines()
    status = {name: text.split() for name, _, text in (line.partition(":") for line in lines)}
    assert status["Uid"] == status["Gid"] == [str(user)] * 4
    assert status["CapEff"] == status["CapPrm"] == [capabilities]
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    assert not {"etc", "proc", "sys"} & set(host.sh(f"ls {process}/root/").split())
    devices = host.sh(f"ls {process}/root/dev 2> /dev/null || :").split()
    assert not set(devices) - {"null", "ram0"}
    assert host.sh(f"readlink {process}/ns/net") != host.sh("readlink /proc/1/ns/net")


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
