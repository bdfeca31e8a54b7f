# SPDX-License-Identifier: GPL-2.0-only
"""Console text that makes any scenario fail.

Reports of kmemleak are not among it, because some are of the kernel's own memory: see
`assert_no_lost_memory`.
"""

import re

TROUBLE = re.compile(
    r"egmentation|segfault|general protection|orrupt|Fatal glibc|free\(\): |double free"
    r"|BUG[: ]|WARNING[: ]|Oops|[Kk]ernel panic|panic - not syncing|Panic on CPU"
    r"|lockdep|LOCKDEP|possible recursive locking|circular locking|inconsistent lock state"
    r"|KASAN|UBSAN|KCSAN|INFO: task .* blocked|rcu.*stall|soft lockup|hard LOCKUP"
    r"|unable to handle|Call Trace|Unknown symbol|disagrees about version|bad page|Bad page"
    r"|refcount_t:|list_add corruption|stack guard page|scheduling while atomic"
    r"|trap (?:invalid opcode|divide error|int3)|unexpected fatal signal"
    r"|crashed on cpu|domain_crash called|Triple fault"
    r"|init: FAILED|sh: .*: not found"
)

HARMLESS = re.compile(
    r"Spectre|Speculation|mitigations|lockdep_init|Running RCU self tests|lockdep is turned"
    r"|\(XEN\).*(?:debug|WARNING: (?:SPECULATIVE|BLOCKDEV))|Lock dependency validator"
    r"|KASAN: KernelAddressSanitizer initialized|kasan: |RCU lockdep checking is enabled"
    r"|LOCKDEP_|lockdep: |panic=|panic_on"
)


def trouble_in(text: str) -> list[str]:
    """Returns the lines of `text` that no healthy machine prints."""
    return [
        line for line in text.splitlines() if TROUBLE.search(line) and not HARMLESS.search(line)
    ]
