// SPDX-License-Identifier: GPL-2.0-only

//! The shared ring: indices, overflow checks and the notification handshake.
//!
//! The C counterparts are the macros of `xen/include/public/io/ring.h`:
//!
//! | here | there |
//! |---|---|
//! | [`FrontRing::new`], [`BackRing::attach`] | `SHARED_RING_INIT`, `FRONT_RING_INIT`, `BACK_RING_ATTACH` |
//! | [`FrontRing::put`], [`BackRing::put`] | `RING_GET_REQUEST`, `RING_GET_RESPONSE` |
//! | [`FrontRing::publish`], [`BackRing::publish`] | `RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`, `RING_PUSH_RESPONSES_AND_CHECK_NOTIFY` |
//! | [`FrontRing::take_response`], [`BackRing::take_request`] | `RING_COPY_RESPONSE`, `RING_COPY_REQUEST` |
//! | [`FrontRing::final_check`], [`BackRing::final_check`] | `RING_FINAL_CHECK_FOR_RESPONSES`, `RING_FINAL_CHECK_FOR_REQUESTS` |
//!
//! # Layout
//!
//! The first 16 words are the header, of which four are used; the slots follow. Their number is the
//! largest power of two that fits.
//!
//! | word | name | written by | meaning |
//! |---|---|---|---|
//! | 0 | `req_prod` | frontend | requests published |
//! | 1 | `req_event` | backend | notify me when `req_prod` reaches this |
//! | 2 | `rsp_prod` | backend | responses published |
//! | 3 | `rsp_event` | frontend | notify me when `rsp_prod` reaches this |
//!
//! Indices count from the first use of the ring and wrap at 32 bits; the low bits select the slot.
//! All arithmetic on them is wrapping, because the other side may write anything. An impossible
//! index is a [`RingError`]: the ring must not be used after that.
//!
//! # Handshake
//!
//! A producer fills slots, then makes them visible (*publishes*) by storing its index, then reads
//! the consumer's event index to decide whether to send a notification. A consumer takes all
//! entries; before it sleeps, it stores its event index and then checks again for new entries
//! (*final check*). A full memory barrier between the store and the load on both sides means that
//! at least one of them sees the other's store, so no wakeup is lost.
//!
//! # Trust
//!
//! A side stores its own indices in private memory and does not read them back from the ring; only
//! a backend that attaches reads `rsp_prod`, once, and checks it like a value of the frontend.
//! Slots are written and not read back; each word from the other side is read once, after its index
//! and a read barrier.
//!
//! Neither [`FrontRing`] nor [`BackRing`] takes a lock: the caller owns the ring, or holds the lock
//! that protects it.
//!
//! # Examples
//!
//! A flush from a frontend to a backend, and its response. Each side notifies the other one if
//! `publish` returns `true`.
//!
//! ```
//! # use core::cell::Cell;
//! # use blkif::plan::flush;
//! # use blkif::ring::{BackRing, FrontRing};
//! # use blkif::wire::{op, Abi, Status};
//! # use xen_io::ring::SharedMemory;
//! # struct Page([Cell<u32>; 1024]);
//! # impl SharedMemory for &Page {
//! #     fn words(&self) -> usize { 1024 }
//! #     fn load(&self, word: usize) -> u32 { self.0.get(word).map_or(0, Cell::get) }
//! #     fn store(&self, word: usize, value: u32) { self.0[word].set(value) }
//! #     fn rmb(&self) {}
//! #     fn wmb(&self) {}
//! #     fn mb(&self) {}
//! # }
//! # let page = Page([const { Cell::new(0) }; 1024]);
//! let mut front = FrontRing::new(&page, Abi::X86_64).unwrap();
//! let mut back = BackRing::attach(&page, Abi::X86_64).unwrap();
//!
//! front.put(flush(op::FLUSH_DISKCACHE, 0, 7)).unwrap();
//! assert!(front.publish());
//!
//! let request = back.take_request().unwrap().unwrap();
//! assert_eq!(back.take_request(), Ok(None));
//! assert!(!back.final_check());
//! back.put(&request.response(Status::Okay)).unwrap();
//! assert!(back.publish());
//!
//! let response = front.take_response().unwrap().unwrap();
//! assert_eq!((response.id, response.status), (7, Status::Okay));
//! ```

use core::fmt;

use crate::wire::{
    Abi,
    Encode,
    Response,
    WireRequest,
    RESPONSE_WORDS,
    WORDS_PER_PAGE, //
};

pub use xen_io::ring::SharedMemory;

/// Pages of the largest ring (`XENBUS_MAX_RING_GRANTS`).
pub const MAX_PAGES: usize = 16;

/// Largest value of the node `ring-page-order`.
pub const MAX_PAGE_ORDER: u32 = 4;

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 1;
const RSP_PROD: usize = 2;
const RSP_EVENT: usize = 3;
const HEADER_WORDS: u32 = 16;

