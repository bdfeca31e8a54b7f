# SPDX-License-Identifier: GPL-2.0-only
"""An xfs on the disk of a scenario, and its check.

The programs are those of Debian's packages, which are not in the build root.
"""

import os
import subprocess
from pathlib import Path

from .cache import CACHE
from .cache import key_of
from .cache import made_once
from .image import debian_packages

PACKAGES = ("xfsprogs", "libinih1", "liburcu8t64")
START, SIZE = 32 << 20, 300 << 20
"""Its offset on the disk and its size, the minimum of mkfs.xfs."""


def partitioned_disk(first: tuple[int, int]) -> Path:
    """Returns a raw image with two partitions: `first` (start, size), empty, and one with xfs."""
    places = (first, (START, SIZE))
    table = "".join(f"start={start >> 9}, size={size >> 9}\n" for start, size in places)

    def make(path: Path) -> None:
        made = path.with_name(path.name + ".xfs")
        with open(made, "wb") as file:
            file.truncate(SIZE)
        result = _run("mkfs.xfs", "-q", "-f", made)
        if result.returncode != 0:
            raise RuntimeError(f"mkfs.xfs failed:\n{result.stdout}")
        place = [f"if={made}", f"of={path}", f"seek={START >> 20}", "bs=1M", "conv=sparse"]
        subprocess.run(["dd", "status=none", *place], check=True)
        made.unlink()
        subprocess.run(["sfdisk", "-q", "-X", "dos", path], input=table, text=True, check=True)

    return made_once(CACHE / "images" / f"xfs-{key_of(table, *PACKAGES)}.img", make)


def assert_sound(disk: str | Path, where: str) -> None:
    """Checks that xfs_repair would repair nothing in the xfs on the image `disk`."""
    with open(disk, "rb") as file, open(f"{disk}.xfs", "wb") as copy:
        file.seek(START)
        copy.write(file.read(SIZE))
    result = _run("xfs_repair", "-n", "-f", copy.name)
    os.unlink(copy.name)
    assert result.returncode == 0, f"{where}:\n{result.stdout}"


def _run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    tree = _unpacked()
    return subprocess.run(
        [tree / "usr/sbin" / program, *arguments],
        env={"LD_LIBRARY_PATH": f"{tree}/usr/lib/x86_64-linux-gnu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _unpacked() -> Path:
    packages = debian_packages(PACKAGES, installed=False)

    def make(path: Path) -> None:
        path.mkdir()
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, path / "root"], check=True)

    key = key_of(*(package.name for package in packages))
    return made_once(CACHE / "images" / f"xfs-tools-{key}", make) / "root"
