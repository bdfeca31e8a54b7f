# SPDX-License-Identifier: GPL-2.0
"""Four virtual CPUs write at once, each its own part of the disk."""

from harness.evidence import assert_served_by_pair

FIO = (
    "fio --filename=/dev/xvda --ioengine=libaio --iodepth=8 --direct=1 --rw=randwrite --bsrange=4k-64k "
    "--size=4M --offset_increment=8M --numjobs=4 --cpus_allowed=0-3 --cpus_allowed_policy=split "
    "--name=part --verify=crc32c --verify_fatal=1 --randseed=7 --output-format=terse"
)


def test_four_vcpus(xen):
    """Rows: FE-06, FE-23, FE-50, BE-09, BE-21, BE-41"""
    host = xen(waiting=None)
    host.load_backend("max_queues=4")
    host.ram_disks()
    guest = host.start_guest(vcpus=4, fio=True)
    assert_served_by_pair(host, guest)
    assert guest.sh("nproc") == "4"
    offered = int(
        host.xenstore_read(
            f"/local/domain/0/backend/vbd/{guest.domid}/51712/multi-queue-max-queues"
        )
        or 1
    )
    used = int(
        host.xenstore_read(f"/local/domain/{guest.domid}/device/vbd/51712/multi-queue-num-queues")
        or 1
    )
    assert 1 <= used <= offered
    guest.sh(FIO, timeout=600)