/// An error in a ring. All but `Memory` and `Record` mean that the peer has violated the protocol.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RingError {
    /// The memory is not 1 to 16 whole pages; its size in words.
    Memory(usize),
    /// The frontend claims more requests than the ring has free slots.
    Requests {
        /// `req_prod` as read.
        req_prod: u32,
        /// Requests consumed so far.
        req_cons: u32,
    },
    /// The backend claims more responses than there are requests.
    Responses {
        /// `rsp_prod` as read.
        rsp_prod: u32,
        /// Responses consumed so far.
        rsp_cons: u32,
    },
    /// The record of a backend that has crashed does not fit the ring.
    Record {
        /// `rsp_prod` of the ring.
        rsp_prod: u32,
        /// Requests consumed, according to the record.
        req_cons: u32,
    },
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RingError::Memory(words) => {
                write!(f, "a ring of {words} words is not 1 to {MAX_PAGES} pages")
            }
            RingError::Requests { req_prod, req_cons } => {
                write!(
                    f,
                    "req_prod {req_prod} is impossible after {req_cons} requests"
                )
            }
            RingError::Record { rsp_prod, req_cons } => {
                write!(
                    f,
                    "{req_cons} recorded requests are impossible after {rsp_prod} responses"
                )
            }
            RingError::Responses { rsp_prod, rsp_cons } => {
                write!(
                    f,
                    "rsp_prod {rsp_prod} is impossible after {rsp_cons} responses"
                )
            }
        }
    }
}

/// The error of `put`: a frontend has no free slot, or a backend has no request to respond to.
///
/// The caller has to check for that before, so this is a bug.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NoSlot;

/// Returns the number of slots of a ring of `words` words (`__CONST_RING_SIZE`): as many as fit
/// behind the header, rounded down to a power of two. One page has 32 slots in each ABI.
pub const fn capacity(words: usize, abi: Abi) -> u32 {
    let fit = (words as u32).saturating_sub(HEADER_WORDS) / abi.slot_words();
    match fit.checked_ilog2() {
        Some(log) => 1 << log,
        None => 0,
    }
}

