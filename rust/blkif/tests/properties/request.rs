// SPDX-License-Identifier: GPL-2.0-only

//! The checks against a slow model, which counts in 128 bits, sector by sector.

use crate::common;
use blkif::request::check;
use blkif::request::max_pages_per_request;
use blkif::request::max_segments_per_request;
use blkif::request::Data;
use blkif::request::DiskLimits;
use blkif::request::Extent;
use blkif::request::InvalidRequest;
use blkif::request::Request;
use blkif::request::Segment;
use blkif::wire::op;
use blkif::wire::DiscardRequest;
use blkif::wire::IndirectRequest;
use blkif::wire::RwRequest;
use blkif::wire::WireRequest;
use blkif::wire::WireSegment;
use proptest::prelude::*;

/// What a request does, in the simplest terms: sectors of the disk, and bytes of granted pages in
/// units of 512.
#[derive(Debug, Eq, PartialEq)]
enum Effect {
    Transfer {
        write: bool,
        barrier: bool,
        sectors: Vec<u64>,
        memory: Vec<(u32, u32)>,
    },
    Flush,
    Discard {
        start: u64,
        len: u64,
        secure: bool,
    },
}

/// Returns the effect of a request, or `None` if it is invalid. `fetched` are the segments that the
/// pages of an indirect request hold.
fn model(wire: &WireRequest, fetched: &[WireSegment], disk: &DiskLimits) -> Option<Effect> {
    match wire {
        WireRequest::Rw(rw) => model_rw(rw, disk),
        WireRequest::Indirect(indirect) => {
            let n = usize::from(indirect.nr_segments);
            let offered = usize::from(disk.indirect_segments).min(4096);
            let operation = [op::READ, op::WRITE].contains(&indirect.operation);
            let valid = operation && n >= 1 && n <= offered && n == fetched.len();
            let write = indirect.operation == op::WRITE;
            valid.then(|| transfer(write, false, indirect.sector, fetched, disk))?
        }
        WireRequest::Discard(discard) => model_discard(discard, disk),
        WireRequest::Unknown { .. } => None,
    }
}

fn model_rw(rw: &RwRequest, disk: &DiskLimits) -> Option<Effect> {
    if rw.nr_segments > 11 {
        return None;
    }
    let segments = &rw.segments[..rw.nr_segments.into()];
    let empty = segments.is_empty();
    match rw.operation {
        op::READ if !empty => transfer(false, false, rw.sector, segments, disk),
        op::WRITE if !empty => transfer(true, false, rw.sector, segments, disk),
        op::FLUSH_DISKCACHE if empty => Some(Effect::Flush),
        op::WRITE_BARRIER if empty => {
            let (sectors, memory) = (vec![], vec![]);
            Some(Effect::Transfer {
                write: true,
                barrier: true,
                sectors,
                memory,
            })
        }
        op::FLUSH_DISKCACHE | op::WRITE_BARRIER => transfer(true, true, rw.sector, segments, disk),
        _ => None,
    }
}

fn transfer(
    write: bool,
    barrier: bool,
    sector: u64,
    segments: &[WireSegment],
    disk: &DiskLimits,
) -> Option<Effect> {
    let mut memory = Vec::new();
    for segment in segments {
        let sectors: Vec<u8> = (segment.first..=segment.last).collect();
        if sectors.is_empty() || sectors.iter().any(|sector| *sector >= 8) {
            return None;
        }
        memory.extend(
            sectors
                .iter()
                .map(|sector| (segment.gref, u32::from(*sector))),
        );
    }
    let sectors = range(sector, memory.len() as u64, disk)?.collect();
    let allowed = !write || !disk.read_only;
    allowed.then_some(Effect::Transfer {
        write,
        barrier,
        sectors,
        memory,
    })
}

