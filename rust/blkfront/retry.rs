// SPDX-License-Identifier: GPL-2.0-only

//! When to connect again after an attempt that failed for now.
//!
//! A shortage passes, so a device tries again: soon at first, later once a second. A backend can make
//! a device connect again and again; so there is a limit to how often it does. In both cases the
//! deadline of the outage ends the attempts, see [`worker`](crate::worker).

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

/// How many offers a device makes at once.
const OFFERS: u32 = 8;
/// How much later it may make another one.
const OFFER_PERIOD_MS: u64 = 1_000;
/// The time to the first new attempt; it doubles with each.
const FIRST_MS: u32 = 20;
/// The longest time between two attempts.
const LAST_MS: u32 = 1_000;
/// After an attempt with so long a time to the next the obstacle is reported: it is more than the
/// ordinary delay of a backend that closes.
const REPORT_MS: u32 = 300;

/// The attempts of a device to connect.
pub(crate) struct Retry {
    created: Instant<Monotonic>,
    pace: TokenBucket,
    /// The times between attempts.
    backoff: Backoff,
    /// When the next attempt is due, in milliseconds since `created`.
    due: Option<u64>,
    /// The obstacle that was reported since the device was connected.
    reported: Option<Error>,
}

impl Retry {
    /// Nothing has failed yet.
    pub(crate) fn new() -> Self {
        Self {
            created: Instant::now(),
            pace: TokenBucket::new(OFFERS, OFFER_PERIOD_MS, 0),
            backoff: Backoff::new(FIRST_MS, LAST_MS),
            due: None,
            reported: None,
        }
    }

    fn now(&self) -> u64 {
        self.created.elapsed().as_millis().max(0) as u64
    }

    /// Takes the permission for an offer. `EAGAIN`: there were too many.
    pub(crate) fn try_offer(&mut self) -> Result {
        let now = self.now();
        self.pace.take(now).map_err(|_| EAGAIN)
    }

    /// Schedules another attempt. Returns `true` if the obstacle should be reported.
    pub(crate) fn postpone(&mut self, obstacle: Error) -> bool {
        let delay = self.backoff.next_delay();
        self.due = Some(self.now().saturating_add(delay.into()));
        if delay < REPORT_MS || self.reported == Some(obstacle) {
            return false;
        }
        self.reported = Some(obstacle);
        true
    }

    /// The device is connected, or never will be again.
    pub(crate) fn finish(&mut self) {
        self.backoff.reset();
        self.due = None;
        self.reported = None;
    }

    /// Returns the time until the next attempt, in milliseconds, if there is to be one.
    pub(crate) fn wait_ms(&self) -> Option<u64> {
        self.due.map(|due| due.saturating_sub(self.now()))
    }

    /// Returns `true` once when the next attempt is due.
    pub(crate) fn take_due(&mut self) -> bool {
        let due = self.wait_ms() == Some(0);
        if due {
            self.due = None;
        }
        due
    }
}

/// Returns `true` if what has failed with this error may succeed later.
pub(crate) fn is_transient(error: Error) -> bool {
    [EAGAIN, EBUSY, ENOMEM, ENOSPC].contains(&error)
}
