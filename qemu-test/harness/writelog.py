# SPDX-License-Identifier: GPL-2.0-only
"""Reads the log of writes that QEMU's blklogwrites driver keeps.

The format is that of the kernel's dm-log-writes: a super block, then for each
write or flush an entry of one sector, followed by its data. All numbers are
little-endian.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0x6A736677736872
FLUSH, DISCARD = 1, 4


@dataclass
class Entry:
    """One logged request, in the order in which the disk completed them."""

    sector: int
    flags: int
    data: bytes

    @property
    def is_flush(self) -> bool:
        """Returns `True` if all earlier writes are durable after this entry."""
        return bool(self.flags & FLUSH)


def read_log(path: Path) -> list[Entry]:
    """Returns all entries of the log file `path`."""
    entries = []
    with open(path, "rb") as file:
        magic, _version, count, sector_size = struct.unpack("<QQQI", file.read(28))
        if magic != MAGIC:
            # QEMU writes the super block with the first flush.
            raise AssertionError(f"{path} is no log of writes, or the disk was never flushed")
        file.seek(sector_size)
        for _ in range(count):
            sector, sectors, flags, _length = struct.unpack("<QQQQ", file.read(sector_size)[:32])
            data = b"" if flags & DISCARD else file.read(sectors * sector_size)
            entries.append(Entry(sector, flags, data))
    return entries
