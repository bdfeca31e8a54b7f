// SPDX-License-Identifier: GPL-2.0-only

//! Messages that another domain or a broken device can cause are printed at most ten times in five
//! seconds, for each place in the code.

use kernel::{
    bindings,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// Messages in one interval.
const BURST: u32 = 10;
/// Length of an interval, in nanoseconds.
const INTERVAL_NS: i64 = 5_000_000_000;

/// Counts the messages of one place.
///
/// CPUs that race for it may print a message more or less: the bound holds within the number of
/// CPUs.
pub struct Ratelimit {
    /// When the interval began, in nanoseconds of the monotonic clock.
    begin: Atomic<i64>,
    printed: Atomic<u32>,
}

impl Ratelimit {
    /// Creates a limit. The first message starts the first interval.
    pub const fn new() -> Self {
        Self {
            begin: Atomic::new(i64::MIN),
            printed: Atomic::new(0),
        }
    }

    /// Returns `true` if one more message may be printed now. Any context but an NMI.
    pub fn allow(&self) -> bool {
        // SAFETY: Reads a clock, in any context but that of an NMI.
        let now = unsafe { bindings::ktime_get() };
        if now.wrapping_sub(self.begin.load(Relaxed)) as u64 > INTERVAL_NS as u64 {
            self.begin.store(now, Relaxed);
            self.printed.store(0, Relaxed);
        }
        if self.printed.load(Relaxed) >= BURST {
            return false;
        }
        self.printed.fetch_add(1, Relaxed);
        true
    }
}

impl Default for Ratelimit {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs a printing expression unless its place has printed too much lately.
///
/// `ratelimited!(pr_warn!("bad request\n"))`
#[macro_export]
macro_rules! ratelimited {
    ($print:expr) => {{
        static LIMIT: $crate::base::ratelimit::Ratelimit =
            $crate::base::ratelimit::Ratelimit::new();
        if LIMIT.allow() {
            $print;
        }
    }};
}
