# SPDX-License-Identifier: GPL-2.0-only
"""Requests without a response, and backends that reconnect repeatedly.

The backend is the module rblk_hostile_back, which serves xvdb, or dom0's shell,
which has no ring.
"""

import re
from pathlib import Path

import pytest

from harness.driver_check import assert_front_of_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.toolstack import connect_disks
from harness.toolstack import directories
from harness.toolstack import remove_devices
from harness.toolstack import write_nodes
from harness.xenhost import Disk
from harness.xenhost import Server
from harness.xenhost import XenHost

XVDB = 51728
PARAMETERS = "/sys/module/rblk_hostile_back/parameters"
FRONT_PARAMETERS = "/sys/module/rblkfront/parameters"
HONEST, KEEP, SILENCE, LOSE_EVENT, MISS_EVENT = 0, 9, 10, 12, 13
DRIVER = "/sys/bus/xen-backend/drivers/vbd-hostile"

WRITE = "/usr/bin/dd if=/dev/zero of=/dev/xvdb bs=4k count=1 oflag=direct"
WRITER = (
    f"rm -f /tmp/end; ({WRITE} && echo done > /tmp/end || echo failed > /tmp/end) 2> /dev/null &"
)
"""Writes; what becomes of it is in /tmp/end."""

SHORT_TIMEOUT = "echo 1000 > /sys/block/xvdb/queue/io_timeout"
"""A request times out each second, and its connection is given up after ten."""


def hostile_disk(
    xen: StartHost, test_modules: Path, front_parameters: str = ""
) -> tuple[XenHost, Server, Guest]:
    """A guest whose xvdb is served by the module; gives the host, the server and the guest."""
    host = xen(modules=[test_modules / "rblk_hostile_back.ko"], front_parameters=front_parameters)
    server = host.start_server()
    server.insmod("rblk_hostile_back", f"device={XVDB}")
    server.ram_disks(1, megabytes=16)
    guest = host.start_guest(disks=[])
    assert_front_of_pair(host, guest)
    host.attach(guest, Disk("xvdb", "/dev/ram0"))
    guest.wait_for_disk("xvdb")
    return host, server, guest


def play(server: Server, misbehaviour: int) -> None:
    """Has the module play a misbehaviour from now on."""
    server.sh(f"echo {misbehaviour} > {PARAMETERS}/misbehaviour")


def messages(guest: Guest, text: str) -> list[str]:
    """The kernel's messages that contain a text."""
    return [line for line in guest.sh("dmesg").splitlines() if text in line]


@pytest.mark.feature("F-30")
def test_lost_event(xen: StartHost, test_modules: Path) -> None:
    """A lost event, in either direction, causes a delay and a message.

    xen-blkfront waits for the next event, which never comes if there is one request at a time.
    """
    _host, server, guest = hostile_disk(xen, test_modules)
    guest.sh(SHORT_TIMEOUT)
    for misbehaviour, said in (
        (LOSE_EVENT, "xvdb: an event of the backend was lost"),
        (MISS_EVENT, "xvdb: the backend responds after it was notified again"),
    ):
        play(server, misbehaviour)
        guest.sh(WRITE)
        play(server, HONEST)
        guest.wait_for(f"dmesg | grep -q '{said}'")
    guest.sh(WRITE)
    guest.unload_frontend()


@pytest.mark.feature("F-31")
def test_no_answer(xen: StartHost, test_modules: Path) -> None:
    """A request without a response is sent again on another connection, and fails after that.

    xen-blkfront waits without end.
    """
    _host, server, guest = hostile_disk(xen, test_modules)
    guest.allow("error, dev xvdb")
    guest.allow("the backend does not respond")
    guest.sh(SHORT_TIMEOUT)
    said = "xvdb.*does not respond|vbd-51728: .*the backend does not respond"
    play(server, SILENCE)
    guest.sh(WRITER)
    # The next connection may begin before another command reaches the server.
    server.wait_for(f"[ $(cat {PARAMETERS}/ignored) -gt 0 ]")
    play(server, HONEST)
    guest.wait_for('[ "$(cat /tmp/end)" = done ]')
    assert re.search(said, guest.sh("dmesg"))

    play(server, SILENCE)
    guest.sh(WRITER)
    guest.wait_for('[ "$(cat /tmp/end)" = failed ]')
    play(server, HONEST)
    guest.sh(WRITE)
    guest.unload_frontend()


