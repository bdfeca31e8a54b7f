# SPDX-License-Identifier: GPL-2.0-only
"""An HVM guest has a disk twice, emulated and from a backend, and Linux unplugs the first one."""

import pytest

from harness import hvm
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.kernel import Kernel

WRITE = """
dd if=/dev/urandom of=/tmp/data bs=1M count=4
dd if=/tmp/data of=/dev/xvda bs=64k oflag=direct
dd if=/dev/xvda bs=64k count=64 iflag=direct | cmp - /tmp/data
md5sum < /tmp/data
"""


@pytest.mark.feature("FE-02")
def test_hvm(xen: StartHost, kernel: Kernel) -> None:
    """The frontend has the disk that was emulated, by the name xvda for an IDE disk hda.

    QEMU has closed the disk: it does not emulate it any more.
    """
    host = xen(**hvm.host_options(kernel))
    host.load_backend()
    host.ram_disks(megabytes=16)
    disk = hvm.EmulatedDisk("hda")
    hvm.prepare(host)
    guest = hvm.start_guest(host, disk)
    assert "unplug emulated disks" in guest.sh("dmesg")
    guest.wait_for_disk("xvda")
    assert_served_by_pair(host, guest)
    guest.sh("[ ! -e /dev/sda ] && [ ! -e /dev/hda ]")
    qemu = hvm.device_model(host, guest)
    host.sh(f"grep -q file={disk.target} {qemu}/cmdline")
    host.sh(f"! ls -l {qemu}/fd | grep {disk.target}")
    digest = guest.sh(WRITE).splitlines()[-1]
    assert host.sh(f"head -c {4 << 20} {disk.target} | md5sum") == digest
