# SPDX-License-Identifier: GPL-2.0-only
"""The storage daemons of a test, which run outside of the machine, and what dom0 needs for them.

scripts/cluster-tests starts the daemons in a network namespace, and the tests, with their QEMU, in
the same one. QEMU passes the connections of dom0 on.

RBLKIF_KERNEL is the prepared kernel, RBLKIF_CLUSTER_ROOT the root of the daemons, RBLKIF_PROGRAMS
the directory of rblk, rblkd and rblktap, RBLKIF_LOGS the directory of logs.
"""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import rblkd
from harness.cache import CACHE
from harness.cache import key_of
from harness.cache import made_once
from harness.cpio import Archive
from harness.image import libraries_of
from harness.kernel import Kernel
from harness.pairs import pair
from harness.snapshot import Snapshot
from harness.xenhost import XenHost
from harness.xenimage import ext4_image

TREE = Path(__file__).resolve().parents[2]
PORT = 4000
"""The port of rust/engine/tests/engines/machine.rs."""
COMMAND_S = 300
"""Time limit of a command, in seconds."""
LIBRARIES = "usr/lib/x86_64-linux-gnu"
CLIENTS = ("librbd.so.1", "librados.so.2", "libgfapi.so.0")
PLACE = "/cluster"
"""Where dom0 mounts the libraries."""
NETWORK = (
    "-netdev", "user,id=net{forward}",
    "-device", "virtio-net-pci,netdev=net,disable-legacy=on,iommu_platform=on,romfile=",
)  # fmt: skip
"""QEMU's arguments for dom0's network. The machine was saved without this device."""
DRIVERS = ("failover", "net_failover", "virtio_net")
GATEWAY, ADDRESS = "10.0.2.2", "10.0.2.15"
"""The first one is the loopback device of the namespace."""

_CONNECT = f"""
ip link set lo up
for module in {" ".join(DRIVERS)}; do insmod /payload/$module.ko; done
echo 1 > /sys/bus/pci/rescan
until [ -e /sys/class/net/eth0 ]; do usleep 100000; done
ip address add {ADDRESS}/24 dev eth0
ip link set eth0 up
ip route add default via {GATEWAY}
"""

_MOUNT = f"""
mkdir -p {PLACE} /{LIBRARIES} /var/log/glusterfs /etc/ceph /etc/rblk
mount -t ext4 -o ro /dev/vdb {PLACE}
for library in {PLACE}/lib/*; do
	name=/lib/x86_64-linux-gnu/${{library##*/}}
	[ -e $name ] || ln -s $library $name
done
ln -s {PLACE}/glusterfs /{LIBRARIES}/glusterfs
chmod 755 /payload/rblktap
"""


class Daemons:
    """A connection to the process that has the daemons."""

    def __init__(self) -> None:
        connection = socket.create_connection(("127.0.0.1", PORT), COMMAND_S)
        self._stream = connection.makefile("rw", encoding="utf-8", newline="\n")
        conf, self.gluster, *urls = self.command("where").split()
        self.ceph_conf = Path(conf)
        """The file of Ceph's configuration."""
        self.etcd = " ".join(url.replace("127.0.0.1", GATEWAY) for url in urls)
        """The URLs of etcd as dom0 knows them."""

    def command(self, line: str) -> str:
        """Has a command carried out, and returns the answer."""
        self._stream.write(f"{line}\n")
        self._stream.flush()
        answer = self._stream.readline()
        assert answer, f"{line}: failed, see the log of the daemons"
        return answer.strip()

    def configure(self, host: XenHost, name: str) -> None:
        """Writes the configuration of dom0, whose host has this name."""
        conf = self.ceph_conf.read_text()
        places = ("run_dir", "admin_socket", "log_file", "crash_dir")
        lines = [line for line in conf.splitlines() if not line.startswith(places)]
        host.sh(f"cat > /etc/ceph/ceph.conf << 'EOF'\n{'\n'.join(lines)}\nEOF")
        host.sh(f"printf 'etcd = {self.etcd}\n' > /etc/rblk/volumes.conf; hostname {name}")