/// Returns `true` if a producer that has changed its index from `old` to `new` must notify a
/// consumer whose event index is `event`: if the index has reached or passed it.
#[inline]
const fn crosses_event(event: u32, old: u32, new: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

/// Shared memory seen as slots.
struct Slots<M> {
    memory: M,
    abi: Abi,
    capacity: u32,
}

impl<M: SharedMemory> Slots<M> {
    fn new(memory: M, abi: Abi) -> Result<Self, RingError> {
        let words = memory.words();
        if words == 0 || words % WORDS_PER_PAGE != 0 || words > MAX_PAGES * WORDS_PER_PAGE {
            return Err(RingError::Memory(words));
        }
        Ok(Slots {
            memory,
            abi,
            capacity: capacity(words, abi),
        })
    }

    /// Returns the first word of the slot that an index selects.
    #[inline]
    fn word(&self, index: u32) -> usize {
        let slot = index & self.capacity.wrapping_sub(1);
        slot.wrapping_mul(self.abi.slot_words())
            .wrapping_add(HEADER_WORDS) as usize
    }

    #[inline(always)]
    fn write_request(&self, index: u32, request: impl Encode) {
        let mut word = self.word(index);
        request.write(self.abi, |value| {
            self.memory.store(word, value);
            word = word.wrapping_add(1);
        });
    }

    #[inline]
    fn read_request(&self, index: u32, request: &mut WireRequest) {
        let mut word = self.word(index);
        request.read(self.abi, || {
            let value = self.memory.load(word);
            word = word.wrapping_add(1);
            value
        });
    }

    #[inline]
    fn write_response(&self, index: u32, response: &Response) {
        let mut word = self.word(index);
        for value in response.encode() {
            self.memory.store(word, value);
            word = word.wrapping_add(1);
        }
    }

    #[inline]
    fn read_response(&self, index: u32) -> Response {
        let mut word = self.word(index);
        let mut words = [0; RESPONSE_WORDS];
        for value in &mut words {
            *value = self.memory.load(word);
            word = word.wrapping_add(1);
        }
        Response::decode(words)
    }

    /// Moves a producer index.
    ///
    /// Returns `true` if the other side asked to be notified of that.
    #[inline]
    fn publish(&self, prod_word: usize, event_word: usize, old: u32, new: u32) -> bool {
        if old == new {
            return false;
        }
        self.memory.wmb();
        self.memory.store(prod_word, new);
        self.memory.mb();
        crosses_event(self.memory.load(event_word), old, new)
    }

    /// Asks to be notified when a producer index reaches `event`.
    ///
    /// Returns `true` if the producer index differs from `cons`; then the event index may not have
    /// been set.
    #[inline]
    fn final_check(&self, prod_word: usize, event_word: usize, cons: u32, event: u32) -> bool {
        if self.memory.load(prod_word) != cons {
            return true;
        }
        self.memory.store(event_word, event);
        self.memory.mb();
        self.memory.load(prod_word) != cons
    }
}

/// The frontend's side of a ring: it puts requests and takes responses.
pub struct FrontRing<M> {
    slots: Slots<M>,
    /// Requests put, published or not.
    req_prod_pvt: u32,
    /// Requests published.
    req_prod: u32,
    /// Responses taken.
    rsp_cons: u32,
    /// `rsp_prod` when it was last read: the responses before it are in the ring.
    rsp_seen: u32,
}

impl<M: SharedMemory> FrontRing<M> {
    /// Initialises `memory`, which no backend uses yet, as an empty ring.
    pub fn new(memory: M, abi: Abi) -> Result<Self, RingError> {
        let slots = Slots::new(memory, abi)?;
        slots.memory.store(REQ_PROD, 0);
        slots.memory.store(REQ_EVENT, 1);
        slots.memory.store(RSP_PROD, 0);
        slots.memory.store(RSP_EVENT, 1);
        Ok(FrontRing {
            slots,
            req_prod_pvt: 0,
            req_prod: 0,
            rsp_cons: 0,
            rsp_seen: 0,
        })
    }

    /// Returns the memory given to [`FrontRing::new`].
    pub fn memory(&self) -> &M {
        &self.slots.memory
    }

    /// Returns the memory given to [`FrontRing::new`], for a ring that is no longer used.
    pub fn into_memory(self) -> M {
        self.slots.memory
    }

    /// Returns the number of slots of the ring.
    #[inline]
    pub fn capacity(&self) -> u32 {
        self.slots.capacity
    }

    /// Returns the number of requests that were put and whose responses were not taken.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.req_prod_pvt.wrapping_sub(self.rsp_cons)
    }

    /// Returns the number of requests that can be put now.
    #[inline]
    pub fn free_slots(&self) -> u32 {
        self.slots.capacity.saturating_sub(self.in_flight())
    }

    /// Writes a request into the next slot.
    ///
    /// The backend does not see it before [`FrontRing::publish`].
    #[inline(always)]
    pub fn put(&mut self, request: impl Encode) -> Result<(), NoSlot> {
        if self.free_slots() == 0 {
            return Err(NoSlot);
        }
        self.slots.write_request(self.req_prod_pvt, request);
        self.req_prod_pvt = self.req_prod_pvt.wrapping_add(1);
        Ok(())
    }

    /// Publishes all requests put so far.
    ///
    /// Returns `true` if the backend must be notified.
    #[inline]
    #[must_use = "a backend that sleeps must be notified"]
    pub fn publish(&mut self) -> bool {
        let old = self.req_prod;
        self.req_prod = self.req_prod_pvt;
        self.slots.publish(REQ_PROD, REQ_EVENT, old, self.req_prod)
    }

    /// Takes the next response, or `None` if there is none now.
    ///
    /// The backend's index is read once per batch.
    #[inline]
    pub fn take_response(&mut self) -> Result<Option<Response>, RingError> {
        if self.rsp_cons == self.rsp_seen && !self.check_producer()? {
            return Ok(None);
        }
        let response = self.slots.read_response(self.rsp_cons);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Ok(Some(response))
    }

    /// Asks for a notification after `threshold` more responses, once [`FrontRing::take_response`]
    /// has returned `None`.
    ///
    /// Returns `true` if responses have come in the meantime: take them now, because there may be
    /// no notification of them.
    ///
    /// `threshold` is clamped to the range from 1 to the number of published requests without a
    /// response, so that the notification comes at the latest with the last of these responses.
    /// With more than 1, a response is not noticed until that many have come, however long that
    /// takes.
    #[inline]
    #[must_use = "responses that came before the event index was set are not notified"]
    pub fn final_check(&mut self, threshold: u32) -> bool {
        let awaited = self.req_prod.wrapping_sub(self.rsp_cons);
        let event = self.rsp_cons.wrapping_add(threshold.min(awaited).max(1));
        self.slots
            .final_check(RSP_PROD, RSP_EVENT, self.rsp_cons, event)
    }

    /// Returns the number of responses that were taken since the ring was created, modulo 2^32.
    pub fn responses_taken(&self) -> u32 {
        self.rsp_cons
    }

    /// Returns `true` if the backend has published responses that were not taken.
    pub fn has_responses(&self) -> bool {
        self.slots.memory.load(RSP_PROD) != self.rsp_cons
    }

    /// Returns `true` if the backend has not moved its event index since a request reached it: it
    /// may have missed the notification.
    pub fn has_unnoticed_requests(&self) -> bool {
        let event = self.slots.memory.load(REQ_EVENT);
        self.req_prod.wrapping_sub(event) < self.slots.capacity
    }

    /// Reads the backend's index.
    ///
    /// Returns `true` if there are new responses.
    #[inline]
    fn check_producer(&mut self) -> Result<bool, RingError> {
        let rsp_prod = self.slots.memory.load(RSP_PROD);
        let new = rsp_prod.wrapping_sub(self.rsp_cons);
        if new > self.req_prod.wrapping_sub(self.rsp_cons) {
            return Err(RingError::Responses {
                rsp_prod,
                rsp_cons: self.rsp_cons,
            });
        }
        self.slots.memory.rmb();
        self.rsp_seen = rsp_prod;
        Ok(new != 0)
    }
}

