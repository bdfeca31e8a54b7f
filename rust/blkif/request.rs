// SPDX-License-Identifier: GPL-2.0-only

//! Checks of requests: from the wire form to a valid request.
//!
//! [`check`] checks a request as the frontend has written it, and returns a [`Request`], or the
//! reason why it is refused. A value of this type is valid for the disk: in range, aligned,
//! allowed. No later code checks again.
//!
//! A read, write or barrier has [`Data`]. If the segments are in the slot, they are checked with
//! the rest. If they are in pages of their own ([`Unfetched`]), the caller has to fetch these pages
//! and pass each segment to a [`SegmentChecker`], which returns the [`Extent`] of the transfer at
//! the end. An `Extent` and a [`Segment`] cannot be created in another way, so code that takes them
//! as arguments never gets unchecked numbers.
//!
//! # Examples
//!
//! ```
//! use blkif::request::{check, Data, DiskLimits, InvalidRequest, Request};
//! use blkif::wire::{op, RwRequest, WireRequest, WireSegment};
//!
//! let limits = DiskLimits {
//!     sectors: 1 << 20,
//!     block_size: 512,
//!     read_only: true,
//!     discard: false,
//!     secure_discard: false,
//!     indirect_segments: 32,
//! };
//! let mut rw = RwRequest {
//!     operation: op::READ,
//!     nr_segments: 1,
//!     handle: 0,
//!     id: 1,
//!     sector: 8,
//!     segments: [WireSegment { gref: 9, first: 2, last: 5 }; 11],
//! };
//! let wire = WireRequest::Rw(rw);
//! let Ok(Request::Read(Data::Direct(data))) = check(&wire, &limits) else {
//!     panic!("refused");
//! };
//! assert_eq!((data.extent().sector(), data.extent().sectors()), (8, 4));
//! let segment = data.segments().next().unwrap();
//! assert_eq!((segment.gref(), segment.offset(), segment.len()), (9, 1024, 2048));
//!
//! rw.operation = op::WRITE;
//! assert_eq!(check(&WireRequest::Rw(rw), &limits), Err(InvalidRequest::ReadOnly));
//! ```

use core::fmt;

use crate::wire::{
    self,
    op,
    Status,
    WireRequest,
    WireSegment,
    DIRECT_SEGMENTS,
    SECTORS_PER_PAGE,
    SECTOR_SIZE, //
};

/// The limits of a disk that a request must respect.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiskLimits {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical block size in bytes: a power of two, at least 512.
    pub block_size: u32,
    /// The disk must not be written to.
    pub read_only: bool,
    /// Discard was offered to the frontend.
    pub discard: bool,
    /// Secure discard was offered to the frontend.
    pub secure_discard: bool,
    /// Segments of an indirect request, as offered to the frontend; 0 if none were offered.
    pub indirect_segments: u16,
}

impl DiskLimits {
    /// Returns the number of sectors in a logical block, at least 1.
    #[inline]
    fn block_sectors(&self) -> u32 {
        (self.block_size / SECTOR_SIZE).max(1)
    }

    /// Returns `true` if a sector number or count is not a multiple of the logical block size.
    #[inline]
    fn misaligned(&self, sectors: u64) -> bool {
        sectors & u64::from(self.block_sectors().wrapping_sub(1)) != 0
    }

    /// Checks a range of sectors, which the caller knows not to be empty.
    #[inline]
    fn check_range(&self, sector: u64, sectors: u64) -> Result<(), InvalidRequest> {
        if self.misaligned(sector) {
            return Err(InvalidRequest::MisalignedSector {
                sector,
                block_size: self.block_size,
            });
        }
        if self.misaligned(sectors) {
            return Err(InvalidRequest::MisalignedLength {
                sectors,
                block_size: self.block_size,
            });
        }
        match sector.checked_add(sectors) {
            Some(end) if end <= self.sectors => Ok(()),
            _ => Err(InvalidRequest::OutOfRange {
                sector,
                sectors,
                size: self.sectors,
            }),
        }
    }
}

/// The reason why a request is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InvalidRequest {
    /// The protocol does not define the operation.
    UnknownOperation(u8),
    /// An indirect request, although none were offered.
    IndirectNotOffered,
    /// An indirect request is neither a read nor a write.
    IndirectOperation(u8),
    /// A read or write, or an indirect request, has no segments.
    NoSegments,
    /// There are more segments than fit or were offered.
    TooManySegments {
        /// Segments as written.
        segments: u16,
        /// Segments allowed.
        limit: u16,
    },
    /// A segment ends before it starts or beyond its page.
    SegmentRange {
        /// First sector as written.
        first: u8,
        /// Last sector as written.
        last: u8,
    },
    /// Fewer segments were fetched than the request has, or more. A bug of the backend.
    SegmentCount {
        /// Segments that the request has.
        expected: u16,
        /// Segments fetched.
        fetched: u16,
    },
    /// The first sector is not the first of a logical block.
    MisalignedSector {
        /// First sector as written.
        sector: u64,
        /// Logical block size in bytes.
        block_size: u32,
    },
    /// The length is not a whole number of logical blocks.
    MisalignedLength {
        /// Length in sectors.
        sectors: u64,
        /// Logical block size in bytes.
        block_size: u32,
    },
    /// The range exceeds the disk, or its end overflows.
    OutOfRange {
        /// First sector as written.
        sector: u64,
        /// Length in sectors.
        sectors: u64,
        /// Size of the disk in sectors.
        size: u64,
    },
    /// A write, a barrier with data or a discard for a read-only disk.
    ReadOnly,
    /// A discard, although discard was not offered.
    DiscardNotOffered,
    /// A secure discard, although it was not offered. An ordinary discard instead would leave data
    /// readable that the frontend takes for erased.
    SecureNotOffered,
    /// A discard of no sectors.
    EmptyDiscard,
}

