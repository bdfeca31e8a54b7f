# SPDX-License-Identifier: GPL-2.0
"""Insert, use, remove: nothing is left, by Xen's and the kernels' own count."""

from harness.counts import kernel_counts
from harness.counts import xen_counts
from harness.evidence import assert_served_by_pair
from harness.xenhost import Disk

CYCLES = 5
SLACK_KB = 1024
"""Kernel memory may differ by this much: caches of the rest of the system."""


def cycle(host, guest):
    """One life of a disk and of both drivers."""
    host.attach(guest, Disk("xvdb", "/dev/ram0"))
    guest.wait_for_disk("xvdb")
    guest.sh(
        "dd if=/dev/zero of=/dev/xvdb bs=256k count=8 oflag=direct && dd if=/dev/xvdb of=/dev/null bs=256k count=8"
    )
    host.take_away(guest, "xvdb")
    guest.unload_frontend()
    host.unload_backend()
    host.load_backend()
    guest.load_frontend()


def test_leak_count(host):
    """Rows: FE-65, FE-68"""
    guest = host.start_guest(disks=[])
    cycle(host, guest)
    cycle(host, guest)
    before = xen_counts(host), kernel_counts(host), kernel_counts(guest)
    for _ in range(CYCLES):
        cycle(host, guest)
    after = xen_counts(host), kernel_counts(host), kernel_counts(guest)
    assert after[0] == before[0]
    for now, then in zip(after[1:], before[1:]):
        assert now["threads"] <= then["threads"]
        assert now["slab_kb"] <= then["slab_kb"] + SLACK_KB
        assert now["modules"] == then["modules"]
    host.attach(guest, Disk("xvdb", "/dev/ram0"))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
