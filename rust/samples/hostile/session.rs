// SPDX-License-Identifier: GPL-2.0-only

//! A connection of the frontend, on which any request can be sent, valid or not.

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
            XenbusState, //
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

/// Time limit for a response, in milliseconds.
const RESPONSE_TIMEOUT_MS: u32 = 60_000;

/// Sector that no valid request writes, and that a refused write must not change.
pub(crate) const VICTIM: u64 = 8;
/// Sector that valid requests write.
pub(crate) const SCRATCH: u64 = 64;
/// Sector to which valid requests write poison.
pub(crate) const ELSEWHERE: u64 = 128;
/// Number of segments of the largest indirect request that backends support.
const MAX_INDIRECT: usize = 256;
/// Pages for many requests at once.
const MANY: usize = 8;
/// The byte that refused writes contain.
const POISON: u8 = 0xee;
/// A grant reference that was never allocated.
pub(crate) const NO_GRANT: u32 = 0xffff_fff0;
/// The last sector of a page.
pub(crate) const LAST: u8 = 7;

/// The granted pages that requests use.
pub(crate) struct Pages {
    /// A page full of [`POISON`], the data of refused writes.
    poison: GrantedPage,
    /// A page granted read-only.
    locked: GrantedPage,
    /// A page granted to no domain.
    foreign: GrantedPage,
    /// Segments of indirect requests.
    list: GrantedPage,
    /// Pages for many or large requests, because Xen counts at most 127 uses of a grant.
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

/// Allocates a page filled with a byte and grants it to a domain.
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

/// The resources of a connection.
pub(crate) struct Parts {
    pub(crate) device: ARef<xenbus::Device>,
    pub(crate) session_state: Arc<SessionState>,
    pub(crate) raw_ring: RawRing<RingPages>,
    pub(crate) channel: EventChannel<SessionState>,
    pub(crate) pages: Pages,
    /// Time for a backend to close, in milliseconds.
    pub(crate) timeout_ms: u32,
}

/// A connection as its thread uses it.
pub(crate) struct Session<'a> {
    pub(crate) parts: Parts,
    pub(crate) current: &'a Current,
    /// Number of requests written.
    pub(crate) sent: u32,
    /// Number of responses read.
    pub(crate) received: u32,
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
            received: 0,
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

    /// Waits until the backend is connected.
    ///
    /// Returns `false` if it does not connect.
    pub(crate) fn await_connection(&self) -> bool {
        let end = jiffies::now().wrapping_add(msecs_to_jiffies(RESPONSE_TIMEOUT_MS));
        let session_state = &self.parts.session_state;
        while session_state.backend_is(XenbusState::InitWait) {
            if self.current.should_stop() || jiffies::is_past(end) {
                return false;
            }
            session_state.wait(self.current);
        }
        session_state.backend_is(XenbusState::Connected)
    }

    /// Returns `true` if either side closes the connection.
    pub(crate) fn is_closing(&self) -> bool {
        self.current.should_stop() || !self.parts.session_state.backend_is(XenbusState::Connected)
    }

    /// Waits for a condition.
    ///
    /// Returns `false` after the time limit, or if the connection closes first.
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

    /// Waits until the backend closes, up to the time limit.
    pub(crate) fn watch_backend(&self) -> Outcome {
        if self.wait(self.parts.timeout_ms, || self.is_closing()) {
            Outcome::Closing
        } else {
            Outcome::Silent
        }
    }

    /// Writes a request to the next slot.
    pub(crate) fn put(&mut self, request: &WireRequest) {
        let words = request.encode(self.abi());
        let len = self.abi().slot_words() as usize;
        let words = words.get(..len).unwrap_or(&words);
        self.parts.raw_ring.put(self.sent, words);
        self.sent = self.sent.wrapping_add(1);
    }

    /// Publishes all requests written and notifies the backend.
    pub(crate) fn publish(&self) {
        self.claim(self.sent);
    }

    /// Publishes any producer index and notifies the backend.
    pub(crate) fn claim(&self, requests: u32) {
        self.show(requests);
        self.parts.channel.notify();
    }

    /// Publishes any producer index without notification.
    pub(crate) fn show(&self, requests: u32) {
        self.ring().write_fence();
        self.ring().store(REQ_PROD, requests);
        self.ring().full_fence();
    }

