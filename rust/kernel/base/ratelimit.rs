// SPDX-License-Identifier: GPL-2.0-only

//! Rate limits of messages that another domain or a broken device can cause: ten in five seconds,
//! for each place in the code.

use kernel::{
    bindings,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// Number of messages in an interval.
const BURST: u32 = 10;
/// Length of an interval, in nanoseconds.
const INTERVAL_NS: i64 = 5_000_000_000;

/// The rate limit of the messages of one place in the code.
///
/// CPUs that call it at the same time may print a few messages more, at most one for each CPU.
pub struct Ratelimit {
    /// Start of the interval, in nanoseconds of the monotonic clock.
    begin: Atomic<i64>,
    printed: Atomic<u32>,
}

impl Ratelimit {
    /// Creates a rate limit, whose first interval starts with the first message.
    pub const fn new() -> Self {
        Self {
            begin: Atomic::new(i64::MIN),
            printed: Atomic::new(0),
        }
    }

    /// Returns `true` if another message may be printed now.
    ///
    /// Context: any but an NMI.
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

/// Evaluates an expression that prints a message, unless this place in the code has printed too
/// many.
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