impl InvalidRequest {
    /// Returns the status of the response: [`Status::NotSupported`] for operations that were not
    /// offered, so that a frontend stops using them, and [`Status::Error`] for invalid requests.
    pub const fn status(&self) -> Status {
        match self {
            InvalidRequest::UnknownOperation(_)
            | InvalidRequest::IndirectNotOffered
            | InvalidRequest::DiscardNotOffered
            | InvalidRequest::SecureNotOffered => Status::NotSupported,
            InvalidRequest::IndirectOperation(_)
            | InvalidRequest::NoSegments
            | InvalidRequest::TooManySegments { .. }
            | InvalidRequest::SegmentRange { .. }
            | InvalidRequest::SegmentCount { .. }
            | InvalidRequest::MisalignedSector { .. }
            | InvalidRequest::MisalignedLength { .. }
            | InvalidRequest::OutOfRange { .. }
            | InvalidRequest::ReadOnly
            | InvalidRequest::EmptyDiscard => Status::Error,
        }
    }
}

impl fmt::Display for InvalidRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InvalidRequest::UnknownOperation(operation) => {
                write!(f, "unknown operation {operation}")
            }
            InvalidRequest::IndirectNotOffered => {
                f.write_str("indirect request, but none were offered")
            }
            InvalidRequest::IndirectOperation(operation) => {
                write!(
                    f,
                    "indirect request with operation {operation}, not a read or write"
                )
            }
            InvalidRequest::NoSegments => f.write_str("read or write without segments"),
            InvalidRequest::TooManySegments { segments, limit } => {
                write!(f, "{segments} segments, at most {limit} are allowed")
            }
            InvalidRequest::SegmentRange { first, last } => {
                write!(
                    f,
                    "segment from sector {first} to {last}, not within a page of 8 sectors"
                )
            }
            InvalidRequest::SegmentCount { expected, fetched } => {
                write!(f, "{fetched} segments fetched of a request with {expected}")
            }
            InvalidRequest::MisalignedSector { sector, block_size } => {
                write!(
                    f,
                    "sector {sector} is not at the start of a block of {block_size} bytes"
                )
            }
            InvalidRequest::MisalignedLength {
                sectors,
                block_size,
            } => {
                write!(
                    f,
                    "{sectors} sectors are not whole blocks of {block_size} bytes"
                )
            }
            InvalidRequest::OutOfRange {
                sector,
                sectors,
                size,
            } => {
                write!(
                    f,
                    "{sectors} sectors at sector {sector} exceed the disk of {size} sectors"
                )
            }
            InvalidRequest::ReadOnly => f.write_str("write or discard on a read-only disk"),
            InvalidRequest::DiscardNotOffered => f.write_str("discard, but it was not offered"),
            InvalidRequest::SecureNotOffered => {
                f.write_str("secure discard, but it was not offered")
            }
            InvalidRequest::EmptyDiscard => f.write_str("discard of no sectors"),
        }
    }
}

/// A checked run of sectors in a granted page: `first <= last < 8`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    gref: u32,
    first: u8,
    last: u8,
}

impl Segment {
    /// Creates a segment from a checked one.
    #[inline]
    const fn new(wire: WireSegment) -> Self {
        let WireSegment { gref, first, last } = wire;
        Segment { gref, first, last }
    }

    /// Checks a segment.
    ///
    /// It need not consist of whole blocks of the disk: with direct I/O from memory that is aligned
    /// to 512 bytes, a block may be in parts of two pages. The block layer accepts that if the
    /// request as a whole consists of whole blocks and the disk does not need memory that is
    /// aligned to more than 512 bytes; otherwise the I/O fails.
    #[inline]
    fn check(wire: WireSegment) -> Result<Self, InvalidRequest> {
        let WireSegment { first, last, .. } = wire;
        if first > last || last >= SECTORS_PER_PAGE {
            return Err(InvalidRequest::SegmentRange { first, last });
        }
        Ok(Segment::new(wire))
    }

    /// Returns the grant reference of the page.
    #[inline]
    pub const fn gref(&self) -> u32 {
        self.gref
    }

    /// Returns the number of sectors, 1 to 8.
    #[inline]
    pub const fn sectors(&self) -> u8 {
        self.last.wrapping_sub(self.first).wrapping_add(1)
    }

    /// Returns the offset in the page in bytes, below 4096.
    #[inline]
    pub const fn offset(&self) -> u16 {
        (self.first as u16) << 9
    }

    /// Returns the length in bytes; `offset + len` is at most 4096.
    #[inline]
    pub const fn len(&self) -> u16 {
        (self.sectors() as u16) << 9
    }

