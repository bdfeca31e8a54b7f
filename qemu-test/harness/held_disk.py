# SPDX-License-Identifier: GPL-2.0-only
"""A disk of the server that completes no I/O until a scenario tells it to: rblk_ramdisk's
/dev/rblk0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .driver_check import assert_served_by_pair
from .guest import TWO_VCPUS
from .shell import until
from .xenhost import Disk

if TYPE_CHECKING:
    from .guest import Guest
    from .guest import Kind
    from .xenhost import Server
    from .xenhost import XenHost

DISK = "size_mib=64 depth=128 discard_granularity=4096 timeout_ms=1200000 only=7"
"""Parameters: it holds reads, writes and flushes, but no discard, whose task would delay a suspend.
"""
MODE = "/sys/module/rblk_ramdisk/parameters/mode"
STOP_S = 600
"""How long I/O is held at most, in seconds."""
LOOK_S = 10
"""Poll interval in seconds, in case an event was missed."""


def start(
    xen: Callable[..., XenHost], test_modules: Path, waiting: Kind = TWO_VCPUS
) -> tuple[XenHost, Guest]:
    """Starts a host with such a disk, and a guest that uses it through two large rings."""
    host = xen(
        waiting=waiting,
        front_parameters="max_ring_page_order=1 max_indirect_segments=64",
        modules=[test_modules / "rblk_ramdisk.ko"],
    )
    server = host.start_server()
    server.allow("error, dev rblk0")
    server.load_backend("max_queues=2")
    server.insmod("rblk_ramdisk", DISK)
    guest = host.start_guest(disks=[Disk("xvda", "/dev/rblk0")])
    assert_served_by_pair(host, guest)
    return host, guest


def hold(server: Server, guest: Guest) -> None:
    """Holds new I/O; returns when some is in flight."""
    server.sh(f"dmesg -c >/dev/null; echo 3 > {MODE}")
    guest.wait_for("set -- $(cat /sys/block/xvda/inflight); [ $1 -gt 0 ] && [ $2 -gt 8 ]")


def release(server: Server) -> None:
    """Completes the I/O that is held."""
    server.sh(f"echo 0 > {MODE}; : < /dev/rblk0")


def fail_when_stopped(host: XenHost, guest: Guest) -> None:
    """Fails the I/O that is held as soon as the guest has stopped to be saved.

    Returns at once. Only a frontend that sends the requests again gets them done.
    """
    server = host.server
    node = _stopped(server)
    stopped = _awaited(f"xl list {guest.domid} | grep -q -- '--s'", "@releaseDomain")
    said = _awaited(f"xenstore-exists {node}", node)
    failed = until("grep -q '^ *0 *0$' /sys/block/rblk0/inflight", STOP_S, "break", pause_us=100000)
    server.sh(
        f"({said}; echo 4 > {MODE}; : < /dev/rblk0; {failed}; echo 0 > {MODE}; xenstore-rm {node}) "
        "> /dev/null 2>&1 &"
    )
    host.sh(f"({stopped}; xenstore-write {node} 1) > /dev/null 2>&1 &")


def assert_failed(server: Server) -> None:
    """Checks that I/O in flight has failed; Linux limits the rate of messages, so one is enough."""
    server.wait_for(f"! xenstore-exists {_stopped(server)}")
    assert "I/O error, dev rblk0" in server.sh("dmesg")


def _stopped(server: Server) -> str:
    """Returns the xenstore node that exists when the guest has stopped."""
    return f"/local/domain/{server.domid}/data/stopped"


def _awaited(condition: str, node: str) -> str:
    """Returns a shell script that waits for a condition, which it checks when a node changes."""
    return (
        f"for look in $(seq {STOP_S // LOOK_S}); do ! {{ {condition}; }} || break; "
        f"timeout {LOOK_S} xenstore-watch -n 2 {node} || true; done; {condition} || exit 1"
    )
