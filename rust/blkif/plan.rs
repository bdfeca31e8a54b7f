// SPDX-License-Identifier: GPL-2.0-only

//! Planning: from a block request to slots of the ring.
//!
//! The data of a block request is a list of [`PageFragment`]s, each within one page of 4 KiB. A
//! slot has space for 11 of them, an indirect request for the number that the backend has offered.
//! [`Plan`] divides the list into [`Part`]s, one for each slot, according to the current limits.
//! Usually there is one part. There are several if the limits of the block layer are larger than
//! those of the backend, which is possible after a reconnect.
//!
//! Every fragment is in exactly one part, parts are consecutive on the disk and in the list, and
//! none is larger than the limits allow. A part consists of whole logical blocks if the request
//! does, because a backend refuses others: the frontend has the block layer align each fragment to
//! the block, or to the page if a block is larger, and [`SlotLimits`] ends a part between two
//! blocks.
//!
//! # Examples
//!
//! A read of 64 KiB, on a backend without indirect requests, takes two slots:
//!
//! ```
//! use blkif::plan::{PageFragment, Plan, SegmentPlacement, SlotLimits};
//!
//! let limits = SlotLimits::new(0, 512).unwrap();
//! let fragments = [PageFragment::new(0, 4096).unwrap(); 16];
//! let plan = Plan::new(2048, fragments.into_iter(), 16, limits).unwrap();
//! assert_eq!((plan.slots(), plan.grants()), (2, 16));
//!
//! let parts: Vec<_> = plan.collect();
//! assert_eq!((parts[0].sector, parts[0].sectors, parts[0].count), (2048, 88, 11));
//! assert_eq!((parts[1].sector, parts[1].sectors, parts[1].count), (2136, 40, 5));
//! assert_eq!(parts[1].placement, SegmentPlacement::Direct);
//! ```
//!
//! With indirect requests it takes one slot, and another grant for the page with the segments:
//!
//! ```
//! # use blkif::plan::SlotLimits;
//! let limits = SlotLimits::new(32, 512).unwrap();
//! assert_eq!((limits.slots(16), limits.grants(16)), (1, 17));
//! ```

use core::num::NonZeroU32;

use crate::{
    id::FIELD_LIMIT,
    wire::{
        self,
        indirect_pages,
        op,
        WireRequest,
        WireSegment,
        DIRECT_SEGMENTS,
        INDIRECT_PAGES,
        INDIRECT_SEGMENTS,
        PAGE_SIZE,
        SECTORS_PER_PAGE,
        SECTOR_SIZE, //
    },
};

/// A run of sectors in a page of 4 KiB: `first <= last < 8`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PageFragment {
    first: u8,
    last: u8,
}

impl PageFragment {
    /// Creates a fragment of `len` bytes from byte `offset` of a page.
    ///
    /// Returns `None` if it does not consist of whole sectors, is empty, or exceeds the page.
    #[inline]
    pub const fn new(offset: u32, len: u32) -> Option<Self> {
        let end = match offset.checked_add(len) {
            Some(end) if end <= PAGE_SIZE && len != 0 => end,
            _ => return None,
        };
        if (offset | len) % SECTOR_SIZE != 0 {
            return None;
        }
        let first = offset / SECTOR_SIZE;
        let last = (end / SECTOR_SIZE).wrapping_sub(1);
        Some(PageFragment {
            first: first as u8,
            last: last as u8,
        })
    }

    /// Returns the number of sectors, 1 to 8.
    #[inline]
    pub const fn sectors(self) -> u8 {
        self.last.wrapping_sub(self.first).wrapping_add(1)
    }

    /// Returns the offset in the page in bytes.
    #[inline]
    pub const fn offset(self) -> u16 {
        (self.first as u16) << 9
    }

    /// Returns the length in bytes.
    #[inline]
    pub const fn len(self) -> u16 {
        (self.sectors() as u16) << 9
    }

