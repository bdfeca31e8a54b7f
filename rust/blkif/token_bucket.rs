// SPDX-License-Identifier: GPL-2.0-only

//! A limit on the rate of actions that the peer causes.
//!
//! Time is a number of ticks that wraps; the caller defines a tick.
//!
//! # Examples
//!
//! Two actions at once, then one in 10 ticks:
//!
//! ```
//! use blkif::token_bucket::TokenBucket;
//!
//! let mut bucket = TokenBucket::new(2, 10, 0);
//! assert_eq!((bucket.take(0), bucket.take(0)), (Ok(()), Ok(())));
//! assert_eq!(bucket.take(4), Err(6));
//! assert_eq!(bucket.take(10), Ok(()));
//! ```

/// A token bucket: allows a few actions at once, and then one in each period.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TokenBucket {
    most: u32,
    period: u64,
    left: u32,
    /// Start of the period at whose end the next token comes.
    since: u64,
}

impl TokenBucket {
    /// Creates a bucket of `most` tokens, which gets another one after each `period` (at least 1).
    pub fn new(most: u32, period: u64, now: u64) -> Self {
        Self {
            most,
            period: period.max(1),
            left: most,
            since: now,
        }
    }

    /// Takes a token.
    ///
    /// If there is none, the error is the time until there is one.
    pub fn take(&mut self, now: u64) -> Result<(), u64> {
        let waited = now.wrapping_sub(self.since);
        let gained = waited.checked_div(self.period).unwrap_or(0);
        let missing = self.most.saturating_sub(self.left);
        if gained >= u64::from(missing) {
            self.left = self.most;
            self.since = now;
        } else {
            // Less than `missing`, which fits.
            self.left = self.left.saturating_add(gained as u32);
            self.since = now.wrapping_sub(waited.checked_rem(self.period).unwrap_or(0));
        }
        if self.left == 0 {
            return Err(self.period.saturating_sub(now.wrapping_sub(self.since)));
        }
        self.left = self.left.saturating_sub(1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_at_once_and_then_one_in_each_period() {
        let mut bucket = TokenBucket::new(3, 10, u64::MAX);
        for _ in 0..3 {
            assert_eq!(bucket.take(u64::MAX), Ok(()));
        }
        // 4 ticks later, 6 before the period is over.
        assert_eq!(bucket.take(3), Err(6));
        assert_eq!(bucket.take(9), Ok(()));
        assert_eq!(bucket.take(9), Err(10));
        assert_eq!(bucket.take(24), Ok(()));
        assert_eq!(bucket.take(24), Err(5));
    }

    #[test]
    fn time_alone_gives_no_more_than_the_most() {
        let mut bucket = TokenBucket::new(2, 10, 0);
        assert_eq!(bucket.take(1_000_000), Ok(()));
        assert_eq!(bucket.take(1_000_000), Ok(()));
        assert_eq!(bucket.take(1_000_000), Err(10));
    }

    #[test]
    fn no_more_tokens_than_time_allows() {
        for period in 1..20 {
            let mut bucket = TokenBucket::new(4, period, 0);
            let taken = (0..1000).filter(|now| bucket.take(*now).is_ok()).count() as u64;
            assert!(taken <= 4 + 1000 / period);
            assert!(taken >= 1000 / period);
        }
    }

    #[test]
    fn a_period_of_nothing_is_one_tick() {
        let mut bucket = TokenBucket::new(1, 0, 5);
        assert_eq!(bucket.take(5), Ok(()));
        assert_eq!(bucket.take(5), Err(1));
        assert_eq!(bucket.take(6), Ok(()));
    }
}
