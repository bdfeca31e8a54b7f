# SPDX-License-Identifier: GPL-2.0-only
"""Builds the images of a Xen host: hypervisor, initramfs of dom0 and DomU, root disk.

No disk driver for Xen is in any of these. The drivers of a scenario are on
the payload disk, so that all scenarios share a snapshot and no other driver is present.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .cpio import Archive
from .image import PIECES
from .image import add_modules
from .image import add_program
from .image import base_archive
from .image import debian_packages

if TYPE_CHECKING:
    from .kernel import Kernel

XEN = "/boot/xen-4.20-amd64.gz"
XEN_BIN = "/usr/lib/xen-4.20/bin"

XEN_TOOLS = ("xl", "xenstored", "xenconsoled", "xen-init-dom0", "libxl-save-helper", "xenconsole")
XENSTORE_TOOLS = ("read", "write", "rm", "ls", "list", "exists", "chmod", "watch")

DOM0_MODULES = (
    "xen-privcmd", "xenfs", "xen-evtchn", "xen-gntdev", "xen-gntalloc",
    "virtio_blk", "virtio_console", "ext4", "loop",
)  # fmt: skip
DOM0_PROGRAMS = (
    *(f"{XEN_BIN}/{name}" for name in XEN_TOOLS),
    *(f"/usr/bin/xenstore-{name}" for name in XENSTORE_TOOLS),
    "/usr/sbin/e2fsck",
)
STORAGE_PROGRAMS = (
    f"{XEN_BIN}/xl",
    *(f"/usr/bin/xenstore-{name}" for name in XENSTORE_TOOLS),
)
DOMU_PROGRAMS = (
    "/usr/bin/dd",
    "/usr/sbin/blockdev",
    "/usr/sbin/sfdisk",
    "/usr/sbin/mkfs.ext4",
    "/usr/sbin/e2fsck",
)
FIO = "/usr/bin/fio"
"""Needs 40 MB of libraries, so it is only in guests that ask for it."""


def xen_binary() -> Path:
    """Returns the hypervisor as an ELF multiboot image, for QEMU's -kernel."""
    packed = Path(XEN).read_bytes()
    return made_once(
        CACHE / "images" / f"xen-{key_of(packed)}",
        lambda path: path.write_bytes(gzip.decompress(packed)),
    )


def domu_archive(kernel: Kernel) -> bytes:
    """Returns the part of a DomU's initramfs that all scenarios share."""
    archive = base_archive("domu-init", DOMU_PROGRAMS)
    archive.file("/bin/load-modules", PIECES / "load-modules")
    order = add_modules(archive, kernel, ("ext4",))
    archive.data("/lib/modules/order", "".join(f"{name}\n" for name in order))
    return archive.to_bytes()


def fio_archive() -> bytes:
    """Returns the part of a DomU's initramfs that has fio."""
    archive = Archive()
    add_program(archive, FIO)
    return archive.to_bytes()


def storage_archive(kernel: Kernel) -> bytes:
    """Returns the part of a DomU's initramfs for a driver domain."""
    archive = Archive()
    for program in STORAGE_PROGRAMS:
        add_program(archive, program)
    order = add_modules(archive, kernel, ("ext4", "xen-privcmd"))
    add_modules(archive, kernel, ("brd", "null_blk"))
    archive.data("/lib/modules/order", "".join(f"{name}\n" for name in order))
    archive.file("/etc/xen/scripts/blk-min", PIECES / "blk-min")
    return archive.to_bytes()


def dom0_initrd(kernel: Kernel) -> Path:
    """Returns the file of dom0's initramfs."""
    archive = base_archive("dom0-init", DOM0_PROGRAMS)
    order = add_modules(archive, kernel, DOM0_MODULES)
    optional = add_modules(archive, kernel, ("brd", "null_blk"))
    archive.data("/lib/modules/order", "".join(f"{name}\n" for name in order))
    archive.data("/lib/modules/optional", "".join(f"{name}\n" for name in optional))
    archive.data("/etc/xen/xl.conf", 'autoballoon="off"\n')
    archive.file("/etc/xen/scripts/blk-min", PIECES / "blk-min")
    archive.directory("/guest")
    content = archive.to_bytes()
    return made_once(
        CACHE / "images" / f"dom0-{key_of(content)}", lambda path: path.write_bytes(content)
    )


def guest_disk(kernel: Kernel) -> Path:
    """Returns an ext4 image with what DomUs boot, which dom0 mounts read-only at /guest."""
    parts = {
        "initrd": domu_archive(kernel),
        "fio": fio_archive(),
        "storage": storage_archive(kernel),
        "vmlinux": kernel.vmlinux.read_bytes(),
    }

    def make(path: Path) -> None:
        size = f"{sum(map(len, parts.values())) * 5 // 4 >> 20}M"
        ext4_image(
            path,
            size,
            lambda tree: [(tree / name).write_bytes(part) for name, part in parts.items()],
        )

    return made_once(CACHE / "images" / f"guest-{key_of(*parts.values())}.img", make)


def root_disk(size: str = "384M", packages: Sequence[Path] = ()) -> Path:
    """Returns a raw image with a root file system for a DomU, with `packages` in /packages."""
    archive = base_archive("root-init", DOMU_PROGRAMS, devices=False)
    add_program(archive, FIO)
    archive.link("/sbin/init", "/init")
    for package in packages:
        archive.file(f"/packages/{package.name}", package)
    content = archive.to_bytes()

    def unpack(tree: Path) -> None:
        command = ["cpio", "-id", "--quiet", "--no-absolute-filenames"]
        subprocess.run(command, input=content, cwd=tree, check=True)

    return made_once(
        CACHE / "images" / f"root-{key_of(content, size)}.img",
        lambda path: ext4_image(path, size, unpack),
    )


def ext4_image(path: Path, size: str, fill: Callable[[Path], object]) -> None:
    """Creates an ext4 image from a directory that `fill` fills."""
    tree = path.with_name(path.name + ".tree")
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    fill(tree)
    subprocess.run(["mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", tree, path, size], check=True)
    shutil.rmtree(tree)


def file_in_image(image: str | Path, path: str) -> bytes:
    """Returns the content of a file in an ext4 image, which is not mounted."""
    command = ["debugfs", "-R", f"cat {path}", image]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def grub(name: str) -> bytes:
    """Returns GRUB as a guest's boot loader, a file of Debian's grub-xen-host.

    It has a blkif frontend of its own. The package is not installed, because its
    scripts belong on a real host.
    """
    package = debian_packages(["grub-xen-host"], installed=False)[0]
    command = f"dpkg-deb --fsys-tarfile {package} | tar -xO ./usr/lib/grub-xen/{name}"
    return subprocess.run(command, shell=True, stdout=subprocess.PIPE, check=True).stdout


def grub_disk(linux: Path, initrd: bytes) -> Path:
    """Returns a raw image with the kernel `linux` and a GRUB configuration that starts it."""
    parts = {
        "linux": linux.read_bytes(),
        "initrd": initrd,
        "grub/grub.cfg": b"linux /boot/linux console=hvc0 panic=1 mitigations=off loglevel=5\n"
        b"initrd /boot/initrd\nboot\n",
    }

    def fill(tree: Path) -> None:
        (tree / "boot/grub").mkdir(parents=True)
        for name, part in parts.items():
            (tree / "boot" / name).write_bytes(part)

    size = f"{(sum(map(len, parts.values())) >> 20) * 5 // 4 + 8}M"
    return made_once(
        CACHE / "images" / f"boot-{key_of(*parts.values())}.img",
        lambda path: ext4_image(path, size, fill),
    )
