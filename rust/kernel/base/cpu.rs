// SPDX-License-Identifier: GPL-2.0-only

//! The CPUs of the machine.

use kernel::cpu::CpuId;

/// Returns the number of CPUs that are online now, at least 1.
pub fn online() -> u32 {
    // SAFETY: Only reads a counter.
    unsafe { bindings_ext::num_online_cpus() }
}

/// Returns `true` if a CPU is online now.
pub fn is_online(cpu: CpuId) -> bool {
    // SAFETY: `cpu_online` requires a number in range, which it is by the invariant of `CpuId`.
    unsafe { bindings_ext::cpu_online(cpu.as_u32()) }
}
