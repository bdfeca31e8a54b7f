# SPDX-License-Identifier: GPL-2.0-only
"""Writes cpio archives in the "newc" form that the kernel unpacks at boot.

An archive is made without root rights and without a directory on disk: device
nodes and owners are just numbers in it. The same input gives the same bytes,
so an archive can be named by the hash of what it was made from. Several
archives one after the other are a valid initramfs.

Why not a tool: cpio(1) needs root and a directory for device nodes, and gen_init_cpio is built from
the kernel's source, which this harness does without. Both record times and inode numbers.
"""

import stat
from pathlib import Path


class Archive:
    """An archive; paths are absolute, as seen after boot."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes, tuple[int, int]]] = {}

    def directory(self, path: str) -> None:
        """Adds a directory and its parents."""
        path = path.strip("/")
        if path and path not in self._entries:
            self.directory(str(Path(path).parent) if "/" in path else "")
            self._entries[path] = (stat.S_IFDIR | 0o755, b"", (0, 0))

    def data(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        """Adds a file with the given content."""
        self._parent(path)
        if isinstance(content, str):
            content = content.encode()
        self._entries[path.strip("/")] = (stat.S_IFREG | mode, content, (0, 0))

    def file(self, path: str, source: str | Path) -> None:
        """Adds a copy of the file `source`, executable if `source` is."""
        source = Path(source)
        executable = source.stat().st_mode & 0o100
        self.data(path, source.read_bytes(), 0o755 if executable else 0o644)

    def link(self, path: str, target: str) -> None:
        """Adds a symbolic link."""
        self._parent(path)
        self._entries[path.strip("/")] = (stat.S_IFLNK | 0o777, target.encode(), (0, 0))

    def device(self, path: str, major: int, minor: int) -> None:
        """Adds a character device."""
        self._parent(path)
        self._entries[path.strip("/")] = (stat.S_IFCHR | 0o600, b"", (major, minor))

    def __contains__(self, path: str) -> bool:
        return path.strip("/") in self._entries

    def to_bytes(self) -> bytes:
        """Returns the archive."""
        parts = []
        for inode, path in enumerate(sorted(self._entries), start=1):
            mode, content, device = self._entries[path]
            parts.append(_entry(inode, path, mode, content, device))
        parts.append(_entry(0, "TRAILER!!!", 0, b"", (0, 0)))
        return _padded(b"".join(parts), 512)

    def write(self, path: Path) -> None:
        """Writes the archive to the file `path`."""
        Path(path).write_bytes(self.to_bytes())

    def _parent(self, path: str) -> None:
        self.directory(str(Path("/" + path.strip("/")).parent))


def _entry(inode: int, path: str, mode: int, content: bytes, device: tuple[int, int]) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name, 4) + _padded(content, 4)


def _padded(data: bytes, size: int) -> bytes:
    return data + b"\0" * (-len(data) % size)
