# SPDX-License-Identifier: GPL-2.0-only
"""A Xen host as a scenario sees it: dom0's shell, guests, disks.

pair       which frontend and which backend serve the disks, see pairs.py
vdev       the disk's name in the guest, such as xvda
backend    the domain that serves it: dom0, or a driver domain
target     what the backend serves, a block device of that domain
"""

import gzip
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .cpio import Archive
from .guest import Guest
from .guest import Kind
from .guest import wait_in
from .image import add_built_module
from .image import add_program
from .image import module_at
from .shell import CommandFailed
from .shell import MachineTrouble
from .shell import announcement
from .snapshot import DISK_SIZES
from .snapshot import blank
from .snapshot import resume
from .storage import Storage
from .toolstack import CODES
from .toolstack import directories


@dataclass
class Disk:
    """One disk of a guest, as in its xl configuration."""

    vdev: str = "xvda"
    target: str = "/dev/ram0"
    mode: str = "rw"
    backend: str | None = None
    """The host's server if not said."""

    def specification(self, server):
        """The disk in xl's syntax."""
        backend = self.backend or server.name
        return (
            f"format=raw,vdev={self.vdev},access={self.mode},backend={backend},"
            f"script=blk-min,target={self.target}"
        )


class XenHost:
    """A Xen host; after `boot` dom0 is ready, and no backend loaded yet.

    Without a `pair` the payload is empty, and there is nothing to load.

    `image` is copied to the disk that dom0 sees as /dev/vdb; after the end of
    the scenario the copy is at `self.disk` for a look from outside. With
    `log_writes` QEMU logs the writes to that disk, see writelog.py. `programs`
    are in /payload/programs of dom0 and in /programs of each guest; `tools` of
    the build root, with their libraries, and `files`, content by name, are below
    /payload; `extra` are more arguments for QEMU. `image` may be a function of the
    part of the guest's initramfs that has the frontend.
    """

    name, domid = "Domain-0", 0

    def __init__(
        self, snapshot, pair, logs, modules=(), image=None, front_parameters="", log_writes=False,
        programs=(), extra=(), tools=(), files=None,
    ):  # fmt: skip
        self.logs = Path(logs).resolve()
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.pair = pair
        self.memory_factor = snapshot.memory_factor
        self.guest_type = snapshot.guest_type
        self.has_checks = snapshot.has_checks
        self._waiting = snapshot.waiting
        self._server_waits = self._waiting is not None and self.has_checks
        self.guests = {}
        self.server = self
        """Who serves disks, see `start_server`."""
        self.disk = self.logs / "disk"
        payload = self.logs / "payload"
        front = self._write_payload(
            payload, modules, programs, front_parameters, tools, files or {}
        )
        if callable(image):
            image = image(front)
        if image:
            shutil.copy(image, self.disk)
        blank(self.disk, DISK_SIZES["disk"])
        self.write_log = self.logs / "writes" if log_writes else None
        self.machine = snapshot.start(
            self.logs, {"payload": payload, "disk": self.disk}, self.write_log, extra
        )

    def boot(self):
        """Goes on from the snapshot and unpacks what the scenario brings."""
        resume(self.machine)
        self.sh(
            f"{announcement(self.logs)}; "
            "mkdir -p /payload && cd /payload && cpio -id < /dev/vda 2>/dev/null"
        )

    @contextmanager
    def running(self):
        """From boot to end, for who is no scenario; collects what helps if that fails."""
        try:
            self.boot()
            yield self
            self.finish()
        except BaseException:
            self.collect()
            raise
        finally:
            self.close()

    def _write_payload(self, path, modules, programs, front_parameters, tools, files):
        if self.pair is None:
            blank(path, DISK_SIZES["payload"])
            return b""
        front = Archive()
        add_built_module(front, f"/modules/{self.pair.front.name}.ko", self.pair.front.file)
        front.data("/modules/load", f"{self.pair.front.name} {front_parameters}\n")
        storage = Archive()
        payload = Archive()
        if self.pair.back:
            for archive, driver in ((storage, self.pair.storage), (payload, self.pair.back)):
                add_built_module(archive, f"/modules/{driver.name}.ko", driver.file)
        for tool in tools:
            add_program(payload, tool)
        for name, content in files.items():
            payload.data(f"/{name}", content)
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

    def sh(self, command, timeout=120):
        """Runs a shell script in dom0; it must succeed. Returns its output."""
        return self.machine.shell.check(command, timeout)

    def run(self, command, timeout=120):
        """Runs a shell script in dom0; returns status and output."""
        return self.machine.shell.run(command, timeout)

    def load_backend(self, parameters=""):
        """Loads the pair's backend."""
        self.sh(f"insmod /payload/modules/{self.pair.back.name}.ko {parameters}")

    def unload_backend(self):
        """Unloads the pair's backend."""
        self.sh(f"rmmod {self.pair.back.name}")

    def insmod(self, name, parameters=""):
        """Loads a module of dom0's image or of the payload."""
        self.sh(module_at(name, parameters, "/payload/modules"))

    def ram_disks(self, count=1, megabytes=64):
        """Makes /dev/ram0 and on: disks in dom0's memory."""
        self.insmod("brd", f"rd_nr={count} rd_size={megabytes * 1024}")

    def start_guest(
        self, name="guest", disks=(Disk(),), root=None, settings="", loader=None, initramfs=None, **kind
    ):  # fmt: skip
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

    def start_storage(self, name="storage", settings="", **kind):
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

    def start_server(self):
        """Who is to serve the disks: this host, or a driver domain. It has no backend loaded yet.

        If the kernel under test cannot be dom0, only the latter has the backend under test. A
        scenario that needs dom0 to serve, because of a disk that it has, does not ask for this.
        """
        if self.has_checks:
            self.server = self.start_storage()
        return self.server

    def allow(self, text):
        """Lets console lines that contain `text` pass: this scenario provokes them."""
        self.machine.allow(text)

    def take_back_memory(self):
        """Nothing: the stock kernel maps pages where it has no memory. See storage.py."""

    def start_devd(self):
        """Nothing: in dom0 xl itself runs the hotplug script. See storage.py."""

    def stop_devd(self):
        """Nothing, as above: who does not call xl has nodes for himself."""

    def attach(self, guest, disk):
        """xl block-attach."""
        self.server.start_devd()
        self.sh(f"xl block-attach {guest.name} '{disk.specification(self.server)}'")

    def detach(self, guest, vdev):
        """xl block-detach."""
        self.sh(f"xl block-detach {guest.name} {vdev}")

    def detach_and_wait(self, guest, vdev, server=None):
        """Detaches a disk, and waits until neither half has anything of it."""
        self.detach(guest, vdev)
        guest.wait_for(f"[ ! -b /dev/{vdev} ]")
        back = directories(guest.domid, CODES[vdev], server or self.server)[1]
        self.wait_for(f"! xenstore-exists {back}")

    def wait_for(self, condition, timeout=120):
        """Waits until a shell condition holds in dom0."""
        wait_in(self, condition, timeout)

    def xenstore_read(self, path):
        """The value of a xenstore node, or None where there is none."""
        status, output = self.run(f"xenstore-read {path}")
        return output.strip() if status == 0 else None

    def xen_messages(self, key):
        """What Xen prints for one of its debug keys."""
        return self.sh(f"xl dmesg -c >/dev/null; xl debug-keys {key}; sleep 1; xl dmesg")

    def finish(self):
        """The end of a scenario that went well: all consoles must be clean."""
        for guest in sorted(self.guests.values(), key=lambda guest: guest.serves):
            guest.shut_down()
        self.sh("echo scenario complete > /dev/console")
        self.machine.wait_for_console("scenario complete", timeout=300)
        self.machine.watch()

    def collect(self):
        """Keeps what helps to understand a failure; never raises."""
        looks = {
            "xenstore.txt": "xenstore-ls -fp",
            "dmesg-dom0.txt": "dmesg",
            "xl-list.txt": "xl list -v; xl vcpu-list",
            "xl-dmesg.txt": "xl dmesg",
            "xl-logs.txt": "tail -n 100 /var/log/xen/*.log",
            "dom0-processes.txt": "ps; cat /proc/meminfo; lsmod",
        }
        for name, command in looks.items():
            self._collect(name, lambda command=command: self.machine.shell.run(command, 30)[1])
        for guest in self.guests.values():
            self._collect(f"console-{guest.name}.txt", guest.console)
            if guest.shell:
                self._collect(
                    f"dmesg-{guest.name}.txt", lambda guest=guest: guest.run("dmesg", 60)[1]
                )

    def close(self):
        """Ends the machine and removes what only it needed."""
        self.machine.kill()
        for name in ("payload", "disk", "writes"):
            (self.logs / name).unlink(missing_ok=True)

    def _collect(self, name, look):
        try:
            with self.machine.shell.unwatched():
                text = look()
        except (CommandFailed, MachineTrouble, OSError) as problem:
            text = f"not available: {problem}\n"
        (self.logs / name).write_text(text)
