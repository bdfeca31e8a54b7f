#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Counts instructions, hypercalls and copies per I/O with the C pair and ours, and prints tables.

Each pair boots once per kind of guest and setting:

nosched        no I/O scheduler in the guest, whose clock is read without a trap: the cost of the
               drivers
nonpersistent  the same with feature_persistent=0 in both drivers
queues         four virtual CPUs with a ring each, in real time: what runs is counted, but the
               number of requests in a batch is chance
large-ring     the same with rings of 16 pages and requests of 256 segments
default        everything as it is by default: what a user gets
qcow2          nosched with a qcow2 image on the RAM disk, for backends in user space

With nosched and the first pair the workloads also run on a RAM disk in the guest and on the one in
dom0. This baseline is what is left if the path between the domains costs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends import EMPTY
from backends import IMAGE_MIB
from backends import QCOW2_MIB
from backends import backend_of
from disks import measure_disks
from disks import show
from draw import draw
from measure import measured
from page import write_disks
from page import write_page
from page import write_queues
from page import write_tap
from plugin import LOAD_FLAGS
from plugin import PLUGIN_FLAGS
from plugin import base_symbols
from plugin import code_of
from plugin import compiled
from plugin import module_symbols
from plugin import points
from plugin import read_windows
from plugin import text_size
from queues import MEASURES
from queues import RATIOS
from queues import measure_queues
from report import COLUMNS
from report import TAP_COLUMNS
from report import merged
from report import print_profile
from report import print_report
from workloads import PARALLEL
from workloads import QUEUES
from workloads import chosen

from harness.kernel import Kernel
from harness.kernel import build_id
from harness.pairs import Driver
from harness.pairs import pair as pair_called
from harness.snapshot import Snapshot
from harness.xenhost import XenHost

if TYPE_CHECKING:
    from plugin import Code
    from plugin import Symbols
    from report import Document
    from report import Result
    from workloads import Workload

    from harness.guest import Guest
    from harness.pairs import Pair

MEGABYTES = IMAGE_MIB
FLUSHED = "/run/flushed"
BASELINES = {"xvda": "/dev/ram0", "xvdc": "/dev/nullb0"}
"""Disks of the guest with a baseline, and the device of the same kind that is used without the
pair."""
DOM0_WINDOW = 1000
"""Number of the window in which dom0 sleeps for a second, which identifies its slot."""
PARAMETERS = {
    "nonpersistent": ("feature_persistent=0", "feature_persistent=0"),
    "queues": ("", f"max_queues={QUEUES}"),
    "large-ring": ("max_indirect_segments=256 max_ring_page_order=4", f"max_queues={QUEUES}"),
}
"""Module parameters of the frontend and of the backend for each setting that has any."""


