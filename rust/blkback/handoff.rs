// SPDX-License-Identifier: GPL-2.0-only

//! Handoff of a ring between its queue thread and I/O completion.
//!
//! A queue thread that sleeps lends its ring. I/O completion then writes the response of a request
//! that needs nothing but a response, and notifies the frontend itself, as `end_block_io_op()` of
//! `xen-blkback` does, without waking the thread. The pages of such a request are released when the
//! thread wakes up for another reason.
//!
//! One lock protects all of [`State`]; it is held for a few instructions and never across a
//! notification or a wakeup. [`RingOwner`] is the current owner of the ring:
//!
//! | event | context | [`RingOwner::Thread`] | [`RingOwner::Completion`] |
//! |---|---|---|---|
//! | a request completes and needs only its response | any, lock held | to `completed`; wakes the thread if that was empty | response published, to `responded`; notifies after the unlock |
//! | a request completes and needs the thread | any, lock held | to `completed`; wakes the thread if that was empty | to `completed`; wakes the thread if that was empty |
//! | the thread goes to sleep with requests in flight, and nothing needs it | thread, lock held | `Completion`, unless `completed` has requests | not possible |
//! | the thread goes to sleep otherwise | thread | no change | not possible |
//! | the thread wakes up, for any reason | thread, lock held | no change | `Thread`; takes `responded` |
//! | the thread takes `completed` | thread, lock held | `completed` is empty | not possible: it reclaims first |
//! | an event, a barrier, a shortage, a timer, a new size | any | wakes the thread | wakes the thread, which reclaims the ring |
//! | the thread is asked to stop | any | wakes the thread; the ring is not lent again | wakes the thread, which reclaims the ring |
//! | the thread ends | thread | nothing is in flight; notifies again, drops the ring | not possible: it reclaims first |
//!
//! A request is in one place at any time: with the disk, in `completed`, in `responded`, or with
//! the thread. A thread ends only when it has got back all of them.
//!
//! `Documentation/ring-handoff.rst` describes the memory ordering, and why nothing is lost.
//! `rust/blkif/concurrency/handoff.rs` checks a model of it with the same steps.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::{
    base::spinlock_irqsave::SpinLockIrqSave,
    new_spinlock_irqsave,
    xen::{
        events::Notifier,
        ring::MappedRing, //
    }, //
};

use blkif::{
    ring::BackRing,
    wire::Response, //
};

use crate::{
    list::{
        Linked,
        List, //
    },
    wakeup::QueueWakeup, //
};

/// The ring of a queue.
pub(crate) type Ring = BackRing<MappedRing>;

/// A request that I/O completion may respond to.
pub(crate) trait Respond: Linked {
    /// Returns the response, if the request needs nothing but a response.
    ///
    /// With `persistent`, its pages stay mapped and need not be unmapped before the response.
    fn response_alone(&self, persistent: bool) -> Option<Response>;

    /// Records that the response was written.
    fn set_responded(&mut self);
}

/// A ring that is lent, with the notifier of its frontend.
pub(crate) struct LentRing {
    pub(crate) ring: KBox<Ring>,
    /// Notifies the frontend.
    pub(crate) notifier: Notifier,
    /// `true` if the frontend uses persistent grants.
    pub(crate) persistent: bool,
}

impl LentRing {
    /// Writes and publishes the response of a request that needs nothing but a response.
    ///
    /// Returns `None` if the request needs the thread, and `Some(true)` if the frontend has to be
    /// notified.
    fn respond(&mut self, req: &mut impl Respond) -> Option<bool> {
        let response = req.response_alone(self.persistent)?;
        self.ring.put(&response).ok()?;
        req.set_responded();
        Some(self.ring.publish())
    }
}

/// The owner of a queue's ring.
enum RingOwner {
    /// The queue thread has the ring; I/O completion passes requests to it.
    Thread,
    /// The queue thread sleeps and has lent the ring; I/O completion may write responses.
    Completion(LentRing),
}

/// State that the lock protects.
struct State<R: Respond> {
    owner: RingOwner,
    /// Requests that the disk has completed, for the thread.
    completed: List<R>,
    /// Requests that I/O completion has responded to. The thread releases their pages.
    responded: List<R>,
}

/// A ring that is returned to its thread.
pub(crate) struct Reclaimed<R: Respond> {
    pub(crate) ring: Option<KBox<Ring>>,
    /// The requests that were responded to meanwhile.
    pub(crate) responded: List<R>,
}

/// The handoff of one queue.
#[pin_data]
pub(crate) struct Handoff<R: Respond> {
    wakeup: Arc<QueueWakeup>,
    #[pin]
    state: SpinLockIrqSave<State<R>>,
}

impl<R: Respond> Handoff<R> {
    /// Creates the handoff of a queue.
    ///
    /// `wakeup` wakes its thread.
    ///
    /// The thread owns the ring.
    pub(crate) fn new(wakeup: Arc<QueueWakeup>) -> impl PinInit<Self> {
        pin_init!(Self {
            wakeup,
            state <- new_spinlock_irqsave!(State {
                owner: RingOwner::Thread,
                completed: List::new(),
                responded: List::new(),
            }),
        })
    }

    /// Handles a request that the disk has completed: responds to it if the ring is lent and the
    /// request needs nothing else, and otherwise passes it to the thread.
    ///
    /// Context: any.
    pub(crate) fn complete(&self, mut req: KBox<R>) {
        let mut state = self.state.lock();
        if let RingOwner::Completion(lent) = &mut state.owner {
            if let Some(notify) = lent.respond(&mut *req) {
                let notifier = lent.notifier;
                state.responded.push(req);
                drop(state);
                // The thread may have reclaimed the ring by now. It notifies again before it
                // closes the channel, so the notification cannot be lost.
                if notify {
                    notifier.notify();
                }
                return;
            }
        }
        let first = state.completed.is_empty();
        state.completed.push(req);
        if first {
            self.wakeup.set_has_completed(true);
        }
        drop(state);
        if first {
            self.wakeup.wake();
        }
    }

    /// Lends the ring of a thread that is about to sleep.
    ///
    /// Fails, with the ring, if completed requests need the thread.
    ///
    /// Context: the queue thread.
    pub(crate) fn lend(&self, lent: LentRing) -> Result<(), LentRing> {
        let mut state = self.state.lock();
        if !state.completed.is_empty() {
            return Err(lent);
        }
        state.owner = RingOwner::Completion(lent);
        Ok(())
    }

    /// Takes back the ring of a thread that has woken up, with the requests that were responded to
    /// meanwhile.
    ///
    /// Context: the queue thread.
    pub(crate) fn reclaim(&self) -> Reclaimed<R> {
        let mut state = self.state.lock();
        let ring = match core::mem::replace(&mut state.owner, RingOwner::Thread) {
            RingOwner::Thread => None,
            RingOwner::Completion(lent) => Some(lent.ring),
        };
        Reclaimed {
            ring,
            responded: state.responded.take(),
        }
    }

    /// Takes the completed requests that need the thread.
    ///
    /// Context: the queue thread.
    pub(crate) fn take_completed(&self) -> List<R> {
        if !self.wakeup.has_completed() {
            return List::new();
        }
        let mut state = self.state.lock();
        self.wakeup.set_has_completed(false);
        state.completed.take()
    }
}
