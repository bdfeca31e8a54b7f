# SPDX-License-Identifier: GPL-2.0-only
"""A kernel that a module was not built for refuses it with a message that names both versions.

There is no reference: the C modules come with their kernel, so that the question
does not arise for them.
"""

from conftest import BUILD

from harness.fixtures import StartVm
from harness.kernel import Kernel

MODULES = ("rblkfront", "rblkback")


def test_wrong_kernel(native_vm: StartVm, kernel: Kernel, other_kernel: Kernel) -> None:
    other = other_kernel.release
    vm = native_vm(modules=[BUILD / other / f"{name}.ko" for name in MODULES])
    for name in MODULES:
        status, _output = vm.run(f"insmod /modules/{name}.ko")
        assert status != 0
        assert f"{name}: version magic '{other} " in vm.sh("dmesg")
        assert f"should be '{kernel.release} " in vm.sh("dmesg")
        assert vm.run(f"grep -q {name} /proc/modules")[0] == 1
