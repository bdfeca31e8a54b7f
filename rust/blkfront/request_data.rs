// SPDX-License-Identifier: GPL-2.0-only

//! What a request carries on its way to the backend and back.
//!
//! The data of a request goes in one of two ways. *Direct*: its own pages are granted for as long as
//! it takes. *Bounced*: it is copied to or from pages that hold nothing else, and stay granted.

use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

use kernel_ext::{
    block::mq::{
        InFlight,
        Request,
        Segments, //
    },
    xen::grant::{
        Granted,
        GrantedPage,
        References, //
    },
};

use blkif::{
    plan::{
        PageFragment,
        Part,
        Plan,
        SegmentPlacement,
        SlotLimits, //
    },
    wire::{
        indirect_pages,
        WireSegment, //
    },
};

use crate::{
    disk::Disk,
    params, //
};

/// A grant that there never is. Each fragment of the data has one, so it is not put into the ring; if it
/// were, the backend would refuse the request.
const NO_GRANT: u32 = u32::MAX;

/// A request that was accepted.
pub(crate) type InFlightRequest = Request<Disk, InFlight>;

/// Memory of a request, used again by each that has its tag. Nothing is allocated for a single one.
pub(crate) struct RequestData {
    /// Which connection the pages below belong to.
    pub(crate) generation: u32,
    /// The data in fragments of sectors.
    pub(crate) fragments: KVec<PageFragment>,
    /// Pages for the data, if it is bounced.
    pub(crate) bounce_pages: KVec<GrantedPage>,
    /// Pages for the segments of indirect requests.
    pub(crate) indirect_pages: KVec<GrantedPage>,
    /// Room for the grants of the data, if it goes directly.
    pub(crate) references: References,
    /// A connection was given up because this request was not answered.
    pub(crate) stalled: bool,
}

impl RequestData {
    /// Memory for the largest request.
    pub(crate) fn new() -> Result<Self> {
        let segments = usize::from(params::max_segments());
        Ok(Self {
            generation: 0,
            fragments: KVec::with_capacity(segments, GFP_KERNEL)?,
            bounce_pages: KVec::with_capacity(segments, GFP_KERNEL)?,
            indirect_pages: KVec::with_capacity(params::MOST_PARTS, GFP_KERNEL)?,
            references: References::with_capacity(segments, GFP_KERNEL)?,
            stalled: false,
        })
    }
}

/// A request whose data the backend may use.
pub(crate) enum IssuedRequest {
    /// The data goes through the pages of its [`RequestData`], or there is none.
    Bounced(InFlightRequest),
    /// The pages of the request are granted. It comes out when the backend has let go of them.
    Direct(Granted<InFlightRequest>),
}

impl IssuedRequest {
    #[inline]
    pub(crate) fn request(&self) -> &InFlightRequest {
        match self {
            IssuedRequest::Bounced(rq) => rq,
            IssuedRequest::Direct(granted) => granted.owner(),
        }
    }

    /// Returns what the request carries.
    #[inline]
    pub(crate) fn data(&self) -> &RequestData {
        self.request().data()
    }

    /// Returns what the request carries, to be changed.
    #[inline]
    pub(crate) fn data_mut(&mut self) -> &mut RequestData {
        match self {
            IssuedRequest::Bounced(rq) => rq.data_mut(),
            IssuedRequest::Direct(granted) => granted.data_mut(),
        }
    }

    /// The grant of a fragment of the data.
    #[inline]
    fn reference(&self, fragment: usize) -> u32 {
        let reference = match self {
            IssuedRequest::Bounced(rq) => rq
                .data()
                .bounce_pages
                .get(fragment)
                .map(GrantedPage::reference),
            IssuedRequest::Direct(granted) => granted.references().get(fragment).copied(),
        };
        reference.map_or(NO_GRANT, |reference| reference.value())
    }
}

impl RequestData {
    /// Notes the fragments of a request's data, and says how many there are. `None` if there are more
    /// than a request can carry, or one is not made of whole sectors.
    pub(crate) fn collect_fragments(&mut self, segments: Segments<'_>) -> Option<u32> {
        self.fragments.clear();
        for segment in segments {
            let fragment = PageFragment::new(segment.offset() as u32, segment.len() as u32)?;
            self.fragments.push_within_capacity(fragment).ok()?;
        }
        Some(self.fragments.len() as u32)
    }
}

/// The grants of a request, as the backend gets to see them.
pub(crate) struct RequestSegments<'a> {
    issued: &'a IssuedRequest,
}

impl<'a> RequestSegments<'a> {
    pub(crate) fn new(issued: &'a IssuedRequest) -> Self {
        Self { issued }
    }

    /// Where the request starts on the disk.
    pub(crate) fn sector(&self) -> u64 {
        self.issued.request().sector()
    }

    /// Returns the length of the request in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        u64::from(self.issued.request().bytes() >> 9)
    }

    /// The data, in fragments of sectors.
    pub(crate) fn fragments(&self) -> impl Iterator<Item = PageFragment> + 'a {
        self.issued.request().data().fragments.iter().copied()
    }

    /// The segments of a request that is small.
    #[inline]
    pub(crate) fn all(&self) -> impl ExactSizeIterator<Item = WireSegment> + 'a {
        let issued = self.issued;
        let fragments = issued.request().data().fragments.iter().enumerate();
        fragments.map(move |(index, fragment)| fragment.segment(issued.reference(index)))
    }

    /// The segments of a part.
    pub(crate) fn segments(&self, part: &Part) -> impl ExactSizeIterator<Item = WireSegment> + 'a {
        let issued = self.issued;
        let first = part.first as usize;
        let fragments = issued
            .request()
            .data()
            .fragments
            .get(first..)
            .unwrap_or(&[]);
        let fragments = fragments.get(..part.count.into()).unwrap_or(fragments);
        fragments.iter().enumerate().map(move |(index, fragment)| {
            fragment.segment(issued.reference(first.wrapping_add(index)))
        })
    }

    /// The grants of the pages with the segments of an indirect part.
    pub(crate) fn pages(&self, part: &Part, limits: SlotLimits) -> impl Iterator<Item = u32> + 'a {
        self.part_pages(part, limits)
            .iter()
            .map(|page| page.reference().value())
    }

    /// Writes the segments of all indirect parts into their pages.
    pub(crate) fn fill(&self, fragments: u32, limits: SlotLimits) {
        if self.issued.data().indirect_pages.is_empty() {
            return;
        }
        let Some(plan) = Plan::new(self.sector(), self.fragments(), fragments, limits) else {
            return;
        };
        for part in plan.filter(|part| part.placement != SegmentPlacement::Direct) {
            let mut segments = self.segments(&part);
            for page in self.part_pages(&part, limits) {
                fill_page(page, &mut segments);
            }
        }
    }

    /// Those of each part stand one after the other. All parts but the last have as many, and the
    /// last has no more.
    fn part_pages(&self, part: &Part, limits: SlotLimits) -> &'a [GrantedPage] {
        let each = indirect_pages(limits.segments());
        let first = each.wrapping_mul(part.index.into());
        let pages = self
            .issued
            .data()
            .indirect_pages
            .get(first..)
            .unwrap_or(&[]);
        pages.get(..indirect_pages(part.count)).unwrap_or(pages)
    }
}

/// Segments that are written to a page at once.
const SEGMENTS_AT_ONCE: usize = 32;
/// Bytes of a segment.
const SEGMENT_BYTES: usize = 8;

/// Fills a page with the next 512 segments, or as many as there are.
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
