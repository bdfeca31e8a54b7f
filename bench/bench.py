#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""Counts what an I/O costs, with the C pair and with ours, and prints a table.

    bench.py --kernel DIR --build DIR [--pairs C/C,R/R] [--types pv,pvh] [--cells 4k,1m]
             [--settings fixed,stock] [--out FILE] [--base FILE]

fixed   the guest's scheduler is none and its clock is read without a trap: what
        the drivers cost. stock: both as they come, what a user gets.
floor   the same load on a RAM disk in the guest, and on the one in dom0: what is
        left if the way between the two domains costs nothing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from cells import chosen
from counted import LOAD_FLAGS
from counted import PLUGIN_FLAGS
from counted import base_symbols
from counted import compiled
from counted import points
from counted import read_windows
from measure import measured
from report import print_report

from harness.kernel import Kernel
from harness.pairs import pair as pair_called
from harness.snapshot import Snapshot
from harness.xenhost import XenHost

SETTINGS = {"fixed": 'tsc_mode="native"', "stock": ""}
MEGABYTES = 64
FILL = "dd if=/dev/zero of=/dev/ram0 bs=1M 2>/dev/null || true; sync"
DRAM = "/dev/ram0"


class Run:
    """One boot: a pair and a kind of guest, with all cells."""

    def __init__(self, options, snapshot, symbols, pair, kind, setting):
        self.options = options
        self.pair, self.kind, self.setting = pair, kind, setting
        name = f"{pair.name}-{kind}-{setting}".replace("/", "")
        self.logs = Path(options.logs) / name
        self.symbols = symbols
        self._snapshot = snapshot
        self._windows = []
        self._modules = {}

    def __call__(self, cells, floors):
        """Boots, runs the cells and returns what they cost."""
        self.logs.parent.mkdir(parents=True, exist_ok=True)
        place = self.logs.with_suffix(".points")
        counts = self.logs.with_suffix(".counts")
        place.write_text(points(*self.symbols))
        plugin = compiled("count.c", *PLUGIN_FLAGS)
        self._load = compiled("load.c", *LOAD_FLAGS)
        brd = self.options.kernel_object.with_dependencies(["brd"]) and self._brd()
        host = XenHost(
            self._snapshot, self.pair, self.logs, modules=[brd], programs=[self._load],
            extra=["-plugin", f"{plugin},points={place.resolve()},out={counts.resolve()}"],
        )  # fmt: skip
        try:
            host.boot()
            self._run(host, cells, floors)
            host.finish()
        except BaseException:
            host.collect()
            raise
        finally:
            host.close()
        windows = read_windows(counts)
        return [
            measured(windows[number], where, cell, ios, nanoseconds, self.symbols, self._modules)
            | {"pair": self.pair.name, "type": self.kind, "setting": self.setting}
            for number, (where, cell, ios, nanoseconds) in enumerate(self._windows)
        ]

    def _brd(self):
        path = self.logs.with_name("brd.ko")
        path.write_bytes(self.options.kernel_object.module("brd"))
        return path

    def _run(self, host, cells, floors):
        host.load_backend()
        host.ram_disks(1, MEGABYTES)
        host.sh(FILL)
        guest = host.start_guest(type=self.kind, memory=320, settings=SETTINGS[self.setting])
        if self.setting == "fixed":
            guest.sh("echo none > /sys/block/xvda/queue/scheduler")
        if floors:
            guest.sh(f"insmod /modules/brd.ko rd_nr=1 rd_size={MEGABYTES * 1024}; {FILL}")
        look = "grep '\\[' /proc/kallsyms"
        self._modules = {"load": guest.sh(look), "other": host.sh(look)}
        program = f"/programs/{self._load.name}"
        for cell in cells:
            self._cell(guest, "pair", cell, f"{program} ", "/dev/xvda")
            if floors and cell.kind != "idle":
                self._cell(guest, "guest", cell, program, DRAM)
                self._cell(host, "dom0", cell, f"/payload{program}", DRAM)

    def _cell(self, machine, where, cell, program, device):
        number = len(self._windows)
        start = time.monotonic()
        output = machine.sh(f"{program} {cell.arguments(device, number)}", timeout=1200)
        ios, nanoseconds = map(int, output.split())
        self._windows.append((where, cell, ios, nanoseconds))
        took = time.monotonic() - start
        print(
            f"  {self.pair.name} {self.kind} {self.setting}: {cell.name} on {where}: "
            f"{nanoseconds // ios} instructions each ({took:.0f} s)",
            file=sys.stderr,
        )


def main():
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--build", required=True)
    parser.add_argument("--pairs", default="C/C,R/R,R/C,C/R")
    parser.add_argument("--types", default="pv")
    parser.add_argument("--settings", default="fixed")
    parser.add_argument("--cells", default="")
    parser.add_argument("--no-floors", dest="floors", action="store_false")
    parser.add_argument("--logs", default="build/bench")
    parser.add_argument("--out", default="build/bench/results.json")
    parser.add_argument("--base", default=None)
    options = parser.parse_args()

    start = time.monotonic()
    kernel = options.kernel_object = Kernel(options.kernel)
    snapshot = Snapshot(kernel, counted=True)
    pairs = [pair_called(name, kernel, options.build) for name in options.pairs.split(",")]
    symbols = base_symbols(snapshot, pairs[0])
    cells = chosen(options.cells)
    results = []
    for kind in options.types.split(","):
        for setting in options.settings.split(","):
            for pair in pairs:
                floors = options.floors and pair is pairs[0] and setting == "fixed"
                results += Run(options, snapshot, symbols, pair, kind, setting)(cells, floors)
    document = {"kernel": kernel.release, "results": results}
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
    base = json.loads(Path(options.base).read_text()) if options.base else None
    print_report(document, base)
    print(f"{options.out}: took {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
