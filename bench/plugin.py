# SPDX-License-Identifier: GPL-2.0-only
"""Builds the workload and the QEMU plugin that counts, and reads what the plugin has counted.

workload  I/O of one kind on a disk, see workloads.py
window    the part of a workload that is counted, see load.c
symbols   addresses and names of the functions of Xen and of the kernels
"""

from __future__ import annotations

import bisect
import gzip
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "qemu-test"))

from harness.cache import CACHE
from harness.cache import key_of
from harness.cache import made_once
from harness.xenhost import XenHost

if TYPE_CHECKING:
    from harness.guest import Guest
    from harness.pairs import Driver
    from harness.pairs import Pair
    from harness.snapshot import Snapshot

LOAD_FLAGS = ("-static", "-Wl,--section-start=.window=0x5b1c0000")
PLUGIN_FLAGS = ("-shared", "-fPIC", "-fvisibility=hidden")

XEN_TEXT = 0xFFFF82D000000000
"""Start of Xen, which ends at XEN_END in the address space of every domain."""
XEN_END = 0xFFFF830000000000
KERNEL = 0xFFFF800000000000
"""Start of the kernel of a domain."""
MODULES = 0xFFFFFFFFC0000000


def compiled(name: str, *flags: str) -> Path:
    """Returns a compiled program or plugin of this directory."""
    source = HERE / name
    header = HERE / "qemu_plugin.h"

    def make(path: Path) -> None:
        command = ["gcc", "-O2", "-Wall", "-Werror", *flags, "-o", str(path), str(source)]
        subprocess.run(command, check=True)

    return made_once(CACHE / "bench" / f"{source.stem}-{key_of(source, header, *flags)}", make)


Code = tuple[str, Path, int]
"""Name, file and address of the text section of a module."""


@dataclass
class Symbols:
    """Functions by address."""

    addresses: list[int]
    names: list[str]

    @classmethod
    def parse(cls, text: str) -> Symbols:
        """Reads lines "ADDRESS TYPE NAME"."""
        lines = re.finditer(r"^([0-9a-f]{16}) \w (\S+)", text, re.MULTILINE)
        return cls.of([(int(line.group(1), 16), line.group(2)) for line in lines])

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, str]]) -> Symbols:
        """Creates it from pairs of an address and a name."""
        pairs = sorted(pairs)
        return cls([address for address, _ in pairs], [name for _, name in pairs])

    def name(self, address: int) -> str:
        """Returns the name of the function that contains `address`."""
        place = bisect.bisect_right(self.addresses, address) - 1
        return self.names[place] if place >= 0 else hex(address)

    def address(self, name: str) -> int | None:
        """Returns the address of a function, or `None` if it does not exist."""
        try:
            return self.addresses[self.names.index(name)]
        except ValueError:
            return None


def base_symbols(snapshot: Snapshot, pair: Pair) -> tuple[Symbols, Symbols]:
    """Returns the functions of Xen and of the kernel, which are read once from a running host."""

    def make(path: Path) -> None:
        host = XenHost(snapshot, pair, path.with_name(path.name + ".logs"))
        try:
            host.boot()
            host.sh(
                "(cat /proc/xen/xensyms; echo; grep -v '\\[' /proc/kallsyms) | gzip > /tmp/all.gz"
            )
            size = int(host.sh("stat -c %s /tmp/all.gz"))
            host.sh("dd if=/tmp/all.gz of=/dev/vdb bs=64k conv=fsync 2>/dev/null")
            with host.disk.open("rb") as disk:
                path.write_bytes(disk.read(size))
        finally:
            host.close()

    path = made_once(CACHE / "bench" / f"symbols-{snapshot.key}", make)
    text = gzip.decompress(path.read_bytes()).decode()
    xen, _, linux = text.partition("\n\n")
    return Symbols.parse(xen), Symbols.parse(linux)


def code_of(machine: Guest | XenHost, drivers: Iterable[Driver]) -> list[Code]:
    """Returns name, file and address of the text section of loaded modules."""
    show = "cat /sys/module/{}/sections/.text"
    return [
        (driver.name, driver.file, int(machine.sh(show.format(driver.name.replace("-", "_"))), 16))
        for driver in drivers
    ]


