// SPDX-License-Identifier: GPL-2.0-only

//! Who writes to the ring: any request, right or wrong, and looks at what comes back.

use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        aref::ARef,
        Arc, //
    }, //
};

use kernel_ext::{
    base::{
        jiffies::{
            self,
            msecs_to_jiffies, //
        },
        kthread::Current,
        page::{
            Page,
            PageSliceMut, //
        },
    },
    xen::{
        events::EventChannel,
        grant::{
            GrantAccess,
            GrantReserve,
            GrantedPage, //
        },
        ring::RingPages,
        xenbus::{
            self,
            State, //
        },
        DomId, //
    },
};

use blkif::wire::{
    op,
    Abi,
    IndirectRequest,
    Response,
    RwRequest,
    WireRequest,
    WireSegment,
    DIRECT_SEGMENTS,
    INDIRECT_PAGES,
    SECTORS_PER_PAGE, //
};

use crate::{
    raw_ring::{
        RawRing,
        REQ_EVENT,
        REQ_PROD,
        RSP_EVENT,
        RSP_PROD, //
    },
    session_state::{
        Outcome,
        SessionState, //
    },
};

/// How long an answer may take.
const ANSWER_MS: u32 = 60_000;

/// Sectors that no valid request touches: what a refused write must leave alone.
pub(crate) const VICTIM: u64 = 8;
/// Sectors that valid requests write.
pub(crate) const SCRATCH: u64 = 64;
/// Sectors that valid requests write poison data to.
pub(crate) const ELSEWHERE: u64 = 128;
/// Segments of the largest indirect request that backends offer.
const MOST_INDIRECT: usize = 256;
/// Pages for many requests at once.
const MANY: usize = 8;
/// What refused writes bring.
const POISON: u8 = 0xee;
/// A grant reference that we never had.
pub(crate) const NO_GRANT: u32 = 0xffff_fff0;
/// The last sector of a page.
pub(crate) const LAST: u8 = 7;

/// Pages that requests name.
pub(crate) struct Pages {
    /// Full of [`POISON`], as all that refused writes bring.
    poison: GrantedPage,
    /// The backend may only read it.
    locked: GrantedPage,
    /// No domain may use it.
    foreign: GrantedPage,
    /// Segments of indirect requests.
    list: GrantedPage,
    /// For many requests at once, or large ones: Xen counts the uses of a grant to 127 only.
    many: KVec<GrantedPage>,
    /// The data of valid requests.
    out: GrantedPage,
    back: GrantedPage,
}

impl Pages {
    pub(crate) fn new(device: &xenbus::Device) -> Result<Self> {
        let backend = device.otherend_id();
        let mut many = KVec::new();
        for _ in 0..MANY {
            many.push(grant(backend, GrantAccess::ReadWrite, POISON)?, GFP_KERNEL)?;
        }
        Ok(Self {
            many,
            poison: grant(backend, GrantAccess::ReadWrite, POISON)?,
            locked: grant(backend, GrantAccess::ReadOnly, POISON)?,
            foreign: grant(DomId::NONE, GrantAccess::ReadWrite, POISON)?,
            list: grant(backend, GrantAccess::ReadWrite, 0)?,
            out: grant(backend, GrantAccess::ReadWrite, 0)?,
            back: grant(backend, GrantAccess::ReadWrite, 0)?,
        })
    }
}

/// A page full of a byte, granted to a domain.
fn grant(domain: DomId, access: GrantAccess, byte: u8) -> Result<GrantedPage> {
    let page = Page::alloc_page(GFP_KERNEL)?;
    fill(&page, |_| byte);
    GrantedPage::new(&mut GrantReserve::new(1)?, domain, page, access)
}

fn fill(page: &Page, byte: impl Fn(usize) -> u8) {
    let mut chunk = [0; 128];
    for offset in (0..PAGE_SIZE).step_by(chunk.len()) {
        for (index, place) in chunk.iter_mut().enumerate() {
            *place = byte(offset.wrapping_add(index));
        }
        if let Some(slice) = PageSliceMut::new(page, offset, chunk.len()) {
            slice.write(&chunk);
        }
    }
}

