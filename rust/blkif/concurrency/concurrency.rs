// SPDX-License-Identifier: GPL-2.0-only

//! The ring's handshake under a concurrency checker, and how the backend hands a ring over.
//!
//! Both ends run in threads of `loom`, which tries every order in which their loads and stores can
//! take effect under the memory model of the language; `handoff` is limited to two preemptions. A
//! lost wakeup is a deadlock, which loom reports; a slot that is read before it was written holds
//! something other than expected.
//!
//! To show that the checker would see a mistake, each memory barrier is also left out in turn: then
//! the same tests must fail. The same goes for the handoff (`handoff`).

#![cfg(test)]

mod handoff;

use blkif::ring::BackRing;
use blkif::ring::FrontRing;
use blkif::ring::SharedMemory;
use blkif::wire::Abi;
use blkif::wire::Response;
use blkif::wire::Status;
use blkif::wire::WireRequest;
use loom::sync::atomic::fence;
use loom::sync::atomic::AtomicU32;
use loom::sync::atomic::Ordering;
use loom::sync::Notify;
use loom::thread;
use std::sync::Arc;

/// The memory barrier that is left out.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Without {
    Nothing,
    Rmb,
    Wmb,
    Mb,
}

/// The header and the first two slots of a ring, as far as they are used here: the words of a
/// request that has nothing but an operation and an id.
struct Words {
    header: [AtomicU32; 4],
    slots: [[AtomicU32; 4]; 2],
    without: Without,
}

/// Words of the header and from one slot to the next.
const HEADER: usize = 16;
const SLOT: usize = 28;

impl Words {
    fn new(without: Without) -> Arc<Self> {
        let word = |_| AtomicU32::new(0);
        Arc::new(Words {
            header: [0; 4].map(word),
            slots: [[0; 4].map(word), [0; 4].map(word)],
            without,
        })
    }

    fn word(&self, word: usize) -> &AtomicU32 {
        match word.checked_sub(HEADER) {
            None => &self.header[word],
            Some(word) => &self.slots[word / SLOT][word % SLOT],
        }
    }
}

/// One side's view of the words.
struct Shared(Arc<Words>);

impl Shared {
    fn fence(&self, barrier: Without, ordering: Ordering) {
        if self.0.without != barrier {
            fence(ordering);
        }
    }
}

impl SharedMemory for Shared {
    fn words(&self) -> usize {
        1024
    }
    fn load(&self, word: usize) -> u32 {
        self.0.word(word).load(Ordering::Relaxed)
    }
    fn store(&self, word: usize, value: u32) {
        self.0.word(word).store(value, Ordering::Relaxed);
    }
    fn rmb(&self) {
        self.fence(Without::Rmb, Ordering::Acquire);
    }
    fn wmb(&self) {
        self.fence(Without::Wmb, Ordering::Release);
    }
    fn mb(&self) {
        self.fence(Without::Mb, Ordering::SeqCst);
    }
}

fn request(id: u64) -> WireRequest {
    WireRequest::Unknown { operation: 9, id }
}

fn response(id: u64) -> Response {
    Response {
        id,
        operation: 9,
        status: Status::NotSupported,
    }
}

type Front = FrontRing<Shared>;
type Back = BackRing<Shared>;

fn pair(without: Without) -> (Front, Back) {
    let words = Words::new(without);
    let front = FrontRing::new(Shared(words.clone()), Abi::X86_64).unwrap();
    let back = BackRing::attach(Shared(words), Abi::X86_64).unwrap();
    (front, back)
}

/// Sends `count` requests. Their ids start at 1, so that a word that was not written is not taken
/// for one.
fn send_requests(front: &mut Front, event: &Notify, count: u64) {
    for id in 1..=count {
        front.put(request(id)).unwrap();
        if front.publish() {
            event.notify();
        }
    }
}

/// Takes `count` requests, and sleeps when there are none.
fn take_requests(back: &mut Back, event: &Notify, count: u64) {
    let mut next = 1;
    while next <= count {
        match back.take_request().unwrap() {
            Some(taken) => {
                assert_eq!(taken, request(next));
                next += 1;
            }
            None if back.final_check() => {}
            None => event.wait(),
        }
    }
}

fn send_responses(back: &mut Back, event: &Notify, count: u64) {
    for id in 1..=count {
        back.put(&response(id)).unwrap();
        if back.publish() {
            event.notify();
        }
    }
}

fn take_responses(front: &mut Front, event: &Notify, count: u64, threshold: u32) {
    let mut next = 1;
    while next <= count {
        match front.take_response().unwrap() {
            Some(taken) => {
                assert_eq!(taken, response(next));
                next += 1;
            }
            None if front.final_check(threshold) => {}
            None => event.wait(),
        }
    }
}

/// Checks that two requests arrive that are published one after the other.
fn requests_arrive(without: Without) {
    loom::model(move || {
        let (mut front, mut back) = pair(without);
        let event = Arc::new(Notify::new());
        let theirs = event.clone();
        let sender = thread::spawn(move || send_requests(&mut front, &theirs, 2));
        take_requests(&mut back, &event, 2);
        sender.join().unwrap();
    });
}

/// Checks that two responses arrive that are published one after the other.
fn responses_arrive(without: Without, threshold: u32) {
    loom::model(move || {
        let (mut front, mut back) = pair(without);
        send_requests(&mut front, &Notify::new(), 2);
        take_requests(&mut back, &Notify::new(), 2);
        let event = Arc::new(Notify::new());
        let theirs = event.clone();
        let sender = thread::spawn(move || send_responses(&mut back, &theirs, 2));
        take_responses(&mut front, &event, 2, threshold);
        sender.join().unwrap();
    });
}

/// Checks that a request and its response pass through the same slot.
fn a_round_trip(without: Without) {
    loom::model(move || {
        let (mut front, mut back) = pair(without);
        let (to_back, to_front) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (to_back2, to_front2) = (to_back.clone(), to_front.clone());
        let server = thread::spawn(move || {
            take_requests(&mut back, &to_back2, 1);
            send_responses(&mut back, &to_front2, 1);
        });
        send_requests(&mut front, &to_back, 1);
        take_responses(&mut front, &to_front, 1, 1);
        server.join().unwrap();
    });
}

#[test]
fn no_request_is_lost_or_read_too_early() {
    requests_arrive(Without::Nothing);
}

#[test]
fn no_response_is_lost_or_read_too_early() {
    responses_arrive(Without::Nothing, 1);
}

#[test]
fn no_response_before_a_threshold_is_lost() {
    responses_arrive(Without::Nothing, 2);
}

#[test]
fn a_request_and_its_response() {
    a_round_trip(Without::Nothing);
}

#[test]
#[should_panic]
fn requests_need_the_full_barrier() {
    requests_arrive(Without::Mb);
}

#[test]
#[should_panic]
fn requests_need_the_write_barrier() {
    requests_arrive(Without::Wmb);
}

#[test]
#[should_panic]
fn requests_need_the_read_barrier() {
    requests_arrive(Without::Rmb);
}

#[test]
#[should_panic]
fn responses_need_the_full_barrier() {
    responses_arrive(Without::Mb, 1);
}

#[test]
#[should_panic]
fn responses_need_the_write_barrier() {
    responses_arrive(Without::Wmb, 1);
}

#[test]
#[should_panic]
fn responses_need_the_read_barrier() {
    responses_arrive(Without::Rmb, 1);
}
