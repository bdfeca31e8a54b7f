# SPDX-License-Identifier: GPL-2.0-only
"""Xen's own hotplug script, and ours around it, which tells xl why a disk is refused."""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.xenhost import XenHost

SCRIPTS = Path("/etc/xen/scripts")
NAMES = (
    "block", "block-common.sh", "hotplugpath.sh", "locking.sh", "logging.sh",
    "xen-hotplug-common.sh", "xen-script-common.sh",
)  # fmt: skip
PROGRAMS = ("/bin/bash", "/usr/bin/flock", "/usr/sbin/losetup")
CHECKED = Path(__file__).parents[2] / "packaging/xen/block-checked"

INSTALL = """
cd /payload
find * ! -type d | while read -r file; do
	[ -e /$file ] || { mkdir -p /${file%/*}; cp -a $file /$file; }
done
chmod +x /etc/xen/scripts/*
busybox --install -s
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
"""
SWAP = (
    "dd if=/dev/zero of=/tmp/swap bs=1M count=4 2>/dev/null; losetup /dev/loop7 /tmp/swap; "
    "mkswap /dev/loop7; swapon /dev/loop7"
)


def attach(
    host: XenHost, guest: Guest, vdev: str, target: str, script: str = "block"
) -> tuple[int, str]:
    """xl block-attach: its status and what it prints."""
    disk = f"format=raw,vdev={vdev},access=rw,script={script},target={target}"
    return host.run(f"xl block-attach {guest.name} '{disk}'")


@pytest.mark.feature("BE-01", "BE-52", "B-22")
def test_hotplug_scripts(xen: StartHost, record_property: RecordProperty) -> None:
    """A block device and a file are served; a device that dom0 uses itself is not, and xl says so.

    Xen's script looks only whether it is mounted, and the C module does not look.
    """
    files = {f"etc/xen/scripts/{name}": (SCRIPTS / name).read_bytes() for name in NAMES}
    files["etc/xen/scripts/block-checked"] = CHECKED.read_bytes()
    host = xen(tools=PROGRAMS, files=files)
    host.sh(INSTALL)
    host.load_backend()
    host.ram_disks()
    host.sh("dd if=/dev/zero of=/tmp/image bs=1M count=4 2>/dev/null")
    guest = host.start_guest(disks=[])
    for vdev, target, script in (
        ("xvda", "/dev/ram0", "block"),
        ("xvdb", "/tmp/image", "block-checked"),
    ):
        assert attach(host, guest, vdev, target, script) == (0, "")
        guest.wait_for_disk(vdev)
        guest.sh(f"echo {vdev} | dd of=/dev/{vdev} conv=sync,fsync 2>/dev/null")
    assert_served_by_pair(host, guest)
    host.detach(guest, "xvdb")
    assert host.sh("head -n 1 /dev/ram0; head -n 1 /tmp/image; losetup -a") == "xvda\nxvdb"

    host.sh(SWAP)
    status, output = attach(host, guest, "xvdc", "/dev/loop7", "block-checked")
    if host.pair.backend.name == "rblkback":
        assert status != 0 and "script: " in output and "in use here" in output, output
        assert guest.run("[ -b /dev/xvdc ]")[0] != 0
    else:
        assert status == 0, output
        guest.wait_for_disk("xvdc")
        record_property("c_fails", "B-22")
        host.sh("swapoff /dev/loop7")
