// SPDX-License-Identifier: GPL-2.0-only

//! Each end of the ring against a model of the other one, which counts without wrapping.

use crate::common::Words;
use blkif::ring::BackRing;
use blkif::ring::FrontRing;
use blkif::ring::NoSlot;
use blkif::ring::SharedMemory;
use blkif::wire::op;
use blkif::wire::Abi;
use blkif::wire::Response;
use blkif::wire::Status;
use blkif::wire::WireRequest;
use proptest::prelude::*;
use std::collections::VecDeque;

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 1;
const RSP_PROD: usize = 2;
const RSP_EVENT: usize = 3;

/// What happens to a ring.
#[derive(Clone, Copy, Debug)]
enum Step {
    FrontPut,
    FrontPublish,
    FrontTake,
    FrontSleep(u32),
    BackTake,
    BackPut,
    BackPublish,
    BackSleep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::FrontPut),
        2 => Just(Step::FrontPublish),
        4 => Just(Step::FrontTake),
        1 => (0..40u32).prop_map(Step::FrontSleep),
        4 => Just(Step::BackTake),
        4 => Just(Step::BackPut),
        2 => Just(Step::BackPublish),
        1 => Just(Step::BackSleep),
    ];
    proptest::collection::vec(step, 0..200)
}

fn shape() -> impl Strategy<Value = (Abi, usize)> {
    let abi = prop_oneof![Just(Abi::X86_64), Just(Abi::X86_32), Just(Abi::Arm)];
    (abi, prop_oneof![Just(1), Just(2), Just(16usize)])
}

/// Returns an index of the ring, often shortly before the indices wrap.
fn position() -> impl Strategy<Value = u32> {
    prop_oneof![0..40u32, u32::MAX - 40..=u32::MAX, any::<u32>()]
}

fn request(id: u64) -> WireRequest {
    WireRequest::Discard(blkif::wire::DiscardRequest {
        flag: 0,
        handle: 1,
        id,
        sector: id.wrapping_mul(3),
        nr_sectors: !id,
    })
}

fn response(id: u64) -> Response {
    Response {
        id,
        operation: op::DISCARD,
        status: Status::NotSupported,
    }
}

/// Both ends, what is on its way between them, and how much of it.
struct Both {
    words: Words,
    front: FrontRing<Words>,
    back: BackRing<Words>,
    capacity: u64,
    /// Ids of requests put, not taken yet.
    requests: VecDeque<u64>,
    /// Ids of requests taken, not answered yet.
    taken: VecDeque<u64>,
    /// Ids of responses put, not taken yet.
    responses: VecDeque<u64>,
    put: u64,
    published: u64,
    answered: u64,
    answers_published: u64,
    answers_taken: u64,
    /// What the last sleeper of each side asked for.
    req_event: u64,
    rsp_event: u64,
}

impl Both {
    fn new((abi, pages): (Abi, usize)) -> Self {
        let words = Words::new(pages);
        let front = FrontRing::new(words.clone(), abi).unwrap();
        let back = BackRing::attach(words.clone(), abi).unwrap();
        Both {
            capacity: front.capacity().into(),
            words,
            front,
            back,
            requests: VecDeque::new(),
            taken: VecDeque::new(),
            responses: VecDeque::new(),
            put: 0,
            published: 0,
            answered: 0,
            answers_published: 0,
            answers_taken: 0,
            req_event: 1,
            rsp_event: 1,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::FrontPut => self.front_put(),
            Step::FrontPublish => self.front_publish(),
            Step::FrontTake => self.front_take(),
            Step::FrontSleep(threshold) => self.front_sleep(threshold),
            Step::BackTake => self.back_take(),
            Step::BackPut => self.back_put(),
            Step::BackPublish => self.back_publish(),
            Step::BackSleep => self.back_sleep(),
        }
        let waiting = self.put - self.answers_taken;
        assert_eq!(u64::from(self.front.in_flight()), waiting);
        assert_eq!(u64::from(self.front.free_slots()), self.capacity - waiting);
        assert_eq!(self.back.in_flight() as usize, self.taken.len());
    }

    fn front_put(&mut self) {
        let room = self.put - self.answers_taken < self.capacity;
        let put = self.front.put(request(self.put));
        assert_eq!(put, if room { Ok(()) } else { Err(NoSlot) });
        if room {
            self.requests.push_back(self.put);
            self.put += 1;
        }
    }

    fn front_publish(&mut self) {
        let asked = (self.published + 1..=self.put).contains(&self.req_event);
        assert_eq!(self.front.publish(), asked);
        self.published = self.put;
    }

