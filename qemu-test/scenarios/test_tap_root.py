# SPDX-License-Identifier: GPL-2.0-only
"""rblktap serves the root disk of a guest, a qcow2 image, from boot to shutdown."""

import hashlib
import subprocess

from harness import rblkd
from harness import rblktap
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.job import Job
from harness.rblkd import RblkDisk
from harness.rblktap import Image
from harness.xenimage import file_in_image
from harness.xenimage import root_disk

XVDA = 51712
WORK = (
    "dd if=/dev/urandom of=/work.$((pass % 4)) bs=64k count=16 conv=fsync 2> /dev/null && "
    "cp /work.$((pass % 4)) /copy && sync && echo 1 > /proc/sys/vm/drop_caches && "
    "cmp /work.$((pass % 4)) /copy"
)


def test_tap_root(xen: StartHost) -> None:
    """rblktap is killed while the guest works; the image is checked from outside."""
    image = rblktap.disk([Image("root.qcow2", source=root_disk())], rblktap.QEMU_TOOLS, "512M")
    host = xen(waiting=None, image=image, **rblkd.options())
    rblkd.install(host)
    rblkd.start(host)
    guest = host.start_guest(disks=[RblkDisk("xvda", "root.qcow2")], root="xvda")
    assert "/dev/xvda / ext4 rw" in guest.sh("cat /proc/mounts")
    assert_served_by_pair(host, guest)

    job = Job(guest, WORK)
    job.wait_for_pass()
    rblktap.wait_in_flight(host, guest, XVDA)
    rblkd.kill_rblktap(host, guest, XVDA)
    job.wait_for_pass(2)
    job.stop()
    assert_served_by_pair(host, guest)
    assert "I/O error" not in guest.sh("dmesg")

    guest.sh("tar -cf /bin.tar /bin && sync && echo 3 > /proc/sys/vm/drop_caches")
    guest_sum = guest.sh("sha256sum /copy /bin.tar")
    guest.shut_down()
    image = rblktap.take_out(host, "root.qcow2", host.logs)
    rblktap.qemu_img("check", image)
    raw = host.logs / "root.raw"
    rblktap.qemu_img("convert", "-O", "raw", image, raw)
    subprocess.run(["e2fsck", "-fn", raw], check=True)
    for path in ("/copy", "/bin.tar"):
        assert hashlib.sha256(file_in_image(raw, path)).hexdigest() in guest_sum
    image.unlink()
    raw.unlink()