/// What a connection is made of.
pub(crate) struct Parts {
    pub(crate) device: ARef<xenbus::Device>,
    pub(crate) session_state: Arc<SessionState>,
    pub(crate) raw_ring: RawRing<RingPages>,
    pub(crate) channel: EventChannel<SessionState>,
    pub(crate) pages: Pages,
    /// How long to wait for a backend that may take no notice.
    pub(crate) timeout_ms: u32,
}

/// A connection, in the hands of its thread.
pub(crate) struct Session<'a> {
    pub(crate) parts: Parts,
    pub(crate) current: &'a Current,
    /// Requests published.
    pub(crate) sent: u32,
    /// Responses taken.
    pub(crate) answered: u32,
    id: u64,
    seed: u8,
}

impl<'a> Session<'a> {
    pub(crate) fn new(parts: Parts, current: &'a Current) -> Self {
        let ring = &parts.raw_ring.ring;
        ring.store(REQ_EVENT, 1);
        ring.store(RSP_EVENT, 1);
        Self {
            parts,
            current,
            sent: 0,
            answered: 0,
            id: 0xfeed << 48,
            seed: 0,
        }
    }

    pub(crate) fn ring(&self) -> &RingPages {
        &self.parts.raw_ring.ring
    }

    pub(crate) fn abi(&self) -> Abi {
        self.parts.raw_ring.abi()
    }

    /// Waits until the backend serves the ring. `false`: it does not.
    pub(crate) fn await_connection(&self) -> bool {
        let end = jiffies::now().wrapping_add(msecs_to_jiffies(ANSWER_MS));
        let session_state = &self.parts.session_state;
        while session_state.backend_is(State::InitWait) {
            if self.current.should_stop() || jiffies::is_past(end) {
                return false;
            }
            session_state.wait(self.current);
        }
        session_state.backend_is(State::Connected)
    }

    /// Whether the connection ends, by the backend or by us.
    pub(crate) fn is_closing(&self) -> bool {
        self.current.should_stop() || !self.parts.session_state.backend_is(State::Connected)
    }

    /// Waits until something is true; `false` if it takes too long or the connection ends.
    pub(crate) fn wait(&self, milliseconds: u32, mut condition: impl FnMut() -> bool) -> bool {
        let end = jiffies::now().wrapping_add(msecs_to_jiffies(milliseconds));
        loop {
            if condition() {
                return true;
            }
            if self.is_closing() || jiffies::is_past(end) {
                return condition();
            }
            self.parts.session_state.wait(self.current);
        }
    }

    /// Waits until the backend closes, if it does.
    pub(crate) fn watch_backend(&self) -> Outcome {
        if self.wait(self.parts.timeout_ms, || self.is_closing()) {
            Outcome::Closing
        } else {
            Outcome::Silent
        }
    }

    /// Puts a request into the next slot.
    pub(crate) fn put(&mut self, request: &WireRequest) {
        let words = request.encode(self.abi());
        let len = self.abi().slot_words() as usize;
        let words = words.get(..len).unwrap_or(&words);
        self.parts.raw_ring.put(self.sent, words);
        self.sent = self.sent.wrapping_add(1);
    }

    /// Shows the backend what was put, and notifies it.
    pub(crate) fn publish(&self) {
        self.claim(self.sent);
    }

    /// Claims any number of requests.
    pub(crate) fn claim(&self, requests: u32) {
        self.show(requests);
        self.parts.channel.notify();
    }

    /// Claims any number of requests, and does not notify the backend.
    pub(crate) fn show(&self, requests: u32) {
        self.ring().write_fence();
        self.ring().store(REQ_PROD, requests);
        self.ring().full_fence();
    }

    /// How many responses there are, as the backend says.
    fn responses(&self) -> u32 {
        self.ring().load(RSP_PROD)
    }

