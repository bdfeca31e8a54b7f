// SPDX-License-Identifier: GPL-2.0-only

//! Every byte of a block request is in exactly one slot, and no slot carries more than it may.

use blkif::plan::Direction;
use blkif::plan::PageFragment;
use blkif::plan::PageFragments;
use blkif::plan::Plan;
use blkif::plan::SegmentPlacement;
use blkif::plan::SlotLimits;
use blkif::request::check;
use blkif::request::Data;
use blkif::request::DiskLimits;
use blkif::request::Request;
use blkif::wire::encode;
use blkif::wire::Abi;
use blkif::wire::WireRequest;
use proptest::prelude::*;

fn fragment() -> impl Strategy<Value = PageFragment> {
    (0..8u32, 0..8u32).prop_map(|(a, b)| {
        let (first, last) = (a.min(b), a.max(b));
        PageFragment::new(first * 512, (last - first + 1) * 512).unwrap()
    })
}

fn fragments() -> impl Strategy<Value = Vec<PageFragment>> {
    prop_oneof![
        proptest::collection::vec(fragment(), 0..40),
        proptest::collection::vec(fragment(), 0..2000)
    ]
}

fn offered() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0), 1..40u16, Just(256), 500..530u16, any::<u16>()]
}

/// Returns fragments as the block layer makes them for a disk with blocks of `block_size`: each is
/// aligned to the block, or to the page if a block is larger, and all are whole blocks together.
fn fragments_of_blocks(block_size: u32) -> impl Strategy<Value = Vec<PageFragment>> {
    let unit = block_size.min(4096);
    let pages = (block_size / 4096).max(1) as usize;
    let units = 4096 / unit;
    let fragment = (0..units, 0..units).prop_map(move |(a, b)| {
        let (first, last) = (a.min(b), a.max(b));
        PageFragment::new(first * unit, (last - first + 1) * unit).unwrap()
    });
    proptest::collection::vec(fragment, 0..400).prop_map(move |mut fragments| {
        fragments.truncate(fragments.len() / pages * pages);
        fragments
    })
}

fn fragments_with_block_size() -> impl Strategy<Value = (u32, Vec<PageFragment>)> {
    (9..17u32).prop_flat_map(|shift| (Just(1 << shift), fragments_of_blocks(1 << shift)))
}

