# SPDX-License-Identifier: GPL-2.0-only
"""The disk is swap space of a guest that has run out of memory.

Memory is freed by writing to the disk, so neither driver may wait for memory to write. The C pair
passes as well; a driver that allocates for each request without GFP_NOIO hangs here.
"""

from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost

MORE_MIB = 64
"""What the guest stores beyond the memory that it has for it."""
FILL = f"""
set -e
mib=$(awk '/MemAvailable/ {{ print int($2 / 1024) + {MORE_MIB} }}' /proc/meminfo)
mount -t tmpfs -o size=$((mib + 8))M tmpfs /mnt
for i in $(seq $((mib / 8))); do
	dd if=/dev/urandom of=/mnt/$i bs=1M count=8 2> /dev/null
	md5sum /mnt/$i
done > /sums
"""


def test_swap(xen: StartHost) -> None:
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks(megabytes=160)
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    guest.sh("mkswap /dev/xvda && swapon /dev/xvda")
    guest.sh(FILL, timeout=600)
    swapped = int(guest.sh("awk '/SwapTotal/ {t = $2} /SwapFree/ {print t - $2}' /proc/meminfo"))
    assert swapped > 32 << 10, f"only {swapped} KiB went to swap space"
    guest.sh("md5sum -c /sums", timeout=600)
    guest.sh("umount /mnt && swapoff /dev/xvda", timeout=300)
