#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Runs a guest whose root disk our pair serves from boot to shutdown.

Boots a Xen host in QEMU, starts a guest on /dev/xvda, has it do real work on
that and a second disk, powers it off, and looks at the disk from outside. With
--shell a person gets dom0's shell instead of the work.
"""

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path

from harness.driver_check import assert_served_by_pair
from harness.driver_check import loaded_build_id
from harness.guest import Guest
from harness.image import debian_packages
from harness.kernel import Kernel
from harness.pairs import pair
from harness.snapshot import Snapshot
from harness.xenhost import Disk
from harness.xenhost import XenHost
from harness.xenimage import root_disk

PACKAGES = ("bash", "tar", "gzip")
INTERRUPTED = 130
"""The status of what the keyboard has ended."""
FIO = (
    "--ioengine=libaio --iodepth=8 --direct=1 --rw=randwrite --bsrange=4k-128k "
    "--verify=crc32c --verify_fatal=1 --output-format=terse"
)


class Progress:
    """Prints each step when it begins, and its result when it is done."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def begin(self, text: str) -> None:
        """Begins a step that may take seconds."""
        self.last = time.monotonic()
        print(f"  {text} ... ", end="", flush=True)

    def done(self, found: str = "") -> None:
        """Ends the step and prints its result."""
        print(f"{found}{', ' * bool(found)}{time.monotonic() - self.last:.1f} s", flush=True)

    def total(self) -> float:
        """Returns the seconds since the beginning."""
        return time.monotonic() - self.start


Summary = list[tuple[str, str]]
"""What a demonstration has done: titles and texts."""
Start = Callable[[argparse.Namespace, Kernel, Progress], tuple[XenHost, Guest]]
Work = Callable[[XenHost, Guest, Progress], Summary]


def unpack_packages(guest: Guest, progress: Progress) -> str:
    """Unpacks Debian packages onto the root disk."""
    progress.begin(f"unpacking {len(PACKAGES)} Debian packages onto the root disk")
    guest.sh(
        "mkdir /unpacked && for p in /packages/*.deb; do dpkg-deb -x $p /unpacked; done && sync",
        timeout=300,
    )
    files = guest.sh("find /unpacked -type f | wc -l; du -sm /unpacked | cut -f1").split()
    progress.done(f"{files[0]} files, {files[1]} MB")
    return files[0]


def write_durably(guest: Guest, progress: Progress) -> None:
    """Writes a hundred small files, each with its own fsync."""
    progress.begin("writing 100 files, each with its own fsync")
    guest.sh(
        "mkdir /durable && for i in $(seq 100); do echo line $i | dd of=/durable/$i conv=fsync 2>/dev/null; done",
        timeout=300,
    )
    progress.done()


def verify_disks(guest: Guest, progress: Progress) -> None:
    """Writes both disks with fio and verifies them."""
    progress.begin("fio writes and verifies 16 MB on the root disk (crc32c, 4 to 128 KiB)")
    guest.sh(f"fio --name=root --filename=/fio --size=16M {FIO} && rm /fio", timeout=300)
    progress.done()
    progress.begin("fio writes and verifies 32 MB on the second disk, /dev/xvdb")
    guest.sh(f"fio --name=second --filename=/dev/xvdb --size=32M {FIO}", timeout=300)
    progress.done()


def sums_in_guest(guest: Guest, progress: Progress) -> dict[str, str]:
    """Checksums of the files, read from the disk and not from memory."""
    progress.begin("the guest computes checksums of what it has unpacked")
    guest.sh("sync; echo 3 > /proc/sys/vm/drop_caches")
    lines = guest.sh(
        "sha256sum /durable/1 /durable/100 $(find /unpacked -type f -size +20k | head -n 40)",
        timeout=300,
    )
    pairs = (line.split(None, 1) for line in lines.splitlines())
    sums = {path: checksum for checksum, path in pairs}
    progress.done(f"{len(sums)} files")
    return sums


