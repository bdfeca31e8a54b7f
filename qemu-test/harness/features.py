# SPDX-License-Identifier: GPL-2.0-only
"""The features of Documentation/feature-rows.txt, and the scenarios that test them.

A scenario names its features with `@pytest.mark.feature("FE-03", "FE-10")`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent.parent
ROWS = TREE / "Documentation" / "feature-rows.txt"
SCENARIOS = TREE / "qemu-test" / "scenarios"


def features() -> Iterator[tuple[str, str, str]]:
    """Yields number, description and the reason why it cannot be tested, or "", of each feature."""
    for line in ROWS.read_text().splitlines():
        if line and not line.startswith("#"):
            number, what, *why = (part.strip() for part in line.split("|"))
            yield number, what, why[0] if why else ""


def scenarios() -> Iterator[tuple[str, Path, list[str]]]:
    """Yields name, file and features of each scenario."""
    for path in sorted(SCENARIOS.glob("test_*.py")):
        for item in ast.parse(path.read_text()).body:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
                yield item.name.removeprefix("test_"), path, list(_marked(item))


def _marked(function: ast.FunctionDef) -> Iterator[str]:
    """Yields the arguments of the function's feature markers."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.feature":
            yield from (ast.literal_eval(argument) for argument in decorator.args)
