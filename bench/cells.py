# SPDX-License-Identifier: GPL-2.0
"""What is measured: loads, and the places where the same load runs."""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Cell:
    """One load, as load.c takes it. `limit` is what the issue of the day asks for, see report.py."""

    name: str
    kind: str
    bytes: int
    depth: int
    count: int
    limit: float | None = None

    def arguments(self, device, window):
        """The command line of load.c."""
        return f"{device} {self.kind} {self.bytes} {self.depth} {self.count} {window}"


CELLS = (
    Cell("4k read qd1", "randread", 4 * KIB, 1, 1000, 0.93),
    Cell("4k read qd8", "randread", 4 * KIB, 8, 4000),
    Cell("4k read qd32", "randread", 4 * KIB, 32, 8000, 0.86),
    Cell("4k write qd1", "randwrite", 4 * KIB, 1, 1000, 0.93),
    Cell("4k write qd8", "randwrite", 4 * KIB, 8, 4000),
    Cell("4k write qd32", "randwrite", 4 * KIB, 32, 8000, 0.86),
    Cell("4k mixed qd32", "mixed", 4 * KIB, 32, 8000),
    Cell("4k write+flush qd1", "flushed", 4 * KIB, 1, 500),
    Cell("128k read qd8", "read", 128 * KIB, 8, 800, 0.90),
    Cell("128k write qd8", "write", 128 * KIB, 8, 800, 0.90),
    Cell("1m read qd4", "read", 1024 * KIB, 4, 120, 0.85),
    Cell("1m write qd4", "write", 1024 * KIB, 4, 120, 0.85),
)

IDLE = Cell("idle 20 s", "idle", 0, 0, 20)
"""Nothing at all, for wake-ups. The time is the machine's own: it passes at once."""


def chosen(text):
    """The cells whose names have one of the comma-separated texts in them."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [cell for cell in (*CELLS, IDLE) if not parts or any(part in cell.name for part in parts)]
