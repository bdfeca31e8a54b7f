// SPDX-License-Identifier: GPL-2.0-only

//! The request data: the driver's data of each block request.
//!
//! The data of a request is transferred in one of two ways. *Direct*: the pages of the request are
//! granted until it is complete. *Bounced*: the data is copied to or from pages of a
//! [`pool`](crate::pool), which contain nothing else and stay granted.
//!
//! In `xen-blkfront.c`, `struct blk_shadow` and `struct grant` have this role.

use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

use kernel_ext::{
    block::mq::{
        BlkStatus,
        InFlight,
        Op,
        Request,
        Segments, //
    },
    xen::grant::{
        GrantRef,
        Granted,
        GrantedPage,
        References, //
    },
};

use blkif::{
    plan::{
        Direction,
        PageFragment,
        Part,
        Plan,
        SegmentPlacement,
        SlotLimits, //
    },
    resources::Resources,
    wire::{
        indirect_pages,
        WireSegment, //
    },
};

use crate::params;

/// Placeholder for a missing grant reference. Each fragment has a reference, so this never reaches
/// the ring; if it did, the backend would reject it.
const NO_GRANT: u32 = u32::MAX;

/// The type for which `mq_ops` implements [`Operations`](kernel_ext::block::mq::Operations).
pub(crate) struct BlkfrontOps;

/// A started request.
pub(crate) type InFlightRequest = Request<BlkfrontOps, InFlight>;

/// Kind of a request to the backend.
#[derive(Clone, Copy)]
pub(crate) enum RequestKind {
    /// A read or a write.
    Transfer(Direction),
    /// A flush of the disk's write cache.
    Flush,
    /// A discard of sectors.
    Discard {
        /// `true` if the data must not be readable afterwards.
        secure: bool,
    },
}

impl RequestKind {
    /// Returns the kind of request for an operation, or `None` if there is none.
    #[inline]
    pub(crate) fn new(op: Op) -> Option<Self> {
        match op {
            Op::Read => Some(Self::Transfer(Direction::Read)),
            Op::Write => Some(Self::Transfer(Direction::Write)),
            Op::Flush => Some(Self::Flush),
            Op::Discard => Some(Self::Discard { secure: false }),
            Op::SecureErase => Some(Self::Discard { secure: true }),
            Op::WriteZeroes | Op::Other(_) => None,
        }
    }

    /// Returns `true` if data is written.
    #[inline]
    pub(crate) fn is_write(self) -> bool {
        matches!(self, Self::Transfer(Direction::Write))
    }
}

/// Driver data of a block request.
///
/// blk-mq allocates it with each `struct request` and reuses both. So its vectors are not allocated
/// while a request is submitted.
pub(crate) struct RequestData {
    /// Kind of the request.
    pub(crate) kind: RequestKind,
    /// The slots, pages and grants that the request needs; set when its slots are reserved.
    pub(crate) resources: Resources,
    /// Status of a request that ends without the backend.
    pub(crate) status: BlkStatus,
    /// Number of the connection that the pages below belong to.
    pub(crate) generation: u32,
    /// The data that is read or written, as fragments.
    pub(crate) fragments: KVec<PageFragment>,
    /// Pages for the data, if it is bounced.
    pub(crate) bounce_pages: KVec<GrantedPage>,
    /// Pages for the segments of indirect requests.
    pub(crate) indirect_pages: KVec<GrantedPage>,
    /// Memory for the grant references of the request's own pages.
    pub(crate) references: References,
    /// `true` if a connection was closed because this request got no response.
    pub(crate) stalled: bool,
}

impl RequestData {
    /// Allocates request data with room for a request of the largest size.
    pub(crate) fn new() -> Result<Self> {
        let segments = usize::from(params::max_segments());
        Ok(Self {
            kind: RequestKind::Flush,
            resources: Resources {
                fragments: 0,
                slots: 0,
                data: 0,
                indirect: 0,
                grants: 0,
            },
            status: BlkStatus::OK,
            generation: 0,
            fragments: KVec::with_capacity(segments, GFP_KERNEL)?,
            bounce_pages: KVec::with_capacity(segments, GFP_KERNEL)?,
            indirect_pages: KVec::with_capacity(params::MAX_PARTS, GFP_KERNEL)?,
            references: References::with_capacity(segments, GFP_KERNEL)?,
            stalled: false,
        })
    }

    /// Sets the fragments of the request's data.
    ///
    /// Returns `false` if there are more than a request can have, or if one is not made of whole
    /// sectors.
    #[inline]
    pub(crate) fn collect_fragments(&mut self, segments: Segments<'_>) -> bool {
        self.fragments.clear();
        for segment in segments {
            let fragment = PageFragment::new(segment.offset() as u32, segment.len() as u32);
            let Some(fragment) = fragment else {
                return false;
            };
            if self.fragments.push_within_capacity(fragment).is_err() {
                return false;
            }
        }
        true
    }
}

/// A started request whose data the backend may use.
pub(crate) enum IssuedRequest {
    /// The data is in the bounce pages of its [`RequestData`], or the request has no data.
    Bounced(InFlightRequest),
    /// The pages of the request are granted.
    Direct(Granted<InFlightRequest>),
}

impl IssuedRequest {
    /// Returns the request.
    #[inline]
    pub(crate) fn request(&self) -> &InFlightRequest {
        match self {
            IssuedRequest::Bounced(rq) => rq,
            IssuedRequest::Direct(granted) => granted.owner(),
        }
    }

    /// Returns the request data.
    #[inline]
    pub(crate) fn data(&self) -> &RequestData {
        self.request().data()
    }

