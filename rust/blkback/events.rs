// SPDX-License-Identifier: GPL-2.0-only

//! Where the thread of a queue and what it waits for meet.
//!
//! The thread sleeps at its [`QueueEvents`]. Events, ends of I/O and whatever else it should look at are
//! reported here, mostly by interrupts, and wake it.
//!
//! For the end of an I/O it need not wake up if nothing but an answer is missing. So before it sleeps
//! with I/O in flight it *parks* the ring: it leaves it here, where each I/O ends. Who ends one finds
//! the ring, answers, and notifies the frontend. What is left of the request, its memory, waits for
//! the thread to wake up for something else.
//!
//! # Who wakes the thread
//!
//! | for | who | when |
//! |---|---|---|
//! | an event | the interrupt's handler | there are requests |
//! | a request in `done` | who ends it | it is the first: the thread takes all |
//! | a nudge | another queue | a barrier was raised or lowered, or has to run now |
//! | a nudge | another queue of the domain | pages are short: it gives back what it has beyond its part |
//! | a nudge | the queue's alarm | pages may have been unused for long |
//! | a nudge | the size watch | the disk has another size |
//! | short memory | the kernel's shrinker | it gives back what it can |
//! | the end | who stops the thread | it finishes what it has taken |
//!
//! Only ends of I/O are treated otherwise while the ring is parked, and each of them is seen: the lock
//! of the `handoff` decides whether a request is answered where it ends, or goes to `done` and wakes the
//! thread.
//!
//! # Why nothing is lost
//!
//! - *A wake-up.* Who has something to tell writes it, then `pending` or `has_completed`, and only then looks
//!   whether the thread sleeps ([`WaitQueue::wake_up`] has the full barrier between). The thread puts
//!   itself to the wait queue first and looks at both flags then. So one of them sees the other. It
//!   forgets the news, with a full barrier, before it looks at what there may be news of: what is told
//!   after that is news again. `has_completed` changes with `done`, under the lock.
//! - *An event.* The channel notes that it is open before the handler is called, which stores `event`
//!   with a release; the thread loads it with an acquire. So who sees the event can end it. Seen without
//!   that, it would never be ended, and no other one would come.
//! - *The ring.* It is moved, not shared, and under the lock: either the thread has it or the desk.
//!   It is always the thread that takes it back, before it does anything else, and nothing sleeps with
//!   the lock held.
//! - *A request.* It is in one place: with the disk, in `done`, in `responded`, or with the thread.
//!   `in_flight` counts all but the last, so a thread that should stop stays until it has had them all.
//! - *An answer.* It is written and shown with the lock held, once: [`Queue`] does not answer what it
//!   finds in `responded`. There is a slot for it as for any answer. It shows nothing unfinished, as the
//!   thread shows what it has written before it parks.
//! - *A notification.* It is sent after the lock was released, so the thread may be awake by then. If it
//!   only serves on, it does not matter who notifies. If it stops, it could close the channel in
//!   between, so it notifies once more itself before that; who comes after that rings at a closed door.
//! - *What others wait for.* Pages in `responded` count as used. A thread does not park when pages or
//!   memory are short or something of it or of another queue waits for its requests to end; when any of
//!   that begins later, it is told, and takes back the ring.
//! - *Pages that nobody uses.* The alarm is set while there is I/O in flight, though its pages are not
//!   back in the table then.
//!
//! # An event that is lost
//!
//! The thread looks at the ring whenever it wakes up, for whatever reason, and any event wakes it, also
//! one for which there was nothing. So a frontend that notifies again, because an answer is overdue, is
//! served. Events without requests are given back as spurious, and the event channels delay the next
//! one by a second at most; the first one that comes with a request ends that.
//!
//! There is no timer that looks at the ring for a frontend that does not notify again: the thread of
//! an idle disk sleeps. That a request has come without an event can be known only to who has sent it.
//!
//! `blkif/concurrency` has the hand-over as a model under the concurrency checker, with the same steps in
//! the same order, and leaves out in turn what the points above need.
//!
//! [`Queue`]: crate::queue::Queue

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
        spinlock_irqsave::SpinLockIrqSave,
        timer::TimerCallback,
        wait::WaitQueue, //
    },
    new_spinlock_irqsave,
    new_wait_queue,
    xen::{
        events::{
            Eoi,
            Handler,
            Notifier, //
        },
        ring::MappedRing, //
    }, //
};

use blkif::ring::BackRing;

use crate::pending_req::{
    needs_only_response,
    PendingReq,
    ReqList, //
};

/// The ring of a queue.
pub(crate) type Ring = BackRing<MappedRing>;

/// What a thread leaves when it sleeps and would only answer what ends.
pub(crate) struct LentRing {
    pub(crate) ring: KBox<Ring>,
    /// Of the frontend.
    pub(crate) notifier: Notifier,
    /// The pages of requests stay mapped when these have ended.
    pub(crate) persistent: bool,
}

impl LentRing {
    /// Answers a request, if that is all that is to be done for it. Whether the frontend is to be
    /// notified then.
    fn respond(&mut self, req: &mut PendingReq) -> Option<bool> {
        if !needs_only_response(req, self.persistent) {
            return None;
        }
        let ctx = &mut req.context;
        self.ring.put(&ctx.final_response()).ok()?;
        ctx.responded = true;
        Some(self.ring.publish())
    }
}

