# SPDX-License-Identifier: GPL-2.0-only
"""A partition table on the disk, and a disk that is a partition."""

import pytest

from harness.driver_check import assert_served_by_pair
from harness.fixtures import RecordProperty
from harness.xenhost import Disk
from harness.xenhost import XenHost

FILL = "mkfs.ext4 -q {0} && mount {0} /mnt && echo kept > /mnt/file && umount /mnt"


@pytest.mark.feature("FE-62", "F-23")
def test_partition_table(host: XenHost, record_property: RecordProperty) -> None:
    """Partitions are found, unless the toolstack disables the scan."""
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    guest.sh("printf '2048,32768,L\\n,,L\\n' | sfdisk -q /dev/xvda")
    for partition in ("xvda1", "xvda2"):
        guest.wait_for_disk(partition)
        guest.sh(FILL.format(f"/dev/{partition}"))
    sizes = guest.sh("cat /sys/block/xvda/xvda1/size /sys/block/xvda/xvda2/size").split()
    assert sizes == ["32768", str(131072 - 2048 - 32768)]
    guest.reload_frontend()
    for partition in ("xvda1", "xvda2"):
        guest.wait_for_disk(partition)
        assert guest.sh(f"mount /dev/{partition} /mnt && cat /mnt/file && umount /mnt") == "kept"
    host.sh(f"xenstore-write /local/domain/{guest.domid}/device/vbd/51712/no-part-scan 1")
    guest.reload_frontend()
    guest.wait_for_disk("xvda")
    # A look for partitions is over when this one is.
    looked = guest.run("blockdev --rereadpt /dev/xvda")[0] == 0
    assert (guest.run("[ -b /dev/xvda1 ]")[0] == 0) == looked == (guest.front == "xen-blkfront")
    if looked:
        record_property("c_fails", "F-23")


@pytest.mark.feature("FE-01")
def test_partition_vbd(host: XenHost) -> None:
    guest = host.start_guest(disks=[Disk("xvda1", "/dev/ram0")])
    guest.wait_for_disk("xvda1")
    assert_served_by_pair(host, guest, "xvda1")
    assert guest.sh("cat /sys/block/xvda1/dev") == "202:1"
    assert guest.run("[ -e /sys/block/xvda ]")[0] != 0
    guest.sh(FILL.format("/dev/xvda1"))
    guest.shut_down()
    assert host.server.sh("mount -o ro /dev/ram0 /mnt && cat /mnt/file && umount /mnt") == "kept"
