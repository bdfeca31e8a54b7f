# SPDX-License-Identifier: GPL-2.0-only
"""The packages on a Debian dom0: installation, operation, restart, upgrade, reboot, removal.

One machine is booted for all, and each test starts where the one before it has ended. A guest has
disks whose data it verifies meanwhile. The environment says where things are: RBLKIF_IMAGE is the
directory of scripts/lib/host-image, RBLKIF_DEBS the directory of our packages, RBLKIF_KERNEL the
prepared kernel of guests, RBLKIF_LOGS where logs go.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.guest import Guest
from harness.job import Job
from harness.kernel import Kernel
from harness.pairs import pair
from harness.rblkd import RblkDisk
from host.debian_host import DebianHost
from host.debian_host import DebianSystem

PACKAGES = ("rblk", "rblkd")
NEWER = "+test1"
FEW, MANY = 4, 16
MIB = 8
INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get -q -y install"
FIO = (
    "fio --output-format=terse --thread --ioengine=libaio --direct=1 --rw=randwrite --bs=4k "
    "--size=256k --iodepth=4 --verify=crc32c --do_verify=1 --verify_fatal=1 --randseed=$pass"
)
STATE = "/run/rblk"


def letter(number: int) -> str:
    """Returns the name of a disk in the guest."""
    return f"xvd{chr(ord('a') + number)}"


def image(number: int) -> str:
    """Returns the URI of a disk's image."""
    return f"raw:/srv/{letter(number)}.raw"


class System:
    """The host with what the tests have started."""

    def __init__(self, host: DebianHost) -> None:
        self.host = host
        self.sh = host.sh
        self.run = host.run
        self._guest: Guest | None = None
        self._disks = 0
        self._job: Job | None = None

    @property
    def guest(self) -> Guest:
        """Returns the guest with the disks."""
        assert self._guest, "no guest was started"
        return self._guest

    @property
    def job(self) -> Job:
        """Returns the work of the guest."""
        assert self._job, "no work was started"
        return self._job

    def start_guest(self, disks: int) -> None:
        """Starts a guest with these disks."""
        self.create_images(0, disks)
        listed = [RblkDisk(letter(number), image(number)) for number in range(disks)]
        self._guest = self.host.start_guest(disks=listed, fio=True)
        self._disks = disks

    def create_images(self, first: int, end: int) -> None:
        """Creates the images of disks."""
        for number in range(first, end):
            self.sh(f"rblk image create {image(number)} {MIB}M")

    def attach(self, disks: int) -> None:
        """Attaches more disks, until the guest has this many."""
        self.create_images(self._disks, disks)
        for number in range(self._disks, disks):
            disk = RblkDisk(letter(number), image(number))
            self.sh(f"xl block-attach {self.guest.name} '{disk.specification(self.host)}'")
        self._disks = disks
        self.guest.wait_for_disk(letter(disks - 1))

    def start_work(self) -> None:
        """Has the guest write and verify all disks, again and again."""
        names = [letter(number) for number in range(self._disks)]
        jobs = " ".join(f"--name={name} --filename=/dev/{name}" for name in names)
        self._job = Job(self.guest, f"{FIO} {jobs}", f"work-{self._disks}")
        self._job.wait_for_pass()

    def stop_work(self) -> float:
        """Stops the work. Returns how long the slowest write took, in seconds."""
        self.job.stop()
        slowest = self.guest.sh(
            f"awk -F';' '$56 > slowest {{ slowest = $56 }} END {{ print slowest + 0 }}' {self.job.files}.log"
        )
        assert "I/O error" not in self.guest.sh("dmesg")
        return float(slowest) / 1e6

    def works(self) -> None:
        """Checks that a pass of the work that has begun now ends without an error."""
        self.job.wait_for_pass(2)

    def processes(self) -> list[int]:
        """Returns the processes that serve disks."""
        text = self.sh(
            "xenstore-ls -f /local/domain/0/backend/vbd3 2> /dev/null | sed -n 's/.*kthread-pid = //p'"
        )
        return sorted(int(word.strip('"')) for word in text.split())

    def seconds(self, command: str) -> float:
        """Returns how long a command takes in dom0, which must succeed."""
        clock = "read now rest < /proc/uptime; echo $now"
        first, last = self.sh(f"{clock}\n{command} > /dev/null\n{clock}").split()
        return float(last) - float(first)

    def journal(self) -> str:
        """Returns the messages of rblkd since the boot."""
        return self.sh("journalctl -b -u rblkd --no-pager -o cat")

    def wait_ready(self) -> None:
        """Waits until rblkd runs and answers."""
        self.host.wait_for("systemctl is-active -q rblkd && rblk host status > /dev/null")


