// SPDX-License-Identifier: GPL-2.0-only

//! A model of the backend's inbox: who ends an I/O while the queue's thread sleeps answers it with the
//! ring that the thread has parked.
//!
//! The steps are those of `blkback/events.rs` and of the thread around its sleep, in the same order. The
//! ring is the real one. Lost is: an answer that the frontend never hears of, or the thread, if it
//! sleeps on with work to do. Both are deadlocks here.

use super::pair;
use super::response;
use super::send_requests;
use super::take_requests;
use super::take_responses;
use super::Back;
use super::Without;
use loom::model::Builder;
use loom::sync::atomic::fence;
use loom::sync::atomic::AtomicBool;
use loom::sync::atomic::AtomicU32;
use loom::sync::atomic::Ordering;
use loom::sync::Mutex;
use loom::sync::Notify;
use loom::thread;
use std::sync::Arc;

/// How often a thread is interrupted in the middle, at most. Three threads in any order are too many to
/// try; each of the mistakes below shows with two interruptions.
const PREEMPTIONS: usize = 2;

/// A step that is left out.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Skip {
    Nothing,
    /// The thread that stops notifies the frontend before it closes the channel.
    LastNotify,
    /// The barrier between telling that something has ended and looking whether the thread sleeps.
    Barrier,
    /// The look at what has ended once the thread counts as sleeping.
    Look,
    /// The thread takes the transfers that were answered while it slept.
    Answered,
}

/// The event channel to the frontend.
struct Channel {
    open: AtomicBool,
    event: Notify,
}

impl Channel {
    fn ring(&self) {
        if self.open.load(Ordering::SeqCst) {
            self.event.notify();
        }
    }

    fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
    }
}

/// What the lock protects.
struct Desk {
    done: Vec<u64>,
    answered: u64,
    parked: Option<Back>,
}

struct Inbox {
    some_done: AtomicBool,
    desk: Mutex<Desk>,
    sleeps: AtomicBool,
    wake: Notify,
    channel: Channel,
    skip: Skip,
}

impl Inbox {
    fn new(skip: Skip) -> Arc<Self> {
        let desk = Desk {
            done: Vec::new(),
            answered: 0,
            parked: None,
        };
        Arc::new(Inbox {
            some_done: AtomicBool::new(false),
            desk: Mutex::new(desk),
            sleeps: AtomicBool::new(false),
            wake: Notify::new(),
            channel: Channel {
                open: AtomicBool::new(true),
                event: Notify::new(),
            },
            skip,
        })
    }

    /// The I/O of a request has ended; the thread has to do something for it, or only to answer.
    fn done(&self, id: u64, needs_thread: bool) {
        let mut desk = self.desk.lock().unwrap();
        if let (Some(ring), false) = (&mut desk.parked, needs_thread) {
            ring.put(&response(id)).unwrap();
            let notify = ring.publish();
            desk.answered += 1;
            drop(desk);
            if notify {
                self.channel.ring();
            }
            return;
        }
        let first = desk.done.is_empty();
        desk.done.push(id);
        if first {
            self.some_done.store(true, Ordering::Relaxed);
        }
        drop(desk);
        if first {
            self.wake_up();
        }
    }

    fn wake_up(&self) {
        if self.skip != Skip::Barrier {
            fence(Ordering::SeqCst);
        }
        if self.sleeps.load(Ordering::Relaxed) {
            self.wake.notify();
        }
    }

    fn wait(&self) {
        loop {
            self.sleeps.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.skip != Skip::Look && self.some_done.load(Ordering::Relaxed) {
                break;
            }
            self.wake.wait();
            if self.some_done.load(Ordering::Relaxed) {
                break;
            }
        }
        self.sleeps.store(false, Ordering::Relaxed);
    }

    fn park(&self, ring: Back) -> Option<Back> {
        let mut desk = self.desk.lock().unwrap();
        if !desk.done.is_empty() {
            return Some(ring);
        }
        desk.parked.replace(ring)
    }

    fn take_done(&self) -> Vec<u64> {
        if !self.some_done.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let mut desk = self.desk.lock().unwrap();
        self.some_done.store(false, Ordering::Relaxed);
        std::mem::take(&mut desk.done)
    }
}

/// What the thread owns.
struct Server {
    inbox: Arc<Inbox>,
    ring: Option<Back>,
    in_flight: u64,
}

impl Server {
    /// Serves until nothing is in flight, and closes the channel. One that is `stopping` wakes up for
    /// that at any moment of its first sleep, and does not park any more.
    fn serve(mut self, stopping: bool) {
        let mut park = true;
        while self.in_flight != 0 {
            if park {
                self.ring = self.ring.take().and_then(|ring| self.inbox.park(ring));
            }
            if !(park && stopping) {
                self.inbox.wait();
            }
            park = !stopping;
            self.unpark();
            self.end_all();
        }
        if self.inbox.skip != Skip::LastNotify {
            self.inbox.channel.ring();
        }
        self.inbox.channel.close();
    }

