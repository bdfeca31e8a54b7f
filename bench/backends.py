# SPDX-License-Identifier: GPL-2.0-only
"""The backends that are measured: a module of dom0's kernel, rblktap, and QEMU.

Each serves the same block devices of dom0. In the setting qcow2, the RAM disk holds a qcow2 image,
all of whose clusters are allocated before the measurement.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from plugin import Symbols
from plugin import code_of

from harness import qdisk
from harness import rblkd
from harness import rblktap
from harness.cache import CACHE
from harness.cache import key_of
from harness.cache import made_once
from harness.rblkd import RblkDisk
from harness.xenhost import Disk

if TYPE_CHECKING:
    from plugin import Code

    from harness.guest import Guest
    from harness.pairs import Driver
    from harness.pairs import Pair
    from harness.xenhost import Server
    from harness.xenhost import XenHost

IMAGE_MIB = 64
QCOW2_MIB = 80
"""Size of the RAM disk with the qcow2 image."""
EMPTY = "empty.qcow2"
XVDA = 51712


class ModuleBackend:
    """A module of dom0's kernel."""

    def __init__(self, pair: Pair, profile: bool) -> None:
        self._pair, self._profile = pair, profile

    def host_options(self) -> dict[str, Any]:
        """Returns the options of the host."""
        return {}

    def start(self, host: XenHost, parameters: str) -> None:
        """Starts the backend in dom0."""
        host.load_backend(parameters)

    def disk(self, vdev: str, device: str, _format: str) -> Disk:
        """Returns a disk that is a block device of dom0."""
        return Disk(vdev, device)

    def code(self, host: XenHost, devices: list[Driver]) -> list[Code]:
        """Returns the code of modules in dom0."""
        return code_of(host, [self._pair.backend, *devices])

    def user_symbols(self, _host: XenHost, _guest: Guest) -> Symbols | None:
        """Returns the functions of the program that serves xvda."""
        return None


class TapBackend(ModuleBackend):
    """rblktap; QEMU's storage daemon serves the qcow2 image."""

    def __init__(self, pair: Pair, profile: bool) -> None:
        super().__init__(pair, profile)
        self._program = _with_symbols() if profile else None

    def host_options(self) -> dict[str, Any]:
        """Returns the options of the host."""
        files = rblkd.files() | {EMPTY: _empty_image()}
        if self._program:
            files["rblktap"] = _stripped(self._program)
        return {
            "image": rblktap.disk([], rblktap.QEMU_TOOLS),
            "tools": rblkd.TOOLS,
            "files": files,
        }

    def start(self, host: XenHost, parameters: str) -> None:
        """Starts rblkd."""
        rblkd.install(host)
        rblkd.start(host)

    def disk(self, vdev: str, device: str, format: str) -> Disk:
        """Returns a disk that is an image on a block device of dom0."""
        return RblkDisk(vdev, f"{format}:{device}")

    def code(self, host: XenHost, devices: list[Driver]) -> list[Code]:
        """Returns the code of modules in dom0."""
        return code_of(host, devices)

    def user_symbols(self, host: XenHost, guest: Guest) -> Symbols | None:
        """Returns the functions of rblktap, which is loaded at an address by chance."""
        if not self._program:
            return None
        process = rblktap.children(host, guest, XVDA)["rblktap"]
        base = int(host.sh(f"grep -m 1 {rblktap.PROGRAM} {process}/maps").split("-")[0], 16)
        text = subprocess.run(
            ["nm", "-C", "--defined-only", self._program],
            stdout=subprocess.PIPE, check=True, text=True,
        ).stdout  # fmt: skip
        found = [(0, "(user)")]
        for line in text.splitlines():
            address, kind, name = line.split(None, 2)
            if kind in "tTwW":
                found.append((base + int(address, 16), f"{name} [rblktap]"))
        found.append((base + self._program.stat().st_size, "(user)"))
        return Symbols.of(found)


@dataclass
class QemuDeviceDisk(Disk):
    """A disk that QEMU serves from a block device, through the page cache.

    libxl asks for aio=native with direct I/O, and Debian's QEMU for Xen is built without it.
    """

    format: str = "raw"

    def specification(self, _server: Server) -> str:
        """Returns the disk in xl's syntax."""
        return (
            f"format={self.format},vdev={self.vdev},access=rw,backendtype=qdisk,"
            f"target={self.target}"
        )


class QemuBackend(ModuleBackend):
    """QEMU, as Debian builds it."""

    def host_options(self) -> dict[str, Any]:
        """Returns the options of the host."""
        return {"image": qdisk.disk([]), "files": {EMPTY: _empty_image()}}

    def start(self, host: XenHost, parameters: str) -> None:
        """Makes QEMU available to xl, which starts it with a guest."""
        qdisk.mount(host)

    def disk(self, vdev: str, device: str, format: str) -> Disk:
        """Returns a disk that is an image on a block device of dom0."""
        return QemuDeviceDisk(vdev, device, format=format)

    def code(self, host: XenHost, devices: list[Driver]) -> list[Code]:
        """Returns the code of modules in dom0."""
        return code_of(host, devices)


def backend_of(pair: Pair, profile: bool) -> ModuleBackend:
    """Returns the backend of a pair; `profile` asks for the functions of programs too."""
    kinds = {"T": TapBackend, "Q": QemuBackend}
    return kinds.get(pair.name[-1], ModuleBackend)(pair, profile)


def _with_symbols() -> Path:
    """Builds rblktap as it is used, but with its symbols; returns a copy of it."""
    packages = [f"--package={package}" for package in rblktap.PACKAGES]
    command = [
        "cargo", "build", "--quiet", "--locked", "--release", f"--target={rblktap.TARGET}", *packages,
        "--config", 'profile.release.package.rblktap.strip="none"',
    ]  # fmt: skip
    environment = {**os.environ, "RUSTFLAGS": rblktap.RUSTFLAGS}
    subprocess.run(command, cwd=rblktap.TREE, env=environment, check=True)
    content = (rblktap.TREE / "target" / rblktap.TARGET / "release" / "rblktap").read_bytes()
    path = CACHE / "bench" / f"rblktap-{key_of(content)}"
    return made_once(path, lambda path: path.write_bytes(content))


def _stripped(program: Path) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run(["objcopy", "--strip-all", program, file.name], check=True)
        return Path(file.name).read_bytes()


def _empty_image() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / EMPTY
        rblktap.qemu_img("create", "-q", "-f", "qcow2", path, f"{IMAGE_MIB}M")
        return path.read_bytes()
