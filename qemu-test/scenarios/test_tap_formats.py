# SPDX-License-Identifier: GPL-2.0-only
"""rblktap serves images of several formats: what a guest writes is what is in the image."""

from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import TWO_VCPUS
from harness.guest import Guest
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.xenhost import XenHost

XVDB = 51728
MIB = 32
WRITTEN_MIB = 8
"""The area that `VERIFY` writes."""
VERIFY = (
    "fio --name=part --filename=/dev/xvdb --ioengine=libaio --iodepth=16 --direct=1 "
    "--rw=randwrite --norandommap=0 --bsrange=512-256k --blockalign=512 --size=8M "
    "--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed={seed} --output-format=terse"
)
SUM = "dd if=/dev/xvdb bs=1M count={count} iflag=direct 2> /dev/null | sha256sum"
METADATA_KB = 1024
"""More than an image without data occupies."""

SOCKET = "/run/export.sock"
NBD_SERVER = f"qemu-nbd --persistent --discard=unmap -f raw --socket={SOCKET} --fork"

PLAIN = Image("plain.raw", MIB)
EXPORTED = Image("exported.raw", MIB)
BASE = Image("base.raw", MIB, source=rblktap.pattern(MIB))
TOP = Image("top.qcow2", backing=BASE.name)
DYNAMIC = Image("dynamic.vhd", MIB)


def attach(host: XenHost, guest: Guest, target: str) -> None:
    """Attaches an image as xvdb."""
    host.attach(guest, RblkDisk("xvdb", target))
    guest.wait_for_disk("xvdb")
    assert_served_by_pair(host, guest, "xvdb")
    rblktap.assert_confined(host, guest, XVDB)
    # All its threads have the user and the filter of the first.
    server = rblktap.children(host, guest, XVDB)["rblktap"]
    restrictions = f"grep -hE '^(Uid|Seccomp):' {server}/task/*/status"
    assert host.sh(f"{restrictions} | sort -u | wc -l") == "2"


def verify(host: XenHost, guest: Guest, image: Image, target: str = "") -> None:
    """Verifies random writes from inside and outside, and that a discard frees blocks of the image.

    QEMU completes a discard on a VHD without effect. `target` is the URI if that is no file.
    """
    attach(host, guest, target or image.name)
    for seed in (3, 4):
        guest.sh(VERIFY.format(seed=seed), timeout=600)
    inside = guest.sh(SUM.format(count=WRITTEN_MIB))
    rblkd.detach(host, guest, "xvdb")
    assert rblktap.sum_of(host, image, WRITTEN_MIB) == inside
    assert rblktap.allocated_kb(host, image.name) >= WRITTEN_MIB << 10
    if image.format != "raw":
        check(host, image)
    attach(host, guest, target or image.name)
    guest.sh("blkdiscard /dev/xvdb")
    rblkd.detach(host, guest, "xvdb")
    if image.format != "vpc":
        assert rblktap.allocated_kb(host, image.name) < METADATA_KB


def check(host: XenHost, image: Image) -> None:
    """Checks an image; vpc has no check."""
    status, output = host.run(f"qemu-img check -f {image.format} {rblktap.PLACE}/{image.name}")
    assert status == 0 or (image.format == "vpc" and "not support checks" in output), output


def verify_backing(host: XenHost, guest: Guest) -> None:
    """What was not written is read from the backing file, which does not change."""
    base = rblktap.sum_of(host, BASE, MIB)
    attach(host, guest, TOP.name)
    assert guest.sh(SUM.format(count=MIB)) == base
    rblkd.detach(host, guest, "xvdb")
    verify(host, guest, TOP)
    assert rblktap.sum_of(host, BASE, MIB) == base


def verify_device(host: XenHost, guest: Guest) -> None:
    """A qcow2 image on a block device is verified from inside and outside."""
    image = Image("device.qcow2")
    host.ram_disks(megabytes=2 * MIB)
    host.sh(f"qemu-img create -q -f qcow2 /dev/ram0 {MIB}M")
    host.sh(f"ln -s /dev/ram0 {rblktap.PLACE}/{image.name}")
    attach(host, guest, "qcow2:/dev/ram0")
    guest.sh(VERIFY.format(seed=6), timeout=600)
    inside = guest.sh(SUM.format(count=WRITTEN_MIB))
    rblkd.detach(host, guest, "xvdb")
    assert rblktap.sum_of(host, image, WRITTEN_MIB) == inside
    check(host, image)


def grow(host: XenHost, guest: Guest) -> None:
    """A qcow2 image grows while it is attached, but does not shrink, and a VHD keeps its size."""
    attach(host, guest, TOP.name)
    for mib in (MIB + 16, MIB + 32):
        rblkd.rblk(host, f"disk resize {guest.name}/xvdb {mib}M")
        guest.wait_for(f"[ $(cat /sys/block/xvdb/size) = {mib << 11} ]")
        guest.sh(
            f"echo end | dd of=/dev/xvdb bs=1M seek={mib - 1} conv=sync,fsync,notrunc 2> /dev/null"
        )
    assert "cannot be made smaller" in refused_resize(host, guest, MIB)
    rblkd.detach(host, guest, "xvdb")
    check(host, TOP)
    attach(host, guest, DYNAMIC.name)
    assert "does not support resize" in refused_resize(host, guest, MIB * 2)
    guest.sh(VERIFY.format(seed=5), timeout=600)
    rblkd.detach(host, guest, "xvdb")


def refused_resize(host: XenHost, guest: Guest, mib: int) -> str:
    """Resizes xvdb, which must fail, and returns what rblk prints."""
    status, output = host.run(f"rblk disk resize {guest.name}/xvdb {mib}M")
    assert status != 0
    return output


def test_tap_formats(xen: StartHost) -> None:
    """Raw, qcow2 with a backing file and on a device, dynamic VHD, and NBD; a larger image."""
    images = [PLAIN, EXPORTED, BASE, TOP, DYNAMIC]
    disk = rblktap.disk(images, [*rblktap.QEMU_TOOLS, "/usr/bin/qemu-nbd"])
    host = xen(waiting=TWO_VCPUS, image=disk, **rblkd.options())
    rblkd.install(host)
    rblkd.start(host)
    guest = host.start_guest(disks=[])
    verify(host, guest, PLAIN)
    verify_backing(host, guest)
    verify(host, guest, DYNAMIC)
    verify_device(host, guest)
    grow(host, guest)
    host.sh(f"{NBD_SERVER} {rblktap.PLACE}/{EXPORTED.name}")
    verify(host, guest, EXPORTED, f"nbd+unix:///?socket={SOCKET}")
