# SPDX-License-Identifier: GPL-2.0-only
"""A cache of files and directories that are named by the hash of what they are made of.

An entry is made under a temporary name and renamed when it is complete, under a lock: an
interrupted process leaves nothing that looks finished, and of two processes that want the same
entry one makes it and the other waits.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(os.environ.get("RBLKIF_CACHE") or Path.home() / ".cache" / "rblkif")


def key_of(*parts: str | bytes | Path) -> str:
    """Returns a short hash of strings, bytes and the contents of files."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                part = hashlib.file_digest(file, "sha256").digest()
        elif isinstance(part, str):
            part = part.encode()
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def made_once(path: str | Path, make: Callable[[Path], object]) -> Path:
    """Returns `path`, after `make(temporary path)` has made it if need be."""
    path = Path(path)
    if path.exists():
        os.utime(path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(path.name + ".lock")):
        if not path.exists():
            temporary = path.with_name(path.name + ".tmp")
            _remove(temporary)
            make(temporary)
            temporary.rename(path)
            _forget_unused(path.parent)
    return path


def _forget_unused(directory: Path) -> None:
    """Removes what has not been used for a week."""
    for path in directory.iterdir():
        if time.time() - path.stat().st_mtime > 7 * 86400:
            _remove(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
