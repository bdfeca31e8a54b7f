// SPDX-License-Identifier: GPL-2.0-only

//! Requests that get no response in time.
//!
//! The block layer calls [`Queue::timed_out`] for a request that has been in flight for longer than
//! `queue/io_timeout` in sysfs, and again after each further period of that length. Then the device
//! worker checks the rings. It takes responses for which no event has arrived, and notifies a
//! backend that has not noticed a request. So a lost event only causes a delay.
//!
//! When a request has timed out ten times, its connection is closed: the backend is asked to close,
//! and the requests wait for another connection. If a request gets no response there either, it
//! fails. With the module parameter `io_timeout` = 0, a disk waits for its backend instead.

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
    queue::Queue,
    wakeup::WakeReason, //
};

/// Time after which an event that has not arrived counts as lost, in milliseconds.
const EVENT_TIMEOUT_MS: i64 = 50;
/// Time that a backend has for a response after it was notified again, in milliseconds.
const RESPONSE_TIMEOUT_MS: i64 = 2_000;
/// Poll interval while waiting for that response, in milliseconds.
const RESPONSE_POLL_MS: i64 = 10;

impl Queue {
    /// Counts a timeout of a request, and makes the device worker check the rings.
    ///
    /// Context: any.
    pub(crate) fn timed_out(&self, id: RequestId) {
        self.inner.lock().shadow.timed_out(id);
        self.wakeup.set(WakeReason::TimedOut);
    }

    /// Returns `true` if a request has timed out too often.
    pub(crate) fn has_stalled(&self) -> bool {
        let inner = self.inner.lock();
        inner.is_open() && inner.shadow.has_stalled()
    }

    /// Resets the timeouts of all requests.
    ///
    /// Called when the backend connects: before that it could not respond.
    pub(crate) fn reset_timeouts(&self) {
        self.inner.lock().shadow.reset_timeouts();
    }

    /// Takes responses for which an event was lost.
    ///
    /// Context: process; the device is locked, so that the connection stays.
    pub(crate) fn take_missed_responses(&self) {
        self.poll();
        let name = self.name.as_str();
        ratelimited!(pr_warn!(
            "{name}: an event of the backend was lost: found responses after a timeout\n"
        ));
    }

    /// Returns `true` if there are responses for which no event has arrived in time.
    ///
    /// Context: may sleep.
    pub(crate) fn has_missed_responses(&self) -> bool {
        let Some(before) = self.taken_if_more() else {
            return false;
        };
        fsleep(Delta::from_millis(EVENT_TIMEOUT_MS));
        self.taken_if_more() == Some(before)
    }

    /// Returns the number of responses that were taken, or `None` if the ring has no other
    /// response.
    fn taken_if_more(&self) -> Option<u32> {
        let inner = self.inner.lock();
        let ring_channel = inner
            .ring_channel
            .as_ref()
            .filter(|ring_channel| ring_channel.is_open())?;
        let ring = &ring_channel.ring;
        ring.has_responses().then(|| ring.responses_taken())
    }

    /// Notifies a backend that has not noticed all requests, and logs a lost event if it then
    /// responds.
    ///
    /// Context: may sleep.
    pub(crate) fn notify_again(&self) {
        let Some(before) = self.resend_notification() else {
            return;
        };
        let start = Instant::<Monotonic>::now();
        loop {
            match self.responses_taken() {
                None => return,
                Some(taken) if taken != before => break,
                Some(_) => {}
            }
            if self.wakeup.is_removing() || start.elapsed().as_millis() >= RESPONSE_TIMEOUT_MS {
                return;
            }
            fsleep(Delta::from_millis(RESPONSE_POLL_MS));
        }
        let name = self.name.as_str();
        ratelimited!(pr_warn!(
            "{name}: the backend responds after it was notified again: an event to it was lost\n"
        ));
    }

    /// Returns the number of responses that were taken from the ring, or `None` if the connection
    /// has ended.
    fn responses_taken(&self) -> Option<u32> {
        let inner = self.inner.lock();
        let ring_channel = inner
            .ring_channel
            .as_ref()
            .filter(|ring_channel| ring_channel.is_open())?;
        Some(ring_channel.ring.responses_taken())
    }

    /// Notifies the backend if it has not noticed all requests, and returns the number of responses
    /// that were taken before; `None` if it has noticed them.
    fn resend_notification(&self) -> Option<u32> {
        let (notifier, taken) = {
            let inner = self.inner.lock();
            let ring_channel = inner
                .ring_channel
                .as_ref()
                .filter(|ring_channel| ring_channel.is_open())?;
            let taken = ring_channel.ring.responses_taken();
            let unnoticed =
                ring_channel.ring.in_flight() != 0 && ring_channel.ring.has_unnoticed_requests();
            (unnoticed.then_some(ring_channel.notifier)?, taken)
        };
        notifier.notify();
        Some(taken)
    }
}