    fn unpark(&mut self) {
        if self.ring.is_some() {
            return;
        }
        let mut desk = self.inbox.desk.lock().unwrap();
        self.ring = desk.parked.take();
        if self.inbox.skip != Skip::Answered {
            self.in_flight -= std::mem::take(&mut desk.answered);
        }
    }

    fn end_all(&mut self) {
        let ring = self.ring.as_mut().unwrap();
        for id in self.inbox.take_done() {
            ring.put(&response(id)).unwrap();
            self.in_flight -= 1;
        }
        if ring.publish() {
            self.inbox.channel.ring();
        }
    }
}

/// A frontend waits for the answers to its requests. Of each of them is known whether its end needs
/// the thread; they end in this order.
fn answers_arrive(skip: Skip, ends: &'static [bool], stopping: bool) {
    let count = ends.len() as u64;
    let mut builder = Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(move || {
        let (mut front, mut back) = pair(Without::Nothing);
        send_requests(&mut front, &Notify::new(), count);
        take_requests(&mut back, &Notify::new(), count);
        let inbox = Inbox::new(skip);
        let (theirs, disks) = (inbox.clone(), inbox.clone());
        let server = thread::spawn(move || {
            let server = Server {
                inbox: theirs,
                ring: Some(back),
                in_flight: count,
            };
            server.serve(stopping);
        });
        let disk = thread::spawn(move || {
            for (id, needs_thread) in (1..).zip(ends) {
                disks.done(id, *needs_thread);
            }
        });
        take_responses(&mut front, &inbox.channel.event, count, 1);
        disk.join().unwrap();
        server.join().unwrap();
    });
}

/// What the interrupt of the event channel and the thread share.
struct Event {
    /// An event has come and was not ended.
    open: AtomicU32,
    /// The handler has told the thread of it.
    event: AtomicBool,
    ended: Notify,
}

impl Event {
    /// Ends the event if there is one. In the driver this is one exchange. The checker lets an exchange
    /// see the latest store, in whatever order stores take effect; a load shows what can go wrong.
    fn end(&self) {
        if self.open.load(Ordering::Relaxed) != 0 {
            self.open.store(0, Ordering::Relaxed);
            self.ended.notify();
        }
    }
}

/// An event comes while the thread is awake for another reason, and has to be ended, or no other one
/// comes.
fn event_is_ended(tell: Ordering, look: Ordering) {
    Builder::new().check(move || {
        let event = Arc::new(Event {
            open: AtomicU32::new(0),
            event: AtomicBool::new(false),
            ended: Notify::new(),
        });
        let theirs = event.clone();
        let server = thread::spawn(move || {
            while !theirs.event.load(look) {
                thread::yield_now();
            }
            theirs.end();
        });
        event.open.store(1, Ordering::Relaxed);
        event.event.store(true, tell);
        event.ended.wait();
        server.join().unwrap();
    });
}

/// The last one needs the thread, so that it has a reason to wake up.
const ONE_ANSWERED: &[bool] = &[false, true];

/// All may be answered where they end; the thread is stopped meanwhile.
const ALL_ANSWERED: &[bool] = &[false];

#[test]
fn an_event_that_is_seen_is_ended() {
    event_is_ended(Ordering::Release, Ordering::Acquire);
}

#[test]
#[should_panic(expected = "deadlock")]
fn telling_of_an_event_needs_the_release() {
    event_is_ended(Ordering::Relaxed, Ordering::Acquire);
}

#[test]
#[should_panic(expected = "deadlock")]
fn looking_for_an_event_needs_the_acquire() {
    event_is_ended(Ordering::Release, Ordering::Relaxed);
}

#[test]
fn ends_that_need_the_thread_wake_it() {
    answers_arrive(Skip::Nothing, ONE_ANSWERED, false);
}

#[test]
fn an_answer_of_a_thread_that_stops_is_heard() {
    answers_arrive(Skip::Nothing, ALL_ANSWERED, true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_thread_that_stops_notifies_once_more() {
    answers_arrive(Skip::LastNotify, ALL_ANSWERED, true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn waking_needs_the_barrier() {
    answers_arrive(Skip::Barrier, ONE_ANSWERED, false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn sleeping_needs_the_look() {
    answers_arrive(Skip::Look, ONE_ANSWERED, false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn what_was_answered_is_counted() {
    answers_arrive(Skip::Answered, ALL_ANSWERED, true);
}
