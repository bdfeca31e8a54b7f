#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Runs a guest whose root disk, a qcow2 image, rblktap serves from boot to shutdown.

Boots a Xen host in QEMU with rblkd in dom0, starts a guest on /dev/xvda, has it do real work, kills
rblktap meanwhile, powers the guest off, and looks at the image from outside.
"""

import argparse
import sys
from pathlib import Path

from demo import FIO
from demo import PACKAGES
from demo import Progress
from demo import Summary
from demo import check_image
from demo import run
from demo import sums_in_guest
from demo import unpack_packages
from demo import write_durably

from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.driver_check import loaded_build_id
from harness.guest import Guest
from harness.image import debian_packages
from harness.kernel import Kernel
from harness.pairs import pair
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.snapshot import Snapshot
from harness.xenhost import XenHost
from harness.xenimage import root_disk

XVDA = 51712
IMAGE = "root.qcow2"
SIZE = "640M"
"""Size of the file system with the image and what QEMU's tools need."""


def start(options: argparse.Namespace, kernel: Kernel, progress: Progress) -> tuple[XenHost, Guest]:
    """Starts the Xen host and its guest."""
    progress.begin("building rblktap, rblkd and rblk")
    programs = rblkd.options()
    progress.done()
    progress.begin("Xen and dom0 boot in QEMU")
    root = Image(IMAGE, source=root_disk(packages=debian_packages(PACKAGES)))
    host = XenHost(
        Snapshot(kernel),
        pair(options.pair, kernel, options.build),
        options.logs,
        image=rblktap.disk([root], rblktap.QEMU_TOOLS, SIZE),
        **programs,
    )
    try:
        host.boot()
        rblkd.install(host)
        rblkd.start(host)
        progress.done("rblkd runs")
        progress.begin(f"the guest boots from /dev/xvda, the image {IMAGE}")
        guest = host.start_guest(disks=[RblkDisk("xvda", IMAGE)], root="xvda", memory=256)
        assert_served_by_pair(host, guest)
    except BaseException:
        host.collect()
        host.close()
        raise
    progress.done()
    return host, guest


def verify_over_a_kill(host: XenHost, guest: Guest, progress: Progress) -> str:
    """Has fio verify the root disk, and kills rblktap while its writes are in flight."""
    progress.begin("fio writes and verifies 16 MB on the root disk; rblktap is killed (kill -9)")
    fio = f"fio --name=root --filename=/fio --size=16M {FIO}"
    guest.sh(f"({fio} > /run/fio.log 2>&1; echo $? > /run/fio.status) > /dev/null 2>&1 &")
    rblktap.wait_in_flight(host, guest, XVDA)
    rblkd.kill_rblktap(host, guest, XVDA)
    guest.wait_for("[ -s /run/fio.status ]", timeout=300)
    if guest.sh("cat /run/fio.status").strip() != "0":
        raise AssertionError(f"fio failed:\n{guest.sh('cat /run/fio.log')}")
    guest.sh("rm /fio")
    errors = guest.run("dmesg | grep -c 'I/O error'")[1].strip()
    progress.done(f"verified, {errors} I/O errors in the guest")
    assert errors == "0"
    return f"1 time; the guest saw {errors} I/O errors"


def work(host: XenHost, guest: Guest, progress: Progress) -> Summary:
    """Runs the demonstration."""
    mount = guest.sh("grep ' / ' /proc/mounts | tail -n 1")
    front = loaded_build_id(guest, host.pair.front.name)
    files = unpack_packages(guest, progress)
    killed = verify_over_a_kill(host, guest, progress)
    write_durably(guest, progress)
    sums = sums_in_guest(guest, progress)
    progress.begin("the guest powers off")
    guest.shut_down()
    progress.done()
    image = rblktap.take_out(host, IMAGE, host.logs)
    host.finish()
    progress.begin(f"qemu-img check {IMAGE}")
    rblktap.qemu_img("check", image)
    progress.done("no errors")
    raw = image.with_suffix(".raw")
    rblktap.qemu_img("convert", "-O", "raw", image, raw)
    check_image(raw, sums, progress)
    raw.unlink()
    image.unlink()
    return [
        ("root disk", mount),
        ("image", f"{IMAGE}, served by rblktap and qemu-storage-daemon"),
        ("frontend", f"{host.pair.front.name}.ko  build id {front[:16]}"),
        ("killed", killed),
        ("written", f"{files} files unpacked, 100 files with fsync, 16 MB verified by fio"),
        (
            "checked",
            f"qemu-img check, e2fsck clean, {len(sums)} checksums equal inside and outside",
        ),
    ]


def main() -> int:
    """Runs the demonstration and says how it went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", required=True, help="directory of a prepared kernel")
    parser.add_argument("--build", required=True, help="directory with our modules")
    parser.add_argument("--logs", required=True, help="where logs go")
    parser.add_argument("--pair", default="R/T", help="FRONT/T, with FRONT C or R")
    options = parser.parse_args()
    options.logs = Path(options.logs)
    return run(options, start, work)


if __name__ == "__main__":
    sys.exit(main())
