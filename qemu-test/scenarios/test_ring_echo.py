# SPDX-License-Identifier: GPL-2.0-only
"""Lifetimes of Xen's resources without a disk: both drivers of a pair are unbound at random.

The echo pair sends pages back and forth. Each half is unbound and bound again a
hundred times, at the same time and in whatever state the other one is just
then. After each round the pair must work again; at the end nothing may be left,
as Xen counts it: grants, event channels, pages.
"""

import random
import re
import time
from collections.abc import Mapping
from pathlib import Path

from harness.fixtures import StartHost
from harness.guest import Guest
from harness.shell import Target
from harness.xenhost import XenHost

ROUNDS = 5
UNBINDS = 20
"""Of each half, in a round."""

FRONT = "/sys/bus/xen/drivers/recho"
BACK = "/sys/bus/xen-backend/drivers/recho"


def directories(host: XenHost, domid: int) -> tuple[str, str]:
    """The frontend's and the backend's directory."""
    back = f"/local/domain/{host.server.domid}/backend/recho/{domid}/0"
    return f"/local/domain/{domid}/device/recho/0", back


def create_device(host: XenHost, domid: int) -> None:
    """What a toolstack writes for a device: the state last."""
    front, back = directories(host, domid)
    server = host.server.domid
    host.sh(
        f"xenstore-write {front}/backend {back} {front}/backend-id {server}"
        f" {back}/frontend {front} {back}/frontend-id {domid} {back}/online 1\n"
        f"xenstore-chmod -r {back} n{server} r{domid}\n"
        f"xenstore-chmod -r {front} n{domid} r{server}\n"
        f"xenstore-write {back}/state 1 {front}/state 1"
    )


def comes_and_goes(chance: random.Random, driver: str, device: str) -> str:
    """A script that unbinds and binds, with pauses of 0 to 0.2 s."""
    pauses = " ".join(str(chance.randrange(200_000)) for _ in range(UNBINDS))
    return (
        f"for pause in {pauses}; do usleep $pause; echo {device} > {driver}/unbind; "
        f"usleep $((200000 - pause)); echo {device} > {driver}/bind; done"
    )


def wait_until_it_echoes(guest: Guest) -> None:
    """Waits until the pair works: the number of right replies grows, and none is wrong."""
    for _ in range(2):
        now = "$(cat /sys/bus/xen/devices/recho-0/echoed)"
        guest.sh(f"echo {now} > /tmp/echoed")
        guest.wait_for(f"[ {now} != $(cat /tmp/echoed) ] && [ {now} != 0 ]", timeout=30)
    assert guest.sh("cat /sys/bus/xen/devices/recho-0/errors") == "0"


def count_by_xen(host: XenHost, domid: int) -> dict[str, object]:
    """Returns the numbers of grants, mappings, event channels and pages of the domains."""
    grants = host.xen_messages("g")
    channels = host.xen_messages("e")
    pages = host.xen_messages("q")
    return {
        "grants": len(re.findall(r"\[0x[0-9a-f]+\]", grants)),
        "channels": len(re.findall(r"\]: s=[1-9]", channels)),
        "pages": re.findall(rf"domain {domid}:.*?nr_pages=(\d+)", pages, re.DOTALL)[:1],
    }


def free_kilobytes(machine: Target) -> int:
    """Returns the available memory without caches."""
    machine.sh("sync; echo 3 > /proc/sys/vm/drop_caches; sleep 1")
    return int(machine.sh("sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"))


def assert_nothing_left(
    host: XenHost, guest: Guest, before: dict[str, object], free: Mapping[Target, int]
) -> None:
    """Checks that Xen's counts are as before; deferred grants are freed within seconds."""
    deadline = time.monotonic() + 30
    while (now := count_by_xen(host, guest.domid)) != before:
        assert time.monotonic() < deadline, f"before {before}, now {now}"
    for machine, kilobytes in free.items():
        lost = kilobytes - free_kilobytes(machine)
        # KASAN keeps what is freed for a while.
        assert lost < 4096 or host.has_checks, f"{lost} KiB less than before"


def load(host: XenHost, guest: Guest) -> None:
    """Both modules; they find the device by themselves."""
    host.server.insmod("rblk_echo_back")
    guest.sh("insmod /modules/rblk_echo_front.ko")


def unload(host: XenHost, guest: Guest, domid: int) -> None:
    """Unbinds both halves and removes both modules."""
    guest.sh(f"echo recho-0 > {FRONT}/unbind; rmmod rblk_echo_front")
    host.server.sh(f"echo recho-{domid}-0 > {BACK}/unbind; rmmod rblk_echo_back")


def detach(host: XenHost, guest: Guest, domid: int) -> None:
    """Removes the device as a toolstack does, and waits for both drivers."""
    front, back = directories(host, domid)
    host.sh(f"xenstore-write {back}/online 0 {back}/state 5")
    host.wait_for(f"[ $(xenstore-read {back}/state) = 6 ]")
    host.server.wait_for(f"[ ! -e /sys/bus/xen-backend/devices/recho-{domid}-0 ]")
    host.sh(f"xenstore-rm {front}; xenstore-rm {back}")
    guest.wait_for("[ ! -e /sys/bus/xen/devices/recho-0 ]")
    guest.sh("rmmod rblk_echo_front")
    host.server.sh("rmmod rblk_echo_back")


def test_ring_echo(xen: StartHost, test_modules: Path) -> None:
    chance = random.Random(20)
    host = xen(modules=[test_modules / "rblk_echo_front.ko", test_modules / "rblk_echo_back.ko"])
    server = host.start_server()
    guest = host.start_guest(disks=[])
    domid = guest.domid
    load(host, guest)
    create_device(host, domid)
    wait_until_it_echoes(guest)
    unload(host, guest, domid)
    before = count_by_xen(host, domid)
    free: dict[Target, int] = {machine: free_kilobytes(machine) for machine in (server, guest)}

    for _ in range(ROUNDS):
        load(host, guest)
        wait_until_it_echoes(guest)
        script = comes_and_goes(chance, FRONT, "recho-0")
        guest.sh(
            f"(sh -ec '{script}' > /tmp/round 2>&1 && echo end || echo end $?) >> /tmp/round 2>&1 &"
        )
        server.sh(comes_and_goes(chance, BACK, f"recho-{domid}-0"), timeout=300)
        guest.wait_for("grep -q end /tmp/round", timeout=300)
        assert guest.sh("cat /tmp/round") == "end"
        wait_until_it_echoes(guest)
        unload(host, guest, domid)
    load(host, guest)
    wait_until_it_echoes(guest)
    detach(host, guest, domid)
    assert_nothing_left(host, guest, before, free)