    /// Returns `false`: a fragment has at least one sector.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Returns the segment for this fragment of the granted page `gref`.
    #[inline]
    pub const fn segment(self, gref: u32) -> WireSegment {
        WireSegment {
            gref,
            first: self.first,
            last: self.last,
        }
    }
}

/// The fragments of a range of bytes that may span pages: a `bio_vec` in pages larger than 4 KiB,
/// or in several pages.
#[derive(Clone, Copy, Debug)]
pub struct PageFragments {
    offset: u32,
    len: u32,
}

impl PageFragments {
    /// Creates the fragments of `len` bytes from byte `offset` of the first page.
    ///
    /// Returns `None` if the range does not consist of whole sectors or ends beyond 4 GiB.
    #[inline]
    pub const fn new(offset: u32, len: u32) -> Option<Self> {
        if (offset | len) % SECTOR_SIZE != 0 || offset.checked_add(len).is_none() {
            return None;
        }
        Some(PageFragments { offset, len })
    }
}

impl Iterator for PageFragments {
    /// Number of the page, counted from the first, and the fragment in it.
    type Item = (u32, PageFragment);

    #[inline]
    fn next(&mut self) -> Option<(u32, PageFragment)> {
        let start = self.offset % PAGE_SIZE;
        let len = self.len.min(PAGE_SIZE.wrapping_sub(start));
        let fragment = PageFragment::new(start, len)?;
        let page = self.offset / PAGE_SIZE;
        self.offset = self.offset.wrapping_add(len);
        self.len = self.len.wrapping_sub(len);
        Some((page, fragment))
    }
}

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

impl Direction {
    /// Returns the operation on the wire.
    #[inline]
    pub const fn operation(self) -> u8 {
        match self {
            Direction::Read => op::READ,
            Direction::Write => op::WRITE,
        }
    }
}

/// Returns the number of pages of a logical block, 1 if it is smaller than a page.
#[inline]
const fn block_pages(block_size: u32) -> u32 {
    let pages = block_size / PAGE_SIZE;
    if pages == 0 {
        1
    } else {
        pages
    }
}

/// Returns `count` rounded down to whole blocks of `pages` pages.
#[inline]
const fn whole_blocks(count: u32, pages: u32) -> u32 {
    match count.checked_rem(pages) {
        Some(rest) => count.wrapping_sub(rest),
        None => count,
    }
}

/// Returns the largest number of fragments of a request that fits into `slots` slots, with any
/// backend that can serve a disk with this logical block size.
pub const fn max_fragments(block_size: u32, slots: u32) -> u32 {
    let pages = block_pages(block_size);
    let direct = whole_blocks(DIRECT_SEGMENTS as u32, pages);
    let least = if direct == 0 { pages } else { direct };
    least.saturating_mul(slots)
}

/// The amount of data that a slot can carry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SlotLimits {
    /// A multiple of the pages of a logical block.
    segments: NonZeroU32,
}

impl SlotLimits {
    /// Returns the limits of a backend that offers indirect requests of `indirect_segments`
    /// segments, 0 for one that offers none, for a disk with this logical block size.
    ///
    /// Returns `None` if a block does not fit into a slot.
    pub fn new(indirect_segments: u16, block_size: u32) -> Option<Self> {
        let offered = usize::from(indirect_segments).clamp(DIRECT_SEGMENTS, INDIRECT_SEGMENTS);
        let segments = whole_blocks(offered as u32, block_pages(block_size));
        NonZeroU32::new(segments).map(|segments| SlotLimits { segments })
    }

    /// Returns the number of segments in one slot, 8 to 4096.
    #[inline]
    pub const fn segments(self) -> u16 {
        self.segments.get() as u16
    }

    /// Returns the number of slots that `fragments` fragments need.
    #[inline]
    pub fn slots(self, fragments: u32) -> u32 {
        let part = fragments % self.segments != 0;
        (fragments / self.segments).wrapping_add(u32::from(part))
    }