    /// Waits until there are so many responses in all; takes none.
    pub(crate) fn await_responses(&self, count: u32) -> Outcome {
        let enough = || {
            self.ring()
                .store(RSP_EVENT, self.responses().wrapping_add(1));
            self.ring().full_fence();
            count.wrapping_sub(self.responses()) as i32 <= 0
        };
        if self.wait(ANSWER_MS, enough) {
            self.ring().read_fence();
            Outcome::Okay
        } else if self.is_closing() {
            Outcome::Closing
        } else {
            Outcome::Silent
        }
    }

    /// Takes the next response.
    pub(crate) fn take(&mut self) -> Result<Response, Outcome> {
        match self.await_responses(self.answered.wrapping_add(1)) {
            Outcome::Okay => {
                let response = Response::decode(self.parts.raw_ring.get(self.answered));
                self.answered = self.answered.wrapping_add(1);
                Ok(response)
            }
            other => Err(other),
        }
    }

    /// Sends a request and awaits the response to it.
    pub(crate) fn ask(&mut self, request: WireRequest) -> Outcome {
        self.put(&request);
        self.publish();
        let response = match self.take() {
            Ok(response) => response,
            Err(outcome) => return outcome,
        };
        let expected = (request.id(), request.response_operation());
        if (response.id, response.operation) != expected {
            return Outcome::Stray;
        }
        response.status.into()
    }

    /// An id that was not used before.
    pub(crate) fn next_id(&mut self) -> u64 {
        self.id = self.id.wrapping_add(1);
        self.id
    }

    /// A request with its segments in the slot.
    pub(crate) fn rw(&mut self, operation: u8, sector: u64, segments: &[WireSegment]) -> RwRequest {
        let mut all = [WireSegment::default(); DIRECT_SEGMENTS];
        for (place, segment) in all.iter_mut().zip(segments) {
            *place = *segment;
        }
        RwRequest {
            operation,
            nr_segments: segments.len() as u8,
            handle: self.handle(),
            id: self.next_id(),
            sector,
            segments: all,
        }
    }

    /// An indirect request whose segments stand in the page for that.
    pub(crate) fn indirect(
        &mut self,
        operation: u8,
        sector: u64,
        segments: &[WireSegment],
    ) -> IndirectRequest {
        for (index, segment) in segments.iter().enumerate() {
            let [gref, range] = segment.encode();
            let place = self.parts.pages.list.slice_mut(index.wrapping_mul(8), 8);
            if let Some(place) = place {
                let both = u64::from(gref) | u64::from(range) << 32;
                place.write(&both.to_le_bytes());
            }
        }
        IndirectRequest {
            operation,
            nr_segments: segments.len() as u16,
            handle: self.handle(),
            id: self.next_id(),
            sector,
            grefs: [self.parts.pages.list.reference().value(); INDIRECT_PAGES],
        }
    }

    pub(crate) fn handle(&self) -> u16 {
        self.parts.device.handle().unwrap_or(0) as u16
    }

    /// A whole page of poison.
    pub(crate) fn poison(&self) -> WireSegment {
        self.part_of_poison(0, LAST)
    }

    /// A part of that page, or what is none.
    pub(crate) fn part_of_poison(&self, first: u8, last: u8) -> WireSegment {
        let gref = self.parts.pages.poison.reference().value();
        WireSegment { gref, first, last }
    }

    /// The page that the backend may only read.
    pub(crate) fn locked(&self) -> WireSegment {
        whole(self.parts.pages.locked.reference().value())
    }

    /// One of several pages.
    pub(crate) fn many(&self, index: u32) -> WireSegment {
        let page = self.parts.pages.many.get(index as usize % MANY);
        whole(page.map_or(NO_GRANT, |page| page.reference().value()))
    }

    /// The page that no domain may use.
    pub(crate) fn foreign(&self) -> WireSegment {
        whole(self.parts.pages.foreign.reference().value())
    }

    /// Another page of poison, for the backend.
    pub(crate) fn grant_page(&self) -> Result<GrantedPage> {
        let backend = self.parts.device.otherend_id();
        grant(backend, GrantAccess::ReadWrite, POISON)
    }

    /// Sends a read or write whose segments stand in the slot.
    pub(crate) fn direct(
        &mut self,
        operation: u8,
        sector: u64,
        segments: &[WireSegment],
    ) -> Outcome {
        let request = self.rw(operation, sector, segments);
        self.ask(WireRequest::Rw(request))
    }