@pytest.fixture(scope="module")
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """Boots the host; a failure leaves its logs."""
    kernel = Kernel(os.environ["RBLKIF_KERNEL"])
    logs = Path(os.environ["RBLKIF_LOGS"])
    image = DebianSystem(Path(os.environ["RBLKIF_IMAGE"]), kernel)
    guests = pair("C/T", kernel, logs)
    host = DebianHost(image, guests, logs, files=packages(Path(os.environ["RBLKIF_DEBS"])))
    before = request.session.testsfailed
    try:
        host.boot()
        yield System(host)
    finally:
        if request.session.testsfailed > before:
            host.collect()
        (logs / "journal.txt").write_text(host.run("journalctl --no-pager")[1])
        host.close()


def packages(directory: Path) -> dict[str, str | bytes]:
    """Returns our packages, and the same with a newer version, as files of the payload."""
    files: dict[str, str | bytes] = {}
    for name in PACKAGES:
        [package] = directory.glob(f"{name}_*.deb")
        files[f"debs/{name}.deb"] = package.read_bytes()
        files[f"debs/{name}-newer.deb"] = newer(package)
    return files


def newer(package: Path) -> bytes:
    """Returns a package with a newer version, and otherwise the same contents."""
    with tempfile.TemporaryDirectory() as place:
        tree, made = f"{place}/tree", Path(place) / "newer.deb"
        subprocess.run(["dpkg-deb", "-R", str(package), tree], check=True)
        command = ["dpkg-deb", "-f", str(package), "Version"]
        version = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        control = Path(tree) / "DEBIAN/control"
        old = version.strip()
        control.write_text(control.read_text().replace(old, old + NEWER))
        build = ["dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "-b", tree, str(made)]
        subprocess.run(build, stdout=subprocess.DEVNULL, check=True)
        return made.read_bytes()


def install(system: System, suffix: str = "") -> None:
    """Installs both packages with apt."""
    files = " ".join(f"/payload/debs/{name}{suffix}.deb" for name in PACKAGES)
    system.sh(f"{INSTALL} {files}", timeout=600)
    system.wait_ready()


def test_install(system: System) -> None:
    """apt installs the packages, and the service runs."""
    install(system)
    assert system.sh("systemctl is-enabled rblkd") == "enabled"
    assert "start: ready" in system.sh("rblk host status")
    system.sh("getent group rblk")
    status, output = system.run("rblk check")
    assert status in {0, 6}, output
    assert "rblkd" not in output, output
    assert "0 loaded units" in system.sh("systemctl list-units --failed --no-pager")
    # A file system that a later test fills: the harness itself uses /run.
    system.sh(
        f"systemctl stop rblkd; mount -t tmpfs -o size=2M tmpfs {STATE}; systemctl start rblkd"
    )
    system.wait_ready()


def test_guest(system: System) -> None:
    """A guest starts with disks, and has them."""
    system.start_guest(FEW)
    listed = json.loads(system.sh("rblk --json disk list"))
    assert len(listed) == FEW
    assert system.sh("rblk disk list").count(" connected ") == FEW
    system.start_work()


def check_restarts(system: System) -> None:
    """Restarts rblkd under I/O: the same processes serve the disks after it."""
    processes = system.processes()
    for command in ("systemctl restart rblkd", "systemctl kill --kill-whom=main -s KILL rblkd"):
        system.sh(command)
        system.wait_ready()
        system.works()
        assert system.processes() == processes
        assert f"{len(processes)} disks" in system.journal()


def test_restart(system: System) -> None:
    """A restart and a kill of rblkd are harmless for running disks."""
    check_restarts(system)


def test_stop(system: System) -> None:
    """SIGTERM ends rblkd at once; the disks are served without it, and adopted later."""
    processes = system.processes()
    print(f"rblkd ended in {system.seconds('systemctl stop rblkd'):.2f} s")
    assert system.run("rblk host status")[0] != 0
    system.works()
    system.sh("systemctl start rblkd")
    system.wait_ready()
    assert system.processes() == processes


def test_reload(system: System) -> None:
    """The configuration is read again; one that is not valid changes nothing."""
    system.sh(
        "rblk image create raw:/srv/check 1M; cp /etc/rblk/rblkd.conf /root/valid.conf; "
        "echo 'storage local = raw:/srv/check' >> /etc/rblk/rblkd.conf; systemctl reload rblkd"
    )
    system.host.wait_for("rblk storage status | grep -q '^local *up '")
    system.sh("echo nonsense >> /etc/rblk/rblkd.conf; systemctl reload rblkd")
    system.host.wait_for(
        "journalctl -b -u rblkd -o cat | grep -q 'the configuration stays as it was'"
    )
    system.sh("rblk storage status | grep -q '^local '")
    # A configuration that is not valid prevents a start, and the disks are served without it.
    assert system.run("systemctl restart rblkd")[0] != 0
    system.works()
    system.sh(
        "cp /root/valid.conf /etc/rblk/rblkd.conf; systemctl reset-failed rblkd; systemctl restart rblkd"
    )
    system.wait_ready()


def test_group(system: System) -> None:
    """Members of the group may list disks, and others may not."""
    ask = "setpriv --reuid 1234 --regid 1234 {} rblk disk"
    assert system.run(f"{ask.format('--clear-groups')} list")[0] != 0
    member = ask.format("--groups $(getent group rblk | cut -d: -f3)")
    assert system.sh(f"{member} list").count(" connected ") == FEW
    assert system.run(f"{member} restart {system.guest.name}/xvda")[0] != 0


def test_no_space(system: System) -> None:
    """A guest whose storage has no space is paused, and resumed when there is space."""
    system.sh(
        "truncate -s 24M /root/small.img; mkfs.ext4 -q /root/small.img; mkdir /small; "
        "mount -o loop /root/small.img /small; rblk image create raw:/small/disk.raw 12M; "
        "dd if=/dev/zero of=/small/fill bs=64k 2> /dev/null || :; "
        "echo 'pause-after = 5' >> /etc/rblk/rblkd.conf; systemctl restart rblkd"
    )
    system.wait_ready()
    name, vdev = system.guest.name, letter(FEW)
    disk = RblkDisk(vdev, "raw:/small/disk.raw")
    system.sh(f"xl block-attach {name} '{disk.specification(system.host)}'")
    system.guest.wait_for_disk(vdev)
    write = f"dd if=/dev/zero of=/dev/{vdev} bs=64k count=32 conv=fsync"
    system.guest.sh(f"({write}; echo $? > /tmp/space) > /dev/null 2>&1 &")
    system.host.wait_for(f"xl list {name} | grep -q -- ' --p--- '")
    system.sh("rm /small/fill")
    system.host.wait_for("rblk events | grep -q 'is resumed: its storage answers'")
    system.guest.wait_for("[ -s /tmp/space ]")
    assert system.guest.sh("cat /tmp/space").strip() == "0"
    system.host.detach(system.guest, vdev)
    system.host.wait_for(f'[ "$(rblk disk list | grep -c connected)" = {FEW} ] && umount /small')
    system.sh("cp /root/valid.conf /etc/rblk/rblkd.conf; systemctl restart rblkd")
    system.wait_ready()


def test_second_agent(system: System) -> None:
    """A second rblkd does not start, and says why; the first one continues."""
    status, output = system.run("rblkd")
    assert (status, f"another rblkd uses {STATE}" in output) == (1, True), output
    system.wait_ready()


def test_unusable_directory(system: System) -> None:
    """A state directory that is full, or of another user: the message says what to do."""
    system.sh(
        "mkdir /root/full; mount -t tmpfs -o size=4k,nr_inodes=2 tmpfs /root/full; touch /root/full/file"
    )
    status, output = system.run("rblkd --run-dir /root/full")
    assert (status, "make room" in output) == (1, True), output
    status, output = system.run("setpriv --reuid 1234 --regid 1234 --clear-groups rblkd")
    assert (status, "run rblkd as root" in output) == (1, True), output
    system.sh("umount /root/full")


def test_full_directory(system: System) -> None:
    """No space in the state directory while disks are served, attached, and rblkd is restarted."""
    processes = system.processes()
    system.create_images(FEW, FEW + 1)
    system.sh(f"dd if=/dev/zero of={STATE}/fill bs=4k 2> /dev/null || :")
    disk = RblkDisk(letter(FEW), image(FEW))
    attach = f"xl block-attach {system.guest.name} '{disk.specification(system.host)}'"
    status, output = system.run(attach)
    assert status != 0, output
    assert "No space left on device" in output, output
    assert "make room in its file system" in output, output
    system.run(f"xl block-detach {system.guest.name} {disk.vdev}")
    system.sh("systemctl restart rblkd")
    system.wait_ready()
    system.works()
    system.sh(f"rm {STATE}/fill /srv/{letter(FEW)}.raw")
    system.host.wait_for(f'[ "$(rblk disk list | grep -c " connected ")" = {FEW} ]')
    assert system.processes() == processes


def test_earlier_state(system: System) -> None:
    """Records of another version, with fields that are unknown and others that are missing."""
    processes = system.processes()
    system.sh(
        "systemctl stop rblkd; for record in /run/rblk/*.json; do "
        """sed -i 's/^{/{"unknown":[1],/; s/"restarts":[0-9]*,//' $record; done; systemctl start rblkd"""
    )
    system.wait_ready()
    assert system.processes() == processes
    assert system.sh("rblk disk list").count(" connected ") == FEW
    system.works()


def test_upgrade(system: System) -> None:
    """apt installs a newer version under I/O."""
    processes = system.processes()
    install(system, "-newer")
    system.works()
    assert system.processes() == processes
    assert NEWER in system.sh("dpkg-query -W -f '${Version}' rblkd")
    print(f"slowest write with {FEW} disks: {system.stop_work():.2f} s")


def test_many_disks(system: System) -> None:
    """Restart, kill and an installation of another version with 16 disks under I/O."""
    system.attach(MANY)
    system.start_work()
    check_restarts(system)
    processes = system.processes()
    assert len(processes) == MANY
    system.sh(
        f"{INSTALL} --allow-downgrades /payload/debs/rblk.deb /payload/debs/rblkd.deb", timeout=600
    )
    system.wait_ready()
    system.works()
    assert system.processes() == processes
    print(f"slowest write with {MANY} disks: {system.stop_work():.2f} s")
    start = json.loads(system.sh("rblk --json host status"))
    print(f"start with {MANY} disks: {start}")


def test_reboot(system: System) -> None:
    """After a reboot of dom0 a guest that starts at boot has its disks."""
    guest = system.guest
    guest.sh("echo kept | dd of=/dev/xvda conv=sync,fsync 2> /dev/null")
    guest.shut_down()
    system.host.wait_for("! pgrep -x rblktap > /dev/null")
    system.sh(
        f"cp /run/{guest.name}.initrd /srv/; mkdir -p /etc/xen/auto; "
        f"sed 's#/run/{guest.name}.initrd#/srv/{guest.name}.initrd#' /run/{guest.name}.cfg "
        f"> /etc/xen/{guest.name}.cfg; ln -s ../{guest.name}.cfg /etc/xen/auto/"
    )
    system.host.reboot()
    assert system.sh("rblk disk list").count(" connected ") == FEW
    assert system.sh(f"xl domid {guest.name}")
    assert system.sh("head -n 1 /srv/xvda.raw").strip() == "kept"
    order = system.sh("systemctl show -p ActiveEnterTimestampMonotonic --value rblkd xendomains")
    ready, started = (int(word) for word in order.split())
    assert ready < started


def test_remove(system: System) -> None:
    """The packages are removed while a disk is served, and purged after it."""
    processes = system.processes()
    remove = "DEBIAN_FRONTEND=noninteractive apt-get -q -y"
    system.sh(f"{remove} remove rblkd", timeout=300)
    assert system.processes() == processes
    install(system)
    assert system.processes() == processes
    system.sh(f"xl destroy {system.guest.name}")
    system.host.wait_for("! pgrep -x rblktap > /dev/null")
    system.sh(f"{remove} purge rblk rblkd", timeout=300)
    left = system.run(
        "ls -d /etc/rblk /etc/xen/scripts/block-rblk /usr/sbin/tap-ctl /usr/sbin/rblkd"
    )[1]
    assert all("No such file" in line for line in left.splitlines()), left
    assert "0 loaded units" in system.sh("systemctl list-units --failed --no-pager")
