# SPDX-License-Identifier: GPL-2.0-only
"""A DomU of a Xen host, as a scenario sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .console_check import trouble_in
from .leak_counts import assert_checked
from .shell import CommandFailed
from .shell import MachineTrouble
from .shell import Shell
from .shell import announcement
from .shell import encode
from .shell import until

if TYPE_CHECKING:
    from .shell import Target
    from .xenhost import Disk
    from .xenhost import XenHost

LOG = "/var/log/xen/console/guest-{name}.log"
"""The file in dom0 to which xenconsoled writes a guest's console."""

END = "guest complete"
"""The last line on a guest's console before it is powered off."""

POWER_OFF = "cd /; sync; mount -o remount,ro / || true; poweroff -f"

DRIVER = "/sys/bus/xen/drivers/vbd"
"""The frontend's directory in a guest's sysfs: xenbus holds its module while a disk is bound."""

NOT_THE_AGENTS = r"!/^#/ && /[^A-Za-z0-9+\/=\r]/"
"""An awk condition for lines of a guest's console that are not the agent's."""

READY = "/run/{name}.ready"
"""A file in dom0 that exists when a guest's agent has started."""

_FOLLOW_CONSOLE = """rm -f {ready}; : > {log}; (tail -f {log} |
awk '/#agent ready/ {{ print > "{ready}"; close("{ready}") }}
{lines} {{ print "({name}) " $0 > "/dev/console"; fflush("/dev/console") }}'
) > /dev/null 2>&1 &"""
"""Copies a guest's console to dom0's console, and notices the start of its agent."""

NOT_STARTED = -1
"""The domain id of a guest that has not been started."""

BOOT_S = 1200
"""Time limit for a boot in seconds; the slowest, a PVH guest with GRUB, takes under 50 s."""


class GuestShell(Shell):
    """The agent of a DomU, reached through dom0 and the DomU's console."""

    def __init__(self, host: XenHost, line: str) -> None:
        super().__init__()
        self._host = host
        self._line = line

    def exchange(self, number: int, request: str, timeout: float, command: str) -> str:
        """Passes the request on through the agent of dom0."""
        line = f"{number} {request}"
        status, answer = self._host.machine.shell.pass_on(self._line, int(timeout), line)
        if status != 0:
            raise CommandFailed(
                f"no answer from the guest within {timeout} s to: {command}\n{answer[-500:]}"
            )
        return answer

    def send(self, command: str) -> None:
        """Starts a shell script and awaits no answer: the guest goes away."""
        line = f"{self.next_number()} run {encode(command)}"
        self._host.machine.shell.pass_on(self._line, 0, line)


@dataclass(frozen=True)
class Kind:
    """The properties of a guest besides its disks."""

    type: str | None = None
    """pv or pvh; by default what its kernel supports."""
    vcpus: int = 1
    memory: int = 192
    """In MiB, without the memory for checks in its kernel."""
    fio: bool = False
    """Adds fio and memory for it."""


TWO_VCPUS = Kind(vcpus=2, fio=True)
"""For more than one ring, or for fio: one kind for both, so that they share a snapshot."""

FOUR_VCPUS = Kind(vcpus=4, memory=432, fio=True)
"""For many rings."""


