# SPDX-License-Identifier: GPL-2.0-only
"""Runs the tests up to the first one with RBLKIF_LAST in its name."""

import os

import pytest

LAST = os.environ.get("RBLKIF_LAST", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drops the tests behind the last one that is asked for: each needs those before it."""
    if not LAST:
        return
    numbers = [number for number, item in enumerate(items) if LAST in item.name]
    if not numbers:
        raise pytest.UsageError(f"no test has {LAST} in its name")
    del items[numbers[0] + 1 :]