/// The backend's side of a ring: it takes requests and puts responses.
pub struct BackRing<M> {
    slots: Slots<M>,
    /// Requests taken.
    req_cons: u32,
    /// `req_prod` when it was last read: the requests before it are in the ring.
    req_seen: u32,
    /// Responses put, published or not.
    rsp_prod_pvt: u32,
    /// Responses published.
    rsp_prod: u32,
}

impl<M: SharedMemory> BackRing<M> {
    /// Attaches to a frontend's ring at the index where the previous backend stopped: the number of
    /// responses published, 0 for a new ring.
    ///
    /// The previous backend must have responded to all requests that it took, or have left a record
    /// of the others, see [`BackRing::adopt`]: responses overwrite requests in the order of their
    /// completion, so a request that was taken and has no response may have been overwritten.
    pub fn attach(memory: M, abi: Abi) -> Result<Self, RingError> {
        let slots = Slots::new(memory, abi)?;
        let at = slots.memory.load(RSP_PROD);
        let mut ring = BackRing {
            slots,
            req_cons: at,
            req_seen: at,
            rsp_prod_pvt: at,
            rsp_prod: at,
        };
        ring.check_producer()?;
        Ok(ring)
    }

    /// Takes over the requests that were in flight when the previous backend crashed, from its
    /// record.
    ///
    /// It had taken the requests before `req_cons`, and had published a response to some of them.
    /// The caller has to respond to the others with [`BackRing::put`], from the record.
    pub fn adopt(&mut self, req_cons: u32) -> Result<(), RingError> {
        if req_cons.wrapping_sub(self.rsp_prod) > self.slots.capacity {
            return Err(RingError::Record {
                rsp_prod: self.rsp_prod,
                req_cons,
            });
        }
        self.req_cons = req_cons;
        self.req_seen = req_cons;
        self.check_producer()?;
        Ok(())
    }

    /// Returns the number of responses published, modulo 2^32 (`rsp_prod`).
    pub fn responses_published(&self) -> u32 {
        self.rsp_prod
    }

    /// Returns the memory given to [`BackRing::attach`].
    pub fn memory(&self) -> &M {
        &self.slots.memory
    }

    /// Returns the number of slots of the ring.
    #[inline]
    pub fn capacity(&self) -> u32 {
        self.slots.capacity
    }

