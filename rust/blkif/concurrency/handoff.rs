// SPDX-License-Identifier: GPL-2.0-only

//! Model of the backend's ring handoff: a sleeping queue thread lends its ring to I/O completion.
//!
//! The steps are those of `Documentation/ring-handoff.rst`, in the same order as in
//! `blkback/handoff.rs`, `blkback/wakeup.rs` and the thread's sleep. The ring is the real one. A
//! lost response leaves the frontend waiting, a lost wakeup the thread; both are deadlocks, which
//! the checker reports.

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

/// Largest number of preemptions. All orders of three threads are too many to try; each omission
/// below shows with two preemptions.
const PREEMPTIONS: usize = 2;

/// The step that is omitted, named as in `ring-handoff.rst`.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Skip {
    Nothing,
    /// T7: a thread that stops notifies the frontend before it closes the channel.
    LastNotify,
    /// C5: the memory barrier between the flag and the check for a sleeper.
    WakeBarrier,
    /// T3: the check of the flag once the thread counts as sleeping.
    SleepCheck,
    /// T5: the thread takes the requests that were responded to.
    TakeResponded,
}

/// The event channel to the frontend.
struct Channel {
    open: AtomicBool,
    event: Notify,
}

impl Channel {
    fn notify(&self) {
        if self.open.load(Ordering::SeqCst) {
            self.event.notify();
        }
    }

    fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
    }
}

/// The owner of the ring.
enum RingOwner {
    Thread,
    Completion(Back),
}

/// State under the lock.
struct State {
    owner: RingOwner,
    completed: Vec<u64>,
    responded: u64,
}

struct Handoff {
    has_completed: AtomicBool,
    state: Mutex<State>,
    sleeps: AtomicBool,
    wake: Notify,
    channel: Channel,
    skip: Skip,
}

impl Handoff {
    fn new(skip: Skip) -> Arc<Self> {
        let state = State {
            owner: RingOwner::Thread,
            completed: Vec::new(),
            responded: 0,
        };
        Arc::new(Handoff {
            has_completed: AtomicBool::new(false),
            state: Mutex::new(state),
            sleeps: AtomicBool::new(false),
            wake: Notify::new(),
            channel: Channel {
                open: AtomicBool::new(true),
                event: Notify::new(),
            },
            skip,
        })
    }

    /// Handles the completion of a request, which needs the thread or only a response (C1 to C6).
    fn complete(&self, id: u64, needs_thread: bool) {
        let mut state = self.state.lock().unwrap();
        if let (RingOwner::Completion(ring), false) = (&mut state.owner, needs_thread) {
            ring.put(&response(id)).unwrap();
            let notify = ring.publish();
            state.responded += 1;
            drop(state);
            if notify {
                self.channel.notify();
            }
            return;
        }
        let first = state.completed.is_empty();
        state.completed.push(id);
        if first {
            self.has_completed.store(true, Ordering::Relaxed);
        }
        drop(state);
        if first {
            self.wake_up();
        }
    }

    /// Wakes the thread if it sleeps (C5, C6).
    fn wake_up(&self) {
        if self.skip != Skip::WakeBarrier {
            fence(Ordering::SeqCst);
        }
        if self.sleeps.load(Ordering::Relaxed) {
            self.wake.notify();
        }
    }

    /// Sleeps until a request has completed (T2 to T4).
    fn wait(&self) {
        loop {
            self.sleeps.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.skip != Skip::SleepCheck && self.has_completed.load(Ordering::Relaxed) {
                break;
            }
            self.wake.wait();
            if self.has_completed.load(Ordering::Relaxed) {
                break;
            }
        }
        self.sleeps.store(false, Ordering::Relaxed);
    }

    /// Lends the ring (T1), or returns it if completed requests need the thread.
    fn lend(&self, ring: Back) -> Result<(), Back> {
        let mut state = self.state.lock().unwrap();
        if !state.completed.is_empty() {
            return Err(ring);
        }
        state.owner = RingOwner::Completion(ring);
        Ok(())
    }

    /// Reclaims the ring (T5). Returns it, and the number of requests that were responded to.
    fn reclaim(&self) -> (Option<Back>, u64) {
        let mut state = self.state.lock().unwrap();
        let ring = match std::mem::replace(&mut state.owner, RingOwner::Thread) {
            RingOwner::Thread => None,
            RingOwner::Completion(ring) => Some(ring),
        };
        let responded = match self.skip {
            Skip::TakeResponded => 0,
            _ => std::mem::take(&mut state.responded),
        };
        (ring, responded)
    }

