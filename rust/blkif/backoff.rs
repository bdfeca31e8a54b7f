// SPDX-License-Identifier: GPL-2.0-only

//! Retries of operations that fail temporarily.
//!
//! Some operations fail temporarily: a page of the other domain is paged out, or Xen or the kernel
//! lacks a resource that will be freed. They are retried with increasing delays. Time is in
//! milliseconds; the caller sleeps.
//!
//! # Examples
//!
//! ```
//! use blkif::backoff::{retry, Backoff};
//!
//! let (mut slept, mut failures) = (0, 3);
//! let result = retry(
//!     Backoff::new(1, 256),
//!     32_000,
//!     |milliseconds| slept += milliseconds,
//!     |error| *error == "busy",
//!     || if failures == 0 { Ok(()) } else { failures -= 1; Err("busy") },
//! );
//! assert_eq!((result, slept), (Ok(()), 1 + 2 + 4));
//! ```

/// Delays between attempts: each is twice as long as the previous one, up to the longest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Backoff {
    first: u32,
    longest: u32,
    next: u32,
}

impl Backoff {
    /// Creates delays that start with `first` and grow to `longest`; each is at least 1.
    pub const fn new(first: u32, longest: u32) -> Self {
        let first = if first == 0 { 1 } else { first };
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// Returns the next delay.
    pub fn next_delay(&mut self) -> u32 {
        let delay = self.next.min(self.longest).max(1);
        self.next = delay.saturating_mul(2);
        delay
    }

    /// Starts with the first delay again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Calls `run` until it succeeds, fails with an error that is not `transient`, or has been retried
/// for `total` milliseconds, and returns its last result.
///
/// Context: as `sleep`, which is called in between and may sleep.
pub fn retry<T, E>(
    mut backoff: Backoff,
    total: u32,
    mut sleep: impl FnMut(u32),
    transient: impl Fn(&E) -> bool,
    mut run: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let mut left = total;
    loop {
        let result = run();
        if left == 0 || !result.as_ref().is_err_and(&transient) {
            return result;
        }
        let delay = backoff.next_delay().min(left);
        left = left.saturating_sub(delay);
        sleep(delay);
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    /// A status as Xen gives it.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    enum Status {
        PagedOut,
        BadReference,
    }

    /// Runs an operation that is refused with each of `refused` in turn, and works after that.
    ///
    /// Returns the result, how often it was run, and the delays.
    fn run(total: u32, refused: &[Status]) -> (Result<u32, Status>, u32, Vec<u32>) {
        let (mut tries, mut delays) = (0, Vec::new());
        let mut refused = refused.iter();
        let result = retry(
            Backoff::new(1, 256),
            total,
            |delay| delays.push(delay),
            |status| *status == Status::PagedOut,
            || {
                tries += 1;
                refused.next().map_or(Ok(tries), |status| Err(*status))
            },
        );
        (result, tries, delays)
    }

    #[test]
    fn delays_double_up_to_the_longest() {
        let mut backoff = Backoff::new(10, 500);
        let delays: Vec<u32> = (0..8).map(|_| backoff.next_delay()).collect();
        assert_eq!(delays, [10, 20, 40, 80, 160, 320, 500, 500]);
        backoff.reset();
        assert_eq!(backoff.next_delay(), 10);
        assert_eq!(backoff.next_delay(), 20);
    }

    #[test]
    fn delays_are_never_none() {
        let mut backoff = Backoff::new(0, 0);
        assert_eq!([backoff.next_delay(), backoff.next_delay()], [1, 1]);
        let mut backoff = Backoff::new(u32::MAX, u32::MAX);
        assert_eq!(backoff.next_delay(), u32::MAX);
        assert_eq!(backoff.next_delay(), u32::MAX);
    }

    #[test]
    fn what_works_is_run_once() {
        assert_eq!(run(1000, &[]), (Ok(1), 1, Vec::new()));
    }

    #[test]
    fn a_page_that_comes_back_is_waited_for() {
        let (result, tries, delays) = run(1000, &[Status::PagedOut; 4]);
        assert_eq!((result, tries), (Ok(5), 5));
        assert_eq!(delays, [1, 2, 4, 8]);
    }

    #[test]
    fn an_error_for_good_ends_it() {
        let refused = [Status::PagedOut, Status::BadReference, Status::PagedOut];
        let (result, tries, delays) = run(1000, &refused);
        assert_eq!((result, tries), (Err(Status::BadReference), 2));
        assert_eq!(delays, [1]);
    }

    #[test]
    fn a_page_that_does_not_come_back_is_an_error_when_the_time_is_over() {
        let (result, tries, delays) = run(1000, &[Status::PagedOut; 100]);
        assert_eq!(result, Err(Status::PagedOut));
        assert_eq!(delays.iter().sum::<u32>(), 1000);
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 233]);
        assert_eq!(tries, 12);
        assert_eq!(run(0, &[Status::PagedOut]).1, 1);
    }
}