    /// Returns the number of grants that `fragments` fragments need: one for each, and one for each
    /// page of segments.
    #[inline]
    pub fn grants(self, fragments: u32) -> u32 {
        let full = segment_pages(self.segments()).wrapping_mul(fragments / self.segments);
        let last = segment_pages((fragments % self.segments) as u16);
        fragments.wrapping_add(full).wrapping_add(last)
    }
}

/// Returns the number of pages of segments that a slot with `fragments` fragments needs.
#[inline]
const fn segment_pages(fragments: u16) -> u32 {
    if fragments as usize <= DIRECT_SEGMENTS {
        0
    } else {
        indirect_pages(fragments) as u32
    }
}

/// The place of the segments of a part.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SegmentPlacement {
    /// In the slot.
    Direct,
    /// In pages of their own, 1 to 8.
    Indirect(u8),
}

/// The part of a request that is in one slot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Part {
    /// Index of the part in the request, from 0.
    pub index: u16,
    /// First sector on the disk.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// First fragment, counted from 0 in the list of the whole request.
    pub first: u32,
    /// Number of fragments, at least 1.
    pub count: u16,
    /// The place of the segments.
    pub placement: SegmentPlacement,
}

/// Returns the request for a transfer whose segments are in the slot.
#[inline]
pub fn direct<I: ExactSizeIterator<Item = WireSegment>>(
    direction: Direction,
    handle: u16,
    id: u64,
    sector: u64,
    segments: I,
) -> wire::RwEncoder<I> {
    wire::RwEncoder {
        operation: direction.operation(),
        nr_segments: segments.len().min(DIRECT_SEGMENTS) as u8,
        handle,
        id,
        sector,
        segments,
    }
}

impl Part {
    /// Returns the request for a part whose placement is [`SegmentPlacement::Direct`].
    ///
    /// `segments` are those of its fragments.
    #[inline]
    pub fn direct<I: ExactSizeIterator<Item = WireSegment>>(
        &self,
        direction: Direction,
        handle: u16,
        id: u64,
        segments: I,
    ) -> wire::RwEncoder<I> {
        direct(direction, handle, id, self.sector, segments)
    }

    /// Returns the request for a part whose placement is [`SegmentPlacement::Indirect`].
    ///
    /// `grefs` are those of the pages that hold the segments of its fragments: 512 segments in each
    /// page but the last.
    #[inline]
    pub fn indirect(
        &self,
        direction: Direction,
        handle: u16,
        id: u64,
        grefs: impl IntoIterator<Item = u32>,
    ) -> WireRequest {
        let mut slots = [0; INDIRECT_PAGES];
        for (slot, gref) in slots.iter_mut().zip(grefs) {
            *slot = gref;
        }
        WireRequest::Indirect(wire::IndirectRequest {
            operation: direction.operation(),
            nr_segments: self.count,
            handle,
            id,
            sector: self.sector,
            grefs: slots,
        })
    }
}

/// The parts of a read or write of the block layer, in order.
#[derive(Clone, Debug)]
pub struct Plan<I> {
    fragments: I,
    limits: SlotLimits,
    sector: u64,
    first: u32,
    left: u32,
    index: u16,
}

impl<I: Iterator<Item = PageFragment>> Plan<I> {
    /// Plans a transfer that starts at `sector` of the disk.
    ///
    /// `count` is the number of `fragments`.
    ///
    /// Returns `None` if there are more parts than an id can number, or if the range ends beyond
    /// 2^64 sectors. The block layer makes no such request.
    #[inline]
    pub fn new(sector: u64, fragments: I, count: u32, limits: SlotLimits) -> Option<Self> {
        if limits.slots(count) > u32::from(FIELD_LIMIT) {
            return None;
        }
        sector.checked_add(u64::from(count).checked_mul(u64::from(SECTORS_PER_PAGE))?)?;
        Some(Plan {
            fragments,
            limits,
            sector,
            first: 0,
            left: count,
            index: 0,
        })
    }

