# SPDX-License-Identifier: GPL-2.0-only
"""rblkd, rblk and rblktap in dom0, with the names by which Xen calls rblk.

The images are those of rblktap.py; Xen's own hotplug script block-tap comes with what it needs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import rblktap
from .rblktap import PLACE
from .rblktap import TapDisk

if TYPE_CHECKING:
    from .guest import Guest
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

_INSTALL = f"""
mkdir -p {PLACE} /dev/shm && mount -t ext4 /dev/vdb {PLACE}
cd /payload/dom0 && find * -type f | while read -r file; do
	[ -e /$file ] || {{ mkdir -p /${{file%/*}} && cp $file /$file && chmod 755 /$file; }}
done
for tool in {" ".join(TOOLS)}; do
	[ -e $tool ] || cp /payload/$tool $tool
done
for library in $(cd /payload && find lib* usr/lib* -type f 2>/dev/null); do
	[ -e /$library ] || {{ mkdir -p /${{library%/*}} && cp /payload/$library /$library; }}
done
chmod 755 {rblktap.PROGRAM} && ln -s /usr/bin/rblk /usr/sbin/tap-ctl
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


@dataclass
class RblkDisk(TapDisk):
    """A disk that rblkd serves; `target` is an image of `rblktap.disk`, or an absolute path."""

    script: str | None = "block-rblk"
    """None for Xen's own script."""

    def specification(self, _server: Server) -> str:
        """Returns the disk in xl's syntax."""
        script = f"script={self.script}," if self.script else ""
        uri = "raw:" if self.script else ""
        return (
            f"format=raw,vdev={self.vdev},access={self.mode},backendtype=tap,"
            f"{script}target={uri}{PLACE}/{self.target}"
        )


def install(host: XenHost) -> None:
    """Installs the programs and mounts the images."""
    host.sh(_INSTALL)


def start(host: XenHost) -> None:
    """Starts rblkd and waits until it answers."""
    host.sh(
        f"setsid rblkd --program {rblktap.PROGRAM} >> {LOG} 2>&1 < /dev/null & "
        "echo $! > /run/rblkd.pid"
    )
    host.wait_for("rblk disk list > /dev/null 2>&1")


def kill(host: XenHost) -> None:
    """Kills rblkd."""
    host.sh("kill -9 $(cat /run/rblkd.pid)")


def rblk(host: XenHost, command: str) -> object:
    """Runs rblk and returns its JSON."""
    return json.loads(host.sh(f"rblk --json {command}"))


def attach(host: XenHost, guest: Guest, disk: RblkDisk) -> tuple[int, str]:
    """Runs xl block-attach; returns status and output."""
    return host.run(f"xl block-attach {guest.name} '{disk.specification(host)}'")
