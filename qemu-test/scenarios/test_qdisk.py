# SPDX-License-Identifier: GPL-2.0-only
"""QEMU in dom0 is the backend, as xl has it for disk images in files: qdisk.

It offers neither indirect requests nor persistent grants nor several rings, and it takes its own
way through the xenbus states.
"""

import hashlib
import secrets
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import qdisk
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.job import Job
from harness.qdisk import QemuDisk
from harness.xenhost import Disk
from harness.xenhost import XenHost
from harness.xenimage import file_in_image
from harness.xenimage import root_disk

VERIFY = (
    "fio --name=part --filename=/dev/{vdev} --ioengine=libaio --iodepth=16 --direct=1 "
    "--rw=randwrite --norandommap=0 --bsrange=512-256k --blockalign=512 --size=8M "
    "--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 --output-format=terse"
)
VERIFIED_KB = 8192
"""The size of the area that `VERIFY` writes."""
METADATA_KB = 1024
"""More than an image without data occupies."""
WRITE = (
    "printf 'round %06d' $pass | dd of=/dev/xvda bs=4k seek=$((pass % 64)) "
    "conv=sync,fsync,notrunc 2> /dev/null && "
    "dd if=/dev/xvda bs=4k skip=$((pass % 64)) count=1 iflag=direct 2> /dev/null | "
    "grep -q \"^$(printf 'round %06d' $pass)\""
)
SAVED = f"{qdisk.PLACE}/saved"


def start(
    xen: StartHost, images: Sequence[tuple[str, str | Path]], disks: Sequence[Disk], **options: Any
) -> tuple[XenHost, Guest]:
    """Starts a host with `images` for QEMU, and a guest with `disks`."""
    host = xen(waiting=None, image=qdisk.disk(images))
    qdisk.mount(host)
    guest = host.start_guest(disks=disks, **options)
    for disk in disks:
        assert_served_by_pair(host, guest, disk.vdev)
    return host, guest


def assert_flush_is_durable(host: XenHost, guest: Guest, vdev: str) -> None:
    """Written data stays in dom0's page cache; an fsync in the guest brings it to dom0's disk.

    Writeback is off in dom0, and the block is allocated already.
    """
    assert "write back" in guest.sh(f"cat /sys/block/{vdev}/queue/write_cache")
    host.sh("sync; echo 0 > /proc/sys/vm/dirty_writeback_centisecs")
    text = secrets.token_hex(16)
    guest.sh(
        f"yes {text} | dd of=/dev/{vdev} bs=4k count=1 iflag=fullblock oflag=direct conv=notrunc"
    )
    assert not qdisk.is_on_disk(host, text)
    guest.sh(f"sync /dev/{vdev}")
    assert qdisk.is_on_disk(host, text)
    host.sh("echo 500 > /proc/sys/vm/dirty_writeback_centisecs")


def verify_and_discard(host: XenHost, guest: Guest, vdev: str, image: str) -> None:
    """Verifies what fio writes, and that a discard frees the blocks of the image."""
    guest.sh(VERIFY.format(vdev=vdev), timeout=600)
    assert qdisk.allocated_kb(host, image) >= VERIFIED_KB
    assert_flush_is_durable(host, guest, vdev)
    guest.sh(f"blkdiscard /dev/{vdev}")
    assert qdisk.allocated_kb(host, image) < METADATA_KB


@pytest.mark.feature(
    "FE-07", "FE-10", "FE-11", "FE-24", "FE-40", "FE-42", "FE-44", "FE-60", "FE-61", "FE-62"
)
def test_qdisk(xen: StartHost) -> None:
    """The root disk is a qcow2 image, a second disk a raw one."""
    images: list[tuple[str, str | Path]] = [("root.qcow2", root_disk()), ("data.raw", "64M")]
    disks = [QemuDisk("xvda", "root.qcow2"), QemuDisk("xvdb", "data.raw")]
    host, guest = start(xen, images, disks, root="xvda")
    assert "/dev/xvda / ext4 rw" in guest.sh("cat /proc/mounts")
    verify_and_discard(host, guest, "xvdb", "data.raw")
    guest.sh("tar -cf /bin.tar /bin && sync")
    guest_sum = guest.sh("sha256sum /bin.tar")
    guest.shut_down()
    image = host.logs / "root.raw"
    qdisk.export_image(host, "root.qcow2", image)
    subprocess.run(["e2fsck", "-fn", image], check=True)
    assert hashlib.sha256(file_in_image(image, "/bin.tar")).hexdigest() in guest_sum
    image.unlink()


