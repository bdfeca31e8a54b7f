# SPDX-License-Identifier: GPL-2.0-only
"""A Xen host as a scenario sees it: dom0's shell, guests, disks.

pair       which frontend and which backend serve the disks, see pairs.py
vdev       the disk's name in the guest, such as xvda
backend    the domain that serves it: dom0, or a driver domain
target     what the backend serves, a block device of that domain
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from .cpio import Archive
from .guest import NOT_STARTED
from .guest import Guest
from .guest import Kind
from .guest import wait_in
from .image import add_built_module
from .image import add_program
from .image import module_at
from .shell import CommandFailed
from .shell import MachineTrouble
from .shell import Shell
from .shell import announcement
from .snapshot import DISK_SIZES
from .snapshot import blank
from .snapshot import resume
from .storage import Storage
from .toolstack import CODES
from .toolstack import directories

if TYPE_CHECKING:
    from .pairs import Pair
    from .snapshot import Snapshot


@dataclass
class Disk:
    """One disk of a guest, as in its xl configuration."""

    vdev: str = "xvda"
    target: str = "/dev/ram0"
    mode: str = "rw"
    backend: str | None = None
    """The host's server by default."""

    def specification(self, server: Server) -> str:
        """Returns the disk in xl's syntax."""
        backend = self.backend or server.name
        return (
            f"format=raw,vdev={self.vdev},access={self.mode},backend={backend},"
            f"script=blk-min,target={self.target}"
        )