    /// Valid requests: what was written last is what is read, and what no valid request has written
    /// is as it was.
    pub(crate) fn check_disk(&mut self) -> Outcome {
        let read_only = self.parts.session_state.facts().read_only;
        self.seed = self.seed.wrapping_add(1);
        let seed = self.seed;
        if !read_only {
            let out = whole(self.parts.pages.out.reference().value());
            write(&self.parts.pages.out, |index| pattern(seed, index));
            let outcome = self.direct(op::WRITE, SCRATCH, &[out]);
            if outcome != Outcome::Okay {
                return outcome;
            }
            let outcome =
                self.read_and_compare(SCRATCH, |index, byte| byte == pattern(seed, index));
            if outcome != Outcome::Okay {
                return outcome;
            }
        }
        self.read_and_compare(VICTIM, |_, byte| byte != POISON)
    }

    /// The largest indirect write: what stands in its last segment is read by another one.
    pub(crate) fn check_indirect(&mut self) -> Outcome {
        self.seed = self.seed.wrapping_add(1);
        let seed = self.seed;
        for page in &self.parts.pages.many {
            write(page, |index| pattern(seed, index));
        }
        let out: [_; MOST_INDIRECT] = core::array::from_fn(|index| self.many(index as u32));
        let request = self.indirect(op::WRITE, ELSEWHERE, &out);
        let outcome = self.ask(WireRequest::Indirect(request));
        if outcome != Outcome::Okay {
            return outcome;
        }

        write(&self.parts.pages.back, |_| POISON);
        let back = whole(self.parts.pages.back.reference().value());
        let last = ELSEWHERE + (MOST_INDIRECT as u64 - 1) * u64::from(SECTORS_PER_PAGE);
        let request = self.indirect(op::READ, last, &[back]);
        match self.ask(WireRequest::Indirect(request)) {
            Outcome::Okay if !self.back_holds(|index, byte| byte == pattern(seed, index)) => {
                Outcome::WrongData
            }
            other => other,
        }
    }

    fn back_holds(&self, right: impl Fn(usize, u8) -> bool) -> bool {
        holds(&self.parts.pages.back, right)
    }

    fn read_and_compare(&mut self, sector: u64, right: impl Fn(usize, u8) -> bool) -> Outcome {
        write(&self.parts.pages.back, |_| POISON);
        let back = whole(self.parts.pages.back.reference().value());
        match self.direct(op::READ, sector, &[back]) {
            Outcome::Okay if self.back_holds(right) => Outcome::Okay,
            Outcome::Okay => Outcome::WrongData,
            other => other,
        }
    }
}

/// A page from its first to its last sector.
pub(crate) fn whole(gref: u32) -> WireSegment {
    WireSegment {
        gref,
        first: 0,
        last: LAST,
    }
}

/// The byte of valid data at an index.
fn pattern(seed: u8, index: usize) -> u8 {
    // Never `POISON`: that one is odd in its upper half.
    (seed.wrapping_add((index / 128) as u8) ^ index as u8) & 0x7f
}

fn write(page: &GrantedPage, byte: impl Fn(usize) -> u8) {
    let mut chunk = [0; 128];
    for offset in (0..PAGE_SIZE).step_by(chunk.len()) {
        for (index, place) in chunk.iter_mut().enumerate() {
            *place = byte(offset.wrapping_add(index));
        }
        if let Some(slice) = page.slice_mut(offset, chunk.len()) {
            slice.write(&chunk);
        }
    }
}

fn holds(page: &GrantedPage, right: impl Fn(usize, u8) -> bool) -> bool {
    let mut chunk = [0; 128];
    (0..PAGE_SIZE).step_by(chunk.len()).all(|offset| {
        let read = page
            .slice(offset, chunk.len())
            .map(|slice| slice.read(&mut chunk));
        let mut bytes = chunk.iter().enumerate();
        read == Some(chunk.len())
            && bytes.all(|(index, byte)| right(offset.wrapping_add(index), *byte))
    })
}