def module_symbols(places: Iterable[Code]) -> Symbols:
    """Returns the functions of modules, see `code_of`, and one "(module)" for all others."""
    found = [(MODULES, "(module)")]
    for module, file, base in places:
        command = ["nm", "-C", "-f", "sysv", str(file)]
        text = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        end = base
        for line in text.splitlines():
            fields = [field.strip() for field in line.split("|")]
            if fields[-1] == ".text" and fields[3] == "FUNC":
                start = base + int(fields[1], 16)
                end = max(end, start + int(fields[4], 16))
                found.append((start, f"{fields[0]} [{module}]"))
        found.append((end, "(module)"))
    return Symbols.of(found)


def text_size(file: Path) -> int:
    """Returns the size of the code of a module in bytes."""
    text = subprocess.run(
        ["size", "-A", str(file)], stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    fields = (line.split() for line in text.splitlines())
    return sum(int(line[1]) for line in fields if line and "text" in line[0])


HYPERCALLS = (
    "grant_table_op", "event_channel_op", "sched_op", "set_timer_op", "vcpu_op", "iret", "mmuext_op",
    "mmu_update", "update_va_mapping", "multicall", "physdev_op", "memory_op", "xen_version",
    "set_segment_base", "stack_switch", "fpu_taskswitch", "update_descriptor", "console_io",
)  # fmt: skip
"""The hypercalls that are counted, by the functions of Xen that serve them."""

LINUX_EVENTS = {
    "switches": ("__switch_to_asm", "-"),
    "copied": ("memcpy", "rdx"),
    "pages_copied": ("copy_page", "-"),
    "allocations": ("kmem_cache_alloc_noprof", "-"),
    "kmalloc": ("__kmalloc_noprof", "-"),
    "kmalloc_cache": ("__kmalloc_cache_noprof", "-"),
    "upcalls": ("xen_evtchn_do_upcall", "-"),
    "wakes": ("try_to_wake_up", "-"),
}
"""What is counted in the kernels: the function, and the register whose values are summed."""

XEN_EVENTS = {"xen_copied": ("memcpy", "rdx"), "flushes": ("flush_area_mask", "-")}


def points(xen: Symbols, linux: Symbols) -> str:
    """Returns the plugin's configuration: what it counts."""
    lines = [f"switch {xen.address('context_switch'):x}"]
    for name in HYPERCALLS:
        address = xen.address(f"do_{name}")
        if address:
            keyed = name in ("grant_table_op", "event_channel_op")
            amount = "rdx" if name == "grant_table_op" else "-"
            lines.append(f"event hc:{name} {address:x} {'rdi' if keyed else '-'} {amount}")
    for symbols, events in ((xen, XEN_EVENTS), (linux, LINUX_EVENTS)):
        for name, (function, amount) in events.items():
            address = symbols.address(function)
            if address:
                lines.append(f"event {name} {address:x} - {amount}")
    return "".join(f"{line}\n" for line in lines)


@dataclass
class Window:
    """The raw counts of one window, by slot."""

    number: int
    slot: int
    blocks: list[tuple[int, int, int]]
    events: list[tuple[Any, ...]]

    def places(self, dom0: int) -> dict[int, str]:
        """Returns who runs in each slot: guest, dom0 or idle. `dom0` is the slot of its CPU."""
        outside = {slot for address, _, slot in self.blocks if not XEN_TEXT <= address < XEN_END}
        return {
            slot: "idle" if slot not in outside else "dom0" if slot == dom0 else "guest"
            for _, _, slot in self.blocks
        }


def read_windows(path: Path) -> dict[int, Window]:
    """Returns the windows of a run of the plugin, by number."""
    windows: dict[int, Window] = {}
    for line in Path(path).read_text().splitlines():
        kind, *fields = line.split()
        if kind == "window":
            window = Window(int(fields[0]), int(fields[1]), [], [])
            windows[window.number] = window
        elif kind == "block":
            window.blocks.append(
                (int(fields[0], 16), int(fields[1]) * int(fields[3]), int(fields[2]))
            )
        else:
            window.events.append((fields[0], *map(int, fields[1:])))
    return windows