/// What is handed over between the thread and the ends of its I/O.
struct Handoff {
    /// Transfers that the disk is done with, for the thread.
    completed: ReqList,
    /// Transfers that were answered where they ended.
    responded: ReqList,
    /// Only while the thread sleeps.
    lent: Option<LentRing>,
}

/// Where the thread of a queue finds what there is to do.
#[pin_data]
pub(crate) struct QueueEvents {
    /// The thread has to look at something: `event`, `memory_pressure`, or what is outside of the queue.
    pending: Atomic<bool>,
    /// The frontend has sent an event that was not given back yet.
    event: Atomic<bool>,
    /// Memory is short, and nobody has looked yet.
    memory_pressure: Atomic<bool>,
    /// `done` has something. Changes with it.
    has_completed: Atomic<bool>,
    #[pin]
    handoff: SpinLockIrqSave<Handoff>,
    #[pin]
    wait: WaitQueue,
}

impl QueueEvents {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            pending: Atomic::new(false),
            event: Atomic::new(false),
            memory_pressure: Atomic::new(false),
            has_completed: Atomic::new(false),
            handoff <- new_spinlock_irqsave!(Handoff {
                completed: ReqList::new(),
                responded: ReqList::new(),
                lent: None,
            }),
            wait <- new_wait_queue!(),
        })
    }

    /// A request has ended. Any context.
    pub(crate) fn complete(&self, mut req: KBox<PendingReq>) {
        let mut handoff = self.handoff.lock();
        if let Some(lent) = &mut handoff.lent {
            if let Some(notify) = lent.respond(&mut req) {
                let notifier = lent.notifier;
                handoff.responded.push(req);
                drop(handoff);
                if notify {
                    notifier.notify();
                }
                return;
            }
        }
        let first = handoff.completed.is_empty();
        handoff.completed.push(req);
        if first {
            self.has_completed.store(true, Relaxed);
        }
        drop(handoff);
        if first {
            self.wait.wake_up();
        }
    }

    /// The thread is about to sleep: what ends meanwhile may be answered with this. It is given back if
    /// something has ended already, for which the thread is needed.
    pub(crate) fn lend_ring(&self, lent: LentRing) -> Option<LentRing> {
        let mut handoff = self.handoff.lock();
        if !handoff.completed.is_empty() {
            return Some(lent);
        }
        handoff.lent.replace(lent)
    }

    /// The thread is awake: what it had parked, and the requests that were answered with it.
    pub(crate) fn reclaim_ring(&self) -> (Option<LentRing>, ReqList) {
        let mut handoff = self.handoff.lock();
        (handoff.lent.take(), handoff.responded.take())
    }

    /// There is something that the thread should look at. Any context.
    pub(crate) fn kick(&self) {
        self.pending.store(true, Release);
        self.wait.wake_up();
    }

    /// What there is news of is about to be looked at.
    pub(crate) fn clear_pending(&self) {
        if self.pending.load(Relaxed) {
            // A full barrier, so that what is looked at is not older than the news.
            self.pending.xchg(false, Full);
        }
    }

    /// Whether there was an event since the last call. It can be ended then: who sees the event sees
    /// that the channel has it open.
    pub(crate) fn take_event(&self) -> bool {
        self.event.load(Acquire) && {
            self.event.store(false, Relaxed);
            true
        }
    }

    /// Memory is short: what is not needed is to be given back. Any context.
    pub(crate) fn set_memory_pressure(&self) {
        self.memory_pressure.store(true, Relaxed);
        self.kick();
    }

    /// Whether memory was short since the last call.
    pub(crate) fn take_memory_pressure(&self) -> bool {
        self.memory_pressure.load(Relaxed) && {
            self.memory_pressure.store(false, Relaxed);
            true
        }
    }

    /// The requests that have ended since the last call.
    pub(crate) fn take_completed(&self) -> ReqList {
        if !self.has_completed.load(Relaxed) {
            return ReqList::new();
        }
        let mut handoff = self.handoff.lock();
        self.has_completed.store(false, Relaxed);
        handoff.completed.take()
    }

    /// Sleeps until there is news, a request has ended, or the thread should stop and `stop` says
    /// that it sleeps no longer then; at most for `timeout`, if there is one.
    pub(crate) fn wait(&self, thread: &Current, stop: bool, timeout: Option<Jiffies>) {
        let condition = || {
            self.pending.load(Relaxed)
                || self.has_completed.load(Relaxed)
                || stop && thread.should_stop()
        };
        match timeout {
            None => self.wait.wait_idle(condition),
            Some(timeout) => {
                self.wait.wait_idle_timeout(timeout, condition);
            }
        }
    }
}

/// Wakes the thread of a queue when there may be something to give back.
pub(crate) struct PurgeTimer(pub(crate) Arc<QueueEvents>);

impl TimerCallback for PurgeTimer {
    fn expired(&self) -> Option<Jiffies> {
        self.0.kick();
        None
    }
}

impl Handler for QueueEvents {
    fn handle(&self) -> Eoi {
        // Pairs with `take_event`.
        self.event.store(true, Release);
        self.kick();
        Eoi::Later
    }
}
