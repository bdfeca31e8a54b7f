# SPDX-License-Identifier: GPL-2.0-only
"""A kernel that scenarios boot: its image and its loadable modules.

A prepared kernel is a directory that `scripts/lib/kernel-set` or
`scripts/lib/own-kernel` made: `vmlinuz` (the packed image), `vmlinux` (unpacked,
which boots faster), `modules/` (as in /lib/modules/RELEASE) and `O` (the object
directory for our own build).
"""

import lzma
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path


class Kernel:
    """One prepared kernel."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).resolve()
        self.release = (self.directory / "release").read_text().strip()
        self.vmlinuz = self.directory / "vmlinuz"
        self.vmlinux = self.directory / "vmlinux"
        self.is_stock = "-rblkif-" not in self.release
        """Set for a kernel of the distribution."""
        self.has_checks = self.release.endswith("-debug")
        """Set for our debug kernel, with KASAN, lockdep and kmemleak."""
        self.memory_factor = 2 if self.has_checks else 1
        """Factor for the memory of a machine, because of KASAN's shadow and the other checks."""
        configuration = (self.directory / "O/.config").read_text()
        is_pv = not self.has_checks and "CONFIG_PREEMPT_RT=y" not in configuration
        self.guest_type = "pv" if is_pv else "pvh"
        """A kernel with KASAN does not start as a PV domain, because it accesses its shadow memory
        before that is mapped, and one with PREEMPT_RT prints nothing there. So they cannot be dom0,
        and their guests are PVH."""
        self.can_be_dom0 = self.guest_type == "pv" and "CONFIG_XEN_DOM0=y" in configuration
        self._tree = self.directory / "modules"
        self._paths = {_name(path): path for path in self._tree.rglob("*.ko*")}
        text = (self._tree / "modules.builtin").read_text()
        self._builtin = {_name(Path(line)) for line in text.split()}
        self._needs: dict[str, list[str]] = {}

    def with_dependencies(self, names: Iterable[str]) -> list[str]:
        """Returns `names` and their dependencies, each module after those that it needs."""
        ordered: list[str] = []

        def visit(name: str) -> None:
            name = name.replace("-", "_")
            if name in ordered or name in self._builtin:
                return
            for need in self.needs(name):
                visit(need)
            if name not in ordered:
                ordered.append(name)

        for name in names:
            visit(name)
        return ordered

    def needs(self, name: str) -> list[str]:
        """Returns the modules that module `name` depends on, from its modinfo."""
        if name not in self._needs:
            match = re.search(rb"\0depends=([^\0]*)\0", b"\0" + self.module(name))
            text = match.group(1).decode() if match else ""
            self._needs[name] = [need for need in text.split(",") if need]
        return self._needs[name]

    def module(self, name: str) -> bytes:
        """Returns the uncompressed content of module `name`."""
        name = name.replace("-", "_")
        if name not in self._paths:
            raise LookupError(f"kernel {self.release} has no module {name}")
        path = self._paths[name]
        data = path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".zst":
            return subprocess.run(["zstd", "-dc", path], stdout=subprocess.PIPE, check=True).stdout
        return data

    def has(self, name: str) -> bool:
        """Returns `True` if the kernel has `name`, as a module or built in."""
        name = name.replace("-", "_")
        return name in self._paths or name in self._builtin


def build_id(module: str | Path) -> str:
    """Returns the build id (hex) in the GNU note of a module file."""
    command = ["readelf", "-n", str(module)]
    text = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    match = re.search(r"Build ID: ([0-9a-f]+)", text)
    if not match:
        raise LookupError(f"{module} carries no build id")
    return match.group(1)


def _name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")