    /// Returns the number of requests that were taken and have no response yet.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod_pvt)
    }

    /// Takes the next request, or `None` if there is none now.
    ///
    /// Each word of it is read once. The frontend's index is read once per batch.
    #[inline]
    pub fn take_request(&mut self) -> Result<Option<WireRequest>, RingError> {
        let mut request = WireRequest::EMPTY;
        let took = self.take_request_to(&mut request)?;
        Ok(took.then_some(request))
    }

    /// Takes a request like [`BackRing::take_request`], into `place`, which can be reused.
    ///
    /// Returns `false` if there is none now.
    #[inline]
    pub fn take_request_to(&mut self, place: &mut WireRequest) -> Result<bool, RingError> {
        if self.req_cons == self.req_seen && !self.check_producer()? {
            return Ok(false);
        }
        self.slots.read_request(self.req_cons, place);
        self.req_cons = self.req_cons.wrapping_add(1);
        Ok(true)
    }

    /// Asks for a notification of the next request, once [`BackRing::take_request`] has returned
    /// `None`.
    ///
    /// Returns `true` if one has come in the meantime: take it now, because there may be no
    /// notification of it.
    #[inline]
    #[must_use = "requests that came before the event index was set are not notified"]
    pub fn final_check(&mut self) -> bool {
        let event = self.req_cons.wrapping_add(1);
        self.slots
            .final_check(REQ_PROD, REQ_EVENT, self.req_cons, event)
    }

    /// Writes a response over the slot of a request that was taken.
    ///
    /// The frontend does not see it before [`BackRing::publish`].
    #[inline]
    pub fn put(&mut self, response: &Response) -> Result<(), NoSlot> {
        if self.in_flight() == 0 {
            return Err(NoSlot);
        }
        self.slots.write_response(self.rsp_prod_pvt, response);
        self.rsp_prod_pvt = self.rsp_prod_pvt.wrapping_add(1);
        Ok(())
    }

    /// Publishes all responses put so far.
    ///
    /// Returns `true` if the frontend must be notified.
    #[inline]
    #[must_use = "a frontend that sleeps must be notified"]
    pub fn publish(&mut self) -> bool {
        let old = self.rsp_prod;
        self.rsp_prod = self.rsp_prod_pvt;
        self.slots.publish(RSP_PROD, RSP_EVENT, old, self.rsp_prod)
    }

    /// Reads the frontend's index.
    ///
    /// Returns `true` if there are new requests.
    #[inline]
    fn check_producer(&mut self) -> Result<bool, RingError> {
        let req_prod = self.slots.memory.load(REQ_PROD);
        let new = req_prod.wrapping_sub(self.req_cons);
        if new > self.slots.capacity.wrapping_sub(self.in_flight()) {
            return Err(RingError::Requests {
                req_prod,
                req_cons: self.req_cons,
            });
        }
        self.slots.memory.rmb();
        self.req_seen = req_prod;
        Ok(new != 0)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{
            Cell,
            RefCell, //
        },
        string::ToString,
        vec::Vec, //
    };

    use crate::{
        plan,
        wire::{
            op,
            Status, //
        },
    };

    use super::*;

    /// An access of a ring to its memory.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    enum Access {
        Load(usize),
        Store(usize),
        Rmb,
        Wmb,
        Mb,
    }

    /// Pages of words that both ends use, with a log.
    struct Pages {
        words: Vec<Cell<u32>>,
        log: RefCell<Vec<Access>>,
    }

    impl Pages {
        fn new(pages: usize) -> Self {
            let words = std::vec![Cell::new(0); pages * WORDS_PER_PAGE];
            Pages {
                words,
                log: RefCell::default(),
            }
        }

        /// Returns the accesses since the last call.
        fn log(&self) -> Vec<Access> {
            self.log.take()
        }

        fn note(&self, access: Access) {
            self.log.borrow_mut().push(access);
        }
    }

    impl SharedMemory for Pages {
        fn words(&self) -> usize {
            self.words.len()
        }
        fn load(&self, word: usize) -> u32 {
            self.note(Access::Load(word));
            self.words[word].get()
        }
        fn store(&self, word: usize, value: u32) {
            self.note(Access::Store(word));
            self.words[word].set(value);
        }
        fn rmb(&self) {
            self.note(Access::Rmb);
        }
        fn wmb(&self) {
            self.note(Access::Wmb);
        }
        fn mb(&self) {
            self.note(Access::Mb);
        }
    }

    const ABI: Abi = Abi::X86_64;

    fn request(id: u64) -> WireRequest {
        plan::flush(op::FLUSH_DISKCACHE, 0, id)
    }

    fn response(id: u64) -> Response {
        Response {
            id,
            operation: op::FLUSH_DISKCACHE,
            status: Status::Okay,
        }
    }

    /// Creates both sides of a ring whose indices are `at`.
    fn pair(pages: &Pages, at: u32) -> (FrontRing<&Pages>, BackRing<&Pages>) {
        let mut front = FrontRing::new(pages, ABI).unwrap();
        front.req_prod_pvt = at;
        front.req_prod = at;
        front.rsp_cons = at;
        front.rsp_seen = at;
        for (word, value) in [(REQ_PROD, at), (RSP_PROD, at)] {
            pages.words[word].set(value);
        }
        for word in [REQ_EVENT, RSP_EVENT] {
            pages.words[word].set(at.wrapping_add(1));
        }
        (front, BackRing::attach(pages, ABI).unwrap())
    }

    fn takes(back: &mut BackRing<&Pages>, id: u64) {
        assert_eq!(back.take_request(), Ok(Some(request(id))));
    }

    #[test]
    fn capacities() {
        for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
            for (pages, slots) in [(1, 32), (2, 64), (3, 64), (4, 128), (8, 256), (16, 512)] {
                assert_eq!(capacity(pages * WORDS_PER_PAGE, abi), slots);
            }
        }
        assert_eq!(capacity(0, ABI), 0);
        assert_eq!(capacity(43, ABI), 0);
        assert_eq!(capacity(44, ABI), 1);
    }

    #[test]
    fn sizes_of_memory() {
        let bad = |words: usize| {
            let mut pages = Pages::new(0);
            pages.words = std::vec![Cell::new(0); words];
            let front = FrontRing::new(&pages, ABI).err();
            assert_eq!(BackRing::attach(&pages, ABI).err(), front);
            front
        };
        for words in [0, 1, 1023, 1025, 17 * 1024, 32 * 1024] {
            assert_eq!(bad(words), Some(RingError::Memory(words)));
        }
        assert_eq!(bad(1024), None);
        assert_eq!(bad(16 * 1024), None);
        let pages = Pages::new(2);
        assert_eq!(FrontRing::new(&pages, ABI).unwrap().capacity(), 64);
        assert_eq!(BackRing::attach(&pages, ABI).unwrap().capacity(), 64);
    }

    #[test]
    fn a_new_ring_asks_for_the_first_events() {
        let pages = Pages::new(1);
        for word in 0..4 {
            pages.words[word].set(77);
        }
        let front = FrontRing::new(&pages, ABI).unwrap();
        let header: Vec<_> = pages.words[..4].iter().map(Cell::get).collect();
        assert_eq!(header, [0, 1, 0, 1]);
        assert!(core::ptr::eq(*front.memory(), &pages));
        let back = BackRing::attach(&pages, ABI).unwrap();
        assert!(core::ptr::eq(*back.memory(), &pages));
    }

    #[test]
    fn slots_are_where_the_layout_says() {
        for (abi, second) in [
            (Abi::X86_64, 64 + 112),
            (Abi::X86_32, 64 + 108),
            (Abi::Arm, 176),
        ] {
            let pages = Pages::new(1);
            let mut front = FrontRing::new(&pages, abi).unwrap();
            front.put(request(0)).unwrap();
            front.put(request(0)).unwrap();
            assert_eq!(pages.words[64 / 4].get(), 3);
            assert_eq!(pages.words[second / 4].get(), 3);
        }
    }

    #[test]
    fn nothing_is_shown_before_it_is_published() {
        let pages = Pages::new(1);
        let (mut front, mut back) = pair(&pages, 0);
        front.put(request(5)).unwrap();
        assert_eq!(back.take_request(), Ok(None));
        assert!(front.publish());
        takes(&mut back, 5);
        assert_eq!(back.take_request(), Ok(None));
        back.put(&response(5)).unwrap();
        assert_eq!(front.take_response(), Ok(None));
        assert!(back.publish());
        assert_eq!(front.take_response(), Ok(Some(response(5))));
        assert_eq!(front.take_response(), Ok(None));
    }

    #[test]
    fn slots_are_counted() {
        let pages = Pages::new(1);
        let (mut front, mut back) = pair(&pages, u32::MAX - 3);
        for id in 0..32 {
            assert_eq!((front.in_flight(), front.free_slots()), (id, 32 - id));
            front.put(request(id.into())).unwrap();
        }
        assert_eq!(front.put(request(32)), Err(NoSlot));
        assert_eq!((front.in_flight(), front.free_slots()), (32, 0));
        assert!(front.publish());
        for id in 0..32 {
            assert_eq!(u64::from(back.in_flight()), id);
            takes(&mut back, id);
        }
        for id in 0..32 {
            back.put(&response(id)).unwrap();
        }
        assert_eq!(back.put(&response(32)), Err(NoSlot));
        assert!(back.publish());
        for id in 0..32 {
            assert_eq!(front.take_response(), Ok(Some(response(id))));
            assert_eq!(u64::from(front.free_slots()), id + 1);
        }
    }

    #[test]
    fn an_index_of_an_earlier_lap_asks_for_nothing() {
        let pages = Pages::new(1);
        let (mut front, _back) = pair(&pages, 0);
        for id in 0..32 {
            front.put(request(id)).unwrap();
        }
        assert!(front.publish());
        front.slots.memory.store(REQ_EVENT, 0);
        assert!(!front.has_unnoticed_requests());
        front.slots.memory.store(REQ_EVENT, 1);
        assert!(front.has_unnoticed_requests());
    }

    #[test]
    fn a_lost_event_can_be_seen() {
        for at in [0, u32::MAX - 1] {
            let pages = Pages::new(1);
            let (mut front, mut back) = pair(&pages, at);
            assert!(!front.has_unnoticed_requests(), "nothing to notice");
            front.put(request(0)).unwrap();
            assert!(!front.has_unnoticed_requests(), "not published");
            assert!(front.publish());
            assert!(front.has_unnoticed_requests());
            takes(&mut back, 0);
            assert!(!back.final_check());
            assert!(!front.has_unnoticed_requests());

            assert!(!front.has_responses());
            assert_eq!(front.responses_taken(), at);
            back.put(&response(0)).unwrap();
            assert!(back.publish());
            assert!(front.has_responses());
            assert_eq!(front.take_response(), Ok(Some(response(0))));
            assert!(!front.has_responses());
            assert_eq!(front.responses_taken(), at.wrapping_add(1));
            assert_eq!(front.into_memory().words(), WORDS_PER_PAGE);
        }
    }

    #[test]
    fn only_what_is_needed_is_notified() {
        for at in [0, u32::MAX - 1] {
            let pages = Pages::new(1);
            let (mut front, mut back) = pair(&pages, at);
            assert!(!front.publish(), "nothing to publish");
            front.put(request(0)).unwrap();
            assert!(front.publish(), "the backend sleeps");
            front.put(request(1)).unwrap();
            assert!(!front.publish(), "it was notified");
            takes(&mut back, 0);
            takes(&mut back, 1);
            assert!(!back.final_check());
            front.put(request(2)).unwrap();
            front.put(request(3)).unwrap();
            assert!(front.publish(), "it sleeps again");
            assert!(back.final_check(), "something came");
        }
    }

    #[test]
    fn a_final_check_sees_what_came_before_it() {
        let pages = Pages::new(1);
        let (mut front, mut back) = pair(&pages, 0);
        front.put(request(0)).unwrap();
        let _ = front.publish();
        pages.log();
        assert!(back.final_check());
        assert_eq!(pages.log(), [Access::Load(REQ_PROD)]);
        takes(&mut back, 0);
        pages.log();
        assert!(!back.final_check());
        let expected = [
            Access::Load(REQ_PROD),
            Access::Store(REQ_EVENT),
            Access::Mb,
            Access::Load(REQ_PROD),
        ];
        assert_eq!(pages.log(), expected);
        back.put(&response(0)).unwrap();
        let _ = back.publish();
        assert!(front.final_check(1));
    }

    #[test]
    fn thresholds() {
        for at in [0, u32::MAX - 2] {
            let pages = Pages::new(1);
            let (mut front, mut back) = pair(&pages, at);
            for id in 0..4 {
                front.put(request(id)).unwrap();
            }
            let event = || pages.words[RSP_EVENT].get().wrapping_sub(at);
            assert!(!front.final_check(3));
            assert_eq!(event(), 1, "nothing is published yet");
            let _ = front.publish();
            for (threshold, expected) in [(0, 1), (1, 1), (3, 3), (4, 4), (5, 4), (u32::MAX, 4)] {
                assert!(!front.final_check(threshold));
                assert_eq!(event(), expected);
            }
            assert!(!front.final_check(2));
            for (id, notified) in [(0, false), (1, true), (2, false)] {
                takes(&mut back, id);
                back.put(&response(id)).unwrap();
                assert_eq!(back.publish(), notified);
            }
        }
    }

    #[test]
    fn indices_are_read_once_for_a_batch() {
        let pages = Pages::new(1);
        let (mut front, mut back) = pair(&pages, 0);
        for id in 0..3 {
            front.put(request(id)).unwrap();
        }
        let _ = front.publish();
        pages.log();
        assert_eq!(
            (0..4).filter_map(|_| back.take_request().unwrap()).count(),
            3
        );
        let log = pages.log();
        assert_eq!(
            log.iter()
                .filter(|access| **access == Access::Load(REQ_PROD))
                .count(),
            2
        );
        assert_eq!(log[..2], [Access::Load(REQ_PROD), Access::Rmb]);
        for id in 0..3 {
            back.put(&response(id)).unwrap();
        }
        let _ = back.publish();
        pages.log();
        assert_eq!(
            (0..4)
                .filter_map(|_| front.take_response().unwrap())
                .count(),
            3
        );
        let log = pages.log();
        assert_eq!(
            log.iter()
                .filter(|access| **access == Access::Load(RSP_PROD))
                .count(),
            2
        );
        assert_eq!(log[..2], [Access::Load(RSP_PROD), Access::Rmb]);
    }

    #[test]
    fn slots_come_before_the_index_and_that_before_the_look() {
        let pages = Pages::new(1);
        let (mut front, mut back) = pair(&pages, 0);
        pages.log();
        front.put(request(0)).unwrap();
        let _ = front.publish();
        let log = pages.log();
        assert!(log[..6]
            .iter()
            .all(|access| matches!(access, Access::Store(16..22))));
        let tail = [
            Access::Wmb,
            Access::Store(REQ_PROD),
            Access::Mb,
            Access::Load(REQ_EVENT),
        ];
        assert_eq!(log[6..], tail);
        takes(&mut back, 0);
        pages.log();
        back.put(&response(0)).unwrap();
        let _ = back.publish();
        let log = pages.log();
        assert_eq!(
            log[..3],
            [Access::Store(16), Access::Store(17), Access::Store(18)]
        );
        let tail = [
            Access::Wmb,
            Access::Store(RSP_PROD),
            Access::Mb,
            Access::Load(RSP_EVENT),
        ];
        assert_eq!(log[3..], tail);
    }

    #[test]
    fn each_word_of_a_request_is_read_once() {
        let pages = Pages::new(1);
        let (mut front, mut back) = pair(&pages, 0);
        front.put(request(0)).unwrap();
        let _ = front.publish();
        pages.log();
        takes(&mut back, 0);
        let expected: Vec<_> = (16..22).map(Access::Load).collect();
        assert_eq!(pages.log()[2..], expected);
    }

    #[test]
    fn more_requests_than_slots_are_refused() {
        for at in [0, u32::MAX - 10] {
            let pages = Pages::new(1);
            let (mut front, mut back) = pair(&pages, at);
            let index = |n: u32| at.wrapping_add(n);
            let hostile = |back: &mut BackRing<&Pages>, req_prod: u32| {
                pages.words[REQ_PROD].set(req_prod);
                let req_cons = back.req_cons;
                assert_eq!(
                    back.take_request(),
                    Err(RingError::Requests { req_prod, req_cons })
                );
            };
            hostile(&mut back, index(33));
            hostile(&mut back, index(u32::MAX));
            hostile(&mut back, index(1 << 31));
            pages.words[REQ_PROD].set(at);
            front.put(request(0)).unwrap();
            front.put(request(1)).unwrap();
            let _ = front.publish();
            takes(&mut back, 0);
            takes(&mut back, 1);
            // Two are in flight, so 30 more fit.
            hostile(&mut back, index(33));
            // An index cannot go back, not even to what is in flight.
            hostile(&mut back, index(1));
            back.put(&response(0)).unwrap();
            hostile(&mut back, index(34));
            pages.words[REQ_PROD].set(index(33));
            assert!(back.take_request().unwrap().is_some());
        }
    }

    #[test]
    fn more_responses_than_requests_are_refused() {
        for at in [0, u32::MAX - 1] {
            let pages = Pages::new(1);
            let (mut front, _) = pair(&pages, at);
            let hostile = |front: &mut FrontRing<&Pages>, n: u32| {
                let rsp_prod = at.wrapping_add(n);
                pages.words[RSP_PROD].set(rsp_prod);
                let error = RingError::Responses {
                    rsp_prod,
                    rsp_cons: front.rsp_cons,
                };
                assert_eq!(front.take_response(), Err(error));
            };
            hostile(&mut front, 1);
            for id in 0..3 {
                front.put(request(id)).unwrap();
            }
            hostile(&mut front, 1);
            let _ = front.publish();
            hostile(&mut front, 4);
            hostile(&mut front, u32::MAX);
            pages.words[RSP_PROD].set(at.wrapping_add(2));
            assert!(front.take_response().unwrap().is_some());
            assert!(front.take_response().unwrap().is_some());
            hostile(&mut front, 1);
            hostile(&mut front, 4);
            pages.words[RSP_PROD].set(at.wrapping_add(3));
            assert!(front.take_response().unwrap().is_some());
        }
    }

    #[test]
    fn a_second_backend_goes_on_where_the_first_left_off() {
        let pages = Pages::new(1);
        let (mut front, mut back) = pair(&pages, u32::MAX);
        for id in 0..3 {
            front.put(request(id)).unwrap();
        }
        let _ = front.publish();
        takes(&mut back, 0);
        back.put(&response(0)).unwrap();
        let _ = back.publish();
        let mut back = BackRing::attach(&pages, ABI).unwrap();
        assert_eq!(back.in_flight(), 0);
        takes(&mut back, 1);
        takes(&mut back, 2);
        back.put(&response(1)).unwrap();
        back.put(&response(2)).unwrap();
        let _ = back.publish();
        for id in 0..3 {
            assert_eq!(front.take_response(), Ok(Some(response(id))));
        }
    }

    #[test]
    fn a_ring_is_adopted_from_a_record() {
        let pages = Pages::new(1);
        let at = u32::MAX - 1;
        let (mut front, mut back) = pair(&pages, at);
        for id in 0..6 {
            front.put(request(id)).unwrap();
        }
        assert!(front.publish());
        for _ in 0..5 {
            back.take_request().unwrap().unwrap();
        }
        back.put(&response(4)).unwrap();
        back.put(&response(2)).unwrap();
        let _ = back.publish();
        back.put(&response(3)).unwrap();

        let mut back = BackRing::attach(&pages, ABI).unwrap();
        assert_eq!(back.responses_published(), at.wrapping_add(2));
        back.adopt(at.wrapping_add(5)).unwrap();
        assert_eq!(back.in_flight(), 3);
        for id in [0, 3, 1] {
            back.put(&response(id)).unwrap();
        }
        assert_eq!(back.put(&response(9)), Err(NoSlot));
        assert_eq!(back.take_request().unwrap().unwrap().id(), 5);
        let _ = back.publish();
        for id in [4, 2, 0, 3, 1] {
            assert_eq!(front.take_response().unwrap().unwrap().id, id);
        }
    }

    #[test]
    fn a_record_that_does_not_fit_the_ring_is_an_error() {
        let pages = Pages::new(1);
        let (mut front, _) = pair(&pages, 7);
        front.put(request(1)).unwrap();
        let _ = front.publish();
        let back = BackRing::attach(&pages, ABI).unwrap();
        assert_eq!(back.responses_published(), 7);
        let adopt = |req_cons| BackRing::attach(&pages, ABI).unwrap().adopt(req_cons);
        assert_eq!(adopt(8), Ok(()));
        for req_cons in [6, 7 + 33] {
            let expected = RingError::Record {
                rsp_prod: 7,
                req_cons,
            };
            assert_eq!(adopt(req_cons), Err(expected));
        }
        assert!(matches!(adopt(9), Err(RingError::Requests { .. })));
        pages.words[REQ_PROD].set(7 + 32);
        assert_eq!(adopt(7 + 32), Ok(()));
    }

    #[test]
    fn a_ring_with_impossible_indices_is_not_attached_to() {
        let pages = Pages::new(1);
        for (req_prod, rsp_prod, fine) in [
            (32, 0, true),
            (33, 0, false),
            (0, 1, false),
            (5, u32::MAX, true),
            (5, 5, true),
        ] {
            pages.words[REQ_PROD].set(req_prod);
            pages.words[RSP_PROD].set(rsp_prod);
            let error = RingError::Requests {
                req_prod,
                req_cons: rsp_prod,
            };
            let expected = if fine { None } else { Some(error) };
            assert_eq!(BackRing::attach(&pages, ABI).err(), expected);
        }
    }

    #[test]
    fn messages() {
        assert_eq!(
            RingError::Memory(5).to_string(),
            "a ring of 5 words is not 1 to 16 pages"
        );
        assert_eq!(
            RingError::Requests {
                req_prod: 99,
                req_cons: 1
            }
            .to_string(),
            "req_prod 99 is impossible after 1 requests"
        );
        assert_eq!(
            RingError::Responses {
                rsp_prod: 99,
                rsp_cons: 1
            }
            .to_string(),
            "rsp_prod 99 is impossible after 1 responses"
        );
    }
}