proptest! {
    /// A request of whole blocks is cut into parts of whole blocks, or the backend cannot serve the
    /// disk: a block does not fit into its slots.
    #[test]
    fn parts_are_whole_blocks(
        (block_size, fragments) in fragments_with_block_size(),
        offered in offered(),
    ) {
        let Some(limits) = SlotLimits::new(offered, block_size) else {
            prop_assert!(u32::from(offered.max(11)) * 4096 < block_size);
            return Ok(());
        };
        let sectors = |fragments: &[PageFragment]| -> u32 {
            fragments.iter().map(|fragment| u32::from(fragment.sectors())).sum()
        };
        let list = fragments.iter().copied();
        let plan = Plan::new(0, list, fragments.len() as u32, limits).unwrap();
        let (slots, mut parts, mut all) = (plan.slots(), 0, 0);
        for part in plan {
            prop_assert_eq!(part.sectors % (block_size / 512), 0);
            all += part.sectors;
            parts += 1;
        }
        prop_assert_eq!((all, parts), (sectors(&fragments), slots));
    }

    #[test]
    fn each_piece_once_and_in_order(
        fragments in fragments(),
        offered in offered(),
        sector in 0..1u64 << 60,
    ) {
        let limits = SlotLimits::new(offered, 512).unwrap();
        let list = fragments.iter().copied();
        let plan = Plan::new(sector, list, fragments.len() as u32, limits).unwrap();
        let (slots, mut grants) = (plan.slots(), plan.grants());
        let (mut first, mut next_sector, mut index) = (0, sector, 0);
        for part in plan {
            prop_assert_eq!((part.index, part.first as usize), (index, first));
            prop_assert_eq!(part.sector, next_sector);
            prop_assert!(part.count >= 1 && part.count <= limits.segments());
            let mine = &fragments[first..first + usize::from(part.count)];
            let sectors: u32 = mine.iter().map(|fragment| u32::from(fragment.sectors())).sum();
            prop_assert_eq!(part.sectors, sectors);
            let pages = match part.placement {
                SegmentPlacement::Direct => {
                    prop_assert!(part.count <= 11);
                    0
                }
                SegmentPlacement::Indirect(pages) => {
                    prop_assert!(part.count > 11 && part.count <= offered.min(4096));
                    prop_assert_eq!(u32::from(pages), u32::from(part.count).div_ceil(512));
                    u32::from(pages)
                }
            };
            grants -= pages + u32::from(part.count);
            first += mine.len();
            next_sector += u64::from(sectors);
            index += 1;
        }
        prop_assert_eq!((first, u32::from(index), grants), (fragments.len(), slots, 0));
    }

    /// What the frontend plans, the backend accepts as what it was.
    #[test]
    fn a_planned_slot_is_a_valid_request(
        fragments in fragments(),
        offered in offered(),
        sector in 0..1u64 << 40,
    ) {
        let limits = SlotLimits::new(offered, 512).unwrap();
        let disk = DiskLimits {
            sectors: 1 << 41,
            block_size: 512,
            read_only: false,
            discard: false,
            secure_discard: false,
            indirect_segments: offered,
        };
        let list = fragments.iter().copied();
        for part in Plan::new(sector, list, fragments.len() as u32, limits).unwrap() {
            let mine = &fragments[part.first as usize..][..usize::from(part.count)];
            let segments = mine
                .iter()
                .enumerate()
                .map(|(index, fragment)| fragment.segment(100 + index as u32));
            let extent = match part.placement {
                SegmentPlacement::Direct => {
                    let request = part.direct(Direction::Write, 0, 1, segments);
                    let words = encode(request, Abi::X86_64);
                    let request = WireRequest::decode(Abi::X86_64, &words);
                    let Ok(Request::Write(Data::Direct(data))) = check(&request, &disk) else {
                        panic!("{request:?}")
                    };
                    prop_assert_eq!(data.segments().len(), mine.len());
                    data.extent()
                }
                SegmentPlacement::Indirect(pages) => {
                    let request = part.indirect(Direction::Write, 0, 1, 7..7 + u32::from(pages));
                    let Ok(Request::Write(Data::Indirect(data))) = check(&request, &disk) else {
                        panic!("{request:?}")
                    };
                    prop_assert_eq!((data.count(), data.grefs().len()), (part.count, pages.into()));
                    let mut checker = data.checker(&disk);
                    for (segment, fragment) in segments.zip(mine) {
                        let checked = checker.push(segment).unwrap();
                        prop_assert_eq!(checked.offset(), fragment.offset());
                        prop_assert_eq!(checked.len(), fragment.len());
                    }
                    checker.finish().unwrap()
                }
            };
            prop_assert_eq!(extent.sector(), part.sector);
            prop_assert_eq!(extent.sectors(), u64::from(part.sectors));
        }
    }

    #[test]
    fn a_run_is_cut_without_gaps(offset in 0..100u32, len in 0..100u32) {
        let mut at = offset * 512;
        for (page, fragment) in PageFragments::new(at, len * 512).unwrap() {
            prop_assert_eq!(page * 4096 + u32::from(fragment.offset()), at);
            at += u32::from(fragment.len());
        }
        prop_assert_eq!(at, (offset + len) * 512);
    }

    #[test]
    fn a_piece_is_what_was_asked_for(offset: u32, len: u32) {
        let whole = offset % 512 == 0 && len % 512 == 0 && len > 0;
        let fits = u64::from(offset) + u64::from(len) <= 4096;
        let fragment = PageFragment::new(offset, len);
        prop_assert_eq!(fragment.is_some(), whole && fits);
    }
}
