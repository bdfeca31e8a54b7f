# SPDX-License-Identifier: GPL-2.0-only
"""rblkd, rblk and rblktap in dom0, with the names by which Xen calls rblk.

The images are those of rblktap.py; Xen's own hotplug script block-tap comes with what it needs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from . import rblktap
from .rblktap import PLACE
from .rblktap import TapDisk
from .toolstack import CODES

if TYPE_CHECKING:
    from .guest import Guest
    from .kernel import Kernel
    from .storage import Storage
    from .xenhost import Server
    from .xenhost import XenHost

TOOLS = ("/bin/bash", "/usr/bin/flock")
"""What block-tap needs beside busybox."""
SCRIPTS = Path("/etc/xen/scripts")
NAMES = (
    "block-tap", "block-common.sh", "hotplugpath.sh", "locking.sh", "logging.sh",
    "xen-hotplug-common.sh", "xen-script-common.sh",
)  # fmt: skip
LOG = "/tmp/rblkd.log"
STORAGE_MODULES = ("xen-gntdev", "xen-evtchn")
"""What a driver domain needs to serve disks from user space."""

_INSTALL = f"""
mkdir -p /dev/shm && chmod 755 {rblktap.PROGRAM}
cd /payload/dom0 && find * -type f | while read -r file; do
	[ -e /$file ] || {{ mkdir -p /${{file%/*}} && cp $file /$file && chmod 755 /$file; }}
done
for tool in {" ".join(TOOLS)}; do
	[ -e $tool ] || cp /payload/$tool $tool
done
for library in $(cd /payload && find lib* usr/lib* -type f 2>/dev/null); do
	[ -e /$library ] || {{ mkdir -p /${{library%/*}} && cp /payload/$library /$library; }}
done
ln -s /usr/bin/rblk /usr/sbin/tap-ctl
ln -s /usr/bin/rblk /etc/xen/scripts/block-rblk
busybox --install -s
ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin
"""


def files() -> dict[str, str | bytes]:
    """Returns what the payload of dom0 has to contain."""
    scripts: dict[str, str | bytes] = {
        f"dom0/etc/xen/scripts/{name}": (SCRIPTS / name).read_bytes() for name in NAMES
    }
    return {
        **scripts,
        "rblktap": rblktap.program(),
        "dom0/usr/sbin/rblkd": rblktap.program("rblkd"),
        "dom0/usr/bin/rblk": rblktap.program("rblk"),
    }


def storage_files(kernel: Kernel) -> dict[str, bytes]:
    """Returns what a driver domain has to contain for `start_in`."""
    modules = {f"/modules/{name}.ko": kernel.module(name) for name in STORAGE_MODULES}
    return {
        **modules,
        rblktap.PROGRAM: rblktap.program(),
        "/usr/sbin/rblkd": rblktap.program("rblkd"),
        "/usr/bin/rblk": rblktap.program("rblk"),
    }


@dataclass
class RblkDisk(TapDisk):
    """A disk that rblkd serves.

    `target` is the name of an image of `rblktap.disk`, the path of a device, or a URI.
    """

    script: str | None = "block-rblk"
    """None for Xen's own script."""

    def specification(self, _server: Server) -> str:
        """Returns the disk in xl's syntax."""
        script = f"script={self.script}," if self.script else ""
        backend = f"backend={self.backend}," if self.backend else ""
        return (
            f"format=raw,vdev={self.vdev},access={self.mode},backendtype=tap,{backend}"
            f"{script}target={self.uri() if self.script else self.path()}"
        )

    def path(self) -> str:
        """Returns the path of the image."""
        return self.target if self.target.startswith("/") else f"{PLACE}/{self.target}"

    def uri(self) -> str:
        """Returns the URI of the image, whose format is the suffix of its name."""
        if ":" in self.target:
            return self.target
        suffix = self.target.split(".")[-1]
        return f"{'raw' if '/' in suffix else suffix}:{self.path()}"


def install(host: XenHost, mount: bool = True) -> None:
    """Installs the programs, and mounts the images."""
    if mount:
        rblktap.mount(host)
    host.sh(_INSTALL)


def start_in(storage: Storage) -> None:
    """Starts rblkd in a driver domain that has `storage_files`."""
    for module in STORAGE_MODULES:
        storage.insmod(module)
    storage.sh("mkdir -p /dev/shm /srv")
    start(storage)


def start(host: Server, program: str = rblktap.PROGRAM) -> None:
    """Starts rblkd, with the program that serves disks, and waits until it answers."""
    host.sh(
        f"setsid rblkd --program {program} >> {LOG} 2>&1 < /dev/null & echo $! > /run/rblkd.pid"
    )
    host.wait_for("rblk disk list > /dev/null 2>&1")


def kill(host: XenHost) -> None:
    """Kills rblkd."""
    host.sh("kill -9 $(cat /run/rblkd.pid)")


def rblk(host: XenHost, command: str) -> object:
    """Runs rblk and returns its JSON."""
    return json.loads(host.sh(f"rblk --json {command}"))


def options() -> dict[str, Any]:
    """Returns the options of a host with these programs."""
    return {"tools": TOOLS, "files": files()}


def attach(host: XenHost, guest: Guest, disk: RblkDisk) -> tuple[int, str]:
    """Runs xl block-attach; returns status and output."""
    return host.run(f"xl block-attach {guest.name} '{disk.specification(host)}'")


def refused(host: XenHost, guest: Guest, disk: RblkDisk) -> str:
    """Attaches a disk, which must fail, and removes what libxl leaves of it.

    Returns what xl prints.
    """
    status, output = attach(host, guest, disk)
    assert status != 0
    host.run(f"xl block-detach {guest.name} {disk.vdev}")
    host.wait_for(f'[ -z "$(ls /run/rblk | grep {CODES[disk.vdev]})" ]')
    return output


def detach(host: XenHost, guest: Guest, vdev: str) -> None:
    """Detaches a disk, and waits until nothing of it is left."""
    host.detach(guest, vdev)
    guest.wait_for(f"[ ! -b /dev/{vdev} ]")
    host.wait_for(
        f'[ -z "$(ls /run/rblk | grep {CODES[vdev]})" ] && '
        f"! xenstore-exists backend/vbd3/{guest.domid}/{CODES[vdev]}"
    )


def statistics(host: XenHost, guest: Guest, vdev: str) -> dict[str, int]:
    """Returns the counters of a disk."""
    status = json.loads(host.sh(f"rblk --json disk stats {guest.name}/{vdev}"))
    counters: dict[str, int] = status["counters"]
    return counters


def replaced(host: XenHost, guest: Guest, device: int, process: int) -> str:
    """Returns a shell condition: another process than `process` serves a disk."""
    directory = f"backend/vbd3/{guest.domid}/{device}"
    return (
        f'[ "$(xenstore-read {directory}/kthread-pid)" != {process} ] && '
        f"[ -S /run/rblk/{guest.domid}-{device}.sock ]"
    )


def kill_rblktap(host: XenHost, guest: Guest, device: int) -> None:
    """Kills the process of a disk, and waits for its successor."""
    process = rblktap.pid(host, guest, device)
    host.sh(f"kill -9 {process}")
    host.wait_for(replaced(host, guest, device, process))