    fn front_take(&mut self) {
        let there = self.answers_taken < self.answers_published;
        let id = if there {
            self.responses.pop_front()
        } else {
            None
        };
        assert_eq!(self.front.take_response(), Ok(id.map(response)));
        self.answers_taken += u64::from(there);
    }

    fn front_sleep(&mut self, threshold: u32) {
        let there = self.answers_taken < self.answers_published;
        assert_eq!(self.front.final_check(threshold), there);
        if !there {
            let awaited = self.published - self.answers_taken;
            self.rsp_event = self.answers_taken + u64::from(threshold).min(awaited).max(1);
        }
        assert_eq!(u64::from(self.words.load(RSP_EVENT)), self.rsp_event);
    }

    fn back_take(&mut self) {
        let there = self.put - (self.requests.len() as u64) < self.published;
        let id = if there {
            self.requests.pop_front()
        } else {
            None
        };
        assert_eq!(self.back.take_request(), Ok(id.map(request)));
        self.taken.extend(id);
    }

    fn back_put(&mut self) {
        let id = self.taken.pop_front();
        let put = self.back.put(&response(id.unwrap_or(0)));
        assert_eq!(put.is_ok(), id.is_some());
        self.answered += u64::from(id.is_some());
        self.responses.extend(id);
    }

    fn back_publish(&mut self) {
        let asked = (self.answers_published + 1..=self.answered).contains(&self.rsp_event);
        assert_eq!(self.back.publish(), asked);
        self.answers_published = self.answered;
    }

    fn back_sleep(&mut self) {
        let consumed = self.put - self.requests.len() as u64;
        let there = consumed < self.published;
        assert_eq!(self.back.final_check(), there);
        if !there {
            self.req_event = consumed + 1;
        }
        assert_eq!(u64::from(self.words.load(REQ_EVENT)), self.req_event);
    }
}

/// Writes a request into the slot of an index, and the index as its id.
fn write_request(words: &Words, index: u32) {
    let slot = 16 + (index % 32) as usize * 28;
    let request = request(u64::from(index)).encode(Abi::native());
    for (word, value) in request.into_iter().enumerate() {
        words.store(slot + word, value);
    }
}

proptest! {
    #[test]
    fn both_ends_agree_with_a_queue(shape in shape(), steps in steps()) {
        let mut both = Both::new(shape);
        for step in steps {
            both.step(step);
        }
    }

    /// The frontend is played by the test: it publishes some requests at a time.
    #[test]
    fn a_backend_serves_over_the_wrap(
        at in position(),
        batches in proptest::collection::vec(0..=32u32, 1..40),
    ) {
        let words = Words::new(1);
        words.store(REQ_PROD, at);
        words.store(RSP_PROD, at);
        let mut back = BackRing::attach(words.clone(), Abi::native()).unwrap();
        let mut index = at;
        for batch in batches {
            for n in 0..batch {
                write_request(&words, index.wrapping_add(n));
            }
            prop_assert!(!back.final_check());
            prop_assert_eq!(words.load(REQ_EVENT), index.wrapping_add(1));
            words.store(REQ_PROD, index.wrapping_add(batch));
            words.store(RSP_EVENT, index.wrapping_add(1));
            for n in 0..batch {
                let id = u64::from(index.wrapping_add(n));
                prop_assert_eq!(back.take_request(), Ok(Some(request(id))));
                prop_assert_eq!(back.put(&response(id)), Ok(()));
            }
            prop_assert_eq!(back.take_request(), Ok(None));
            prop_assert_eq!(back.publish(), batch != 0);
            index = index.wrapping_add(batch);
            prop_assert_eq!(words.load(RSP_PROD), index);
        }
    }

    /// Whatever a frontend writes to its index, a backend takes no more than the ring has slots for
    /// and goes forward only.
    #[test]
    fn a_backend_takes_no_more_than_the_ring_has(
        at in position(),
        indices in proptest::collection::vec(position(), 1..20),
    ) {
        let words = Words::new(1);
        words.store(REQ_PROD, at);
        words.store(RSP_PROD, at);
        let mut back = BackRing::attach(words.clone(), Abi::native()).unwrap();
        let mut taken = 0u32;
        for index in indices {
            words.store(REQ_PROD, index);
            let ahead = u64::from(index.wrapping_sub(at));
            let possible = (u64::from(taken)..=32).contains(&ahead);
            while let Ok(Some(_)) = back.take_request() {
                taken += 1;
            }
            prop_assert_eq!(back.take_request().is_err(), !possible);
            prop_assert!(taken <= 32);
            prop_assert_eq!(back.in_flight(), taken);
        }
    }
}
