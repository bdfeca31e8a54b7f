# SPDX-License-Identifier: GPL-2.0
"""A disk whose device does not exist fails with a message; nothing else suffers."""

from harness.evidence import assert_served_by_pair
from harness.xenhost import Disk

NONSENSE = {"xen-blkback": ("fff:ffff",), "rblkback": ("fff:ffff", "nonsense", "1:zz")}
"""What does not look like a device number at all, the C backend waits for to become one."""


def test_bad_physical_device(host):
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    for number, nonsense in enumerate(NONSENSE[host.pair.back.name]):
        vdev, code = f"xvd{'bcd'[number]}", 51728 + 16 * number
        host.run(f"xl block-attach {guest.name} '{Disk(vdev, nonsense).specification()}'")
        node = f"/local/domain/0/error/backend/vbd/{guest.domid}/{code}/error"
        host.wait_for(f"xenstore-exists {node}")
        assert host.xenstore_read(node)
        assert guest.run(f"[ -b /dev/{vdev} ]")[0] != 0
        host.sh(f"xl block-detach --force {guest.name} {vdev}")
    guest.sh("dd if=/dev/zero of=/dev/xvda bs=64k count=16 conv=fsync")
    host.attach(guest, Disk("xvde", "/dev/ram0", mode="r"))
    guest.wait_for_disk("xvde")
