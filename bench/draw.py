# SPDX-License-Identifier: GPL-2.0-only
"""Draws stacked bars of where the instructions of an I/O are spent, for each pair.

It writes SVG itself, because matplotlib would add 100 packages to the build root for one picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from report import row
from report import shown
from report import tables

if TYPE_CHECKING:
    from report import Document
    from report import Result

PARTS = (("guest", "#7aa6c2"), ("xen", "#d9a441"), ("dom0", "#8fb57a"))
ROW, WIDTH, LEFT, TOP = 15, 560, 190, 46


def draw(document: Document, path: Path) -> None:
    """Draws the first table, each load on a scale of its own: the C pair is 1."""
    title, results = next(tables(document))
    results = [r for r in results if r["bytes"]]
    pairs = [(r, row(results, r)) for r in results if r["where"] == "pair"]
    lines: list[str] = []
    y, last = TOP, None
    for result, values in pairs:
        if not values["of C/C"]:
            continue
        y += 6 if result["workload"] != last else 0
        lines += _bar(result, values, y, result["workload"] != last)
        last, y = result["workload"], y + ROW
    width, height = LEFT + WIDTH + 150, y + 10
    head = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="16" font-size="12">Instructions for each I/O; {title}</text>',
        *_legend(),
        _line(LEFT + WIDTH, TOP, y, "#444"),
    ]
    path.write_text("\n".join([*head, *lines, "</svg>"]) + "\n")


def _legend() -> Iterator[str]:
    x = LEFT
    for name, colour in PARTS:
        yield f'<rect x="{x}" y="26" width="10" height="10" fill="{colour}"/>'
        yield _text(x + 14, 35, name)
        x += 70
    yield _line(x, 26, 36, "#c0392b")
    yield _text(x + 6, 35, "baseline: a RAM disk in the guest")
    yield _text(LEFT + WIDTH - 20, 42, "C/C = 1")


def _bar(result: Result, values: dict[str, Any], y: float, named: Any) -> Iterator[str]:
    scale = WIDTH * values["of C/C"] / values["total"]
    x = LEFT
    if named:
        yield _text(8, y + 10, result["workload"])
    yield _text(LEFT - 34, y + 10, result["pair"])
    for name, colour in PARTS:
        width = values[name] * scale
        yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 3}" fill="{colour}"/>'
        x += width
    if values["baseline guest"]:
        yield _line(LEFT + values["baseline guest"] * scale, y, y + ROW - 3, "#c0392b")
    yield _text(x + 6, y + 10, f"{shown(values['total'])} ({values['of C/C']:.2f})")


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y}">{text}</text>'


def _line(x: float, top: float, bottom: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{colour}" stroke-width="1.5"/>'