class XenHost:
    """A Xen host; after `boot` dom0 is ready, and no backend loaded yet.

    Without a `pair` the payload is empty, and there is nothing to load.

    `image` is copied to the disk that dom0 sees as /dev/vdb; after the end of
    the scenario the copy is at `self.disk` for inspection. With
    `log_writes` QEMU logs the writes to that disk, see writelog.py. `programs`
    are in /payload/programs of dom0 and in /programs of each guest; `tools` of
    the build root, with their libraries, and `files`, content by name, are below
    /payload; `storage_files`, executables by path, are in each driver domain; `extra` are more
    arguments for QEMU. `image` may be a function of the
    part of the guest's initramfs that has the frontend.
    """

    name, domid = "Domain-0", 0

    def __init__(
        self,
        snapshot: Snapshot,
        pair: Pair | None,
        logs: str | Path,
        modules: Sequence[str | Path] = (),
        image: Path | Callable[[bytes], Path] | None = None,
        front_parameters: str = "",
        log_writes: bool = False,
        programs: Sequence[str | Path] = (),
        extra: Sequence[str] = (),
        tools: Sequence[str] = (),
        files: Mapping[str, str | bytes] | None = None,
        storage_files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.logs = Path(logs).resolve()
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self._pair = pair
        self.memory_factor = snapshot.memory_factor
        self.guest_type = snapshot.guest_type
        self.has_checks = snapshot.has_checks
        self._waiting = snapshot.waiting
        self._server_waits = self._waiting is not None and self.has_checks
        self.guests: dict[str, Guest] = {}
        self.server: Server = self
        """The domain that serves disks, see `start_server`."""
        self.disk = self.logs / "disk"
        payload = self.logs / "payload"
        front = self._write_payload(
            payload, modules, programs, front_parameters, tools, files or {}, storage_files or {}
        )
        if callable(image):
            image = image(front)
        if image:
            shutil.copy(image, self.disk)
        blank(self.disk, DISK_SIZES["disk"])
        self.write_log = self.logs / "writes"
        self.machine = snapshot.start(
            self.logs,
            {"payload": payload, "disk": self.disk},
            self.write_log if log_writes else None,
            extra,
        )

    @property
    def has_pair(self) -> bool:
        """Returns `True` if there are drivers under test; a snapshot is made without any."""
        return self._pair is not None

    @property
    def pair(self) -> Pair:
        """Returns the drivers under test."""
        if self._pair is None:
            raise ValueError("this host was started without a pair")
        return self._pair

    def boot(self) -> None:
        """Resumes from the snapshot and unpacks the payload."""
        resume(self.machine)
        self.sh(
            f"{announcement(self.logs)}; "
            "mkdir -p /payload && cd /payload && cpio -id < /dev/vda 2>/dev/null"
        )

    @contextmanager
    def running(self) -> Iterator[XenHost]:
        """Runs the host from boot to end outside of pytest, and collects logs after a failure."""
        try:
            self.boot()
            yield self
            self.finish()
        except BaseException:
            self.collect()
            raise
        finally:
            self.close()

    def _write_payload(
        self,
        path: Path,
        modules: Sequence[str | Path],
        programs: Sequence[str | Path],
        front_parameters: str,
        tools: Sequence[str],
        files: Mapping[str, str | bytes],
        storage_files: Mapping[str, bytes],
    ) -> bytes:
        if not self.has_pair:
            blank(path, DISK_SIZES["payload"])
            return b""
        front = Archive()
        add_built_module(front, f"/modules/{self.pair.front.name}.ko", self.pair.front.file)
        front.data("/modules/load", f"{self.pair.front.name} {front_parameters}\n")
        storage = Archive()
        payload = Archive()
        for archive, driver in ((storage, self.pair.storage), (payload, self.pair.back)):
            if driver:
                add_built_module(archive, f"/modules/{driver.name}.ko", driver.file)
        for tool in tools:
            add_program(payload, tool)
        for name, content in files.items():
            payload.data(f"/{name}", content)
        for name, executable in storage_files.items():
            storage.data(name, executable, 0o755)
        for module in modules:
            for archive in (front, storage, payload):
                add_built_module(archive, f"/modules/{Path(module).name}", module)
        for program in programs:
            for archive in (front, payload):
                archive.file(f"/programs/{Path(program).name}", program)
        for name, archive in (("guest", front), ("storage", storage)):
            payload.data(f"/{name}.cpio", archive.to_bytes())
            if archive is front or self._server_waits:
                payload.data(f"/{name}.packed", gzip.compress(archive.to_bytes(), mtime=0))
        payload.write(path)
        blank(path, DISK_SIZES["payload"])
        return front.to_bytes()

    def sh(self, command: str, timeout: float = 120) -> str:
        """Runs a shell script in dom0; it must succeed. Returns its output."""
        return self.machine.shell.check(command, timeout)

    def run(self, command: str, timeout: float = 120) -> tuple[int, str]:
        """Runs a shell script in dom0; returns status and output."""
        return self.machine.shell.run(command, timeout)

    def load_backend(self, parameters: str = "") -> None:
        """Loads the pair's backend."""
        self.sh(f"insmod /payload/modules/{self.pair.backend.name}.ko {parameters}")

    def unload_backend(self) -> None:
        """Unloads the pair's backend."""
        self.sh(f"rmmod {self.pair.backend.name}")

    def insmod(self, name: str, parameters: str = "") -> None:
        """Loads a module of dom0's image or of the payload."""
        self.sh(module_at(name, parameters, "/payload/modules"))

    def ram_disks(self, count: int = 1, megabytes: int = 64) -> None:
        """Creates RAM disks in dom0, from /dev/ram0."""
        self.insmod("brd", f"rd_nr={count} rd_size={megabytes * 1024}")

    def start_guest(
        self,
        name: str = "guest",
        disks: Iterable[Disk] = (Disk(),),
        root: str | None = None,
        settings: str = "",
        loader: str | None = None,
        initramfs: str | None = None,
        **kind: Any,
    ) -> Guest:
        """Starts a DomU and waits until its agent answers; `kind` are the fields of `Kind`.

        If a guest waits, the first one is that: it booted before the scenario, and
        gets disks and frontend now. `settings` are more lines for the xl
        configuration; `loader`, a file of dom0, is started in place of the kernel, and
        `initramfs`, another one, is what the kernel gets in place of ours.
        """
        self.server.start_devd()
        guest = self.guests[name] = Guest(self, name, settings, loader, initramfs)
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            guest.start(Kind(**kind), disks, root)
        elif kind or root or settings or loader or initramfs or name != "guest":
            raise ValueError(f"the guest that waits is {waiting}: ask for another by xen(waiting=)")
        else:
            guest.take_over(disks)
        return guest

    def start_storage(self, name: str = "storage", settings: str = "", **kind: Any) -> Storage:
        """Starts a driver domain, see storage.py, or takes over the one that waits.

        `settings` are more lines for the xl configuration of one that is started.
        """
        storage = self.guests[name] = Storage(self, name, settings)
        if self._server_waits and not settings:
            storage.take_over()
        else:
            storage.start(Kind(**kind))
        self._server_waits = False
        return storage

    def start_server(self) -> Server:
        """Returns the domain that serves disks, dom0 or a driver domain; no backend is loaded yet.

        If the kernel under test cannot be dom0, the backend under test is in a driver domain. A
        scenario with a disk of dom0 does not call this.
        """
        if self.has_checks:
            self.server = self.start_storage()
        return self.server

    def allow(self, text: str) -> None:
        """Ignores console lines that contain `text`, which this scenario causes."""
        self.machine.allow(text)

    def take_back_memory(self) -> None:
        """Does nothing: the stock kernel maps pages outside of its memory. See storage.py."""

    def start_devd(self) -> None:
        """Does nothing: in dom0 xl itself runs the hotplug script. See storage.py."""

    def stop_devd(self) -> None:
        """Does nothing: without xl, only the scenario writes nodes."""

    def attach(self, guest: Guest, disk: Disk) -> None:
        """Attaches a disk with `xl block-attach`."""
        self.server.start_devd()
        self.sh(f"xl block-attach {guest.name} '{disk.specification(self.server)}'")

    def detach(self, guest: Guest, vdev: str) -> None:
        """Detaches a disk with `xl block-detach`."""
        self.sh(f"xl block-detach {guest.name} {vdev}")

    def detach_and_wait(self, guest: Guest, vdev: str, server: Server | None = None) -> None:
        """Detaches a disk, and waits until both drivers have removed it."""
        self.detach(guest, vdev)
        guest.wait_for(f"[ ! -b /dev/{vdev} ]")
        back = directories(guest.domid, CODES[vdev], server or self.server)[1]
        self.wait_for(f"! xenstore-exists {back}")

    def wait_for(self, condition: str, timeout: float = 120) -> None:
        """Waits until a shell condition holds in dom0."""
        wait_in(self, condition, timeout)

    def xenstore_read(self, path: str) -> str | None:
        """Returns the value of a xenstore node, or `None` if it does not exist."""
        status, output = self.run(f"xenstore-read {path}")
        return output.strip() if status == 0 else None

    def xen_messages(self, key: str) -> str:
        """Returns what Xen prints for one of its debug keys."""
        return self.sh(f"xl dmesg -c >/dev/null; xl debug-keys {key}; sleep 1; xl dmesg")

    def finish(self) -> None:
        """Ends a scenario that has passed; all consoles must be clean."""
        for guest in sorted(self.guests.values(), key=lambda guest: guest.serves):
            guest.shut_down()
        self.sh("echo scenario complete > /dev/console")
        self.machine.wait_for_console("scenario complete", timeout=300)
        self.machine.watch()

    def collect(self) -> None:
        """Collects logs for the analysis of a failure; does not raise."""
        looks = {
            "xenstore.txt": "xenstore-ls -fp",
            "dmesg-dom0.txt": "dmesg",
            "xl-list.txt": "xl list -v; xl vcpu-list",
            "xl-dmesg.txt": "xl dmesg",
            "xl-logs.txt": "tail -n 100 /var/log/xen/*.log",
            "dom0-processes.txt": "ps; cat /proc/meminfo; lsmod",
        }
        for name, command in looks.items():
            self._collect(name, partial(self._output, self.machine.shell, command, 30))
        for guest in self.guests.values():
            self._collect(f"console-{guest.name}.txt", guest.console)
            if guest.domid != NOT_STARTED:
                dmesg = partial(self._output, guest.shell, "dmesg", 60)
                self._collect(f"dmesg-{guest.name}.txt", dmesg)

    def close(self) -> None:
        """Ends the machine and removes what only it needed."""
        self.machine.kill()
        for name in ("payload", "disk", "writes"):
            (self.logs / name).unlink(missing_ok=True)

    @staticmethod
    def _output(shell: Shell, command: str, timeout: float) -> str:
        return shell.run(command, timeout)[1]

    def _collect(self, name: str, look: Callable[[], str]) -> None:
        try:
            with self.machine.shell.unwatched():
                text = look()
        except (CommandFailed, MachineTrouble, OSError) as problem:
            text = f"not available: {problem}\n"
        (self.logs / name).write_text(text)


Server = XenHost | Storage
"""A domain that serves disks."""