    /// Returns the request data, mutably.
    #[inline]
    pub(crate) fn data_mut(&mut self) -> &mut RequestData {
        match self {
            IssuedRequest::Bounced(rq) => rq.data_mut(),
            IssuedRequest::Direct(granted) => granted.data_mut(),
        }
    }
}

/// The segments of a request, as they are written to the ring.
#[derive(Clone, Copy)]
pub(crate) struct RequestSegments<'a> {
    rq: &'a InFlightRequest,
    /// Grant references of the request's own pages; `None` if its data is bounced.
    own: Option<&'a [GrantRef]>,
}

impl<'a> RequestSegments<'a> {
    /// Returns the segments of a request.
    #[inline]
    pub(crate) fn new(issued: &'a IssuedRequest) -> Self {
        match issued {
            IssuedRequest::Bounced(rq) => Self::bounced(rq),
            IssuedRequest::Direct(granted) => Self {
                rq: granted.owner(),
                own: Some(granted.references()),
            },
        }
    }

    /// Returns the segments of a request whose data is bounced.
    #[inline]
    pub(crate) fn bounced(rq: &'a InFlightRequest) -> Self {
        Self { rq, own: None }
    }

    /// Returns the request data.
    #[inline]
    pub(crate) fn data(&self) -> &'a RequestData {
        self.rq.data()
    }

    /// Returns the first sector of the request.
    #[inline]
    pub(crate) fn sector(&self) -> u64 {
        self.rq.sector()
    }

    /// Returns the length of the request in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        u64::from(self.rq.bytes() >> 9)
    }

    /// Returns the number of fragments.
    pub(crate) fn count(&self) -> u32 {
        self.data().resources.fragments
    }

    /// Returns the fragments of the data.
    pub(crate) fn fragments(&self) -> impl Iterator<Item = PageFragment> + 'a {
        self.data().fragments.iter().copied()
    }

    /// Returns the grant reference of a fragment.
    #[inline]
    fn reference(&self, fragment: usize) -> u32 {
        let reference = match self.own {
            Some(references) => references.get(fragment).copied(),
            None => (self.data().bounce_pages.get(fragment)).map(GrantedPage::reference),
        };
        reference.map_or(NO_GRANT, |reference| reference.value())
    }

    /// Returns all segments.
    #[inline]
    pub(crate) fn all(&self) -> impl ExactSizeIterator<Item = WireSegment> + 'a {
        let segments = *self;
        let fragments = self.data().fragments.iter().enumerate();
        fragments.map(move |(index, fragment)| fragment.segment(segments.reference(index)))
    }

    /// Returns the segments of a part.
    pub(crate) fn of_part(&self, part: &Part) -> impl ExactSizeIterator<Item = WireSegment> + 'a {
        let segments = *self;
        let first = part.first as usize;
        let fragments = self.data().fragments.get(first..).unwrap_or(&[]);
        let fragments = fragments.get(..part.count.into()).unwrap_or(fragments);
        fragments.iter().enumerate().map(move |(index, fragment)| {
            fragment.segment(segments.reference(first.wrapping_add(index)))
        })
    }

    /// Returns the grant references of the pages with the segments of an indirect part.
    pub(crate) fn indirect_pages_of_part(
        &self,
        part: &Part,
        slot_limits: SlotLimits,
    ) -> impl Iterator<Item = u32> + 'a {
        self.part_pages(part, slot_limits)
            .iter()
            .map(|page| page.reference().value())
    }

    /// Writes the segments of all indirect parts to their pages.
    pub(crate) fn fill_indirect_pages(&self, slot_limits: SlotLimits) {
        if self.data().indirect_pages.is_empty() {
            return;
        }
        let Some(plan) = Plan::new(self.sector(), self.fragments(), self.count(), slot_limits)
        else {
            return;
        };
        for part in plan.filter(|part| part.placement != SegmentPlacement::Direct) {
            let mut segments = self.of_part(&part);
            for page in self.part_pages(&part, slot_limits) {
                fill_page(page, &mut segments);
            }
        }
    }

    /// Returns the pages with the segments of an indirect part.
    ///
    /// The pages of the parts follow each other. All parts but the last have the same number of
    /// pages, and the last has at most that number.
    fn part_pages(&self, part: &Part, slot_limits: SlotLimits) -> &'a [GrantedPage] {
        let each = indirect_pages(slot_limits.segments());
        let first = each.wrapping_mul(part.index.into());
        let pages = self.data().indirect_pages.get(first..).unwrap_or(&[]);
        pages.get(..indirect_pages(part.count)).unwrap_or(pages)
    }
}

/// Number of segments that are written to a page at once.
const SEGMENTS_AT_ONCE: usize = 32;
/// Size of a segment in bytes.
const SEGMENT_BYTES: usize = 8;

/// Writes the next 512 segments to a page, or those that are left.
fn fill_page(page: &GrantedPage, segments: &mut impl Iterator<Item = WireSegment>) {
    let mut offset = 0usize;
    while offset < PAGE_SIZE {
        let mut bytes = [0; SEGMENTS_AT_ONCE * SEGMENT_BYTES];
        let mut len = 0usize;
        for chunk in bytes.chunks_exact_mut(SEGMENT_BYTES) {
            let Some(segment) = segments.next() else {
                break;
            };
            let [gref, range] = segment.encode();
            let (low, high) = chunk.split_at_mut(SEGMENT_BYTES / 2);
            low.copy_from_slice(&gref.to_le_bytes());
            high.copy_from_slice(&range.to_le_bytes());
            len = len.wrapping_add(SEGMENT_BYTES);
        }
        if len == 0 {
            return;
        }
        if let (Some(to), Some(from)) = (page.slice_mut(offset, len), bytes.get(..len)) {
            to.write(from);
        }
        offset = offset.wrapping_add(len);
    }
}
