# SPDX-License-Identifier: GPL-2.0-only
"""The `use` declarations of a Rust file, as paths."""

import re
from collections.abc import Iterator
from typing import NamedTuple

DECLARATION = re.compile(r"^\s*(pub(?:\([^)]*\))?\s+)?use\s+([\w{][^;]*);", re.MULTILINE)


class Use(NamedTuple):
    """A path that a file imports."""

    line: int
    """Line of the declaration, from 1."""
    path: tuple[str, ...]
    public: bool
    """Whether the file exports the name again."""


def split(text: str) -> list[str]:
    """Splits the inner text of braces at its outermost commas."""
    parts, depth, part = [], 0, ""
    for char in text:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += char
    return [part.strip() for part in [*parts, part] if part.strip()]


def expand(tree: str, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the paths of a use tree, without aliases."""
    if tree.startswith("{"):
        for part in split(tree[1:-1]):
            yield from expand(part, prefix)
        return
    head, separator, rest = tree.partition("::")
    if separator:
        yield from expand(rest.strip(), (*prefix, head.strip()))
    elif head == "self" and prefix:
        yield prefix
    else:
        yield (*prefix, head.split(" as ")[0].strip())


def uses(lines: list[str]) -> Iterator[Use]:
    """Yields the paths that a file imports, before its unit tests."""
    code = [re.sub(r"//.*", "", line) for line in lines]
    text = "\n".join(code).split("#[cfg(test)]\nmod ", maxsplit=1)[0]
    for match in DECLARATION.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        tree = " ".join(match.group(2).split())
        for path in expand(tree):
            yield Use(line, path, bool(match.group(1)))