fn range(sector: u64, len: u64, disk: &DiskLimits) -> Option<std::ops::Range<u64>> {
    let end = u128::from(sector) + u128::from(len);
    let aligned = |number: u64| u128::from(number) * 512 % u128::from(disk.block_size) == 0;
    let valid = end <= u128::from(disk.sectors) && aligned(sector) && aligned(len);
    valid.then_some(sector..end as u64)
}

fn model_discard(discard: &DiscardRequest, disk: &DiskLimits) -> Option<Effect> {
    let secure = discard.flag % 2 == 1;
    let (start, len) = (discard.sector, discard.nr_sectors);
    let allowed = disk.discard && !disk.read_only && (disk.secure_discard || !secure) && len > 0;
    range(start, len, disk).filter(|_| allowed)?;
    Some(Effect::Discard { start, len, secure })
}

/// Returns the effect of the checked request.
fn effect(
    wire: &WireRequest,
    fetched: &[WireSegment],
    disk: &DiskLimits,
) -> Result<Effect, InvalidRequest> {
    Ok(match check(wire, disk)? {
        Request::Flush => Effect::Flush,
        Request::Read(data) => moved(false, false, &data, fetched, disk)?,
        Request::Write(data) => moved(true, false, &data, fetched, disk)?,
        Request::Barrier(Some(data)) => moved(true, true, &Data::Direct(data), fetched, disk)?,
        Request::Barrier(None) => {
            let (sectors, memory) = (vec![], vec![]);
            Effect::Transfer {
                write: true,
                barrier: true,
                sectors,
                memory,
            }
        }
        Request::Discard { extent, secure } => Effect::Discard {
            start: extent.sector(),
            len: extent.sectors(),
            secure,
        },
    })
}

fn moved(
    write: bool,
    barrier: bool,
    data: &Data<'_>,
    fetched: &[WireSegment],
    disk: &DiskLimits,
) -> Result<Effect, InvalidRequest> {
    let (extent, segments) = match data {
        Data::Direct(direct) => (direct.extent(), direct.segments().collect()),
        Data::Indirect(unfetched) => {
            let mut checker = unfetched.checker(disk);
            let segments: Result<Vec<Segment>, InvalidRequest> = fetched
                .iter()
                .map(|segment| checker.push(*segment))
                .collect();
            let segments = segments?;
            (checker.finish()?, segments)
        }
    };
    let sectors = sectors_of(extent);
    let memory = segments.iter().flat_map(sectors_of_segment).collect();
    Ok(Effect::Transfer {
        write,
        barrier,
        sectors,
        memory,
    })
}

fn sectors_of(extent: Extent) -> Vec<u64> {
    (extent.sector()..extent.sector() + extent.sectors()).collect()
}

fn sectors_of_segment(segment: &Segment) -> Vec<(u32, u32)> {
    let start = u32::from(segment.offset()) / 512;
    let len = u32::from(segment.len()) / 512;
    (start..start + len)
        .map(|sector| (segment.gref(), sector))
        .collect()
}

/// Returns the number of segments of a request, and of the frontend's pages that it uses at a time:
/// those of the data, and those that hold the segments.
fn uses(wire: &WireRequest) -> (usize, usize) {
    match wire {
        WireRequest::Rw(rw) => (rw.nr_segments.into(), rw.nr_segments.into()),
        WireRequest::Indirect(indirect) => {
            let segments = usize::from(indirect.nr_segments);
            (segments, segments + indirect.grefs().len())
        }
        WireRequest::Discard(_) | WireRequest::Unknown { .. } => (0, 0),
    }
}

/// Returns a request of any kind, which is valid in most cases.
fn any_shape() -> impl Strategy<Value = WireRequest> {
    let large = (0..3u8, sector(), 0..=4097u16).prop_map(|(operation, sector, nr_segments)| {
        WireRequest::Indirect(IndirectRequest {
            operation,
            nr_segments,
            handle: 0,
            id: 1,
            sector,
            grefs: [1; 8],
        })
    });
    prop_oneof![
        3 => plausible_rw(),
        3 => large,
        1 => plausible_discard(),
        1 => common::request(),
    ]
}