@pytest.mark.feature("FE-05", "FE-20", "FE-21", "FE-63", "FE-64", "FE-65", "FE-68")
def test_qdisk_changes(xen: StartHost) -> None:
    """Resize a disk under I/O, attach and detach another one, use large rings."""
    images = [("data.qcow2", "64M"), ("data.raw", "64M")]
    host, guest = start(xen, images, [QemuDisk("xvda", "data.qcow2")], fio=True)
    verify_and_discard(host, guest, "xvda", "data.qcow2")
    job = Job(guest, WRITE)
    for mib in (80, 96):
        job.wait_for_pass()
        size = {"node-name": "xvda-qcow2", "size": mib << 20}
        qdisk.execute(host, guest, "block_resize", **size)
        guest.wait_for(f"[ $(cat /sys/block/xvda/size) = {mib << 11} ]")
        guest.sh(f"echo end | dd of=/dev/xvda bs=1M seek={mib - 1} conv=sync,fsync,notrunc")
    for _cycle in range(2):
        host.attach(guest, QemuDisk("xvdb", "data.raw"))
        guest.wait_for_disk("xvdb")
        assert_served_by_pair(host, guest, "xvdb")
        verify_and_discard(host, guest, "xvdb", "data.raw")
        host.detach(guest, "xvdb")
        guest.wait_for("[ ! -b /dev/xvdb ]")
        host.wait_for(f"! xenstore-exists /local/domain/0/backend/qdisk/{guest.domid}/51728")
    job.wait_for_pass()
    job.stop()
    guest.unload_frontend()
    guest.wait_for_backends()
    guest.load_frontend("max_ring_page_order=4")
    guest.ask_for_disks()
    guest.wait_for_disk("xvda")
    front = f"/local/domain/{guest.domid}/device/vbd/51712"
    assert host.xenstore_read(f"{front}/ring-page-order") == "4"
    verify_and_discard(host, guest, "xvda", "data.qcow2")
    assert_served_by_pair(host, guest)


@pytest.mark.feature("FE-66")
def test_qdisk_save(xen: StartHost) -> None:
    """Save and restore a guest that writes: another QEMU serves it afterwards."""
    images = [("data.qcow2", "64M")]
    host, guest = start(xen, images, [QemuDisk("xvda", "data.qcow2")])
    job = Job(guest, WRITE)
    for _cycle in range(2):
        job.wait_for_pass(2)
        guest.save(SAVED)
        guest.restore(SAVED)
        job.wait_for_pass(2)
        assert_served_by_pair(host, guest)
    job.stop()


def test_qdisk_dies(xen: StartHost) -> None:
    """Kill QEMU while the guest writes: requests fail when the disk is detached, nothing hangs.

    The C frontend waits for the responses without a limit.
    """
    images = [("data.raw", "64M")]
    host, guest = start(xen, images, [QemuDisk("xvda", "data.raw")])
    guest.allow("I/O error")
    guest.sh(
        "(while echo > /tmp/writes && dd if=/dev/zero of=/dev/xvda bs=4k count=16 oflag=direct; "
        "do :; done; echo > /tmp/failed) > /dev/null 2>&1 &"
    )
    guest.wait_for("[ -e /tmp/writes ]")
    host.sh(f"kill -9 $(xenstore-read /local/domain/{guest.domid}/image/device-model-pid)")
    host.run(f"xl block-detach {guest.name} xvda")
    guest.wait_for("[ -e /tmp/failed -a ! -b /dev/xvda ]")
