# SPDX-License-Identifier: GPL-2.0
"""What makes a console's text a failure, whatever the scenario itself says."""

import re

TROUBLE = re.compile(
    r"egmentation|segfault|general protection|orrupt|Fatal glibc|free\(\): |double free"
    r"|BUG[: ]|WARNING[: ]|Oops|[Kk]ernel panic|panic - not syncing|Panic on CPU"
    r"|lockdep|LOCKDEP|possible recursive locking|circular locking|inconsistent lock state"
    r"|KASAN|UBSAN|KCSAN|kmemleak: [1-9]|INFO: task .* blocked|rcu.*stall|soft lockup|hard LOCKUP"
    r"|unable to handle|Call Trace|Unknown symbol|disagrees about version|bad page|Bad page"
    r"|refcount_t:|list_add corruption|stack guard page|scheduling while atomic"
    r"|init: FAILED|sh: .*: not found"
)

HARMLESS = re.compile(
    r"Spectre|Speculation|mitigations|lockdep_init|Running RCU self tests|lockdep is turned"
    r"|\(XEN\).*(?:debug|WARNING: (?:SPECULATIVE|BLOCKDEV))|Lock dependency validator"
    r"|KASAN: KernelAddressSanitizer initialized|kasan: |RCU lockdep checking is enabled"
    r"|LOCKDEP_|lockdep: |panic=|panic_on"
)


def trouble_in(text):
    """The lines of `text` that no healthy machine prints."""
    return [
        line for line in text.splitlines() if TROUBLE.search(line) and not HARMLESS.search(line)
    ]


def assert_served_by_pair(host, guest, vdev="xvda", storage=None):
    """The loaded drivers are the files of this run's pair, and no other is there.

    The backend is dom0's, or that of the driver domain `storage`.
    """
    front, server, back = host.pair.front, host, host.pair.back
    if storage:
        server, back = storage, host.pair.storage
    assert loaded_build_id(guest, front.name) == front.build_id
    assert loaded_build_id(server, back.name) == back.build_id
    driver = guest.sh(
        f"readlink -f /sys/block/{vdev}/device/driver/module || readlink -f /sys/block/{vdev}/device/driver"
    )
    assert driver.split("/")[-1] in (front.name.replace("-", "_"), "vbd"), driver
    for machine, driver in ((guest, front), (server, back)):
        others = OTHER[driver.name]
        assert not machine.sh(
            f"find / -xdev -name '{others[0]}.ko*' -o -xdev -name '{others[1]}.ko*'"
        )
        assert not machine.sh(
            f"ls -d /sys/module/{others[0].replace('-', '_')} 2>/dev/null || true"
        )


OTHER = {
    "xen-blkfront": ("rblkfront", "rblkfront"),
    "xen-blkback": ("rblkback", "rblkback"),
    "rblkfront": ("xen-blkfront", "xen_blkfront"),
    "rblkback": ("xen-blkback", "xen_blkback"),
}
"""The driver that must not be there, by the one that must."""


def loaded_build_id(machine, module):
    """The build id of a loaded module, as the kernel that runs it shows it."""
    note = machine.sh(
        f"od -An -v -tx1 /sys/module/{module.replace('-', '_')}/notes/.note.gnu.build-id"
    )
    return "".join(note.split())[-40:]
