#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""Boots a machine, runs a shell script in it, prints what came out.

For development, before there is a scenario:
    scripts/in-root qemu-test/try.py plain --module x.ko 'insmod /modules/x.ko; ls /sys/block'
"""

import argparse
import sys
import time
from pathlib import Path

from harness.kernel import Kernel
from harness.plain import PlainVm


def main():
    """Parses the command line and runs one machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["plain"])
    parser.add_argument("--kernel", required=True, help="directory of a prepared kernel")
    parser.add_argument("--module", action="append", default=[], help="a .ko to put into /modules")
    parser.add_argument("--logs", default=None, help="where logs go (default: a name of this run)")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=300)
    parser.add_argument("script")
    options = parser.parse_args()
    logs = Path(options.logs or f"build/test-logs/try-{time.time_ns() // 10**6}")
    vm = PlainVm(Kernel(options.kernel), logs, options.module, cpus=options.cpus)
    try:
        status, output = vm.run(options.script, options.timeout)
        print(output)
        vm.stop()
    finally:
        vm.machine.kill()
        print(f"console: {vm.machine.console_log}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
