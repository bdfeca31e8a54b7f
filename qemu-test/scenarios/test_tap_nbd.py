# SPDX-License-Identifier: GPL-2.0-only
"""An NBD server that fails, delays and logs requests: nbdkit with filters."""

import re
from collections.abc import Sequence

from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.xenhost import XenHost

NBDKIT = "/usr/lib/x86_64-linux-gnu/nbdkit"
TOOLS = (
    "/usr/bin/nbdkit",
    f"{NBDKIT}/plugins/nbdkit-file-plugin.so",
    *(f"{NBDKIT}/filters/nbdkit-{name}-filter.so" for name in ("delay", "error", "log")),
)
FILTER = "--filter=/tap/bin/nbdkit-{}-filter.so"
SOCKET = "/run/export.sock"
LOG = "/tmp/nbdkit.log"
FAIL = "/run/fail"
"""Requests fail while this file exists."""
RETRY_S = 60
"""How long rblktap tries a request again after an error that may pass."""
MOST_RETRIES = 7 + RETRY_S
"""Delays of 10 ms, doubled up to a second, then one a second."""
STEPS = 20


def serve(host: XenHost, filters: Sequence[str], parameters: str) -> None:
    """Starts the server; returns when it listens."""
    names = " ".join(FILTER.format(name) for name in filters)
    host.sh(
        f"nbdkit --unix {SOCKET} --pidfile /run/nbdkit.pid {names} "
        f"/tap/bin/nbdkit-file-plugin.so file=/tap/a.raw {parameters}"
    )


def stop(host: XenHost, guest: Guest) -> None:
    """Detaches the disk and ends the server."""
    rblkd.detach(host, guest, "xvdb")
    host.sh("kill $(cat /run/nbdkit.pid)")
    host.wait_for("[ ! -e /proc/$(cat /run/nbdkit.pid) ]")
    host.sh(f"rm -f {SOCKET} /run/nbdkit.pid")


def attach(host: XenHost, guest: Guest) -> None:
    """Attaches the export as xvdb."""
    host.attach(guest, RblkDisk("xvdb", f"nbd+unix:///?socket={SOCKET}"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")


def retries(host: XenHost, guest: Guest) -> int:
    """Returns how often requests of xvdb were tried again."""
    return rblkd.statistics(host, guest, "xvdb")["retries"]


def write(number: int) -> str:
    """Returns a command that writes a block and waits until it is durable."""
    return (
        f"printf 'step %04d' {number} | dd of=/dev/xvdb bs=4k seek={number} "
        "conv=sync,notrunc oflag=direct 2> /dev/null"
    )


def seconds(guest: Guest, command: str) -> tuple[int, float]:
    """Runs a command in the guest; returns its status and how long it took."""
    status, output = guest.run(
        f"read a _ < /proc/uptime; {command} && status=0 || status=$?; read b _ < /proc/uptime; "
        "echo $a $b; exit $status",
        timeout=600,
    )
    begin, end = map(float, output.split()[-2:])
    return status, end - begin


def errors(host: XenHost, guest: Guest) -> None:
    """An error that may pass is tried again until it has passed or its time is over."""
    serve(
        host, ["error"], f"error-pwrite=ESHUTDOWN error-pwrite-rate=100% error-pwrite-file={FAIL}"
    )
    attach(host, guest)
    guest.sh(write(0))
    assert retries(host, guest) == 0

    host.sh(f"touch {FAIL}")
    guest.sh(f'(sh -c "{write(1)}"; echo $? > /tmp/status) > /dev/null 2>&1 &')
    host.wait_for(
        f"rblk --json disk stats {guest.name}/xvdb | grep -qE '\"retries\": *([4-9]|[1-9][0-9])'"
    )
    assert guest.run("[ -e /tmp/status ]")[0] != 0
    host.sh(f"rm {FAIL}")
    guest.wait_for("[ -s /tmp/status ]")
    assert guest.sh("cat /tmp/status").strip() == "0"
    before = retries(host, guest)
    assert 4 <= before <= MOST_RETRIES
    assert rblkd.statistics(host, guest, "xvdb")["errors"] == 0

    guest.allow("error, dev xvdb")
    host.sh(f"touch {FAIL}")
    status, took = seconds(guest, write(2))
    assert status != 0
    assert RETRY_S - 1 <= took <= 2 * RETRY_S
    after = retries(host, guest)
    print(f"{after - before} retries in {took:.1f} s")
    assert RETRY_S // 2 <= after - before <= MOST_RETRIES
    assert rblkd.statistics(host, guest, "xvdb")["errors"] == 1
    host.sh(f"rm {FAIL}")
    stop(host, guest)

    # Any other error is the guest's at once.
    serve(host, ["error"], f"error-pwrite=EIO error-pwrite-rate=100% error-pwrite-file={FAIL}")
    attach(host, guest)
    host.sh(f"touch {FAIL}")
    status, took = seconds(guest, write(3))
    assert status != 0
    assert took < RETRY_S / 2
    assert retries(host, guest) == 0
    host.sh(f"rm {FAIL}")
    guest.sh(write(3))
    stop(host, guest)


def delays(host: XenHost, guest: Guest) -> None:
    """A slow server causes neither retries nor errors."""
    serve(host, ["delay"], "delay-write=2 delay-read=0")
    attach(host, guest)
    status, took = seconds(guest, write(4))
    assert status == 0
    assert took >= 2
    counters = rblkd.statistics(host, guest, "xvdb")
    assert (counters["retries"], counters["errors"]) == (0, 0)
    stop(host, guest)


def flush_order(host: XenHost, guest: Guest) -> None:
    """Each fsync is a flush that the server has completed before it gets the next write."""
    serve(host, ["log"], f"logfile={LOG}")
    attach(host, guest)
    for step in range(STEPS):
        guest.sh(
            f"printf 'step %04d' {step} | dd of=/dev/xvdb bs=4k seek={step} "
            "conv=sync,fsync,notrunc 2> /dev/null"
        )
    stop(host, guest)
    lines = host.sh(f"grep -E 'Write|Flush' {LOG}").splitlines()
    place: dict[int, int] = {}
    for number, line in enumerate(lines):
        match = re.search(r"\bWrite .*offset=0x([0-9a-f]+)", line)
        if match:
            place.setdefault(int(match.group(1), 16) // 4096, number)
    for step in range(STEPS):
        following = place.get(step + 1, len(lines)) if step + 1 < STEPS else len(lines)
        between = lines[place[step] + 1 : following]
        flushes = [line for line in between if "Flush" in line]
        begun = any("..." in line and "...Flush" not in line for line in flushes)
        ended = any("...Flush" in line for line in flushes)
        assert begun and ended, (step, between)


def test_tap_nbd(xen: StartHost) -> None:
    """Errors with and without retries, delays, and the order of flushes."""
    disk = rblktap.disk([Image("a.raw", 32)], TOOLS)
    host = xen(waiting=TWO_VCPUS, image=disk, **rblkd.options())
    rblkd.install(host)
    rblkd.start(host)
    guest = host.start_guest(disks=[])
    delays(host, guest)
    flush_order(host, guest)
    errors(host, guest)
