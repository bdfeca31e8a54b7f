// SPDX-License-Identifier: GPL-2.0-only

//! Wakeup flags of a queue thread.
//!
//! [`QueueWakeup`] has the flags that the thread checks before it sleeps, and the wait queue on
//! which it sleeps (`waiting_reqs` and `wq` of `struct xen_blkif_ring`).
//!
//! | flag | set by | reason |
//! |---|---|---|
//! | `pending`, `event` | the interrupt handler | the frontend has notified: there may be requests |
//! | `pending`, `memory_pressure` | the shrinker of the bus | memory is short: the thread frees unused memory |
//! | `pending` | another queue of the disk | the barrier gate has closed or opened, or a barrier may run |
//! | `pending` | another queue of the domain | pages are short: the thread returns those beyond its guarantee |
//! | `pending` | [`PurgeTimer`] | persistent grants may have to be purged |
//! | `pending` | the thread itself | it has made as many passes as it may, and there may be more requests |
//! | `pending` | [`SizePoll`](crate::disk::SizePoll) | the size of the disk has changed |
//! | `has_completed` | [`Handoff`](crate::handoff::Handoff) | a request that needs the thread has completed |
//!
//! A thread that has to stop is woken by
//! [`KThread::stop`](kernel_ext::base::kthread::KThread::stop); its stop flag is checked with these
//! flags.
//!
//! `Documentation/ring-handoff.rst` shows that no wakeup is lost.
//!
//! # Lost events
//!
//! The thread checks the ring whenever it wakes up, for whatever reason, and each event wakes it. A
//! frontend that notifies again because a response is overdue is therefore served. Events without
//! requests are ended as spurious, which makes the event channel driver of Linux delay the next one
//! by up to one second; the first event with a request ends the delay.
//!
//! No timer polls the ring for a frontend that does not notify again, so that an idle disk causes
//! no wakeups. Only the frontend can know that it has sent a request without an event.

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        Arc, //
    },
    time::Jiffies, //
};

use kernel_ext::{
    base::{
        kthread::Current,
        timer::TimerCallback,
        wait::WaitQueue, //
    },
    new_wait_queue,
    xen::events::{
        Eoi,
        Handler, //
    },
};

/// The wakeup flags of a queue thread, and the wait queue on which it sleeps.
#[pin_data]
pub(crate) struct QueueWakeup {
    /// `true` if the thread has to check `event`, `memory_pressure`, or state outside of the queue.
    pending: Atomic<bool>,
    /// `true` if the frontend has sent an event that the thread has not taken yet.
    event: Atomic<bool>,
    /// `true` if memory is short, and the thread has not reacted yet.
    memory_pressure: Atomic<bool>,
    /// `true` if the handoff holds completed requests for the thread. Changes under the lock of the
    /// handoff.
    has_completed: Atomic<bool>,
    #[pin]
    wait: WaitQueue,
}

impl QueueWakeup {
    /// Creates wakeup flags, none of which is set.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            pending: Atomic::new(false),
            event: Atomic::new(false),
            memory_pressure: Atomic::new(false),
            has_completed: Atomic::new(false),
            wait <- new_wait_queue!(),
        })
    }

    /// Sets the pending flag, and wakes the thread to check all state that may have changed.
    ///
    /// Context: any.
    pub(crate) fn set_pending(&self) {
        // Release: orders the caller's changes before the flag. Pairs with the exchange in
        // `clear_pending`.
        self.pending.store(true, Release);
        self.wake();
    }

    /// Clears the pending flag.
    ///
    /// Must be called before the thread checks the state that may have changed.
    pub(crate) fn clear_pending(&self) {
        if self.pending.load(Relaxed) {
            // A full barrier: the checks that follow see the changes from before the flag was set.
            // A change after this sets the flag again. Pairs with the release in `set_pending`.
            self.pending.xchg(false, Full);
        }
    }

    /// Returns `true` if the frontend has sent an event since the last call.
    ///
    /// If so, the caller also sees that the channel has marked an event as open, so it can end it.
    pub(crate) fn take_event(&self) -> bool {
        // Acquire: pairs with the release in `handle`.
        self.event.load(Acquire) && {
            self.event.store(false, Relaxed);
            true
        }
    }

    /// Makes the thread free the memory that it does not need to serve one request.
    ///
    /// Context: any.
    pub(crate) fn set_memory_pressure(&self) {
        self.memory_pressure.store(true, Relaxed);
        self.set_pending();
    }

    /// Returns `true` if memory was short since the last call.
    pub(crate) fn take_memory_pressure(&self) -> bool {
        self.memory_pressure.load(Relaxed) && {
            self.memory_pressure.store(false, Relaxed);
            true
        }
    }

    /// Returns `true` if the handoff holds completed requests for the thread.
    #[inline]
    pub(crate) fn has_completed(&self) -> bool {
        self.has_completed.load(Relaxed)
    }

    /// Records whether the handoff holds completed requests for the thread.
    ///
    /// Context: under the lock of the handoff.
    #[inline]
    pub(crate) fn set_has_completed(&self, has_completed: bool) {
        self.has_completed.store(has_completed, Relaxed);
    }

    /// Wakes the thread if it sleeps.
    ///
    /// A flag has to be set before.
    ///
    /// Context: any.
    #[inline]
    pub(crate) fn wake(&self) {
        // `wake_up` has a full barrier between the flag and the check for a sleeper. Pairs with the
        // one between going to sleep and the check of the flags, in `wait`.
        self.wait.wake_up();
    }

    /// Sleeps until a flag is set, for at most `timeout`.
    ///
    /// With `until_stop`, a request to stop the thread ends the sleep too.
    ///
    /// Context: the queue thread. Sleeps, and may be frozen.
    pub(crate) fn wait(&self, thread: &Current, until_stop: bool, timeout: Option<Jiffies>) {
        // This is called after the task was marked as sleeping and a full barrier. Pairs with
        // `wake`.
        let condition = || {
            self.pending.load(Relaxed)
                || self.has_completed.load(Relaxed)
                || until_stop && thread.should_stop()
        };
        match timeout {
            None => self.wait.wait_idle(condition),
            Some(timeout) => {
                self.wait.wait_idle_timeout(timeout, condition);
            }
        }
    }
}

/// Timer that wakes a queue thread to purge persistent grants.
pub(crate) struct PurgeTimer(pub(crate) Arc<QueueWakeup>);

impl TimerCallback for PurgeTimer {
    fn expired(&self) -> Option<Jiffies> {
        self.0.set_pending();
        None
    }
}

impl Handler for QueueWakeup {
    fn handle(&self) -> Eoi {
        // Release: the channel has marked an event as open before. Pairs with the acquire in
        // `take_event`.
        self.event.store(true, Release);
        self.set_pending();
        Eoi::Later
    }
}