    /// Takes the completed requests (T6).
    fn take_completed(&self) -> Vec<u64> {
        if !self.has_completed.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let mut state = self.state.lock().unwrap();
        self.has_completed.store(false, Ordering::Relaxed);
        std::mem::take(&mut state.completed)
    }
}

/// The queue thread.
struct Server {
    handoff: Arc<Handoff>,
    ring: Option<Back>,
    in_flight: u64,
}

impl Server {
    /// Serves until nothing is in flight, and closes the channel. A thread that is `stopping` wakes
    /// up for that at any moment of its first sleep, and does not lend its ring again.
    fn serve(mut self, stopping: bool) {
        let mut lend = true;
        while self.in_flight != 0 {
            if lend {
                self.ring = self
                    .ring
                    .take()
                    .and_then(|ring| self.handoff.lend(ring).err());
            }
            if !(lend && stopping) {
                self.handoff.wait();
            }
            lend = !stopping;
            self.reclaim();
            self.complete_all();
        }
        if self.handoff.skip != Skip::LastNotify {
            self.handoff.channel.notify();
        }
        self.handoff.channel.close();
    }

    fn reclaim(&mut self) {
        if self.ring.is_some() {
            return;
        }
        let (ring, responded) = self.handoff.reclaim();
        self.ring = ring;
        self.in_flight -= responded;
    }

    fn complete_all(&mut self) {
        let ring = self.ring.as_mut().unwrap();
        for id in self.handoff.take_completed() {
            ring.put(&response(id)).unwrap();
            self.in_flight -= 1;
        }
        if ring.publish() {
            self.handoff.channel.notify();
        }
    }
}

/// Checks that a frontend gets the responses to all its requests. `ends` says of each request
/// whether it needs the thread when it completes; they complete in this order.
fn responses_arrive(skip: Skip, ends: &'static [bool], stopping: bool) {
    let count = ends.len() as u64;
    let mut builder = Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(move || {
        let (mut front, mut back) = pair(Without::Nothing);
        send_requests(&mut front, &Notify::new(), count);
        take_requests(&mut back, &Notify::new(), count);
        let handoff = Handoff::new(skip);
        let (theirs, disks) = (handoff.clone(), handoff.clone());
        let server = thread::spawn(move || {
            let server = Server {
                handoff: theirs,
                ring: Some(back),
                in_flight: count,
            };
            server.serve(stopping);
        });
        let disk = thread::spawn(move || {
            for (id, needs_thread) in (1..).zip(ends) {
                disks.complete(id, *needs_thread);
            }
        });
        take_responses(&mut front, &handoff.channel.event, count, 1);
        disk.join().unwrap();
        server.join().unwrap();
    });
}

/// State of the event channel, shared by its interrupt handler and the thread.
struct Event {
    /// An event was received and not ended.
    open: AtomicU32,
    /// The handler has told the thread of the event.
    event: AtomicBool,
    ended: Notify,
}

impl Event {
    /// Ends the event if there is one. In the driver this is one exchange. The checker lets an
    /// exchange see the latest store, whatever the ordering; a load shows what can go wrong.
    fn end(&self) {
        if self.open.load(Ordering::Relaxed) != 0 {
            self.open.store(0, Ordering::Relaxed);
            self.ended.notify();
        }
    }
}

/// Checks that an event that arrives while the thread is awake for another reason is ended, because
/// no other event comes before that.
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

/// The last request needs the thread, so that it has a reason to wake up.
const ONE_RESPONDED: &[bool] = &[false, true];

/// No request needs the thread, which is stopped meanwhile.
const ALL_RESPONDED: &[bool] = &[false];

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
fn completions_that_need_the_thread_wake_it() {
    responses_arrive(Skip::Nothing, ONE_RESPONDED, false);
}

#[test]
fn a_response_of_a_thread_that_stops_arrives() {
    responses_arrive(Skip::Nothing, ALL_RESPONDED, true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn stopping_needs_the_last_notification() {
    responses_arrive(Skip::LastNotify, ALL_RESPONDED, true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn waking_needs_the_barrier() {
    responses_arrive(Skip::WakeBarrier, ONE_RESPONDED, false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn sleeping_needs_the_check() {
    responses_arrive(Skip::SleepCheck, ONE_RESPONDED, false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn requests_that_were_responded_to_are_taken() {
    responses_arrive(Skip::TakeResponded, ALL_RESPONDED, true);
}
