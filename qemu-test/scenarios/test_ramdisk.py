# SPDX-License-Identifier: GPL-2.0-only
"""Our block layer without Xen: the RAM disk rblk_ramdisk.ko in a machine without Xen.

Its module parameters choose how requests are completed; see
rust/samples/ramdisk/ramdisk.rs.
"""

from pathlib import Path

import pytest

from harness.fixtures import StartVm
from harness.guest import wait_in
from harness.leak_counts import assert_no_lost_memory
from harness.native import NativeVm
from harness.ramdisk import DISK
from harness.ramdisk import pull_out
from harness.ramdisk import unload

PARAMETERS = "/sys/module/rblk_ramdisk/parameters"
FIO = (
    f"fio --name=whole --filename={DISK} --ioengine=libaio --iodepth=16 --direct=1 --rw=randwrite "
    "--bsrange=512-256k --blockalign=512 --size=100% --verify=crc32c --verify_fatal=1 --randseed=7 --output-format=terse"
)


@pytest.fixture
def vm(native_vm: StartVm, test_modules: Path) -> NativeVm:
    """A machine that has the module, not loaded yet."""
    return native_vm(modules=[test_modules / "rblk_ramdisk.ko"], shared=True)


def test_ramdisk_data(vm: NativeVm) -> None:
    """Data is right in each mode of completion and with any number of queues."""
    for mode in (0, 1, 2, 5, 6):
        vm.insmod("rblk_ramdisk", f"queues=2 every=3 mode={mode}")
        assert vm.sh(f"blockdev --getsize64 {DISK}") == str(16 << 20)
        vm.sh(FIO, timeout=300)
        unload(vm)
        assert vm.run(f"[ -e {DISK} ]")[0] == 1


def test_ramdisk_flush(vm: NativeVm) -> None:
    """fsync reaches the driver as a flush if and only if the disk has a write cache."""
    flushes = "awk '{print $16}' /sys/block/rblk0/stat"
    for cache, expected in ((1, 5), (0, 0)):
        vm.insmod("rblk_ramdisk", f"write_cache={cache}")
        vm.sh(
            f"for i in 1 2 3 4 5; do dd if=/dev/zero of={DISK} bs=4k seek=$i count=1 conv=fsync,notrunc; done"
        )
        assert int(vm.sh(flushes)) == expected
        unload(vm)


def test_ramdisk_timeout(vm: NativeVm) -> None:
    """A request that is not completed times out with an error."""
    vm.machine.allow("error, dev rblk0")
    vm.machine.allow("Buffer I/O error on dev")
    vm.insmod("rblk_ramdisk", "timeout_ms=1000")
    vm.sh(f"echo 3 > {PARAMETERS}/mode")
    assert vm.run(f"dd if=/dev/zero of={DISK} bs=4k count=1 oflag=direct", timeout=120)[0] != 0
    vm.sh(f"echo 0 > {PARAMETERS}/mode")
    vm.sh(f"dd if=/dev/zero of={DISK} bs=4k count=1 oflag=direct")
    assert "timed out" in vm.sh("dmesg")
    unload(vm)


def test_ramdisk_resize(vm: NativeVm) -> None:
    """The disk grows and shrinks while it is open."""
    vm.insmod("rblk_ramdisk")
    for size in (32, 8, 64):
        vm.sh(f"echo {size} > {PARAMETERS}/size_mib")
        wait_in(vm, f"[ $(blockdev --getsize64 {DISK}) = {size << 20} ]", 60)
    vm.sh(f"dd if=/dev/urandom of={DISK} bs=1M seek=60 count=4 oflag=direct")
    unload(vm)


def test_ramdisk_removal(vm: NativeVm) -> None:
    """The disk is removed with requests in flight, which fail."""
    vm.machine.allow("error, dev rblk0")
    vm.machine.allow("Buffer I/O error on dev")
    vm.insmod("rblk_ramdisk")
    vm.sh(f"echo 3 > {PARAMETERS}/mode")
    vm.sh(
        f"(dd if=/dev/zero of={DISK} bs=4k count=1 oflag=direct && echo done > /tmp/end || echo error > /tmp/end) >/dev/null 2>&1 &"
    )
    wait_in(vm, "[ $(awk '{print $9}' /sys/block/rblk0/stat) -gt 0 ]", 60)
    pull_out(vm)
    wait_in(vm, "[ -s /tmp/end ]", 60)
    assert vm.sh("cat /tmp/end") == "error"
    unload(vm)


def test_ramdisk_busy(vm: NativeVm) -> None:
    """The module cannot be unloaded while it has a disk, or while a removed disk is open."""
    vm.insmod("rblk_ramdisk")
    assert vm.run("rmmod rblk_ramdisk")[0] != 0
    vm.sh(f"sleep 1000 < {DISK} > /dev/null 2>&1 & echo $! > /tmp/opener")
    pull_out(vm)
    assert vm.run("rmmod rblk_ramdisk")[0] != 0
    vm.sh("kill $(cat /tmp/opener)")
    unload(vm)


def test_ramdisk_lost_memory(vm: NativeVm) -> None:
    """Leaked memory is found by the check at the end of each scenario on this kernel."""
    vm.insmod("rblk_ramdisk")
    assert_no_lost_memory(vm)
    unload(vm)
    vm.insmod("rblk_ramdisk", "lose=20")
    with pytest.raises(AssertionError, match="memory that nothing points to"):
        assert_no_lost_memory(vm)
    unload(vm)
    vm.sh("echo clear > /sys/kernel/debug/kmemleak")
