# SPDX-License-Identifier: GPL-2.0-only
"""An HVM guest has disks of rblktap twice: emulated by its device model over NBD, and as PV disks.

The images are a raw one, which rblktap exports itself, and one with a format, which QEMU's storage
daemon exports.
"""

import gzip
import secrets

from harness import hvm
from harness import qdisk
from harness import rblkd
from harness import rblktap
from harness.cpio import Archive
from harness.driver_check import assert_served_by_pair
from harness.fixtures import StartHost
from harness.guest import Guest
from harness.image import add_modules
from harness.kernel import Kernel
from harness.rblkd import RblkDisk
from harness.toolstack import CODES
from harness.xenhost import XenHost

IMAGES = [("plain.raw", "32M"), ("other.qcow2", "32M")]
DISKS = {"xvda": ("0:0:0:0", "plain.raw"), "xvdb": ("0:0:1:0", "other.qcow2")}
"""The address of each disk when it is emulated, and its image. With a name other than xvd* there
would be no PV disk beside the emulated one."""
EMULATED = ("ata_piix", "sd_mod")
"""The guest's drivers for the emulated disks."""
ORDER = "/lib/modules/emulated"
KEEP = 'extra = "console=hvc0 panic=1 mitigations=off nokaslr xen_emul_unplug=unnecessary"\n'
"""The guest keeps the emulated disks beside the PV disks."""
WRITE = "yes {text} | dd of=/dev/{disk} bs=64k count=16 iflag=fullblock conv=fsync 2> /dev/null"
READ = (
    "blockdev --flushbufs /dev/{disk}; "
    "dd if=/dev/{disk} bs=64k count=16 iflag=direct 2> /dev/null | uniq -c"
)
LINES = str((1 << 20) // 17 + 1)
"""The lines that are read: a text of 16 characters each."""


def drivers(kernel: Kernel) -> bytes:
    """Returns an archive with the guest's drivers for emulated disks."""
    archive = Archive()
    names = add_modules(archive, kernel, EMULATED)
    archive.data(ORDER, "".join(f"{name}\n" for name in names))
    return gzip.compress(archive.to_bytes(), mtime=0)


def disks() -> list[RblkDisk]:
    """Returns the disks."""
    return [
        RblkDisk(vdev, f"{image.split('.')[1]}:{qdisk.PLACE}/{image}")
        for vdev, (_, image) in DISKS.items()
    ]


def is_connected(host: XenHost, guest: Guest, vdev: str) -> bool:
    """Returns `True` if the device model is connected to the NBD socket of a disk."""
    socket = host.sh(f"readlink -f /run/rblk/{guest.domid}-{CODES[vdev]}.nbd").strip()
    # A connection has the path of the socket that has accepted it, and the state connected.
    return bool(host.sh(f"grep ' 0001 03 .* {socket}$' /proc/net/unix || :"))


def name_of(guest: Guest, address: str) -> str:
    """Returns the name of an emulated disk. The kernel looks for all at the same time."""
    directory = f"/sys/bus/scsi/devices/{address}/block"
    guest.wait_for(f"[ -b /dev/$(ls {directory}) ]")
    return guest.sh(f"ls {directory}").strip()


def test_tap_hvm(xen: StartHost, kernel: Kernel) -> None:
    """What is written to one is read from the other; and the guest unplugs the emulated ones."""
    options = hvm.host_options(kernel, IMAGES, rblktap.QEMU_TOOLS)
    programs = rblkd.options()
    files = {**options["files"], **programs["files"], "emulated.packed": drivers(kernel)}
    host = xen(**{**options, **programs, "files": files})
    hvm.prepare(host)
    rblktap.install_tools(host, f"{qdisk.PLACE}/{qdisk.TOOLS}")
    rblkd.install(host, mount=False)
    rblkd.start(host)

    guest = hvm.start_guest(host, *disks(), settings=KEEP)
    guest.unpack("/payload/emulated.packed")
    guest.sh(f"while read -r name; do insmod /lib/modules/$name.ko; done < {ORDER}")
    for pv, (address, _) in DISKS.items():
        guest.wait_for_disk(pv)
        assert_served_by_pair(host, guest, pv)
        assert is_connected(host, guest, pv)
        emulated = name_of(guest, address)
        for first, second in ((pv, emulated), (emulated, pv)):
            text = secrets.token_hex(8)
            guest.sh(WRITE.format(text=text, disk=first))
            # Each line is the text, and the last one has no end.
            assert guest.sh(READ.format(disk=second)).split() == [LINES, text]
    guest.shut_down()

    guest = hvm.start_guest(host, *disks())
    assert "unplug emulated disks" in guest.sh("dmesg")
    for pv in DISKS:
        guest.wait_for_disk(pv)
        assert_served_by_pair(host, guest, pv)
        assert not is_connected(host, guest, pv)
