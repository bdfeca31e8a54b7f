# SPDX-License-Identifier: GPL-2.0-only
"""Builds the initramfs of a machine from programs, libraries and modules.

Everything comes from the build root, where the harness itself runs. A program
brings the libraries that `ldd` names. libgcc_s.so.1 is added beside them:
glibc loads it by name when a thread is cancelled, and xl aborts without it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .cpio import Archive

if TYPE_CHECKING:
    from .kernel import Kernel

PIECES = Path(__file__).resolve().parent.parent / "image"
"""Programs and scripts that run inside the machines."""


def base_archive(init: str, programs: Sequence[str | Path] = (), devices: bool = True) -> Archive:
    """Returns an archive with busybox, the agent, an /init and `programs`.

    `init` is the name of a script in `image/`. A program has the same path in
    the machine as in the build root. `devices` are the nodes that the kernel
    wants before /init has mounted /dev.
    """
    archive = Archive()
    for path in (
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/tmp",
        "/etc",
        "/lib/modules",
        "/var/log",
        "/root",
        "/mnt",
    ):
        archive.directory(path)
    if devices:
        archive.device("/dev/console", 5, 1)
        archive.device("/dev/null", 1, 3)
    archive.file("/bin/busybox", "/usr/bin/busybox")
    for name in ("sh", "mount", "insmod", "modprobe"):
        archive.link(f"/bin/{name}", "busybox")
    for name in ("agent", "store-file"):
        archive.file(f"/bin/{name}", compiled(name))
    archive.file("/init", PIECES / init)
    archive.data("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    archive.data("/etc/group", "root:x:0:\n")
    for program in programs:
        add_program(archive, program)
    return archive


def add_program(archive: Archive, program: str | Path) -> None:
    """Adds a program and the libraries it is linked with."""
    archive.file(str(program), program)
    for library in libraries_of(program):
        if library not in archive:
            archive.file(library, library)


def module_at(name: str, parameters: str, place: str) -> str:
    """Returns a shell command that loads a module from `place`, or one of the kernel."""
    files = f"{place}/{name}.ko /lib/modules/{name}.ko"
    return f"insmod $(ls {files} 2>/dev/null | head -n 1) {parameters}"


def add_built_module(archive: Archive, path: str, module: str | Path) -> None:
    """Adds a module file at `path`, without its debug information, which is most of it."""
    with tempfile.NamedTemporaryFile() as stripped:
        subprocess.run(["objcopy", "--strip-debug", module, stripped.name], check=True)
        archive.data(path, Path(stripped.name).read_bytes())


@cache
def libraries_of(program: str | Path, place: str = "") -> tuple[str, ...]:
    """Returns the libraries that a program is linked with, searched in `place` first."""
    result = subprocess.run(
        ["ldd", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(place)},
    )  # fmt: skip
    found = re.findall(r"(/\S+) \(0x", result.stdout)
    if found:
        found.append("/lib/x86_64-linux-gnu/libgcc_s.so.1")
    return tuple(found)


def copy_programs(programs: Iterable[str | Path], directory: Path) -> None:
    """Copies programs and their libraries to `bin` and `lib` in a directory."""
    for name in ("bin", "lib"):
        (directory / name).mkdir(parents=True)
    for program in programs:
        shutil.copy(program, directory / "bin")
        for library in libraries_of(program):
            shutil.copy(library, directory / "lib")


def compiled(name: str) -> Path:
    """Returns a program of `image/`, linked statically, because some machines have no libraries."""
    source = PIECES / f"{name}.c"
    command = ["gcc", "-O2", "-Wall", "-Werror", "-static", "-s"]
    key = key_of(source.read_bytes(), *command)
    return made_once(
        CACHE / "images" / f"{name}-{key}" / name,
        lambda path: subprocess.run([*command, source, "-o", path], check=True),
    )


def add_modules(archive: Archive, kernel: Kernel, names: Iterable[str]) -> list[str]:
    """Adds kernel modules, and a list in the order to load them."""
    ordered = kernel.with_dependencies(names)
    for name in ordered:
        archive.data(f"/lib/modules/{name}.ko", kernel.module(name))
    return ordered


def debian_packages(names: Sequence[str], installed: bool = True) -> list[Path]:
    """Returns package files of the build root's Debian release, downloaded by apt and cached.

    The key is their version if they are `installed`, else their names.
    """
    version = " ".join(names).encode()
    if installed:
        version = subprocess.run(
            ["dpkg-query", "-W", *names], stdout=subprocess.PIPE, check=True
        ).stdout

    def make(path: Path) -> None:
        path.mkdir()
        command = ["apt-get", "-q", "download", *names]
        result = subprocess.run(
            command, cwd=path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode != 0:
            raise RuntimeError(f"apt-get download {' '.join(names)} failed:\n{result.stdout}")

    return sorted(made_once(CACHE / "images" / f"packages-{key_of(version)}", make).glob("*.deb"))
