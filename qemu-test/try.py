#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Boots a machine, runs a shell script in it, prints what came out.

For development, before there is a scenario: scripts/in-root qemu-test/try.py plain --kernel DIR
--module x.ko 'insmod /modules/x.ko; ls /sys/block' scripts/in-root qemu-test/try.py xen
--kernel DIR --pair R/C 'cat /proc/partitions'
"""

import argparse
import sys
import time
from pathlib import Path

from harness.guest_snapshot import SnapshotWithGuest
from harness.kernel import Kernel
from harness.native import NativeVm
from harness.pairs import pair
from harness.snapshot import Snapshot
from harness.xenhost import Disk
from harness.xenhost import XenHost


def plain(options: argparse.Namespace, logs: Path) -> int:
    """Runs a script in a machine without Xen."""
    vm = NativeVm(Kernel(options.kernel), logs, options.module, cpus=options.cpus or 2)
    try:
        vm.boot()
        status, output = vm.run(options.script, options.timeout)
        print(output)
        vm.finish()
    finally:
        vm.close()
    return status


def xen(options: argparse.Namespace, logs: Path) -> int:
    """Runs a script in a guest with a disk, on a Xen host with the pair's backend."""
    kernel = Kernel(options.kernel)
    build = Path(options.build or f"build/{kernel.release}")
    kind = {"type": options.type, "vcpus": options.cpus}
    kind = {name: value for name, value in kind.items() if value}
    snapshot = Snapshot(kernel) if kind else SnapshotWithGuest(kernel)
    host = XenHost(snapshot, pair(options.pair, kernel, build), logs, options.module)
    with host.running():
        host.load_backend()
        host.ram_disks()
        print(host.sh(options.dom0, options.timeout))
        guest = host.start_guest(disks=[Disk()] if options.disk else [], **kind)
        status, output = guest.run(options.script, options.timeout)
        print(output)
        print(host.sh(options.then, options.timeout))
    return status


def main() -> int:
    """Parses the command line and runs one machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["plain", "xen"])
    parser.add_argument("--kernel", required=True, help="directory of a prepared kernel")
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        help="a .ko to put along (plain: /modules, dom0: /payload/modules)",
    )
    parser.add_argument("--logs", default=None, help="where logs go (default: a name of this run)")
    parser.add_argument(
        "--cpus", type=int, default=None, help="of the machine without Xen (2) or the guest (1)"
    )
    parser.add_argument("--timeout", type=int, default=300)
    parser.add_argument("--pair", default="C/C", help="xen: FRONT/BACK, each C or R")
    parser.add_argument("--build", default=None, help="xen: directory with our modules")
    parser.add_argument("--type", default=None, help="xen: pv or pvh")
    parser.add_argument(
        "--no-disk", dest="disk", action="store_false", help="xen: a guest without a disk"
    )
    parser.add_argument(
        "--dom0", default="true", help="xen: script for dom0 before the guest starts"
    )
    parser.add_argument("--then", default="true", help="xen: script for dom0 after the guest's")
    parser.add_argument("script", help="runs in the machine without Xen or in the guest")
    options = parser.parse_args()
    logs = Path(options.logs or f"build/test-logs/try-{time.time_ns() // 10**6}").resolve()
    print(f"logs: {logs}", file=sys.stderr)
    return {"plain": plain, "xen": xen}[options.kind](options, logs)


if __name__ == "__main__":
    sys.exit(main())