class Guest:
    """One DomU."""

    parts: tuple[str, ...] = ("/guest/initrd", "/payload/guest.cpio")
    """The parts of its initramfs, files of dom0."""
    serves = False
    """Set for a domain that serves others and is shut down last."""

    def __init__(
        self,
        host: XenHost,
        name: str,
        settings: str = "",
        loader: str | None = None,
        initramfs: str | None = None,
    ) -> None:
        self.host = host
        self.name = name
        self._settings = settings
        self._loader = loader
        if initramfs:
            self.parts = (initramfs,)
        self.domid = NOT_STARTED
        self._shell: GuestShell | None = None
        self._destroyed = False
        self._allowed: list[str] = []

    def start(self, kind: Kind, disks: Iterable[Disk] = (), root: str | None = None) -> None:
        """Creates the domain with `xl create` and waits for its agent."""
        type = kind.type or self.host.guest_type
        memory = (kind.memory + 128 * kind.fio) * self.host.memory_factor
        extra = "console=hvc0 panic=1 mitigations=off nokaslr loglevel=5"
        if root:
            extra += f" root=/dev/{root} rw"
        boot = f'kernel = "/guest/vmlinux"\nramdisk = "/run/{self.name}.initrd"\nextra = "{extra}"'
        if self._loader:
            boot = f'kernel = "{self._loader}"'
        listed = ", ".join(f'"{disk.specification(self.host.server)}"' for disk in disks)
        configuration = f"""
name = "{self.name}"
type = "{type}"
vcpus = {kind.vcpus}
memory = {memory}
{boot}
disk = [ {listed} ]
on_crash = "destroy"
on_reboot = "destroy"
{self._settings}
"""
        self.host.sh(f"cat > /run/{self.name}.cfg << 'EOF'\n{configuration}\nEOF")
        paths = {"log": LOG.format(name=self.name), "ready": READY.format(name=self.name)}
        self.host.sh(_FOLLOW_CONSOLE.format(**paths, lines=NOT_THE_AGENTS, name=self.name))
        parts = " ".join([*self.parts, *(["/guest/fio"] if kind.fio else [])])
        self.host.sh(f"cat {parts} > /run/{self.name}.initrd")
        self.host.sh(f"xl create /run/{self.name}.cfg", timeout=240)
        self._find()
        self._wait_for_agent()
        if self.host.has_pair:
            self.sh(announcement(self.host.logs))

    def take_over(self, disks: Iterable[Disk]) -> None:
        """Takes over the guest of this name from the snapshot: like `start`, without a boot."""
        self.find_waiting()
        for disk in disks:
            self.host.attach(self, disk)
        self.unpack("/payload/guest.packed")
        self.sh("load-modules")

    def find_waiting(self) -> None:
        """Finds the domain of this name, whose agent has answered other requests before."""
        self._find()
        self.shell.skip_numbers()
        self.sh(announcement(self.host.logs))

    def unpack(self, file: str) -> None:
        """Brings an archive that gzip has packed, a file of dom0, into the guest."""
        nodes = f"/local/domain/{self.domid}/file"
        self.host.sh(f"store-file put {file} {nodes}")
        self.sh(f"set -o pipefail; store-file get {nodes} | gunzip | (cd / && cpio -id)")
        self.host.sh(f"xenstore-rm {nodes}")

    def save(self, place: str) -> None:
        """Saves the guest with `xl save`; it is gone until it is restored."""
        self.host.sh(f"xl save {self.name} {place}", timeout=300)

    def restore(self, place: str) -> None:
        """Restores the guest with `xl restore`, as another domain with new backends."""
        self.host.sh(f"xl restore {place}", timeout=300)
        self._find()

    def _find(self) -> None:
        """Finds the domain of this name and the path to its agent."""
        domid, terminal = self.host.sh(
            f"id=$(xl domid {self.name}); echo $id $(xenstore-read /local/domain/$id/console/tty)"
        ).split()
        self.domid = int(domid)
        self._shell = GuestShell(self.host, terminal)

    def sh(self, command: str, timeout: float = 120) -> str:
        """Runs a shell script in the guest; it must succeed. Returns its output."""
        return self.shell.check(command, timeout)

    def run(self, command: str, timeout: float = 120) -> tuple[int, str]:
        """Runs a shell script in the guest; returns status and output."""
        return self.shell.run(command, timeout)

    def wait_for(self, condition: str, timeout: float = 120) -> None:
        """Waits until a shell condition holds in the guest."""
        wait_in(self, condition, timeout)

    def wait_for_disk(self, vdev: str, timeout: float = 120) -> None:
        """Waits until the guest has the disk as a block device."""
        self.wait_for(f"[ -b /dev/{vdev} ]", timeout)

    def load_frontend(self, parameters: str = "") -> None:
        """Loads the pair's frontend again."""
        self.sh(
            f"insmod $(ls /modules/{self.front}.ko /run/modules/{self.front}.ko 2>/dev/null) {parameters}"
        )

    def unload_frontend(self) -> None:
        """Unbinds all disks from the pair's frontend and unloads it."""
        self.sh(
            f"cd {DRIVER}; for disk in vbd-*; do [ ! -e $disk ] || echo $disk > unbind; done\n"
            f"rmmod {self.front}"
        )

    def reload_frontend(self) -> None:
        """Unloads and loads the frontend; all disks are closed and come back."""
        self.unload_frontend()
        self.wait_for_backends()
        self.load_frontend()
        self.ask_for_disks()

    def rebind_disk(self, code: int) -> None:
        """Unbinds a disk from the frontend through sysfs, and binds it again."""
        device = f"vbd-{code}"
        self.sh(f"cd {DRIVER}; echo {device} > unbind; [ ! -e {device} ]")
        self.wait_for_backends(code)
        self.sh(f"cd {DRIVER}; echo {device} > bind")
        self.ask_for_disks()

    def wait_for_backends(self, disks: int | None = None) -> None:
        """Waits until the backends of these disks, by number, or of all have seen the frontend go.

        The C frontend believes that a backend which is still connected to its predecessor is
        connected to it, and its requests are never completed.
        """
        if self.front == "xen-blkfront":
            directory = f"/local/domain/{self.domid}/device/vbd"
            states = (
                f"for disk in {disks or f'$(xenstore-list {directory})'}; do "
                f"xenstore-read $(xenstore-read {directory}/$disk/backend)/state; done"
            )
            self.host.wait_for(f"! {{ {states}; }} | grep -q '[45]'")

    def ask_for_disks(self) -> None:
        """Makes a frontend that was unbound from its disks connect to them again."""
        if self.front == "xen-blkfront":
            # The C frontend stays in state 6 until the toolstack resets it.
            directory = f"/local/domain/{self.domid}/device/vbd"
            self.host.sh(
                f"for disk in $(xenstore-list {directory}); do xenstore-write {directory}/$disk/state 1; done"
            )

    @property
    def front(self) -> str:
        """Returns the name of the pair's frontend module."""
        return self.host.pair.front.name

    @property
    def has_checks(self) -> bool:
        """Returns `True` if its kernel is the debug kernel."""
        return self.host.has_checks

    @property
    def shell(self) -> GuestShell:
        """Returns the agent; raises `MachineTrouble` if the guest has not been started."""
        if self._shell is None:
            raise MachineTrouble(f"{self.name} was not started")
        return self._shell

    def is_alive(self) -> bool:
        """Returns `True` if the domain exists."""
        return (
            self.domid != NOT_STARTED
            and self.host.run(f"xenstore-exists /local/domain/{self.domid}")[0] == 0
        )

    def console(self) -> str:
        """Returns the text of the guest's console, without the agent's lines."""
        return self.host.sh(f"awk '{NOT_THE_AGENTS}' {LOG.format(name=self.name)}")

    def allow(self, text: str) -> None:
        """Lets console lines that contain `text` pass: this scenario provokes them."""
        self._allowed.append(text)
        self.host.machine.allow(text)

    def shut_down(self, timeout: float = 120) -> None:
        """Powers the guest off from inside; its console must be clean to the end, and have one.

        A guest that the scenario has not destroyed must be there.
        """
        if not self._destroyed:
            if not self.is_alive():
                raise MachineTrouble(f"{self.name} has ended by itself:\n{self.console()[-3000:]}")
            if self.host.has_checks:
                assert_checked(self)
            self.sh(f"echo {END} > /dev/console")
            self.shell.send(POWER_OFF)
            self._wait_gone(timeout)
        self.check_console()
        self.host.guests.pop(self.name, None)

    def destroy(self) -> None:
        """Destroys the guest with `xl destroy`.

        Xen keeps pages of the domain that a disk with I/O in flight still uses.
        """
        self.host.sh(f"xl destroy {self.name}")
        self._destroyed = True
        self._wait_gone(60)

    def check_console(self) -> None:
        """Keeps the console in the logs and raises if it shows trouble."""
        text = self.console()
        (self.host.logs / f"console-{self.name}.txt").write_text(text)
        bad = [
            line
            for line in trouble_in(text)
            if not any(allowed in line for allowed in self._allowed)
        ]
        if bad:
            raise MachineTrouble(f"the console of {self.name} shows:\n" + "\n".join(bad[:20]))
        if not self._destroyed and END not in text:
            raise MachineTrouble(f"the console of {self.name} has no end:\n{text[-3000:]}")

    def _wait_for_agent(self) -> None:
        """Waits for the agent; looks for the domain rarely, because programs slow down the boot."""
        ready = f"[ -e {READY.format(name=self.name)} ]"
        ended = f"! xenstore-exists /local/domain/{self.domid}"
        asked = f"asked=$((asked + 1)); [ $((asked % 16)) = 0 ] && {ended}"
        wait_in(self.host, f"{ready} || {{ {asked}; }}", BOOT_S)
        if not self.is_alive():
            raise MachineTrouble(f"{self.name} ended while starting:\n{self.console()[-3000:]}")

    def _wait_gone(self, timeout: float) -> None:
        wait_in(self.host, f"! xenstore-exists /local/domain/{self.domid}", timeout)


def wait_in(machine: Target, condition: str, timeout: float) -> None:
    """Waits until a shell condition holds in dom0 or a guest."""
    status, output = machine.run(until(condition, int(timeout), "exit 9"), timeout + 30)
    if status != 0:
        raise CommandFailed(f"after {timeout} s still not: {condition}\n{output}")