def check_image(image: Path, sums: Mapping[str, str], progress: Progress) -> None:
    """Checks the content of the disk without the drivers or a mount."""
    progress.begin("e2fsck -fn on the image")
    result = subprocess.run(
        ["e2fsck", "-fn", image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        raise AssertionError(f"e2fsck found errors:\n{result.stdout}")
    progress.done("clean")
    progress.begin("computing the checksums from the image")
    for path, expected in sums.items():
        content = subprocess.run(
            ["debugfs", "-R", f'cat "{path}"', image],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        if hashlib.sha256(content.stdout).hexdigest() != expected:
            raise AssertionError(f"{path} differs between guest and image")
    progress.done(f"all {len(sums)} are the guest's")


def start(options: argparse.Namespace, kernel: Kernel, progress: Progress) -> tuple[XenHost, Guest]:
    """Starts the Xen host and its guest."""
    progress.begin("Xen and dom0 boot in QEMU")
    packages = debian_packages(PACKAGES)
    host = XenHost(
        Snapshot(kernel),
        pair(options.pair, kernel, options.build),
        options.logs,
        image=root_disk(packages=packages),
    )
    try:
        host.boot()
        progress.done()
        progress.begin("the guest boots from /dev/xvda")
        host.load_backend()
        host.ram_disks()
        disks = [Disk("xvda", "/dev/vdb"), Disk("xvdb", "/dev/ram0")]
        guest = host.start_guest(disks=disks, root="xvda", memory=256)
        assert_served_by_pair(host, guest)
    except BaseException:
        host.collect()
        host.close()
        raise
    progress.done()
    return host, guest


def work(host: XenHost, guest: Guest, progress: Progress) -> Summary:
    """Runs the demonstration."""
    mount = guest.sh("grep ' / ' /proc/mounts | tail -n 1")
    front = loaded_build_id(guest, host.pair.front.name)
    back = loaded_build_id(host, host.pair.backend.name)
    files = unpack_packages(guest, progress)
    write_durably(guest, progress)
    verify_disks(guest, progress)
    sums = sums_in_guest(guest, progress)
    progress.begin("the guest powers off")
    guest.shut_down()
    progress.done()
    host.sh("blockdev --flushbufs /dev/vdb")
    host.finish()
    check_image(host.disk, sums, progress)
    return [
        ("root disk", mount),
        ("frontend", f"{host.pair.front.name}.ko  build id {front[:16]}"),
        ("backend", f"{host.pair.backend.name}.ko  build id {back[:16]}"),
        ("written", f"{files} files unpacked, 100 files with fsync, 48 MB verified by fio"),
        ("checked", f"e2fsck clean, {len(sums)} checksums equal inside and outside"),
    ]


def play(host: XenHost, _guest: Guest, _progress: Progress) -> Summary:
    """Gives the terminal to dom0's shell until the person leaves it."""
    print("\n  This is dom0. Try: xl list; xenstore-ls; xl console guest (leave with Ctrl-]).")
    print("  `exit` ends it all.\n", flush=True)
    host.machine.interact("PS1='dom0# ' HOME=/root sh -i")
    return []


def run(options: argparse.Namespace, start: Start, work: Work) -> int:
    """Runs a demonstration and says how it went. Returns the exit status."""
    kernel, progress = Kernel(options.kernel), Progress()
    try:
        host, guest = start(options, kernel, progress)
        try:
            summary = work(host, guest, progress)
        except BaseException:
            host.collect()
            raise
        finally:
            host.close()
    except (AssertionError, OSError, RuntimeError, subprocess.CalledProcessError) as problem:
        print(f"\nThe demonstration failed: {problem}\n\nLogs: {options.logs}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    if not summary:
        return 0
    print(f"\n  {'kernel':10} {kernel.release}{', stock Debian' * kernel.is_stock}")
    for name, text in summary:
        print(f"  {name:10} {text}")
    print(f"  {'time':10} {progress.total():.0f} s\n")
    return 0


def main() -> int:
    """Runs the demonstration, or gives a shell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", required=True, help="directory of a prepared kernel")
    parser.add_argument("--build", required=True, help="directory with our modules")
    parser.add_argument("--logs", required=True, help="where logs go")
    parser.add_argument("--pair", default="R/R", help="FRONT/BACK, each C or R")
    parser.add_argument("--shell", action="store_true", help="a shell in dom0 instead of the work")
    options = parser.parse_args()
    if options.shell and not sys.stdin.isatty():
        parser.error("a shell needs a terminal")
    options.logs = Path(options.logs)
    return run(options, start, play if options.shell else work)


if __name__ == "__main__":
    sys.exit(main())
