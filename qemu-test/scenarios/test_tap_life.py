# SPDX-License-Identifier: GPL-2.0-only
"""Operations of xl and rblk on disks that rblktap serves, and other frontends than Linux."""

import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.job import wait_for_passes
from harness.kernel import Kernel
from harness.leak_counts import kernel_counts
from harness.leak_counts import xen_counts
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.verify import start_jobs
from harness.xenhost import XenHost
from harness.xenimage import domu_archive
from harness.xenimage import grub
from harness.xenimage import grub_disk

XVDA = 51712
SAVED = "/tap/saved"
MIB = 64
CYCLES = int(os.environ.get("RBLKIF_CYCLES", "25"))
"""How often a disk is attached and detached."""
SLACK_KB = 512 + 2 * CYCLES
"""Memory may differ by this much: the consoles, caches of the rest of the system, what the kernel
frees late, and events that rblkd keeps."""
MEMORY_KB = 4096
"""The memory of the processes that serve a raw image, at most, with their share of common pages."""
IDLE_S = 5
USE = (
    "dd if=/dev/urandom of=/tmp/data bs=64k count=4 2> /dev/null && "
    "dd if=/tmp/data of=/dev/xvdb bs=64k oflag=direct conv=fsync,notrunc 2> /dev/null && "
    "dd if=/dev/xvdb bs=64k count=4 iflag=direct 2> /dev/null | cmp - /tmp/data"
)


def start(
    xen: StartHost,
    images: Sequence[Image],
    disks: Sequence[RblkDisk],
    size: str = rblktap.SIZE,
) -> tuple[XenHost, Guest]:
    """Starts a host whose dom0 serves `disks`, and a guest with them."""
    image = rblktap.disk(images, size=size)
    host = xen(waiting=TWO_VCPUS, image=image, **rblkd.options())
    rblkd.install(host)
    rblkd.start(host)
    guest = host.start_guest(disks=disks)
    for disk in disks:
        assert_served_by_pair(host, guest, disk.vdev)
    return host, guest


def test_tap_save(xen: StartHost) -> None:
    """Save and restore a guest that verifies what it writes, and resize its disk.

    A write with a flush after it that is in flight at a save is a BUG of xen-blkfront.
    """
    images = [Image("a.raw", MIB)]
    host, guest = start(xen, images, [RblkDisk("xvda", "a.raw")], size="900M")
    kinds = ["data", "mixed"]
    if guest.front == "rblkfront":
        kinds.append("synced")
    jobs = start_jobs(guest, kinds)
    for _cycle in range(2):
        guest.save(SAVED)
        guest.restore(SAVED)
        wait_for_passes(jobs)
        assert_served_by_pair(host, guest)
    for mib in (MIB + 16, MIB + 32):
        host.sh(f"truncate -s {mib}M /tap/a.raw")
        rblkd.rblk(host, f"disk resize {guest.name}/xvda")
        guest.wait_for(f"[ $(cat /sys/block/xvda/size) = {mib << 11} ]")
        guest.sh(
            f"echo end | dd of=/dev/xvda bs=1M seek={mib - 1} conv=sync,fsync,notrunc 2> /dev/null"
        )
        wait_for_passes(jobs)
    for job in jobs:
        job.stop()
    assert "I/O error" not in guest.sh("dmesg")


def counts(host: XenHost) -> dict[str, Any]:
    """Returns the counts of Xen, of dom0's kernel, and of rblkd."""
    descriptors, threads, files = host.sh(
        "pid=$(cat /run/rblkd.pid); ls /proc/$pid/fd | wc -l; ls /proc/$pid/task | wc -l; "
        "ls /run/rblk /dev/shm | wc -l"
    ).split()
    return {
        "Xen": xen_counts(host),
        "kernel": kernel_counts(host),
        "descriptors": descriptors,
        "threads": threads,
        "files": files,
        "processes": host.sh("pidof rblktap | wc -w"),
    }


