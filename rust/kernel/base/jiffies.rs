// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's coarse clock, which is read by a load from memory.
//!
//! C header: [`include/linux/jiffies.h`](srctree/include/linux/jiffies.h)

use kernel::bindings;

pub use kernel::time::{
    msecs_to_jiffies,
    Jiffies, //
};

/// Returns the current number of ticks, which wraps.
#[inline]
pub fn now() -> Jiffies {
    // SAFETY: A word that is only read here; volatile, because interrupts change it.
    unsafe { (&raw const bindings::jiffies).read_volatile() }
}

/// Returns the number of ticks since `then`, an earlier value of [`now`].
#[inline]
pub fn since(then: Jiffies) -> Jiffies {
    now().wrapping_sub(then)
}

/// Returns `true` if the time `end` has passed, which must be less than half the range of
/// [`Jiffies`] away.
#[inline]
pub fn is_past(end: Jiffies) -> bool {
    now().wrapping_sub(end) as isize >= 0
}