    /// Returns the number of slots still needed.
    #[inline]
    pub fn slots(&self) -> u32 {
        self.limits.slots(self.left)
    }

    /// Returns the number of grants still needed.
    #[inline]
    pub fn grants(&self) -> u32 {
        self.limits.grants(self.left)
    }
}

impl<I: Iterator<Item = PageFragment>> Iterator for Plan<I> {
    type Item = Part;

    #[inline]
    fn next(&mut self) -> Option<Part> {
        let count = self.left.min(self.limits.segments.get()) as u16;
        let mut sectors = 0u32;
        let mut taken = 0u16;
        while taken < count {
            let Some(fragment) = self.fragments.next() else {
                break;
            };
            sectors = sectors.wrapping_add(u32::from(fragment.sectors()));
            taken = taken.wrapping_add(1);
        }
        if taken == 0 {
            return None;
        }
        let placement = match segment_pages(taken) {
            0 => SegmentPlacement::Direct,
            pages => SegmentPlacement::Indirect(pages as u8),
        };
        let part = Part {
            index: self.index,
            sector: self.sector,
            sectors,
            first: self.first,
            count: taken,
            placement,
        };
        self.index = self.index.wrapping_add(1);
        self.sector = self.sector.wrapping_add(u64::from(sectors));
        self.first = self.first.wrapping_add(u32::from(taken));
        self.left = self.left.wrapping_sub(u32::from(taken));
        Some(part)
    }
}

/// Returns a request that makes all completed writes durable: `operation` is
/// [`Flush::operation`](crate::negotiate::Flush::operation).
#[inline]
pub const fn flush(operation: u8, handle: u16, id: u64) -> WireRequest {
    let none = WireSegment {
        gref: 0,
        first: 0,
        last: 0,
    };
    WireRequest::Rw(wire::RwRequest {
        operation,
        nr_segments: 0,
        handle,
        id,
        sector: 0,
        segments: [none; DIRECT_SEGMENTS],
    })
}

