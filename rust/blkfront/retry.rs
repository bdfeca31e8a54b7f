// SPDX-License-Identifier: GPL-2.0-only

//! The schedule of connection attempts after a temporary failure.
//!
//! A lack of memory, grants or event channels is temporary, so a device retries: after 20 ms at
//! first, later once a second. A backend can also make a device connect repeatedly, so the rate of
//! offers is limited. In both cases, if the device has a disk, the attempts end after
//! `reconnect_timeout`, see [`worker`](crate::worker).
//!
//! A state that could not be written to xenstore is written again by the same schedule, and a state
//! of the backend that could not be read is read again.

use kernel::{
    prelude::*,
    time::{
        Instant,
        Monotonic, //
    },
};

use blkif::{
    backoff::Backoff,
    token_bucket::TokenBucket, //
};

/// Number of offers that a device may make in a burst.
const OFFERS: u32 = 8;
/// Time after which a device may make another offer, in milliseconds.
const OFFER_PERIOD_MS: u64 = 1_000;
/// Time to the first retry in milliseconds; it doubles with each further one.
const FIRST_DELAY_MS: u32 = 20;
/// Longest time between two retries, in milliseconds.
const MAX_DELAY_MS: u32 = 1_000;
/// A failure is reported if the time to the next retry is at least this, in milliseconds. It is
/// longer than a backend normally takes to close.
const MIN_REPORT_DELAY_MS: u32 = 300;

/// The attempts of a device to connect.
pub(crate) struct Retry {
    created: Instant<Monotonic>,
    offers: TokenBucket,
    /// Times between retries.
    backoff: Backoff,
    /// Time of the next retry, in milliseconds since `created`.
    due: Option<u64>,
    /// The error that was reported since the device was last connected.
    reported: Option<Error>,
}

impl Retry {
    /// Creates a schedule without failures.
    pub(crate) fn new() -> Self {
        Self {
            created: Instant::now(),
            offers: TokenBucket::new(OFFERS, OFFER_PERIOD_MS, 0),
            backoff: Backoff::new(FIRST_DELAY_MS, MAX_DELAY_MS),
            due: None,
            reported: None,
        }
    }

    fn now(&self) -> u64 {
        self.created.elapsed().as_millis().max(0) as u64
    }

    /// Counts an offer.
    ///
    /// Fails with `EAGAIN` if there were too many.
    pub(crate) fn try_offer(&mut self) -> Result {
        let now = self.now();
        self.offers.take(now).map_err(|_| EAGAIN)
    }

    /// Schedules a retry.
    ///
    /// Returns `true` if `error` should be reported.
    pub(crate) fn postpone(&mut self, error: Error) -> bool {
        let delay = self.backoff.next_delay();
        self.due = Some(self.now().saturating_add(delay.into()));
        if delay < MIN_REPORT_DELAY_MS || self.reported == Some(error) {
            return false;
        }
        self.reported = Some(error);
        true
    }

    /// Ends the retries, because the device is connected, or will never be.
    pub(crate) fn finish(&mut self) {
        self.backoff.reset();
        self.due = None;
        self.reported = None;
    }

    /// Returns the time until the next retry in milliseconds, or `None` if none is scheduled.
    pub(crate) fn wait_ms(&self) -> Option<u64> {
        self.due.map(|due| due.saturating_sub(self.now()))
    }

    /// Returns `true` if a retry is due, and removes it from the schedule.
    pub(crate) fn take_due(&mut self) -> bool {
        let due = self.wait_ms() == Some(0);
        if due {
            self.due = None;
        }
        due
    }
}

/// Returns `true` if an operation that failed with this error may succeed later.
pub(crate) fn is_temporary(error: Error) -> bool {
    [EAGAIN, EBUSY, ENOMEM, ENOSPC].contains(&error)
}