@pytest.mark.feature("F-31")
def test_no_answer_and_no_end(xen: StartHost) -> None:
    """A backend neither responds nor closes: the request fails after `reconnect_timeout`.

    xen-blkfront waits without end.
    """
    host = xen()
    guest = host.start_guest(disks=[])
    assert_front_of_pair(host, guest)
    guest.allow("I/O error, dev xvdb")
    guest.allow("rror on dev xvdb")
    guest.allow("the backend does not respond")
    guest.allow("the backend has been disconnected for too long")
    guest.sh(f"echo 2 > {FRONT_PARAMETERS}/reconnect_timeout")
    front, back = directories(guest.domid, XVDB)
    connect_disks(host, guest, {XVDB: ({}, {})})
    guest.wait_for_disk("xvdb")
    write_nodes(host, back, {"sectors": 2048, "state": 4})
    guest.wait_for("[ $(cat /sys/block/xvdb/size) = 2048 ]")

    guest.sh(f"echo 0 > {FRONT_PARAMETERS}/io_timeout; {SHORT_TIMEOUT}; {WRITER}")
    guest.wait_for("grep -q '[1-9]' /sys/block/xvdb/inflight")
    guest.wait_for("dmesg | grep -q 'xvdb: the backend does not respond: requests wait for it'")
    assert host.xenstore_read(f"{front}/state") == "4"
    guest.sh(f"echo 30 > {FRONT_PARAMETERS}/io_timeout")
    guest.wait_for('[ "$(cat /tmp/end)" = failed ]')
    assert "does not respond" in (
        host.xenstore_read(front.replace("/device/", "/error/device/") + "/error") or ""
    )
    assert host.xenstore_read(f"{front}/state") == "6"
    remove_devices(host, guest, [XVDB])


@pytest.mark.feature("F-34")
def test_returning_backend(xen: StartHost, test_modules: Path) -> None:
    """A backend that reconnects and keeps old mappings sees no new data of the guest.

    xen-blkfront closes the device when the backend closes.
    """
    host, server, guest = hostile_disk(xen, test_modules, "trusted=0")
    device = f"vbd-{guest.domid}-{XVDB}"
    front, back = directories(guest.domid, XVDB, server)
    play(server, KEEP)
    guest.sh(WRITE)
    play(server, HONEST)
    server.sh(f"echo Y > {PARAMETERS}/hoard")
    guest.allow("cannot offer rings: trying again")
    for _ in range(8):
        server.sh(f"cd {DRIVER}; echo {device} > unbind; echo {device} > bind")
        host.wait_for(
            f"[ $(xenstore-read {front}/state) = 1 ] && [ $(xenstore-read {back}/state) = 2 ]"
        )
    guest.wait_for("dmesg | grep -q 'cannot offer rings: trying again'")
    assert server.sh(f"cat {PARAMETERS}/hoarded") == "1"

    guest.sh(WRITER)
    server.sh(
        f"echo N > {PARAMETERS}/hoard; cd {DRIVER}; echo {device} > unbind; echo {device} > bind"
    )
    guest.wait_for('[ "$(cat /tmp/end)" = done ]')
    assert server.sh(f"cat {PARAMETERS}/hoarded") == "0"
    for _ in range(20):
        server.sh(f"cd {DRIVER}; echo {device} > unbind; echo {device} > bind")
    guest.sh(WRITE)
    guest.unload_frontend()


@pytest.mark.feature("F-35")
def test_talkative_backend(xen: StartHost) -> None:
    """Repeated changes by the backend are logged at a limited rate.

    xen-blkfront reports each new capacity.
    """
    host = xen()
    guest = host.start_guest(disks=[])
    assert_front_of_pair(host, guest)
    connect_disks(host, guest, {XVDB: ({}, {})})
    guest.wait_for_disk("xvdb")
    back = directories(guest.domid, XVDB)[1]
    guest.sh("dmesg -c > /dev/null; cut -d ' ' -f 1 /proc/uptime > /tmp/start")
    host.sh(
        f"for i in $(seq 1 1000); do xenstore-write {back}/sectors $((i * 8))"
        f" {back}/sector-size $((512 << i % 2)) {back}/state 4; done",
        timeout=600,
    )
    guest.wait_for("[ $(cat /sys/block/xvdb/size) = 8000 ]")
    lines = len(messages(guest, "xvdb"))
    took = float(
        guest.sh("echo $(cut -d ' ' -f 1 /proc/uptime) $(cat /tmp/start) | awk '{ print $1 - $2 }'")
    )
    # Ten in five seconds of each of three messages, one of them of the block layer.
    assert lines <= 30 * (took // 5 + 2), (lines, took)
    remove_devices(host, guest, [XVDB])
