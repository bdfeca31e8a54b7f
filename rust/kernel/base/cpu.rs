// SPDX-License-Identifier: GPL-2.0

//! The CPUs of the machine.

/// How many CPUs are online now; at least 1.
pub fn online() -> u32 {
    // SAFETY: Only reads a counter.
    unsafe { bindings_ext::num_online_cpus() }
}