    /// Returns `false`: a segment has at least one sector.
    pub const fn is_empty(&self) -> bool {
        false
    }
}

/// A checked range of the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    sector: u64,
    sectors: u64,
}

impl Extent {
    /// Returns the first sector.
    #[inline]
    pub const fn sector(&self) -> u64 {
        self.sector
    }

    /// Returns the number of sectors, at least 1.
    #[inline]
    pub const fn sectors(&self) -> u64 {
        self.sectors
    }
}

/// Checked data of a read, write or barrier.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Data<'a> {
    /// The segments were in the slot and are checked.
    Direct(Direct<'a>),
    /// The segments are in pages that have not been fetched.
    Indirect(Unfetched<'a>),
}

/// Checked segments that were in the slot, and the range of the disk that they transfer.
///
/// They stay in the request, which is in private memory and cannot change while this borrows it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Direct<'a> {
    extent: Extent,
    /// Each of them was checked.
    segments: &'a [WireSegment],
}

impl<'a> Direct<'a> {
    #[inline]
    fn check(
        sector: u64,
        segments: &'a [WireSegment],
        limits: &DiskLimits,
    ) -> Result<Self, InvalidRequest> {
        let mut checker = SegmentChecker::new(sector, segments.len() as u16, limits);
        for wire in segments {
            checker.push(*wire)?;
        }
        let extent = checker.finish()?;
        Ok(Direct { extent, segments })
    }

    /// Returns the range of the disk, which is as long as all segments together.
    #[inline]
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// Returns the segments, 1 to 11.
    #[inline]
    pub fn segments(&self) -> impl ExactSizeIterator<Item = Segment> + 'a {
        self.segments.iter().map(|wire| Segment::new(*wire))
    }
}

/// An indirect request whose pages of segments have not been fetched.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Unfetched<'a> {
    sector: u64,
    count: u16,
    grefs: &'a [u32],
}

impl<'a> Unfetched<'a> {
    /// Returns the number of segments, at least 1 and at most the number that was offered.
    #[inline]
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Returns the grant references of the pages that hold the segments: 512 segments in each page
    /// but the last.
    #[inline]
    pub fn grefs(&self) -> &'a [u32] {
        self.grefs
    }

    /// Starts the check of the segments.
    #[inline]
    pub fn checker<'l>(&self, limits: &'l DiskLimits) -> SegmentChecker<'l> {
        SegmentChecker::new(self.sector, self.count, limits)
    }
}

/// A check of the segments of a request, one after another, and of their total length at the end.
#[derive(Clone, Copy, Debug)]
pub struct SegmentChecker<'l> {
    limits: &'l DiskLimits,
    sector: u64,
    sectors: u64,
    expected: u16,
    fetched: u16,
}

impl<'l> SegmentChecker<'l> {
    #[inline]
    fn new(sector: u64, expected: u16, limits: &'l DiskLimits) -> Self {
        SegmentChecker {
            limits,
            sector,
            sectors: 0,
            expected,
            fetched: 0,
        }
    }

    /// Checks the next segment, from a private copy of its two words ([`WireSegment::decode`]).
    #[inline]
    pub fn push(&mut self, wire: WireSegment) -> Result<Segment, InvalidRequest> {
        let segment = Segment::check(wire)?;
        self.fetched = self.fetched.saturating_add(1);
        self.sectors = self.sectors.wrapping_add(u64::from(segment.sectors()));
        Ok(segment)
    }

    /// Checks that all segments were pushed, and checks the range of the disk that they transfer.
    #[inline]
    pub fn finish(self) -> Result<Extent, InvalidRequest> {
        if self.fetched != self.expected {
            let SegmentChecker {
                expected, fetched, ..
            } = self;
            return Err(InvalidRequest::SegmentCount { expected, fetched });
        }
        self.limits.check_range(self.sector, self.sectors)?;
        Ok(Extent {
            sector: self.sector,
            sectors: self.sectors,
        })
    }
}

