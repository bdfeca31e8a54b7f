# SPDX-License-Identifier: GPL-2.0-only
"""The backend module is replaced with the command that the documentation names."""

from pathlib import Path

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.guest import Kind
from harness.job import Job
from harness.pairs import Pair
from harness.toolstack import CODES
from harness.toolstack import directories
from harness.xenhost import Disk
from harness.xenhost import Server
from harness.xenhost import XenHost

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

DRIVER = "/sys/bus/xen-backend/drivers/vbd"
MORE_MIB = 64
"""What the guest stores beyond the memory that it has for it."""
FILL = f"""
mib=$(awk '/MemAvailable/ {{ print int($2 / 1024) + {MORE_MIB} }}' /proc/meminfo)
mount -t tmpfs -o size=$((mib + 8))M tmpfs /mnt
(for i in $(seq $((mib / 8))); do
	dd if=/dev/urandom of=/mnt/$i bs=1M count=8 2> /dev/null && md5sum /mnt/$i || break
done > /sums; echo > /filled) > /dev/null 2>&1 &
echo $((mib / 8))"""
"""Stores files in the background, and prints their number."""
CHECK = """
(while read -r sum; do echo "$sum" | md5sum -c || break; done < /sums > /checked; echo > /ended) 2> /dev/null &"""


@pytest.fixture
def make_host(xen: StartHost, pair: Pair, build: Path, tmp_path: Path) -> StartHost:
    """Makes a host whose server has the backend, the command with all it takes, and RAM disks.

    Beside the backend there is one for another kernel, and one that needs a function that no kernel
    has.
    """
    backend = (build / "rblkback.ko").read_bytes()
    other, broken = tmp_path / "other-kernel.ko", tmp_path / "broken.ko"
    other.write_bytes(backend.replace(b"vermagic=7", b"vermagic=6"))
    broken.write_bytes(backend.replace(b"\0bdev_file_open_by_dev\0", b"\0bdev_file_open_by_dew\0"))
    is_ours = pair.backend.name == "rblkback"

    def make(parameters: str = "", waiting: Kind = Kind(), **ram_disks: int) -> XenHost:
        modules = [build / "rblkclaim.ko", other, broken] if is_ours else []
        host = xen(modules=modules, waiting=waiting)
        server = host.start_server()
        server.load_backend(parameters)
        server.ram_disks(**ram_disks)
        server.sh(
            f"cat > {PLACE} << 'END OF FILE'\n{COMMAND.read_text()}\nEND OF FILE\nchmod 755 {PLACE}"
        )
        return host

    return make


def replace(server: Server, module: str, status: int, parameters: str = "") -> str:
    """Runs the command with a file of the payload; it must end with that status. Returns its
    output.
    """
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
def test_replace_backend(make_host: StartHost) -> None:
    """A guest sees a pause and no error. Other programs cannot claim the device meanwhile.

    A module that the kernel does not take leaves everything as it is, and one that turns out to be
    bad only then is exchanged for the one before.
    """
    host = make_host("max_queues=3", TWO_VCPUS, count=2)
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

    # A frontend that uses more queues than the new module offers keeps them.
    front = directories(guest.domid, CODES["xvda"], server)[0]
    assert host.xenstore_read(f"{front}/multi-queue-num-queues") == "2"
    replace(server, "rblkback", REPLACED, "max_queues=1")
    assert server.sh(f"cat {QUEUES}") == "1"
    job.wait_for_pass(3)
    assert host.xenstore_read(f"{front}/multi-queue-num-queues") == "2"

    job.stop()
    server.sh("echo > /tmp/stop")
    server.wait_for("[ -e /tmp/stopped ]")
    assert int(server.sh("wc -l < /tmp/tries")) > 50
    server.sh("[ ! -e /tmp/had ]")
    assert_served_by_pair(host, guest)


def exchange(host: XenHost, guest: Guest) -> None:
    """Replaces the backend by itself, with the command or, the C driver, by hand."""
    if host.pair.backend.name == "rblkback":
        replace(host.server, "rblkback", REPLACED)
        return
    server, device = host.server, f"vbd-{guest.domid}-51712"
    server.sh(f"echo {device} > {DRIVER}/unbind")
    server.unload_backend()
    server.load_backend()
    server.wait_for(f"[ -e {DRIVER}/{device} ] || echo {device} > {DRIVER}/bind")


def test_replace_swap(make_host: StartHost) -> None:
    """The disk is the swap space of a guest that runs out of memory.

    Linux may report, with a stack trace, that it lacks memory for its table of swap entries. It
    waits for memory then.
    """
    host = make_host(megabytes=160)
    guest = host.start_guest()
    guest.allow("Call Trace")
    assert_served_by_pair(host, guest)
    guest.sh("mkswap /dev/xvda && swapon /dev/xvda")
    files = int(guest.sh(FILL))
    for stored in (files // 2, files * 3 // 4, files - 1):
        guest.wait_for(f"[ $(wc -l < /sums) -ge {stored} ]", TIMEOUT_S)
        exchange(host, guest)
    guest.wait_for("[ -e /filled ]", TIMEOUT_S)
    assert int(guest.sh("wc -l < /sums")) == files
    swapped = int(guest.sh("awk '/SwapTotal/ {t = $2} /SwapFree/ {print t - $2}' /proc/meminfo"))
    assert swapped > 32 << 10, f"only {swapped} KiB went to swap space"
    guest.sh(CHECK)
    for checked in (1, files // 2):
        guest.wait_for(f"[ $(wc -l < /checked) -ge {checked} ]", TIMEOUT_S)
        exchange(host, guest)
    guest.wait_for("[ -e /ended ]", TIMEOUT_S)
    assert guest.sh("grep -c OK /checked") == str(files), guest.sh("tail -n 1 /checked")
    guest.sh("umount /mnt && swapoff /dev/xvda", timeout=TIMEOUT_S)
    traces = "dmesg | grep -B 8 'Call Trace' | grep -c 'page allocation failure' || :"
    assert guest.sh(traces) == guest.sh("dmesg | grep -c 'Call Trace' || :")
    assert_served_by_pair(host, guest)
