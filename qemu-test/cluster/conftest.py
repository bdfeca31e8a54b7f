# SPDX-License-Identifier: GPL-2.0-only
"""The storage daemons, which all tests share."""

import pytest

from cluster.daemons import Daemons


@pytest.fixture(scope="session")
def daemons() -> Daemons:
    """Returns a connection to the process that has the daemons."""
    return Daemons()