/// A request that is valid for its disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Request<'a> {
    /// Read into the segments.
    Read(Data<'a>),
    /// Write from the segments.
    Write(Data<'a>),
    /// Make all writes durable that have got a response.
    Flush,
    /// Wait until all earlier requests are complete and durable, write the data, if any, make it
    /// durable, and only then start later requests. A flush with data becomes a barrier, which
    /// guarantees more.
    Barrier(Option<Direct<'a>>),
    /// Discard the data in a range.
    Discard {
        /// The range.
        extent: Extent,
        /// The data must not be recoverable.
        secure: bool,
    },
}

impl Request<'_> {
    /// Returns the number of segments of its data.
    #[inline]
    pub fn segments(&self) -> usize {
        match self {
            Request::Read(Data::Indirect(data)) | Request::Write(Data::Indirect(data)) => {
                usize::from(data.count())
            }
            Request::Read(Data::Direct(data))
            | Request::Write(Data::Direct(data))
            | Request::Barrier(Some(data)) => data.segments().len(),
            Request::Barrier(None) | Request::Flush | Request::Discard { .. } => 0,
        }
    }
}

/// Returns the largest number of the frontend's pages that one request uses at a time, if indirect
/// requests may have `indirect_segments` segments.
///
/// A backend that has this number of pages, addresses and mappings can serve each request, if it
/// serves one after another. The pages of segments count too: they may still be mapped when the
/// data is.
pub const fn max_pages_per_request(indirect_segments: u16) -> usize {
    let segments = indirect_limit(indirect_segments);
    at_least_direct((segments as usize).saturating_add(wire::indirect_pages(segments)))
}

/// Returns the largest number of segments of a request, see [`max_pages_per_request`].
pub const fn max_segments_per_request(indirect_segments: u16) -> usize {
    at_least_direct(indirect_limit(indirect_segments) as usize)
}

/// Returns the larger of a number and [`DIRECT_SEGMENTS`]: `max` is not `const`.
const fn at_least_direct(number: usize) -> usize {
    DIRECT_SEGMENTS.saturating_add(number.saturating_sub(DIRECT_SEGMENTS))
}

/// Returns the largest number of segments of an indirect request: those that are offered, up to the
/// number that fits.
const fn indirect_limit(offered: u16) -> u16 {
    offered.saturating_sub(offered.saturating_sub(wire::INDIRECT_SEGMENTS as u16))
}

/// Checks a request against a disk.
///
/// The response takes id and operation from `wire` ([`WireRequest::response`]).
#[inline]
pub fn check<'a>(
    wire: &'a WireRequest,
    limits: &DiskLimits,
) -> Result<Request<'a>, InvalidRequest> {
    match wire {
        WireRequest::Rw(rw) => check_rw(rw, limits),
        WireRequest::Indirect(indirect) => check_indirect(indirect, limits),
        WireRequest::Discard(discard) => check_discard(discard, limits),
        WireRequest::Unknown { operation, .. } => Err(InvalidRequest::UnknownOperation(*operation)),
    }
}

#[inline]
fn check_rw<'a>(
    rw: &'a wire::RwRequest,
    limits: &DiskLimits,
) -> Result<Request<'a>, InvalidRequest> {
    if usize::from(rw.nr_segments) > DIRECT_SEGMENTS {
        let segments = u16::from(rw.nr_segments);
        return Err(InvalidRequest::TooManySegments {
            segments,
            limit: DIRECT_SEGMENTS as u16,
        });
    }
    let segments = rw.segments();
    match rw.operation {
        op::READ if segments.is_empty() => Err(InvalidRequest::NoSegments),
        op::READ => Ok(Request::Read(Data::Direct(Direct::check(
            rw.sector, segments, limits,
        )?))),
        op::WRITE if segments.is_empty() => Err(InvalidRequest::NoSegments),
        op::FLUSH_DISKCACHE if segments.is_empty() => Ok(Request::Flush),
        op::WRITE_BARRIER if segments.is_empty() => Ok(Request::Barrier(None)),
        op::WRITE | op::FLUSH_DISKCACHE | op::WRITE_BARRIER if limits.read_only => {
            Err(InvalidRequest::ReadOnly)
        }
        op::WRITE => Ok(Request::Write(Data::Direct(Direct::check(
            rw.sector, segments, limits,
        )?))),
        op::FLUSH_DISKCACHE | op::WRITE_BARRIER => Ok(Request::Barrier(Some(Direct::check(
            rw.sector, segments, limits,
        )?))),
        operation => Err(InvalidRequest::UnknownOperation(operation)),
    }
}

#[inline]
fn check_indirect<'a>(
    indirect: &'a wire::IndirectRequest,
    limits: &DiskLimits,
) -> Result<Request<'a>, InvalidRequest> {
    if limits.indirect_segments == 0 {
        return Err(InvalidRequest::IndirectNotOffered);
    }
    if indirect.operation != op::READ && indirect.operation != op::WRITE {
        return Err(InvalidRequest::IndirectOperation(indirect.operation));
    }
    let limit = indirect_limit(limits.indirect_segments);
    let segments = indirect.nr_segments;
    if segments == 0 {
        return Err(InvalidRequest::NoSegments);
    }
    if segments > limit {
        return Err(InvalidRequest::TooManySegments { segments, limit });
    }
    let data = Unfetched {
        sector: indirect.sector,
        count: segments,
        grefs: indirect.grefs(),
    };
    if indirect.operation == op::READ {
        Ok(Request::Read(Data::Indirect(data)))
    } else if limits.read_only {
        Err(InvalidRequest::ReadOnly)
    } else {
        Ok(Request::Write(Data::Indirect(data)))
    }
}

#[inline]
fn check_discard(
    discard: &wire::DiscardRequest,
    limits: &DiskLimits,
) -> Result<Request<'static>, InvalidRequest> {
    let secure = discard.flag & wire::DISCARD_SECURE != 0;
    if limits.read_only {
        return Err(InvalidRequest::ReadOnly);
    }
    if !limits.discard {
        return Err(InvalidRequest::DiscardNotOffered);
    }
    if secure && !limits.secure_discard {
        return Err(InvalidRequest::SecureNotOffered);
    }
    if discard.nr_sectors == 0 {
        return Err(InvalidRequest::EmptyDiscard);
    }
    limits.check_range(discard.sector, discard.nr_sectors)?;
    let extent = Extent {
        sector: discard.sector,
        sectors: discard.nr_sectors,
    };
    Ok(Request::Discard { extent, secure })
}

