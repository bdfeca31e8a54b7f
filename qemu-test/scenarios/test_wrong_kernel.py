# SPDX-License-Identifier: GPL-2.0
"""A module is refused, with both versions named, by a kernel that it was not built for.

There is no control: the C modules come with their kernel, so that the question
does not arise for them.
"""

from conftest import BUILD
from conftest import kernels
from harness.kernel import Kernel

MODULES = ("rblkfront", "rblkback")


def test_wrong_kernel(plain_vm, kernel):
    releases = {Kernel(directory).release for directory in kernels().values()}
    others = sorted(releases - {kernel.release})
    assert others, "this scenario needs a second kernel: run it without KERNEL="
    vm = plain_vm(modules=[BUILD / others[0] / f"{name}.ko" for name in MODULES])
    for name in MODULES:
        status, _output = vm.run(f"insmod /modules/{name}.ko")
        assert status != 0
        assert f"{name}: version magic '{others[0]} " in vm.sh("dmesg")
        assert f"should be '{kernel.release} " in vm.sh("dmesg")
        assert vm.run(f"grep -q {name} /proc/modules")[0] == 1