    /// Returns the producer index of the backend.
    fn responses(&self) -> u32 {
        self.ring().load(RSP_PROD)
    }

    /// Waits until the backend has published `count` responses in total; reads none.
    pub(crate) fn await_responses(&self, count: u32) -> Outcome {
        let enough = || {
            self.ring()
                .store(RSP_EVENT, self.responses().wrapping_add(1));
            self.ring().full_fence();
            count.wrapping_sub(self.responses()) as i32 <= 0
        };
        if self.wait(RESPONSE_TIMEOUT_MS, enough) {
            self.ring().read_fence();
            Outcome::Okay
        } else if self.is_closing() {
            Outcome::Closing
        } else {
            Outcome::Silent
        }
    }

    /// Reads the next response.
    pub(crate) fn take(&mut self) -> Result<Response, Outcome> {
        match self.await_responses(self.received.wrapping_add(1)) {
            Outcome::Okay => {
                let response = Response::decode(self.parts.raw_ring.get(self.received));
                self.received = self.received.wrapping_add(1);
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

    /// Returns an unused id.
    pub(crate) fn next_id(&mut self) -> u64 {
        self.id = self.id.wrapping_add(1);
        self.id
    }

    /// Builds a request with its segments in the slot.
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

    /// Builds an indirect request and writes its segments to the page for them.
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

    /// Returns a segment of a whole page of poison.
    pub(crate) fn poison(&self) -> WireSegment {
        self.part_of_poison(0, LAST)
    }

    /// Returns a segment of any, even invalid, sectors of that page.
    pub(crate) fn part_of_poison(&self, first: u8, last: u8) -> WireSegment {
        let gref = self.parts.pages.poison.reference().value();
        WireSegment { gref, first, last }
    }

    /// Returns a segment of the page granted read-only.
    pub(crate) fn locked(&self) -> WireSegment {
        whole(self.parts.pages.locked.reference().value())
    }

    /// Returns a segment of one of the many pages.
    pub(crate) fn many(&self, index: u32) -> WireSegment {
        let page = self.parts.pages.many.get(index as usize % MANY);
        whole(page.map_or(NO_GRANT, |page| page.reference().value()))
    }

    /// Returns a segment of the page granted to no domain.
    pub(crate) fn foreign(&self) -> WireSegment {
        whole(self.parts.pages.foreign.reference().value())
    }

    /// Grants another page of poison to the backend.
    pub(crate) fn grant_page(&self) -> Result<GrantedPage> {
        let backend = self.parts.device.otherend_id();
        grant(backend, GrantAccess::ReadWrite, POISON)
    }

    /// Sends a read or write with its segments in the slot, and waits for the response.
    pub(crate) fn direct(
        &mut self,
        operation: u8,
        sector: u64,
        segments: &[WireSegment],
    ) -> Outcome {
        let request = self.rw(operation, sector, segments);
        self.ask(WireRequest::Rw(request))
    }

    /// Checks with valid requests that the last data written is read back.
    ///
    /// Sectors that no valid request has written must be unchanged.
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

    /// Sends the largest indirect write, and reads back its last segment.
    pub(crate) fn check_indirect(&mut self) -> Outcome {
        self.seed = self.seed.wrapping_add(1);
        let seed = self.seed;
        for page in &self.parts.pages.many {
            write(page, |index| pattern(seed, index));
        }
        let out: [_; MAX_INDIRECT] = core::array::from_fn(|index| self.many(index as u32));
        let request = self.indirect(op::WRITE, ELSEWHERE, &out);
        let outcome = self.ask(WireRequest::Indirect(request));
        if outcome != Outcome::Okay {
            return outcome;
        }

        write(&self.parts.pages.back, |_| POISON);
        let back = whole(self.parts.pages.back.reference().value());
        let last = ELSEWHERE + (MAX_INDIRECT as u64 - 1) * u64::from(SECTORS_PER_PAGE);
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

/// Returns a segment of a whole page.
pub(crate) fn whole(gref: u32) -> WireSegment {
    WireSegment {
        gref,
        first: 0,
        last: LAST,
    }
}

/// Returns the byte of valid data at an index.
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
