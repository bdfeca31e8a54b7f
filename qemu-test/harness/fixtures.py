# SPDX-License-Identifier: GPL-2.0-only
"""The types of the fixtures in conftest.py that are functions."""

from collections.abc import Callable

from .native import NativeVm
from .xenhost import XenHost

StartHost = Callable[..., XenHost]
"""`xen`, and fixtures that wrap it: starts a Xen host."""
StartVm = Callable[..., NativeVm]
"""`native_vm`: starts a machine without Xen."""
RecordProperty = Callable[[str, object], None]
"""`record_property` of pytest: adds a property to the JUnit report."""
