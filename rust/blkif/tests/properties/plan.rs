// SPDX-License-Identifier: GPL-2.0-only

//! Every byte of a block request is in exactly one slot, and no slot carries more than it may.

use blkif::plan::Direction;
use blkif::plan::Form;
use blkif::plan::Piece;
use blkif::plan::Pieces;
use blkif::plan::Plan;
use blkif::plan::SlotLimits;
use blkif::request::check;
use blkif::request::Data;
use blkif::request::DiskLimits;
use blkif::request::Request;
use blkif::wire::encode;
use blkif::wire::Abi;
use blkif::wire::WireRequest;
use proptest::prelude::*;

fn piece() -> impl Strategy<Value = Piece> {
    (0..8u32, 0..8u32).prop_map(|(a, b)| {
        let (first, last) = (a.min(b), a.max(b));
        Piece::new(first * 512, (last - first + 1) * 512).unwrap()
    })
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    prop_oneof![
        proptest::collection::vec(piece(), 0..40),
        proptest::collection::vec(piece(), 0..2000)
    ]
}

fn offered() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0), 1..40u16, Just(256), 500..530u16, any::<u16>()]
}

/// Returns pieces as the block layer makes them for a disk with blocks of `block_size`: each is
/// aligned to the block, or to the page if a block is larger, and all are whole blocks together.
fn pieces_of_blocks(block_size: u32) -> impl Strategy<Value = Vec<Piece>> {
    let unit = block_size.min(4096);
    let pages = (block_size / 4096).max(1) as usize;
    let units = 4096 / unit;
    let piece = (0..units, 0..units).prop_map(move |(a, b)| {
        let (first, last) = (a.min(b), a.max(b));
        Piece::new(first * unit, (last - first + 1) * unit).unwrap()
    });
    proptest::collection::vec(piece, 0..400).prop_map(move |mut pieces| {
        pieces.truncate(pieces.len() / pages * pages);
        pieces
    })
}

fn pieces_with_block_size() -> impl Strategy<Value = (u32, Vec<Piece>)> {
    (9..17u32).prop_flat_map(|shift| (Just(1 << shift), pieces_of_blocks(1 << shift)))
}

proptest! {
    /// A request of whole blocks is cut into parts of whole blocks, or the backend cannot serve the
    /// disk: a block does not fit into its slots.
    #[test]
    fn parts_are_whole_blocks(
        (block_size, pieces) in pieces_with_block_size(),
        offered in offered(),
    ) {
        let Some(limits) = SlotLimits::new(offered, block_size) else {
            prop_assert!(u32::from(offered.max(11)) * 4096 < block_size);
            return Ok(());
        };
        let sectors = |pieces: &[Piece]| -> u32 {
            pieces.iter().map(|piece| u32::from(piece.sectors())).sum()
        };
        let list = pieces.iter().copied();
        let plan = Plan::new(0, list, pieces.len() as u32, limits).unwrap();
        let (slots, mut parts, mut all) = (plan.slots(), 0, 0);
        for part in plan {
            prop_assert_eq!(part.sectors % (block_size / 512), 0);
            all += part.sectors;
            parts += 1;
        }
        prop_assert_eq!((all, parts), (sectors(&pieces), slots));
    }

    #[test]
    fn each_piece_once_and_in_order(
        pieces in pieces(),
        offered in offered(),
        sector in 0..1u64 << 60,
    ) {
        let limits = SlotLimits::new(offered, 512).unwrap();
        let list = pieces.iter().copied();
        let plan = Plan::new(sector, list, pieces.len() as u32, limits).unwrap();
        let (slots, mut grants) = (plan.slots(), plan.grants());
        let (mut first, mut next_sector, mut index) = (0, sector, 0);
        for part in plan {
            prop_assert_eq!((part.index, part.first as usize), (index, first));
            prop_assert_eq!(part.sector, next_sector);
            prop_assert!(part.count >= 1 && part.count <= limits.segments());
            let mine = &pieces[first..first + usize::from(part.count)];
            let sectors: u32 = mine.iter().map(|piece| u32::from(piece.sectors())).sum();
            prop_assert_eq!(part.sectors, sectors);
            let pages = match part.form {
                Form::Direct => {
                    prop_assert!(part.count <= 11);
                    0
                }
                Form::Indirect(pages) => {
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
        prop_assert_eq!((first, u32::from(index), grants), (pieces.len(), slots, 0));
    }

    /// What the frontend plans, the backend accepts as what it was.
    #[test]
    fn a_planned_slot_is_a_valid_request(
        pieces in pieces(),
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
        let list = pieces.iter().copied();
        for part in Plan::new(sector, list, pieces.len() as u32, limits).unwrap() {
            let mine = &pieces[part.first as usize..][..usize::from(part.count)];
            let segments = mine
                .iter()
                .enumerate()
                .map(|(index, piece)| piece.segment(100 + index as u32));
            let extent = match part.form {
                Form::Direct => {
                    let request = part.direct(Direction::Write, 0, 1, segments);
                    let words = encode(request, Abi::X86_64);
                    let request = WireRequest::decode(Abi::X86_64, &words);
                    let Ok(Request::Write(Data::Direct(data))) = check(&request, &disk) else {
                        panic!("{request:?}")
                    };
                    prop_assert_eq!(data.segments().len(), mine.len());
                    data.extent()
                }
                Form::Indirect(pages) => {
                    let request = part.indirect(Direction::Write, 0, 1, 7..7 + u32::from(pages));
                    let Ok(Request::Write(Data::Indirect(data))) = check(&request, &disk) else {
                        panic!("{request:?}")
                    };
                    prop_assert_eq!((data.count(), data.grefs().len()), (part.count, pages.into()));
                    let mut checker = data.checker(&disk);
                    for (segment, piece) in segments.zip(mine) {
                        let checked = checker.push(segment).unwrap();
                        prop_assert_eq!(checked.offset(), piece.offset());
                        prop_assert_eq!(checked.len(), piece.len());
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
        for (page, piece) in Pieces::new(at, len * 512).unwrap() {
            prop_assert_eq!(page * 4096 + u32::from(piece.offset()), at);
            at += u32::from(piece.len());
        }
        prop_assert_eq!(at, (offset + len) * 512);
    }

    #[test]
    fn a_piece_is_what_was_asked_for(offset: u32, len: u32) {
        let whole = offset % 512 == 0 && len % 512 == 0 && len > 0;
        let fits = u64::from(offset) + u64::from(len) <= 4096;
        let piece = Piece::new(offset, len);
        prop_assert_eq!(piece.is_some(), whole && fits);
    }
}
