# SPDX-License-Identifier: GPL-2.0
"""A driver is replaced on a running system, and the disk is what it was."""

from harness.evidence import assert_served_by_pair

DRIVER = "/sys/bus/xen-backend/drivers/vbd"
SUM = "dd if=/dev/xvda bs=4k count=256 iflag=direct 2>/dev/null | sha256sum"


def test_reload_frontend(host):
    """Unloaded and loaded; then unbound and bound through sysfs while the disk is open.

    Rows: FE-60, FE-64, FE-65, FE-68
    """
    guest = host.start_guest()
    guest.sh("yes pattern | dd of=/dev/xvda bs=4k count=256 iflag=fullblock conv=fsync")
    written = guest.sh(SUM)
    for _cycle in range(3):
        guest.reload_frontend()
        guest.wait_for_disk("xvda")
        assert guest.sh(SUM) == written
    for _cycle in range(2):
        guest.sh("(sleep 1000 < /dev/xvda; true) > /dev/null 2>&1 &")
        guest.rebind_disk(51712)
        guest.wait_for_disk("xvda")
        assert guest.sh(SUM) == written
        guest.sh("kill $(pidof sleep)")
    assert_served_by_pair(host, guest)


def test_reload_backend(host):
    """The guest goes on writing meanwhile: it sees a pause, and no error."""
    guest = host.start_guest()
    assert_served_by_pair(host, guest)
    device = f"vbd-{guest.domid}-51712"
    guest.sh(
        "(i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); "
        "printf 'round %06d' $i | dd of=/dev/xvda bs=4k seek=$((i % 64)) conv=sync,fsync,notrunc || touch /tmp/failed; "
        "echo $i > /tmp/round; mv /tmp/round /tmp/rounds; done) >/dev/null 2>&1 &"
    )
    for _cycle in range(3):
        guest.wait_for("[ -s /tmp/rounds ]")
        host.sh(f"echo {device} > {DRIVER}/unbind")
        host.unload_backend()
        host.load_backend()
        host.wait_for(f"[ -e {DRIVER}/{device} ] || echo {device} > {DRIVER}/bind")
        rounds = int(guest.sh("cat /tmp/rounds"))
        guest.wait_for(f"[ $(cat /tmp/rounds) -gt {rounds + 2} ]")
    guest.sh("touch /tmp/stop")
    guest.wait_for("! pidof dd")
    assert guest.run("[ -e /tmp/failed ]")[0] == 1
    last = int(guest.sh("cat /tmp/rounds"))
    for round in range(max(1, last - 10), last + 1):
        assert (
            guest.sh(
                f"dd if=/dev/xvda bs=4k skip={round % 64} count=1 iflag=direct 2>/dev/null | head -c 12"
            )
            == f"round {round:06}"
        )
    assert_served_by_pair(host, guest)