def files_kb(host: XenHost) -> int:
    """Returns the size of the files of rblkd, which are in memory here: its log and its state."""
    return int(host.sh("du -skcx /tmp /run /var /dev/shm 2> /dev/null | tail -n 1").split()[0])


def test_tap_cycles(xen: StartHost) -> None:
    """Attach, use and detach leave nothing behind; an idle disk takes little memory and no time."""
    host, guest = start(
        xen, [Image("a.raw", MIB), Image("b.raw", MIB)], [RblkDisk("xvda", "a.raw")]
    )
    assert_idle(host, guest)

    def cycle() -> None:
        host.attach(guest, RblkDisk("xvdb", "b.raw"))
        guest.wait_for_disk("xvdb")
        guest.sh(USE)
        rblkd.detach(host, guest, "xvdb")

    for _ in range(3):
        cycle()
    before, files = counts(host), files_kb(host)
    for _ in range(CYCLES):
        cycle()
    after, grown = counts(host), files_kb(host) - files
    print(before, after, f"files have grown by {grown} KiB", sep="\n")
    # Persistent grants of the first disk that were not used for a minute are unmapped meanwhile.
    grants = before["Xen"].pop("grants")
    for domain, count in after["Xen"].pop("grants").items():
        assert count <= grants[domain]
    assert {name: after[name] for name in after if name != "kernel"} == {
        name: before[name] for name in before if name != "kernel"
    }
    now, then = after["kernel"], before["kernel"]
    assert now["threads"] <= then["threads"]
    assert now["slab_kb"] <= then["slab_kb"] + SLACK_KB
    assert then["free_kb"] - now["free_kb"] <= SLACK_KB + grown


def assert_idle(host: XenHost, guest: Guest) -> None:
    """Checks that no thread of an idle disk wakes up, and what memory its processes take."""
    monitor = rblktap.pid(host, guest, XVDA)
    parent = f"'^PPid:[[:space:]]*{monitor}$'"
    # grep fails if another process ends meanwhile.
    server = host.sh(f"grep -ls {parent} /proc/[0-9]*/status || true").split("/")[2]
    switches = (
        f"cat /proc/{monitor}/task/*/status /proc/{server}/task/*/status | "
        "awk '/ctxt_switches/ { n += $2 } END { print n }'"
    )
    # The last reads of the new disk are over when nothing changes for a while.
    host.wait_for(f"a=$({switches}); sleep {IDLE_S}; [ $({switches}) = $a ]")
    fields = host.sh(
        f"cat /proc/{monitor}/smaps_rollup /proc/{server}/smaps_rollup | "
        "awk '/^Rss:/ { rss = rss \" \" $2 } /^Pss:/ { pss += $2 } END { print pss rss }'"
    ).split()
    shared, *resident = map(int, fields)
    print(f"an idle disk takes {shared} KiB, and its processes {resident} KiB each")
    assert shared <= MEMORY_KB


def test_tap_grub(xen: StartHost, kernel: Kernel) -> None:
    """GRUB as the frontend reads kernel and initramfs; then Linux connects to the same disk."""

    def image(front: bytes) -> Path:
        return grub_disk(kernel.vmlinux, gzip.compress(domu_archive(kernel) + front, mtime=0))

    options = rblkd.options()
    options["files"] |= {"grub": grub("grub-x86_64-xen.bin")}
    host = xen(waiting=None, image=image, **options)
    rblkd.install(host, mount=False)
    rblkd.start(host)
    guest = host.start_guest(
        type="pv", disks=[RblkDisk("xvda", "raw:/dev/vdb")], memory=320, loader="/payload/grub"
    )
    assert_served_by_pair(host, guest)
    guest.sh(
        "mount -t ext4 /dev/xvda /mnt && dd if=/dev/zero of=/mnt/new bs=64k count=16 conv=fsync && "
        "umount /mnt && e2fsck -fn /dev/xvda"
    )