#[cfg(test)]
mod tests {
    use std::{
        boxed::Box,
        string::ToString,
        vec::Vec, //
    };

    use crate::wire::{
        DiscardRequest,
        IndirectRequest,
        RwRequest, //
    };

    use super::*;

    const LIMITS: DiskLimits = DiskLimits {
        sectors: 1000,
        block_size: 512,
        read_only: false,
        discard: true,
        secure_discard: true,
        indirect_segments: 256,
    };
    const READ_ONLY: DiskLimits = DiskLimits {
        read_only: true,
        ..LIMITS
    };
    const BLOCKS_OF_4K: DiskLimits = DiskLimits {
        block_size: 4096,
        ..LIMITS
    };
    const BLOCKS_OF_16K: DiskLimits = DiskLimits {
        block_size: 16384,
        ..LIMITS
    };

    fn wire(first: u8, last: u8) -> WireSegment {
        WireSegment {
            gref: 7,
            first,
            last,
        }
    }

    fn rw(operation: u8, sector: u64, list: &[WireSegment]) -> WireRequest {
        let mut segments = [WireSegment::default(); DIRECT_SEGMENTS];
        segments[..list.len()].copy_from_slice(list);
        let nr_segments = list.len() as u8;
        WireRequest::Rw(RwRequest {
            operation,
            nr_segments,
            handle: 0,
            id: 1,
            sector,
            segments,
        })
    }

    fn indirect(operation: u8, sector: u64, nr_segments: u16) -> WireRequest {
        let grefs = [10, 11, 12, 13, 14, 15, 16, 17];
        WireRequest::Indirect(IndirectRequest {
            operation,
            nr_segments,
            handle: 0,
            id: 1,
            sector,
            grefs,
        })
    }

    fn discard(sector: u64, nr_sectors: u64, flag: u8) -> WireRequest {
        WireRequest::Discard(DiscardRequest {
            flag,
            handle: 0,
            id: 1,
            sector,
            nr_sectors,
        })
    }

    fn refusal(request: &WireRequest, limits: &DiskLimits) -> InvalidRequest {
        check(request, limits).unwrap_err()
    }

