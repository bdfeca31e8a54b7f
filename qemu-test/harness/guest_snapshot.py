# SPDX-License-Identifier: GPL-2.0-only
"""A snapshot with a guest that has booted and waits, and a driver domain if dom0 cannot serve.

Booting a guest takes most of the time of a scenario. The waiting guest has no disk, no frontend
and no files of a scenario: it gets these through xenstore when a scenario takes it over.
"""

from pathlib import Path
from typing import Any

from .cache import CACHE
from .cache import key_of
from .guest import Guest
from .guest import Kind
from .snapshot import Snapshot
from .snapshot import resume
from .snapshot import save
from .storage import Storage
from .xenhost import XenHost

NAMES = ("guest_snapshot.py", "guest.py", "storage.py", "xenhost.py")
MADE_BY = [Path(__file__).with_name(name) for name in NAMES]

RATE_LIMIT = "xl sched-credit2 --schedparam --ratelimit_us={us}"
"""How long Xen's scheduler lets a virtual CPU run before it is preempted: 1000 by default. A guest
with two that share a processor boots twice as long with that; its I/O is faster."""


class SnapshotWithGuest(Snapshot):
    """The Xen host for one kernel, with a guest of the kind `waiting` called "guest".

    If the kernel under test cannot be dom0, a driver domain called "storage" waits too.
    """

    def __init__(self, *arguments: Any, waiting: Kind = Kind(), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waiting = waiting
        self._before = Snapshot(*arguments, **options)
        self.key = key_of(self.key, repr(waiting), *MADE_BY)
        self._directory = CACHE / "snapshots" / self.key

    def _make(self, directory: Path) -> None:
        host = XenHost(self._before, None, directory)
        try:
            resume(host.machine)
            host.sh(RATE_LIMIT.format(us=0))
            guest = Guest(host, "guest")
            guest.parts = guest.parts[:1]
            guest.start(self.waiting or Kind())
            if self.has_checks:
                storage = Storage(host, "storage")
                storage.parts = storage.parts[:2]
                storage.start(Kind())
            host.sh(RATE_LIMIT.format(us=1000))
            save(host.machine, directory)
        finally:
            host.close()
