# SPDX-License-Identifier: GPL-2.0-only
"""An HVM guest: firmware, and disks that QEMU emulates until Linux unplugs them.

The device model is the QEMU of qdisk.py. It loads the kernel and the initramfs itself, because
reading them through an emulated drive takes many minutes without hardware virtualization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from . import qdisk
from .xenhost import Disk

if TYPE_CHECKING:
    from .guest import Guest
    from .kernel import Kernel
    from .xenhost import Server
    from .xenhost import XenHost

FIRMWARE = (
    "/usr/lib/xen-4.20/boot/hvmloader", "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
)  # fmt: skip
"""Files of the build root that the guest needs besides QEMU."""
KERNEL = "vmlinuz"
"""A packed kernel, below /payload: QEMU does not boot another one."""
SETTINGS = f"""
kernel = "/payload/{KERNEL}"
vga = "none"
usb = 0
vnc = 0
firmware_override = "{qdisk.PLACE}/hvmloader"
bios_path_override = "{qdisk.PLACE}/bios-256k.bin"
"""
"""Of its xl configuration. xl uses the last of two lines for the kernel."""
INITRAMFS = "/run/hvm.gz"


class EmulatedDisk(Disk):
    """A disk that the device model has too: xl gives it none with a script or a backend domain."""

    def specification(self, _server: Server) -> str:
        """Returns the disk in xl's syntax."""
        return f"format=raw,vdev={self.vdev},access={self.mode},target={self.target}"


def host_options(
    kernel: Kernel, images: Sequence[tuple[str, str]] = (), tools: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the options of a host on which `start_guest` can start a guest.

    `images` and `tools` are those of `qdisk.disk`.
    """
    return {
        "waiting": None,
        "image": qdisk.disk(images, FIRMWARE, tools),
        "files": {KERNEL: kernel.vmlinuz.read_bytes()},
    }


def prepare(host: XenHost) -> None:
    """Makes what `start_guest` needs."""
    qdisk.mount(host)
    host.sh(f"cat /guest/initrd /payload/guest.cpio | gzip -1 > {INITRAMFS}")
    # The script that xl runs if the disk names none.
    host.sh("ln -s blk-min /etc/xen/scripts/block")


def start_guest(host: XenHost, *disks: Disk, settings: str = "") -> Guest:
    """Starts a guest; `settings` are more lines for the xl configuration."""
    return host.start_guest(
        disks=disks, settings=SETTINGS + settings, initramfs=INITRAMFS, type="hvm", memory=256
    )


def device_model(host: XenHost, guest: Guest) -> str:
    """Returns the directory in dom0's /proc of the QEMU process of the guest."""
    pid = host.xenstore_read(f"/local/domain/{guest.domid}/image/device-model-pid")
    return f"/proc/{pid}"
