# SPDX-License-Identifier: GPL-2.0-only
"""QEMU in dom0 as the backend of a guest's disks: xl's backend type qdisk.

QEMU, its libraries and the disk images are in a file system on dom0's /dev/vdb, mounted at
/qemu. They are too large for dom0's initramfs, and most scenarios do not need them. `xl` starts
one QEMU process for each guest that has such a disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .image import compiled
from .image import copy_programs
from .image import debian_packages
from .image import libraries_of
from .xenhost import Disk
from .xenimage import ext4_image
from .xenimage import file_in_image

if TYPE_CHECKING:
    from .guest import Guest
    from .xenhost import Server
    from .xenhost import XenHost

PACKAGES = (
    "qemu-system-xen", "qemu-utils", "libspice-server1", "libgstreamer1.0-0",
    "libgstreamer-plugins-base1.0-0", "libopus0", "liborc-0.4-0t64",
)  # fmt: skip
"""QEMU and qemu-img, with the libraries that the build root lacks. They are unpacked and not
installed: only these scenarios use them."""
LIBRARIES = "usr/lib/x86_64-linux-gnu"
QEMU = "usr/libexec/xen-qemu-system-i386"
KEYMAP = "/usr/share/qemu/keymaps/en-us"
"""QEMU does not start without it, because xl always passes -vnc."""
PLACE = "/qemu"
"""Mount point in dom0."""
TOOLS = "tools"
"""The directory with other programs."""
SIZE = "384M"
"""Size of the file system."""
XL_PATH = "/usr/libexec/xen-qemu-system-i386"
"""Where Debian's xl expects QEMU."""

_START = """#!/bin/sh
LD_LIBRARY_PATH={place}/lib exec {place}/qemu -L {place} "$@"
"""


def tree() -> Path:
    """Returns the directory with the unpacked packages."""
    packages = debian_packages(PACKAGES, installed=False)

    def make(path: Path) -> None:
        path.mkdir()
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, path], check=True)
        # dpkg-deb sets the time of the directory, and the cache removes old entries.
        os.utime(path)

    return made_once(CACHE / "images" / f"qemu-{key_of(*(one.name for one in packages))}", make)


def qemu_img(*arguments: str | Path) -> None:
    """Runs qemu-img in the build root."""
    place = tree()
    result = subprocess.run(
        [place / "usr/bin/qemu-img", *map(str, arguments)],
        env={**os.environ, "LD_LIBRARY_PATH": str(place / LIBRARIES)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if result.returncode != 0:
        raise RuntimeError(f"qemu-img {' '.join(map(str, arguments))} failed:\n{result.stdout}")


def disk(
    images: Sequence[tuple[str, str | Path]],
    firmware: Sequence[str | Path] = (),
    tools: Sequence[str] = (),
) -> Path:
    """Returns an ext4 image for dom0's /dev/vdb with QEMU, `images` and the files `firmware`.

    An image is a pair of its name, whose suffix (raw, qcow2) is the format, and either its size
    or the raw image that it is copied from. `tools` are programs of the build root, see
    `copy_programs`.
    """
    programs = tree()
    qemu, qmp = programs / QEMU, compiled("qmp")

    def fill(directory: Path) -> None:
        for name in ("lib", "keymaps"):
            (directory / name).mkdir()
        shutil.copy(qemu, directory / "qemu")
        shutil.copy(KEYMAP, directory / "keymaps")
        for library in libraries_of(qemu, programs / LIBRARIES):
            shutil.copy(library, directory / "lib")
        for file in (qmp, *firmware):
            shutil.copy(file, directory)
        copy_programs(tools, directory / TOOLS)
        start = directory / "start"
        start.write_text(_START.format(place=PLACE))
        start.chmod(0o755)
        for name, source in images:
            _make_image(directory / name, source)

    described = [f"{name} {source}" for name, source in images]
    key = key_of(
        programs.name, qmp.parent.name, _START, *map(Path, firmware), *map(Path, tools), *described
    )
    return made_once(
        CACHE / "images" / f"qdisk-{key}.img", lambda path: ext4_image(path, SIZE, fill)
    )


def _make_image(path: Path, source: str | Path) -> None:
    if isinstance(source, Path):
        qemu_img("convert", "-O", _format_of(path.name), source, path)
    else:
        qemu_img("create", "-q", "-f", _format_of(path.name), path, source)


def _format_of(name: str) -> str:
    return name.split(".")[-1]


@dataclass
class QemuDisk(Disk):
    """A disk that QEMU serves; `target` is the name of an image passed to `disk`."""

    def specification(self, _server: Server) -> str:
        """Returns the disk in xl's syntax."""
        return (
            f"format={_format_of(self.target)},vdev={self.vdev},access={self.mode},"
            f"backendtype=qdisk,target={PLACE}/{self.target}"
        )


def mount(host: XenHost) -> None:
    """Mounts the file system with QEMU in dom0 and puts QEMU where xl expects it."""
    host.sh(
        f"mkdir -p {PLACE} $(dirname {XL_PATH}) && mount -t ext4 /dev/vdb {PLACE} && "
        f"ln -s {PLACE}/start {XL_PATH}"
    )


def allocated_kb(host: XenHost, image: str) -> int:
    """Returns how many KiB of dom0's file system an image occupies."""
    return int(host.sh(f"sync; du -k {PLACE}/{image}").split()[0])


def is_on_disk(host: XenHost, text: str) -> bool:
    """Returns `True` if the backing file of dom0's /dev/vdb contains `text`."""
    with open(host.disk, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return content.find(text.encode()) >= 0


def export_image(host: XenHost, image: str, path: Path) -> None:
    """Unmounts the file system, checks `image` and converts it to the raw file `path`."""
    host.wait_for(f"umount {PLACE}")
    host.sh("blockdev --flushbufs /dev/vdb")
    copy = path.with_name(image)
    copy.write_bytes(file_in_image(host.disk, f"/{image}"))
    qemu_img("check", copy)
    qemu_img("convert", "-O", "raw", copy, path)
    copy.unlink()


def execute(host: XenHost, guest: Guest, command: str, **arguments: object) -> None:
    """Executes a QMP command in a guest's QEMU, through the socket that libxl creates."""
    request = json.dumps({"execute": command, "arguments": arguments})
    host.sh(f"{PLACE}/qmp /var/run/xen/qmp-libxl-{guest.domid} '{request}'")
