# SPDX-License-Identifier: GPL-2.0-only
"""The backend module is replaced with the command that the documentation names."""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.job import Job
from harness.xenhost import Disk

COMMAND = Path(__file__).parents[2] / "packaging/sbin/rblkback-replace"
PLACE = "/run/rblkback-replace"
TIMEOUT_S = 600
REPLACED, UNCHANGED, FELL_BACK = 0, 1, 2
"""Exit status of the command."""
QUEUES = "/sys/module/rblkback/parameters/max_queues"
SWAPON = """
(while [ ! -e /tmp/stop ]; do
	echo >> /tmp/tries
	swapon /dev/ram0 2> /dev/null && echo >> /tmp/had
	usleep 20000
done; echo > /tmp/stopped) > /dev/null 2>&1 &"""
"""What else wants the disk: it tries again and again to use it as swap space."""
WRITE = (
    "printf 'round %06d' $pass | "
    "dd of=/dev/xvda bs=4k seek=$((16 + pass % 64)) conv=sync,fsync,notrunc 2> /dev/null"
)
"""Leaves alone the first block, which says that the disk is swap space."""


@pytest.fixture
def host(xen, build, tmp_path):
    """A host whose server has the backend, the command with all it takes, and two RAM disks.

    Beside the backend there is one for another kernel, and one that needs a function that no kernel
    has.
    """
    backend = (build / "rblkback.ko").read_bytes()
    other, broken = tmp_path / "other-kernel.ko", tmp_path / "broken.ko"
    other.write_bytes(backend.replace(b"vermagic=7", b"vermagic=6"))
    broken.write_bytes(backend.replace(b"\0bdev_file_open_by_dev\0", b"\0bdev_file_open_by_dew\0"))
    host = xen(modules=[build / "rblkclaim.ko", other, broken])
    server = host.start_server()
    server.load_backend("max_queues=3")
    server.ram_disks(2)
    server.sh(
        f"cat > {PLACE} << 'END OF FILE'\n{COMMAND.read_text()}\nEND OF FILE\nchmod 755 {PLACE}"
    )
    return host


def replace(server, module, status, parameters=""):
    """Runs the command with a file of the payload; it must end with that status. Returns its output."""
    arguments = (
        f"--timeout {TIMEOUT_S} --old $modules/rblkback.ko $modules/{module}.ko {parameters}"
    )
    found, output = server.run(
        f"modules=/payload/modules; [ -d $modules ] || modules=/modules; {PLACE} {arguments}",
        timeout=2 * TIMEOUT_S,
    )
    assert found == status, output
    # Nothing of it is left.
    server.sh("[ ! -e /sys/module/rblkclaim ]")
    return output


@pytest.mark.feature("BE-52", "B-22")
def test_replace_backend(host):
    """A guest sees a pause, and no error. What else wants the device does not get it meanwhile.

    A module that the kernel does not take leaves everything as it is, and one that turns out to be
    bad only then is exchanged for the one before.
    """
    server = host.server
    server.sh("mkswap /dev/ram0")
    guest = host.start_guest(disks=[Disk(), Disk("xvdb", "/dev/ram1", mode="r")])
    assert_served_by_pair(host, guest)
    server.sh(SWAPON)
    job = Job(guest, WRITE)
    job.wait_for_pass()

    replace(server, "rblkback", REPLACED, "max_queues=2")
    assert server.sh(f"cat {QUEUES}") == "2"
    job.wait_for_pass(3)
    assert "does not take" in replace(server, "other-kernel", UNCHANGED)
    job.wait_for_pass()
    server.allow("Unknown symbol bdev_file_open_by_dew")
    replace(server, "broken", FELL_BACK, "max_queues=1")
    # It has the parameters that it had before.
    assert server.sh(f"cat {QUEUES}") == "2"
    job.wait_for_pass(3)
    assert guest.sh("dd if=/dev/xvdb of=/dev/null bs=4k count=4 iflag=direct 2>&1 | head -n 1")

    job.stop()
    server.sh("echo > /tmp/stop")
    server.wait_for("[ -e /tmp/stopped ]")
    assert int(server.sh("wc -l < /tmp/tries")) > 50
    server.sh("[ ! -e /tmp/had ]")
    assert_served_by_pair(host, guest)