    /// Returns the direct data of a request.
    fn direct<'a>(request: &'a WireRequest, limits: &DiskLimits) -> Direct<'a> {
        match check(request, limits) {
            Ok(Request::Read(Data::Direct(data)) | Request::Write(Data::Direct(data))) => data,
            Ok(Request::Barrier(Some(data))) => data,
            other => panic!("{other:?}"),
        }
    }

    fn unfetched(sector: u64, count: u16, limits: &DiskLimits) -> Unfetched<'static> {
        let request = Box::leak(Box::new(indirect(op::READ, sector, count)));
        match check(request, limits) {
            Ok(Request::Read(Data::Indirect(data))) => data,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn direct_data_is_passed_on() {
        let request = rw(op::READ, 5, &[wire(1, 7), wire(0, 0)]);
        let data = direct(&request, &LIMITS);
        assert_eq!((data.extent().sector(), data.extent().sectors()), (5, 8));
        let segments: Vec<_> = data
            .segments()
            .map(|s| (s.gref(), s.offset(), s.len(), s.sectors(), s.is_empty()))
            .collect();
        assert_eq!(segments, [(7, 512, 3584, 7, false), (7, 0, 512, 1, false)]);
    }

    #[test]
    fn operations() {
        let one = [wire(0, 7)];
        assert!(matches!(
            check(&rw(op::READ, 0, &one), &LIMITS),
            Ok(Request::Read(Data::Direct(_)))
        ));
        assert!(matches!(
            check(&rw(op::WRITE, 0, &one), &LIMITS),
            Ok(Request::Write(Data::Direct(_)))
        ));
        assert_eq!(
            check(&rw(op::FLUSH_DISKCACHE, 0, &[]), &LIMITS),
            Ok(Request::Flush)
        );
        assert_eq!(
            check(&rw(op::WRITE_BARRIER, 0, &[]), &LIMITS),
            Ok(Request::Barrier(None))
        );
        for operation in [op::WRITE_BARRIER, op::FLUSH_DISKCACHE] {
            assert!(matches!(
                check(&rw(operation, 0, &one), &LIMITS),
                Ok(Request::Barrier(Some(_)))
            ));
        }
        assert!(matches!(
            check(&indirect(op::READ, 0, 1), &LIMITS),
            Ok(Request::Read(Data::Indirect(_)))
        ));
        assert!(matches!(
            check(&indirect(op::WRITE, 0, 1), &LIMITS),
            Ok(Request::Write(Data::Indirect(_)))
        ));
    }

    #[test]
    fn unknown_operations() {
        for operation in [4, 7, 255] {
            let request = WireRequest::Unknown { operation, id: 1 };
            assert_eq!(
                refusal(&request, &LIMITS),
                InvalidRequest::UnknownOperation(operation)
            );
            let request = rw(operation, 0, &[wire(0, 0)]);
            assert_eq!(
                refusal(&request, &LIMITS),
                InvalidRequest::UnknownOperation(operation)
            );
        }
        for operation in [
            op::WRITE_BARRIER,
            op::FLUSH_DISKCACHE,
            op::DISCARD,
            op::INDIRECT,
            255,
        ] {
            let request = indirect(operation, 0, 1);
            assert_eq!(
                refusal(&request, &LIMITS),
                InvalidRequest::IndirectOperation(operation)
            );
        }
    }

    #[test]
    fn number_of_direct_segments() {
        assert_eq!(
            refusal(&rw(op::READ, 0, &[]), &LIMITS),
            InvalidRequest::NoSegments
        );
        assert_eq!(
            refusal(&rw(op::WRITE, 0, &[]), &LIMITS),
            InvalidRequest::NoSegments
        );
        assert_eq!(
            direct(&rw(op::READ, 0, &[wire(0, 0); 11]), &LIMITS)
                .segments()
                .len(),
            11
        );
        let WireRequest::Rw(full) = rw(op::READ, 0, &[wire(0, 0); 11]) else {
            panic!()
        };
        for nr_segments in [12, 255] {
            let request = WireRequest::Rw(RwRequest {
                nr_segments,
                ..full
            });
            let segments = nr_segments.into();
            let refused = InvalidRequest::TooManySegments {
                segments,
                limit: 11,
            };
            assert_eq!(refusal(&request, &LIMITS), refused);
        }
    }

    #[test]
    fn number_of_indirect_segments() {
        assert_eq!(
            refusal(&indirect(op::READ, 0, 0), &LIMITS),
            InvalidRequest::NoSegments
        );
        assert_eq!(unfetched(0, 256, &LIMITS).count(), 256);
        let refused = InvalidRequest::TooManySegments {
            segments: 257,
            limit: 256,
        };
        assert_eq!(refusal(&indirect(op::READ, 0, 257), &LIMITS), refused);
        let unlimited = DiskLimits {
            indirect_segments: u16::MAX,
            ..LIMITS
        };
        assert_eq!(unfetched(0, 4096, &unlimited).count(), 4096);
        let refused = InvalidRequest::TooManySegments {
            segments: 4097,
            limit: 4096,
        };
        assert_eq!(refusal(&indirect(op::READ, 0, 4097), &unlimited), refused);
    }

    #[test]
    fn segments_of_each_request() {
        for (request, segments) in [
            (rw(op::READ, 0, &[wire(0, 0); 3]), 3),
            (rw(op::WRITE, 0, &[wire(0, 0); 11]), 11),
            (rw(op::WRITE_BARRIER, 0, &[wire(0, 0); 2]), 2),
            (rw(op::WRITE_BARRIER, 0, &[]), 0),
            (rw(op::FLUSH_DISKCACHE, 0, &[]), 0),
            (discard(0, 8, 0), 0),
            (indirect(op::READ, 0, 256), 256),
            (indirect(op::WRITE, 0, 1), 1),
        ] {
            assert_eq!(check(&request, &LIMITS).unwrap().segments(), segments);
        }
    }

    #[test]
    fn most_that_one_request_uses() {
        for (offered, segments, pages) in [
            (0, 11, 11),
            (10, 11, 11),
            (11, 11, 12),
            (12, 12, 13),
            (256, 256, 257),
            (512, 512, 513),
            (513, 513, 515),
            (4096, 4096, 4104),
            (4097, 4096, 4104),
            (u16::MAX, 4096, 4104),
        ] {
            assert_eq!(max_segments_per_request(offered), segments);
            assert_eq!(max_pages_per_request(offered), pages);
        }
    }

    #[test]
    fn indirect_requests_can_be_off() {
        let none = DiskLimits {
            indirect_segments: 0,
            ..LIMITS
        };
        assert_eq!(
            refusal(&indirect(op::READ, 0, 1), &none),
            InvalidRequest::IndirectNotOffered
        );
        assert_eq!(
            refusal(&indirect(9, 0, 0), &none),
            InvalidRequest::IndirectNotOffered
        );
    }

    #[test]
    fn pages_of_an_indirect_request() {
        let unlimited = DiskLimits {
            indirect_segments: 4096,
            ..LIMITS
        };
        assert_eq!(unfetched(0, 512, &unlimited).grefs(), [10]);
        assert_eq!(unfetched(0, 513, &unlimited).grefs(), [10, 11]);
        assert_eq!(
            unfetched(0, 4096, &unlimited).grefs(),
            [10, 11, 12, 13, 14, 15, 16, 17]
        );
    }

    #[test]
    fn segments_stay_in_their_page() {
        for (first, last) in [(1, 0), (7, 6), (0, 8), (8, 8), (255, 255), (0, 255)] {
            let request = rw(op::READ, 0, &[wire(0, 0), wire(first, last)]);
            assert_eq!(
                refusal(&request, &LIMITS),
                InvalidRequest::SegmentRange { first, last }
            );
        }
        for (first, last) in [(0, 0), (0, 7), (7, 7), (3, 4)] {
            let request = rw(op::READ, 0, &[wire(first, last)]);
            let data = direct(&request, &LIMITS);
            assert_eq!(data.extent().sectors(), u64::from(last - first + 1));
        }
    }

    #[test]
    fn segments_of_large_blocks() {
        let check_list = |limits: &DiskLimits, list: &[WireSegment]| {
            let sectors = list.iter().map(|s| u64::from(s.last - s.first) + 1).sum();
            let request = rw(op::READ, 0, list);
            if sectors * 512 % u64::from(limits.block_size) == 0 {
                assert_eq!(direct(&request, limits).extent().sectors(), sectors);
            } else {
                let refused = InvalidRequest::MisalignedLength {
                    sectors,
                    block_size: limits.block_size,
                };
                assert_eq!(refusal(&request, limits), refused);
            }
        };
        let blocks_of_1k = DiskLimits {
            block_size: 1024,
            ..LIMITS
        };
        for limits in [&LIMITS, &blocks_of_1k, &BLOCKS_OF_4K, &BLOCKS_OF_16K] {
            // A block of 4 KiB from memory that starts at 512 in its page.
            check_list(limits, &[wire(1, 7), wire(0, 0)]);
            check_list(limits, &[wire(1, 7), wire(0, 7), wire(0, 0)]);
            check_list(limits, &[wire(0, 6)]);
            check_list(limits, &[wire(1, 2)]);
            check_list(limits, &[wire(0, 7); 3]);
            check_list(limits, &[wire(0, 7); 4]);
        }
    }

    #[test]
    fn block_sizes_that_cannot_be_are_taken_as_one_sector() {
        let limits = DiskLimits {
            block_size: 0,
            ..LIMITS
        };
        assert_eq!(
            direct(&rw(op::READ, 3, &[wire(0, 0)]), &limits)
                .extent()
                .sectors(),
            1
        );
    }

    #[test]
    fn data_starts_at_a_block() {
        let page = [wire(0, 7)];
        for sector in [1, 4, 7, 9] {
            let refused = InvalidRequest::MisalignedSector {
                sector,
                block_size: 4096,
            };
            assert_eq!(
                refusal(&rw(op::READ, sector, &page), &BLOCKS_OF_4K),
                refused
            );
        }
        assert_eq!(
            direct(&rw(op::READ, 8, &page), &BLOCKS_OF_4K)
                .extent()
                .sector(),
            8
        );
    }

    #[test]
    fn data_stays_on_the_disk() {
        let page = [wire(0, 7)];
        assert_eq!(
            direct(&rw(op::READ, 992, &page), &LIMITS).extent().sector(),
            992
        );
        for sector in [993, 1000, u64::MAX - 8, u64::MAX - 7, u64::MAX] {
            let refused = InvalidRequest::OutOfRange {
                sector,
                sectors: 8,
                size: 1000,
            };
            assert_eq!(refusal(&rw(op::READ, sector, &page), &LIMITS), refused);
            assert_eq!(
                refusal(&rw(op::WRITE_BARRIER, sector, &page), &LIMITS),
                refused
            );
        }
        // Nothing is written, so it does not matter where.
        assert_eq!(
            check(&rw(op::FLUSH_DISKCACHE, u64::MAX, &[]), &LIMITS),
            Ok(Request::Flush)
        );
    }

    #[test]
    fn read_only() {
        let page = [wire(0, 7)];
        assert!(check(&rw(op::READ, 0, &page), &READ_ONLY).is_ok());
        assert!(check(&indirect(op::READ, 0, 1), &READ_ONLY).is_ok());
        assert_eq!(
            check(&rw(op::FLUSH_DISKCACHE, 0, &[]), &READ_ONLY),
            Ok(Request::Flush)
        );
        assert_eq!(
            check(&rw(op::WRITE_BARRIER, 0, &[]), &READ_ONLY),
            Ok(Request::Barrier(None))
        );
        for operation in [op::WRITE, op::WRITE_BARRIER, op::FLUSH_DISKCACHE] {
            assert_eq!(
                refusal(&rw(operation, 0, &page), &READ_ONLY),
                InvalidRequest::ReadOnly
            );
        }
        assert_eq!(
            refusal(&indirect(op::WRITE, 0, 1), &READ_ONLY),
            InvalidRequest::ReadOnly
        );
        assert_eq!(
            refusal(&discard(0, 8, 0), &READ_ONLY),
            InvalidRequest::ReadOnly
        );
        assert_eq!(
            refusal(&rw(4, 0, &page), &READ_ONLY),
            InvalidRequest::UnknownOperation(4)
        );
    }

    #[test]
    fn discards() {
        for (flag, secure) in [(0, false), (1, true), (2, false), (255, true)] {
            let Ok(Request::Discard { extent, secure: is }) = check(&discard(8, 9, flag), &LIMITS)
            else {
                panic!()
            };
            assert_eq!((extent.sector(), extent.sectors(), is), (8, 9, secure));
        }
        let refused = InvalidRequest::OutOfRange {
            sector: 1,
            sectors: u64::MAX,
            size: 1000,
        };
        assert_eq!(refusal(&discard(1, u64::MAX, 0), &LIMITS), refused);
        let refused = InvalidRequest::MisalignedLength {
            sectors: 12,
            block_size: 4096,
        };
        assert_eq!(refusal(&discard(8, 12, 0), &BLOCKS_OF_4K), refused);
        assert_eq!(
            refusal(&discard(1, 0, 0), &LIMITS),
            InvalidRequest::EmptyDiscard
        );
    }

    #[test]
    fn discards_that_were_not_offered() {
        let off = DiskLimits {
            discard: false,
            ..LIMITS
        };
        assert_eq!(
            refusal(&discard(0, 8, 0), &off),
            InvalidRequest::DiscardNotOffered
        );
        let plain = DiskLimits {
            secure_discard: false,
            ..LIMITS
        };
        assert_eq!(
            refusal(&discard(0, 8, 1), &plain),
            InvalidRequest::SecureNotOffered
        );
        assert!(check(&discard(0, 8, 0), &plain).is_ok());
    }

    #[test]
    fn fetched_segments_give_an_extent() {
        let mut checker = unfetched(16, 3, &LIMITS).checker(&LIMITS);
        assert_eq!(checker.push(wire(0, 7)).unwrap().sectors(), 8);
        assert_eq!(checker.push(wire(2, 3)).unwrap().offset(), 1024);
        checker.push(wire(7, 7)).unwrap();
        let extent = checker.finish().unwrap();
        assert_eq!((extent.sector(), extent.sectors()), (16, 11));
    }

    #[test]
    fn fetched_segments_are_checked() {
        let mut checker = unfetched(16, 3, &BLOCKS_OF_4K).checker(&BLOCKS_OF_4K);
        assert_eq!(
            checker.push(wire(3, 2)),
            Err(InvalidRequest::SegmentRange { first: 3, last: 2 })
        );
        for _ in 0..3 {
            checker.push(wire(0, 2)).unwrap();
        }
        let refused = InvalidRequest::MisalignedLength {
            sectors: 9,
            block_size: 4096,
        };
        assert_eq!(checker.finish(), Err(refused));
    }

    #[test]
    fn fetched_segments_may_be_parts_of_blocks() {
        let mut checker = unfetched(16, 2, &BLOCKS_OF_4K).checker(&BLOCKS_OF_4K);
        checker.push(wire(1, 7)).unwrap();
        checker.push(wire(0, 0)).unwrap();
        assert_eq!(checker.finish().unwrap().sectors(), 8);
    }

    #[test]
    fn all_segments_must_be_fetched() {
        for fetched in [1, 3] {
            let mut checker = unfetched(0, 2, &LIMITS).checker(&LIMITS);
            for _ in 0..fetched {
                checker.push(wire(0, 0)).unwrap();
            }
            let refused = InvalidRequest::SegmentCount {
                expected: 2,
                fetched,
            };
            assert_eq!(checker.finish(), Err(refused));
        }
    }

    #[test]
    fn fetched_segments_stay_on_the_disk() {
        let mut checker = unfetched(990, 2, &LIMITS).checker(&LIMITS);
        checker.push(wire(0, 7)).unwrap();
        checker.push(wire(0, 7)).unwrap();
        let refused = InvalidRequest::OutOfRange {
            sector: 990,
            sectors: 16,
            size: 1000,
        };
        assert_eq!(checker.finish(), Err(refused));
    }

    #[test]
    fn every_refusal_has_a_status_and_a_message() {
        let (first, last, block_size, sectors) = (3, 2, 4096, 9);
        for (refused, status, message) in [
            (
                InvalidRequest::UnknownOperation(9),
                Status::NotSupported,
                "unknown operation 9",
            ),
            (
                InvalidRequest::IndirectNotOffered,
                Status::NotSupported,
                "indirect request, but none were offered",
            ),
            (
                InvalidRequest::IndirectOperation(5),
                Status::Error,
                "indirect request with operation 5, not a read or write",
            ),
            (
                InvalidRequest::NoSegments,
                Status::Error,
                "read or write without segments",
            ),
            (
                InvalidRequest::TooManySegments {
                    segments: 12,
                    limit: 11,
                },
                Status::Error,
                "12 segments, at most 11 are allowed",
            ),
            (
                InvalidRequest::SegmentRange { first, last },
                Status::Error,
                "segment from sector 3 to 2, not within a page of 8 sectors",
            ),
            (
                InvalidRequest::SegmentCount {
                    expected: 2,
                    fetched: 1,
                },
                Status::Error,
                "1 segments fetched of a request with 2",
            ),
            (
                InvalidRequest::MisalignedSector {
                    sector: 1,
                    block_size,
                },
                Status::Error,
                "sector 1 is not at the start of a block of 4096 bytes",
            ),
            (
                InvalidRequest::MisalignedLength {
                    sectors,
                    block_size,
                },
                Status::Error,
                "9 sectors are not whole blocks of 4096 bytes",
            ),
            (
                InvalidRequest::OutOfRange {
                    sector: 1,
                    sectors,
                    size: 5,
                },
                Status::Error,
                "9 sectors at sector 1 exceed the disk of 5 sectors",
            ),
            (
                InvalidRequest::ReadOnly,
                Status::Error,
                "write or discard on a read-only disk",
            ),
            (
                InvalidRequest::DiscardNotOffered,
                Status::NotSupported,
                "discard, but it was not offered",
            ),
            (
                InvalidRequest::SecureNotOffered,
                Status::NotSupported,
                "secure discard, but it was not offered",
            ),
            (
                InvalidRequest::EmptyDiscard,
                Status::Error,
                "discard of no sectors",
            ),
        ] {
            assert_eq!(refused.status(), status);
            assert_eq!(refused.to_string(), message);
        }
    }
}