class Run:
    """One boot: a pair, a kind of guest and a setting, with all workloads."""

    def __init__(
        self,
        options: argparse.Namespace,
        snapshot: Snapshot,
        symbols: tuple[Symbols, Symbols],
        pair: Pair,
        kind: str,
        setting: str,
    ) -> None:
        self.options = options
        self.pair, self.kind, self.setting = pair, kind, setting
        self.logs = Path(options.logs) / f"{pair.name}-{kind}-{setting}".replace("/", "")
        self.symbols = symbols
        self._parameters = PARAMETERS.get(setting, ("", ""))
        self._snapshot = snapshot
        self._backend = backend_of(pair, options.profile)
        self._windows: list[tuple[str, Workload, int, int]] = []
        self._user: dict[str, Symbols] = {}
        self._code: dict[str, list[Code]] = {}

    def __call__(self, workloads: Sequence[Workload], baselines: bool) -> list[Result]:
        """Boots, runs the workloads and returns what they cost."""
        self.logs.parent.mkdir(parents=True, exist_ok=True)
        place = self.logs.with_suffix(".points")
        counts = self.logs.with_suffix(".counts")
        place.write_text(points(*self.symbols))
        plugin = compiled("count.c", *PLUGIN_FLAGS)
        self._load = compiled("load.c", *LOAD_FLAGS)
        devices = [self._module(name) for name in ("brd", "null_blk", "configfs")]
        host = XenHost(
            self._snapshot, self.pair, self.logs, modules=[device.file for device in devices],
            programs=[self._load], front_parameters=self._parameters[0],
            extra=["-plugin", f"{plugin},points={place.resolve()},out={counts.resolve()}"],
            **self._backend.host_options(),
        )  # fmt: skip
        with host.running():
            guest = self._start(host, devices, baselines)
            for workload in workloads:
                self._measure(
                    host,
                    guest,
                    workload,
                    baselines and workload.bytes > 0 and workload.disk in BASELINES,
                )
        windows = read_windows(counts)
        dom0 = windows[DOM0_WINDOW].slot
        modules = {domain: module_symbols(places) for domain, places in self._code.items()}
        return [
            measured(
                windows[number],
                dom0,
                where,
                workload,
                ios,
                nanoseconds,
                self.symbols,
                modules,
                self._user,
            )
            | {"pair": self.pair.name, "type": self.kind, "setting": self.setting}
            for number, (where, workload, ios, nanoseconds) in enumerate(self._windows)
        ]

    def _module(self, name: str) -> Driver:
        path = self.logs.with_name(f"{name}.ko")
        path.write_bytes(self.options.kernel_object.module(name))
        return Driver(name, path, build_id(path))

    def _start(self, host: XenHost, devices: list[Driver], baselines: bool) -> Guest:
        """Starts a guest: xvda is a RAM disk, xvdb can be flushed, xvdc does nothing with data."""
        fill = f"dd if=/dev/zero of=/dev/ram0 bs=1M count={MEGABYTES} 2>/dev/null; sync"
        is_qcow2 = self.setting == "qcow2"
        self._backend.start(host, self._parameters[1])
        host.sh(f"/payload/programs/{self._load.name} - idle 0 0 1 {DOM0_WINDOW} 1")
        host.ram_disks(1, QCOW2_MIB if is_qcow2 else MEGABYTES)
        if is_qcow2:
            host.sh(f"dd if=/payload/{EMPTY} of=/dev/ram0 bs=64k conv=sync,fsync 2>/dev/null")
        else:
            host.sh(fill)
        host.sh(f"dd if=/dev/zero of={FLUSHED} bs=1M count=8 2>/dev/null")
        host.sh(f"losetup /dev/loop0 {FLUSHED}")
        do_nothing = "insmod {0}/configfs.ko && insmod {0}/null_blk.ko gb=1"
        host.sh(do_nothing.format("/payload/modules"))
        disks = [
            self._backend.disk("xvda", "/dev/ram0", "qcow2" if is_qcow2 else "raw"),
            self._backend.disk("xvdb", "/dev/loop0", "raw"),
            self._backend.disk("xvdc", "/dev/nullb0", "raw"),
        ]
        guest = host.start_guest(
            type=self.kind, memory=320, disks=disks, vcpus=QUEUES if self.setting in PARALLEL else 1,
            settings="" if self.setting == "default" else 'tsc_mode = "native"',
        )  # fmt: skip
        for disk in disks:
            guest.wait_for_disk(disk.vdev, timeout=600)
        if self.setting != "default":
            guest.sh("for disk in /sys/block/xvd*; do echo none > $disk/queue/scheduler; done")
        if is_qcow2:
            guest.sh(
                f"dd if=/dev/zero of=/dev/xvda bs=1M count={MEGABYTES} conv=fsync", timeout=600
            )
        if baselines:
            guest.sh(f"insmod /modules/brd.ko rd_nr=1 rd_size={MEGABYTES * 1024}; {fill}")
            guest.sh(do_nothing.format("/modules"))
        self._code = {
            "guest": code_of(guest, [self.pair.front, *devices * baselines]),
            "dom0": self._backend.code(host, devices),
        }
        if user := self._backend.user_symbols(host, guest):
            self._user = {"dom0": user}
        return guest

    def _measure(self, host: XenHost, guest: Guest, workload: Workload, baselines: bool) -> None:
        program = f"/programs/{self._load.name}"
        self._run_workload(guest, "pair", workload, program, f"/dev/{workload.disk}")
        if baselines:
            self._run_workload(guest, "guest", workload, program, BASELINES[workload.disk])
            self._run_workload(
                host, "dom0", workload, f"/payload{program}", BASELINES[workload.disk]
            )

    def _run_workload(
        self, machine: Guest | XenHost, where: str, workload: Workload, program: str, device: str
    ) -> None:
        number = len(self._windows)
        start = time.monotonic()
        output = machine.sh(f"{program} {workload.arguments(device, number)}", timeout=1200)
        ios, nanoseconds = map(int, output.split())
        self._windows.append((where, workload, ios, nanoseconds))
        took = time.monotonic() - start
        # Where processors run beside each other, time is that of the clock.
        unit = "ns" if self.setting in PARALLEL else "instructions"
        print(
            f"  {self.pair.name} {self.kind} {self.setting}: {workload.name} on {where}: "
            f"{nanoseconds // ios} {unit} each ({took:.0f} s)",
            file=sys.stderr,
        )


