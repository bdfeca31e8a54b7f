# SPDX-License-Identifier: GPL-2.0-only
"""Disks that rblktap cannot serve: xl prints why, within its time limits."""

import re

from harness import rblkd
from harness import rblktap
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.xenhost import XenHost

TOOLS = (*rblktap.QEMU_TOOLS, "/usr/bin/chattr")
LIMIT_S = 40
"""The limit of libxl for a hotplug script."""
NO_DAEMON_S = 60
"""Twice what libxl needs to fail without a backend, on a machine with other work."""
HOLD = (
    "qemu-storage-daemon --daemonize --pidfile /run/holder.pid "
    f"--blockdev driver=file,node-name=f,filename={rblktap.PLACE}/{{name}} "
    "--nbd-server addr.type=unix,addr.path=/run/holder.sock "
    "--export type=nbd,id=n,node-name=f,name=,writable=on"
)


def attempt(host: XenHost, guest: Guest, target: str, limit: float = LIMIT_S) -> str:
    """Attaches xvdb, which must fail in time. Returns what xl prints."""
    before = float(host.sh("cut -d' ' -f1 /proc/uptime"))
    output = rblkd.refused(host, guest, RblkDisk("xvdb", target))
    took = float(host.sh("cut -d' ' -f1 /proc/uptime")) - before
    print(f"{target}: {took:.1f} s\n{output}")
    assert took < limit
    return output


def reason(output: str) -> str:
    """Returns the reason that the hotplug script has given to xl."""
    return "\n".join(re.findall(r"script: (.*)", output))


def assert_exclusive(host: XenHost, guest: Guest, name: str) -> None:
    """Checks that no other disk and no other program can write to an image while a disk uses it."""
    host.attach(guest, RblkDisk("xvdc", name))
    guest.wait_for_disk("xvdc")
    found = reason(attempt(host, guest, name))
    assert f"/tap/{name}" in found and "in use" in found, found
    kind = name.split(".")[-1]
    status, output = host.run(f"qemu-img resize -f {kind} {rblktap.PLACE}/{name} +1M")
    assert status != 0 and "lock" in output, output
    rblkd.detach(host, guest, "xvdc")


def test_tap_failures(xen: StartHost) -> None:
    """A missing, a corrupt, a protected and a locked image; no daemon, a daemon that was killed."""
    images = [Image("good.raw", 32), Image("held.raw", 32), Image("held.qcow2", 32)]
    images.append(Image("bad.raw", 1))
    disk = rblktap.disk(images, TOOLS)
    host = xen(waiting=TWO_VCPUS, image=disk, **rblkd.options())
    rblkd.install(host)
    guest = host.start_guest(disks=[])

    rblkd.start(host)

    found = reason(attempt(host, guest, "missing.raw"))
    assert "/tap/missing.raw" in found and "No such file" in found, found
    found = reason(attempt(host, guest, "missing.qcow2"))
    assert "missing.qcow2" in found and "No such file" in found, found
    host.sh("cd /tap && cp bad.raw bad.qcow2 && cp bad.raw bad.vhd")
    for name in ("bad.qcow2", "bad.vhd"):
        found = reason(attempt(host, guest, name))
        assert name in found, found
    host.sh("chattr +i /tap/bad.raw")
    found = reason(attempt(host, guest, "bad.raw"))
    assert "/tap/bad.raw" in found and "not permitted" in found, found
    host.sh("chattr -i /tap/bad.raw")
    for name in ("held.raw", "held.qcow2"):
        host.sh(HOLD.format(name=name))
        found = reason(attempt(host, guest, name))
        assert f"/tap/{name}" in found and "in use" in found, found
        holder = host.sh("cat /run/holder.pid")
        host.sh(f"kill {holder}")
        host.wait_for(f"[ ! -e /proc/{holder} ]")
        assert_exclusive(host, guest, name)
    found = reason(attempt(host, guest, "nbd+unix:///?socket=/run/nowhere.sock"))
    assert "/run/nowhere.sock" in found, found

    # All of that has left the image and the daemon usable.
    host.attach(guest, RblkDisk("xvdb", "held.raw"))
    guest.wait_for_disk("xvdb")
    guest.sh("echo data | dd of=/dev/xvdb conv=sync,fsync 2> /dev/null")
    rblkd.detach(host, guest, "xvdb")
    assert host.sh("head -n 1 /tap/held.raw").strip() == "data"

    rblkd.kill(host)
    output = attempt(host, guest, "good.raw", NO_DAEMON_S)
    assert "51728" in output, output
    # libxl has left the disk in xenstore.
    rblkd.start(host)
    rblkd.detach(host, guest, "xvdb")
    host.attach(guest, RblkDisk("xvdb", "good.raw"))
    guest.wait_for_disk("xvdb")
