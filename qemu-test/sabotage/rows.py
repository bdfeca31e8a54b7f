# SPDX-License-Identifier: GPL-2.0-only
"""The rows of the feature table, and the scenarios that show them.

The rows are those of Documentation/feature-rows.txt. A scenario says in its
docstring which ones it shows: "Rows: FE-03, FE-10".
"""

import ast
import re
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent.parent
ROWS = TREE / "Documentation" / "feature-rows.txt"
SCENARIOS = TREE / "qemu-test" / "scenarios"


def rows():
    """(number, what, why it cannot be shown here or "") of each row."""
    for line in ROWS.read_text().splitlines():
        if line and not line.startswith("#"):
            number, what, *why = (part.strip() for part in line.split("|"))
            yield number, what, why[0] if why else ""


def scenarios():
    """(name, file, rows that it shows) of each scenario."""
    for path in sorted(SCENARIOS.glob("test_*.py")):
        for item in ast.parse(path.read_text()).body:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
                yield item.name.removeprefix("test_"), path, _rows_in(ast.get_docstring(item) or "")


def _rows_in(text):
    """The rows that a docstring names."""
    match = re.search(r"^Rows:((?:\s+[A-Z]+-\d+,?)+)", text, re.M)
    return re.findall(r"[A-Z]+-\d+", match.group(1)) if match else []