def parsed() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", required=True, help="a prepared kernel")
    parser.add_argument("--build", required=True, help="directory with our modules")
    parser.add_argument("--pairs", default="C/C,R/R,C/R,R/C", help="FRONT/BACK, ...")
    parser.add_argument("--types", default="pv", help="pv, pvh")
    parser.add_argument("--settings", default="nosched,nonpersistent,queues,large-ring,default")
    parser.add_argument("--workloads", default="", help="parts of names of workloads; all if empty")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--profile", action="store_true", help="print the functions too")
    parser.add_argument(
        "--disks", action="store_true", help="no loads, but what disks cost beside I/O"
    )
    parser.add_argument(
        "--queues", action="store_true", help="no counts, but the time of four queues"
    )
    parser.add_argument(
        "--tap",
        action="store_true",
        help="the pairs with rblktap and with QEMU, beside the modules",
    )
    parser.add_argument("--logs", default="build/bench")
    parser.add_argument("--out", default="build/bench/results.json")
    parser.add_argument("--base", help="results of an earlier run, to compare with")
    parser.add_argument(
        "--into", help="results of an earlier run, to replace those of the same name in"
    )
    parser.add_argument(
        "--page", help="directory for the table and the picture of the documentation"
    )
    options = parser.parse_args()
    if options.tap:
        options.baselines = False
        if options.settings == parser.get_default("settings"):
            options.settings = "nosched,qcow2"
        if options.pairs == parser.get_default("pairs"):
            options.pairs = "C/C,R/R,C/T,R/T,C/Q,R/Q"
    return options


def is_measured(kind: str, setting: str, pair: Pair) -> bool:
    """Returns `True` if a pair is measured with a kind of guest and a setting."""
    if setting == "large-ring" and pair.front.name == "xen-blkfront":
        # It allocates half a gigabyte for each ring.
        return False
    if setting == "qcow2":
        return pair.back is None
    mixed = len(set(pair.name.split("/"))) > 1
    return (kind == "pv" and setting == "nosched") or (
        not mixed and (kind == "pv" or setting not in PARALLEL)
    )


def run_all(options: argparse.Namespace) -> Document:
    """Boots and measures all that the command line asks for."""
    kernel = options.kernel_object = Kernel(options.kernel)
    pairs = [pair_called(name, kernel, options.build) for name in options.pairs.split(",")]
    symbols = base_symbols(Snapshot(kernel, icount=True), pairs[0])
    results = []
    for kind in options.types.split(","):
        for setting in options.settings.split(","):
            snapshot = Snapshot(kernel, icount=setting not in PARALLEL)
            workloads = chosen(options.workloads, setting)
            for pair in pairs:
                if not is_measured(kind, setting, pair):
                    continue
                baselines = options.baselines and pair is pairs[0] and setting == "nosched"
                results += Run(options, snapshot, symbols, pair, kind, setting)(
                    workloads, baselines
                )
    drivers = {
        driver.name: driver for pair in pairs for driver in (pair.front, pair.back) if driver
    }
    return {
        "kernel": kernel.release,
        "date": time.strftime("%B %Y"),
        "code": {name: text_size(driver.file) for name, driver in drivers.items()},
        "results": results,
    }


def run_disks(options: argparse.Namespace) -> None:
    """Boots each pair and prints what disks cost beside I/O."""
    kernel = Kernel(options.kernel)
    snapshot = Snapshot(kernel, icount=True)
    pairs = [pair_called(name, kernel, options.build) for name in options.pairs.split(",")]
    rows = [row for pair in pairs for row in measure_disks(options, snapshot, pair, options.types)]
    rows.sort(key=lambda row: row["disks"])
    print("\n".join(show(rows)))
    if options.page:
        write_disks(rows, Path(options.page) / "performance-disks.inc")


def run_queues(options: argparse.Namespace) -> None:
    """Boots the pairs in turns and prints how their times compare."""
    kernel = Kernel(options.kernel)
    pairs = [pair_called(name, kernel, options.build) for name in ("C/C", "R/R")]
    rows = measure_queues(options, kernel, pairs)
    for row in rows:
        ratios = " ".join(f"{name} {row[name]:.3f}" for name in RATIOS)
        print(f"{row['load']:20} {MEASURES[row['measure']]:24} {ratios}")
    if options.page:
        write_queues(rows, Path(options.page) / "performance-queues.inc")


def main() -> None:
    """Measures, writes the results, prints them."""
    options = parsed()
    if options.disks:
        run_disks(options)
        return
    if options.queues:
        run_queues(options)
        return
    base = json.loads(Path(options.base).read_text()) if options.base else None
    into = json.loads(Path(options.into).read_text()) if options.into else None
    start = time.monotonic()
    document = run_all(options)
    if into:
        document = merged(into, document)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print_report(document, base, TAP_COLUMNS if options.tap else COLUMNS)
    if options.profile:
        print_profile(document)
    if options.page and options.tap:
        write_tap(document, Path(options.page) / "performance-tap.inc")
    elif options.page:
        write_page(document, Path(options.page) / "performance-tables.inc")
        draw(document, Path(options.page) / "performance.svg")
    print(f"{out}: took {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