fn disk() -> impl Strategy<Value = DiskLimits> {
    let sectors = prop_oneof![0..200u64, Just(u64::MAX), any::<u64>()];
    let offered = prop_oneof![Just(0), Just(256), any::<u16>()];
    let flags = (
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.8),
        any::<bool>(),
    );
    (sectors, 9..16u32, flags, offered).prop_map(|(sectors, shift, flags, indirect_segments)| {
        let (read_only, discard, secure_discard) = flags;
        let block_size = 1 << shift;
        DiskLimits {
            sectors,
            block_size,
            read_only,
            discard,
            secure_discard,
            indirect_segments,
        }
    })
}

/// Returns a segment, which is valid in most cases.
fn segment() -> impl Strategy<Value = WireSegment> {
    prop_oneof![
        4 => (any::<u32>(), 0..8u8, 0..8u8).prop_map(|(gref, a, b)| {
            WireSegment { gref, first: a.min(b), last: a.max(b) }
        }),
        4 => any::<u32>().prop_map(|gref| WireSegment { gref, first: 0, last: 7 }),
        1 => common::segment(),
    ]
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..20u64).prop_map(|n| n * 8),
        2 => 0..200u64,
        1 => any::<u64>(),
        1 => u64::MAX - 100..=u64::MAX,
    ]
}

fn plausible_rw() -> impl Strategy<Value = WireRequest> {
    let segments = proptest::collection::vec(segment(), 0..=11);
    (0..4u8, sector(), segments).prop_map(|(operation, sector, list)| {
        let mut segments = [WireSegment::default(); 11];
        segments[..list.len()].copy_from_slice(&list);
        let nr_segments = list.len() as u8;
        WireRequest::Rw(RwRequest {
            operation,
            nr_segments,
            handle: 0,
            id: 1,
            sector,
            segments,
        })
    })
}

fn plausible_discard() -> impl Strategy<Value = WireRequest> {
    (any::<u8>(), sector(), sector()).prop_map(|(flag, sector, nr_sectors)| {
        WireRequest::Discard(DiscardRequest {
            flag,
            handle: 0,
            id: 1,
            sector,
            nr_sectors,
        })
    })
}

/// Returns an indirect request and the segments in its pages.
fn plausible_indirect() -> impl Strategy<Value = (WireRequest, Vec<WireSegment>)> {
    let segments = proptest::collection::vec(segment(), 0..40);
    (0..3u8, sector(), segments).prop_map(|(operation, sector, segments)| {
        let nr_segments = segments.len() as u16;
        let grefs = [1; 8];
        let request = IndirectRequest {
            operation,
            nr_segments,
            handle: 0,
            id: 1,
            sector,
            grefs,
        };
        (WireRequest::Indirect(request), segments)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn direct(request in plausible_rw(), disk in disk()) {
        prop_assert_eq!(effect(&request, &[], &disk).ok(), model(&request, &[], &disk));
    }

    #[test]
    fn discards(request in plausible_discard(), disk in disk()) {
        prop_assert_eq!(effect(&request, &[], &disk).ok(), model(&request, &[], &disk));
    }

    #[test]
    fn indirect((request, fetched) in plausible_indirect(), disk in disk()) {
        prop_assert_eq!(effect(&request, &fetched, &disk).ok(), model(&request, &fetched, &disk));
    }

    #[test]
    fn one_request_fits_into_what_is_kept_for_one(wire in any_shape(), disk in disk()) {
        if let Ok(request) = check(&wire, &disk) {
            let (segments, pages) = uses(&wire);
            prop_assert_eq!(request.segments(), segments);
            prop_assert!(segments <= max_segments_per_request(disk.indirect_segments));
            prop_assert!(pages <= max_pages_per_request(disk.indirect_segments));
        }
    }

    #[test]
    fn anything(request in common::request(), disk in disk()) {
        prop_assert_eq!(effect(&request, &[], &disk).ok(), model(&request, &[], &disk));
    }
}
