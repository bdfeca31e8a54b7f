// SPDX-License-Identifier: GPL-2.0-only

//! Requests that are not answered in time.
//!
//! The block layer tells of a request that is in flight for longer than the time in
//! `queue/io_timeout` in sysfs, each time that this has passed once more. Then the device's thread
//! looks at the rings. A response that is there, though no event has told of it, is taken; a backend
//! that has not noticed a request is notified again. So a lost event costs a delay, and no more.
//!
//! When a request has timed out ten times, its connection is given up: the backend is
//! asked to close, and the requests wait for another connection. One that is not answered there
//! either fails. The module parameter `io_timeout` = 0 has a disk wait for its backend instead.

use kernel::{
    prelude::*,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
};

use kernel_ext::{
    block::mq::RequestId,
    ratelimited, //
};

use crate::{
    events::Event,
    queue::Queue, //
};

/// How long an event may be on its way.
const EVENT_MS: i64 = 50;
/// How long a backend that was notified again is given to answer.
const ANSWER_MS: i64 = 2_000;
/// How often is looked whether it has.
const ANSWER_STEP_MS: i64 = 10;

impl Queue {
    /// Notes that a request has timed out once more.
    pub(crate) fn timed_out(&self, id: RequestId) {
        self.inner.lock().slots.timed_out(id);
        self.events.set(Event::TimedOut);
    }

    /// Returns `true` if a request has timed out too often.
    pub(crate) fn has_stalled(&self) -> bool {
        let inner = self.inner.lock();
        inner.is_open() && inner.slots.has_stalled()
    }

    /// The backend was away, and has had no chance to answer.
    pub(crate) fn reset_timeouts(&self) {
        self.inner.lock().slots.reset_timeouts();
    }

    /// Makes up for lost events. Sleeps.
    pub(crate) fn check_ring(&self) {
        if self.has_missed_responses() {
            self.poll();
            ratelimited!(pr_warn!(
                "{}: an event of the backend was lost: found responses after a time-out\n",
                self.name.as_str()
            ));
        } else {
            self.notify_again();
        }
    }

    /// Returns `true` if there are responses for which no event has come in the time that one takes.
    fn has_missed_responses(&self) -> bool {
        let Some(before) = self.unseen_responses() else {
            return false;
        };
        fsleep(Delta::from_millis(EVENT_MS));
        self.unseen_responses() == Some(before)
    }

    /// Returns how many responses were taken, if there are more.
    fn unseen_responses(&self) -> Option<u32> {
        let inner = self.inner.lock();
        let connection = inner
            .connection
            .as_ref()
            .filter(|connection| connection.is_open())?;
        let ring = &connection.ring;
        ring.has_responses().then(|| ring.responses_taken())
    }

    /// Notifies the backend of requests that it has not noticed, and sees whether that helps.
    fn notify_again(&self) {
        let Some(before) = self.ring_again() else {
            return;
        };
        let start = Instant::<Monotonic>::now();
        while self.responses_taken() == Some(before) {
            if self.events.is_removing() || start.elapsed().as_millis() >= ANSWER_MS {
                return;
            }
            fsleep(Delta::from_millis(ANSWER_STEP_MS));
        }
        ratelimited!(pr_warn!(
            "{}: the backend answers after it was notified again: an event to it was lost\n",
            self.name.as_str()
        ));
    }

    fn responses_taken(&self) -> Option<u32> {
        let inner = self.inner.lock();
        Some(inner.connection.as_ref()?.ring.responses_taken())
    }

    /// Notifies a backend that has not noticed all requests. Returns how many responses were taken
    /// until then.
    fn ring_again(&self) -> Option<u32> {
        let (notifier, taken) = {
            let inner = self.inner.lock();
            let connection = inner
                .connection
                .as_ref()
                .filter(|connection| connection.is_open())?;
            let taken = connection.ring.responses_taken();
            let unnoticed = connection.ring.in_flight() != 0 && connection.ring.is_unnoticed();
            (unnoticed.then_some(connection.notifier)?, taken)
        };
        notifier.notify();
        Some(taken)
    }
}