def libraries() -> Path:
    """Returns an ext4 image with the libraries of Ceph and GlusterFS, of the daemons' root."""
    root = Path(os.environ["RBLKIF_CLUSTER_ROOT"])
    place = root / LIBRARIES
    path = f"{place}:{place}/ceph"
    plugins = sorted((place / "glusterfs").rglob("*.so"))
    roots = [place / name for name in CLIENTS] + [file for file in plugins if not file.is_symlink()]
    found = sorted({file for one in roots for file in libraries_of(str(one), path)})
    files = [Path(file) for file in found if file.startswith(str(root))]
    files += roots[: len(CLIENTS)]

    def fill(tree: Path) -> None:
        (tree / "lib").mkdir()
        for file in files:
            (tree / "lib" / file.name).write_bytes(file.read_bytes())
        subprocess.run(["cp", "-a", place / "glusterfs", tree / "glusterfs"], check=True)

    key = key_of(root.name, Path(__file__))
    return made_once(
        CACHE / "images" / f"cluster-{key}.img", lambda path: ext4_image(path, "192M", fill)
    )


def flushes() -> Path:
    """Returns the program for guests that writes, flushes and checks blocks."""
    source = Path(__file__).with_name("flushes.c")
    command = ["gcc", "-O2", "-Wall", "-Werror", "-static", "-s"]
    return made_once(
        CACHE / "images" / f"flushes-{key_of(source.read_bytes(), *command)}" / "flushes",
        lambda path: subprocess.run([*command, source, "-o", path], check=True),
    )


def _files(kernel: Kernel) -> dict[str, str | bytes]:
    """Returns what the payload of dom0 has to contain.

    The programs load the libraries, so they are not linked statically as in other scenarios.
    """
    built = Path(os.environ["RBLKIF_PROGRAMS"])
    scripts: dict[str, str | bytes] = {
        f"dom0/etc/xen/scripts/{name}": (rblkd.SCRIPTS / name).read_bytes() for name in rblkd.NAMES
    }
    modules = {f"{name}.ko": kernel.module(name) for name in DRIVERS}
    archive = Archive()
    archive.file("/programs/flushes", flushes())
    return {
        **scripts,
        **modules,
        "rblktap": (built / "rblktap").read_bytes(),
        "dom0/usr/sbin/rblkd": (built / "rblkd").read_bytes(),
        "dom0/usr/bin/rblk": (built / "rblk").read_bytes(),
        "programs.packed": gzip.compress(archive.to_bytes(), mtime=0),
    }


@contextmanager
def xen_host(daemons: Daemons, name: str, port: int | None = None) -> Iterator[XenHost]:
    """Runs a Xen host on which rblkd and the volumes of the daemons can be used.

    Connections to `port` of the namespace come to the same port of dom0.
    """
    kernel = Kernel(os.environ["RBLKIF_KERNEL"])
    forward = f",hostfwd=tcp:127.0.0.1:{port}-{ADDRESS}:{port}" if port else ""
    host = XenHost(
        Snapshot(kernel),
        pair("C/T", kernel, kernel.directory),
        Path(os.environ["RBLKIF_LOGS"]) / name,
        image=libraries(),
        extra=[argument.format(forward=forward) for argument in NETWORK],
        tools=rblkd.TOOLS,
        files=_files(kernel),
    )
    with host.running():
        host.sh(_CONNECT)
        rblkd.install(host, mount=False)
        host.sh(_MOUNT)
        daemons.configure(host, name)
        rblkd.start(host)
        try:
            yield host
        except BaseException:
            print(f"rblkd on {name}:\n{host.run(f'tail -n 50 {rblkd.LOG}')[1]}")
            raise
