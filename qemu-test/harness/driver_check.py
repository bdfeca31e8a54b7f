# SPDX-License-Identifier: GPL-2.0-only
"""Checks that the drivers of a run's pair, and no others, serve a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .pairs import TAP

if TYPE_CHECKING:
    from .guest import Guest
    from .pairs import Driver
    from .shell import Target
    from .xenhost import Server
    from .xenhost import XenHost


def assert_served_by_pair(
    host: XenHost, guest: Guest, vdev: str = "xvda", server: Server | None = None
) -> None:
    """Checks that the loaded drivers are the files of this run's pair, and no others are present.

    The backend is that of the host's server or of another `server`, or QEMU in dom0.
    """
    server = server or host.server
    if host.pair.name.endswith(f"/{TAP}"):
        _assert_served_by_rblktap(server, guest, vdev)
    elif host.pair.back is None:
        _assert_served_by_qemu(host, guest, vdev)
    else:
        back = host.pair.back if server is host else host.pair.storage
        assert back is not None
        _assert_loaded(server, back)
    front = host.pair.front
    device = f"/sys/block/{vdev}/device/driver"
    look = f"readlink -f {device}/module || readlink -f {device}"
    driver = _assert_loaded(guest, front, look)
    assert driver.split("/")[-1] in (front.name.replace("-", "_"), "vbd"), driver


def assert_front_of_pair(host: XenHost, guest: Guest) -> None:
    """Checks the loaded frontend, where dom0's shell plays the backend."""
    _assert_loaded(guest, host.pair.front)


def _assert_served_by_qemu(host: XenHost, guest: Guest, vdev: str) -> None:
    """Asserts that the guest's QEMU process serves the disk, and that no backend is loaded."""
    domain = f"/local/domain/{guest.domid}"
    node = guest.sh(f"cat /sys/block/{vdev}/device/nodename")
    back, *seen = host.sh(
        f"back=$(xenstore-read {domain}/{node}/backend); echo $back; xenstore-read $back/state\n"
        f"readlink /proc/$(xenstore-read {domain}/image/device-model-pid)/exe\n"
        "find / -xdev -name '*blkback.ko*'; find /sys/module -maxdepth 1 -name '*blkback'"
    ).split()
    assert back.startswith(f"/local/domain/0/backend/qdisk/{guest.domid}/"), back
    assert seen == ["4", "/qemu/qemu"]


def _assert_served_by_rblktap(server: Server, guest: Guest, vdev: str) -> None:
    """Asserts that a process of rblktap serves the disk, and that there is no backend module."""
    node = guest.sh(f"cat /sys/block/{vdev}/device/nodename")
    back, *seen = server.sh(
        f"back=$(xenstore-read /local/domain/{guest.domid}/{node}/backend); echo $back\n"
        "xenstore-read $back/state\n"
        "readlink /proc/$(xenstore-read $back/kthread-pid)/exe\n"
        "find / -xdev -name '*blkback.ko*'; find /sys/module -maxdepth 1 -name '*blkback'"
    ).split()
    assert back.startswith(f"/local/domain/{server.domid}/backend/vbd3/{guest.domid}/"), back
    assert seen == ["4", "/payload/rblktap"]


OTHER = {
    "xen-blkfront": "rblkfront",
    "xen-blkback": "rblkback",
    "rblkfront": "xen-blkfront",
    "rblkback": "xen-blkback",
}
"""The other driver for the same devices, which must not be present."""


def loaded_build_id(machine: Target, module: str) -> str:
    """Returns the build id of a loaded module, from the kernel that runs it."""
    return _build_id(machine.sh(_NOTE.format(module.replace("-", "_"))))


_NOTE = "od -An -v -tx1 /sys/module/{}/notes/.note.gnu.build-id"


def _build_id(note: str) -> str:
    return "".join(note.split())[-40:]


def _assert_loaded(machine: Target, driver: Driver, look: str = ":") -> str:
    """Checks that only this driver for its devices is loaded; returns the output of `look`."""
    note = _NOTE.format(driver.name.replace("-", "_"))
    other = OTHER[driver.name].replace("-", "[-_]")
    seen = machine.sh(
        f"{note}; echo --; find / -xdev -name '{other}.ko*'\n"
        f"find /sys/module -maxdepth 1 -name '{other}'; echo --; {look}"
    )
    loaded, others, said = (part.strip() for part in seen.split("--"))
    assert _build_id(loaded) == driver.build_id
    assert not others, others
    return said