/// Returns a request to discard sectors.
#[inline]
pub const fn discard(handle: u16, id: u64, sector: u64, sectors: u64, secure: bool) -> WireRequest {
    let flag = if secure { wire::DISCARD_SECURE } else { 0 };
    WireRequest::Discard(wire::DiscardRequest {
        flag,
        handle,
        id,
        sector,
        nr_sectors: sectors,
    })
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use crate::{
        negotiate::Flush,
        wire::{
            encode,
            Abi,
            Encode, //
        },
    };

    use super::*;

    fn pages(count: u32) -> impl Iterator<Item = PageFragment> {
        (0..count).map(|_| PageFragment::new(0, 4096).unwrap())
    }

    fn limits(indirect: u16) -> SlotLimits {
        SlotLimits::new(indirect, 512).unwrap()
    }

    fn parts(sector: u64, count: u32, indirect: u16) -> Vec<Part> {
        let limits = limits(indirect);
        let plan = Plan::new(sector, pages(count), count, limits).unwrap();
        let (slots, grants) = (plan.slots(), plan.grants());
        let parts: Vec<_> = plan.collect();
        assert_eq!(parts.len() as u32, slots);
        let used: u32 = parts
            .iter()
            .map(|part| u32::from(part.count) + indirect_grants(part))
            .sum();
        assert_eq!(used, grants);
        parts
    }

    fn indirect_grants(part: &Part) -> u32 {
        match part.placement {
            SegmentPlacement::Direct => 0,
            SegmentPlacement::Indirect(pages) => pages.into(),
        }
    }

    #[test]
    fn pieces_are_whole_sectors_of_a_page() {
        let fragment = PageFragment::new(512, 1024).unwrap();
        assert_eq!(
            (fragment.offset(), fragment.len(), fragment.sectors()),
            (512, 1024, 2)
        );
        assert_eq!(
            fragment.segment(5),
            WireSegment {
                gref: 5,
                first: 1,
                last: 2
            }
        );
        assert!(!fragment.is_empty());
        assert!(PageFragment::new(0, 4096).is_some());
        assert!(PageFragment::new(3584, 512).is_some());
        let bad = [
            (0, 0),
            (0, 100),
            (100, 512),
            (0, 4608),
            (3584, 1024),
            (4096, 512),
            (512, u32::MAX),
        ];
        for (offset, len) in bad {
            assert_eq!(PageFragment::new(offset, len), None, "{offset} {len}");
        }
    }

    #[test]
    fn runs_are_cut_at_pages() {
        let cut = |offset, len| -> Vec<_> {
            let fragments = PageFragments::new(offset, len).unwrap();
            fragments
                .map(|(page, fragment)| (page, fragment.offset(), fragment.len()))
                .collect()
        };
        assert_eq!(cut(512, 512), [(0, 512, 512)]);
        assert_eq!(cut(3584, 5120), [(0, 3584, 512), (1, 0, 4096), (2, 0, 512)]);
        assert_eq!(cut(8192, 4096), [(2, 0, 4096)]);
        assert_eq!(cut(0, 0), []);
        assert!(PageFragments::new(1, 512).is_none());
        assert!(PageFragments::new(512, 1).is_none());
        assert!(PageFragments::new(u32::MAX - 511, 512).is_none());
    }

    #[test]
    fn limits_have_bounds() {
        for (offered, segments) in [(0, 11), (11, 11), (12, 12), (4096, 4096), (u16::MAX, 4096)] {
            for block_size in [512, 4096] {
                let limits = SlotLimits::new(offered, block_size).unwrap();
                assert_eq!(limits.segments(), segments);
            }
        }
    }

    #[test]
    fn a_slot_carries_whole_blocks() {
        let segments = |offered, block_size| {
            SlotLimits::new(offered, block_size).map(|limits| limits.segments())
        };
        assert_eq!(segments(0, 8192), Some(10));
        assert_eq!(segments(0, 32768), Some(8));
        assert_eq!(segments(0, 65536), None);
        assert_eq!(segments(15, 65536), None);
        assert_eq!(segments(32, 65536), Some(32));
        assert_eq!(segments(47, 65536), Some(32));
        assert_eq!(segments(4096, 65536), Some(4096));
    }

    #[test]
    fn a_request_fits_into_the_slots_of_the_least_backend() {
        let expected = [
            (512, 352),
            (4096, 352),
            (8192, 320),
            (16384, 256),
            (32768, 256),
            (65536, 512),
        ];
        for (block_size, fragments) in expected {
            assert_eq!(max_fragments(block_size, 32), fragments);
        }
    }

    #[test]
    fn what_fits_into_a_slot_is_direct() {
        let first = Part {
            index: 0,
            sector: 7,
            sectors: 88,
            first: 0,
            count: 11,
            placement: SegmentPlacement::Direct,
        };
        assert_eq!(parts(7, 11, 0), [first]);
        assert_eq!(parts(7, 11, 256), [first]);
        assert_eq!(parts(7, 0, 256), []);
    }

    #[test]
    fn more_is_indirect() {
        let placement = SegmentPlacement::Indirect(1);
        let part = Part {
            index: 0,
            sector: 0,
            sectors: 96,
            first: 0,
            count: 12,
            placement,
        };
        assert_eq!(parts(0, 12, 32), [part]);
        assert_eq!(
            parts(0, 512, 4096)[0].placement,
            SegmentPlacement::Indirect(1)
        );
        assert_eq!(
            parts(0, 513, 4096)[0].placement,
            SegmentPlacement::Indirect(2)
        );
        assert_eq!(
            parts(0, 4096, 4096)[0].placement,
            SegmentPlacement::Indirect(8)
        );
    }

    #[test]
    fn more_than_a_slot_can_carry_is_several_parts() {
        let part = |index, sector, first, count| {
            let sectors = u32::from(count) * 8;
            Part {
                index,
                sector,
                sectors,
                first,
                count,
                placement: SegmentPlacement::Direct,
            }
        };
        let expected = [
            part(0, 100, 0, 11),
            part(1, 188, 11, 11),
            part(2, 276, 22, 10),
        ];
        assert_eq!(parts(100, 32, 0), expected);
        let placements: Vec<_> = parts(0, 70, 32)
            .iter()
            .map(|part| (part.count, part.placement))
            .collect();
        let indirect = SegmentPlacement::Indirect(1);
        assert_eq!(
            placements,
            [
                (32, indirect),
                (32, indirect),
                (6, SegmentPlacement::Direct)
            ]
        );
    }

    #[test]
    fn plans_that_cannot_be() {
        let plan = |sector, count| Plan::new(sector, pages(0), count, limits(0));
        assert!(plan(0, 4096 * 11).is_some());
        assert!(plan(0, 4096 * 11 + 1).is_none());
        assert!(plan(u64::MAX - 8, 1).is_some());
        assert!(plan(u64::MAX - 7, 1).is_none());
    }

    #[test]
    fn a_list_that_ends_early_ends_the_plan() {
        let plan = Plan::new(0, pages(3), 20, limits(0)).unwrap();
        let counts: Vec<_> = plan.map(|part| part.count).collect();
        assert_eq!(counts, [3]);
    }

    /// Returns the request that the backend reads.
    fn read_back(request: impl Encode) -> WireRequest {
        let abi = Abi::native();
        assert_eq!(request.response_operation(), op::WRITE);
        WireRequest::decode(abi, &encode(request, abi))
    }

    #[test]
    fn segments_without_room_are_not_written() {
        let segments = [PageFragment::new(0, 512).unwrap().segment(1); 12];
        let request = direct(Direction::Write, 0, 1, 0, segments.into_iter());
        let WireRequest::Rw(rw) = read_back(request) else {
            panic!()
        };
        assert_eq!((rw.nr_segments, rw.segments()), (11, &segments[..11]));
    }

    #[test]
    fn parts_become_requests() {
        let limits = limits(32);
        let part = Plan::new(9, pages(2), 2, limits).unwrap().next().unwrap();
        let segments = [1, 2].map(|gref| PageFragment::new(0, 4096).unwrap().segment(gref));
        let request = part.direct(Direction::Write, 51712, 5, segments.into_iter());
        let WireRequest::Rw(rw) = read_back(request) else {
            panic!()
        };
        assert_eq!(
            (rw.operation, rw.handle, rw.id, rw.sector),
            (op::WRITE, 51712, 5, 9)
        );
        assert_eq!(rw.segments(), segments);

        let part = Plan::new(9, pages(12), 12, limits).unwrap().next().unwrap();
        let request = part.indirect(Direction::Read, 51712, 5, [77]);
        let WireRequest::Indirect(indirect) = request else {
            panic!()
        };
        assert_eq!((indirect.operation, indirect.nr_segments), (op::READ, 12));
        assert_eq!(
            (indirect.handle, indirect.id, indirect.sector),
            (51712, 5, 9)
        );
        assert_eq!(indirect.grefs(), [77]);
    }

    #[test]
    fn requests_without_data() {
        let operation = Flush::Cache.operation().unwrap();
        let WireRequest::Rw(rw) = flush(operation, 3, 4) else {
            panic!()
        };
        assert_eq!(
            (rw.operation, rw.nr_segments, rw.handle, rw.id),
            (3, 0, 3, 4)
        );
        for (secure, flag) in [(false, 0), (true, 1)] {
            let expected = wire::DiscardRequest {
                flag,
                handle: 3,
                id: 4,
                sector: 5,
                nr_sectors: 6,
            };
            assert_eq!(discard(3, 4, 5, 6, secure), WireRequest::Discard(expected));
        }
    }
}
