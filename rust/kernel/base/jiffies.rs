// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's coarse clock, which costs a load from memory.
//!
//! C header: [`include/linux/jiffies.h`](srctree/include/linux/jiffies.h)

use kernel::bindings;

pub use kernel::time::{
    msecs_to_jiffies,
    Jiffies, //
};

/// Returns the number of ticks since some time ago. Wraps.
#[inline]
pub fn now() -> Jiffies {
    // SAFETY: A word that is only read here; volatile, for interrupts change it.
    unsafe { (&raw const bindings::jiffies).read_volatile() }
}

/// Returns the number of ticks since `then`, an earlier value of [`now`].
#[inline]
pub fn since(then: Jiffies) -> Jiffies {
    now().wrapping_sub(then)
}

/// Returns `true` if `end`, a value computed from [`now`] not too long ago, has passed.
#[inline]
pub fn is_past(end: Jiffies) -> bool {
    now().wrapping_sub(end) as isize >= 0
}
