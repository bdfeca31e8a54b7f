// SPDX-License-Identifier: GPL-2.0-only

//! One request of any shape fits into what a ring keeps for it, with whatever backend it meets.

use blkif::plan::max_fragments;
use blkif::plan::PageFragment;
use blkif::plan::Plan;
use blkif::plan::SegmentPlacement;
use blkif::plan::SlotLimits;
use blkif::resources::Resources;
use proptest::prelude::*;

/// Slots of the smallest ring.
const SLOTS: u32 = 32;

fn offered() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0), 1..40u16, Just(256), 500..530u16, any::<u16>()]
}

/// Returns `count` rounded down to whole blocks: if blocks are larger than pages, a request has
/// whole blocks of fragments.
fn pages_of_blocks(block_size: u32, count: u32) -> u32 {
    let pages = (block_size / 4096).max(1);
    count / pages * pages
}

proptest! {
    /// The disk was made by a connection with `before`, and goes on with one that has `now`.
    #[test]
    fn one_request_always_fits(
        before in offered(),
        now in offered(),
        shift in 9..17u32,
        share in 0.0..1.0f64,
        bounce: bool,
    ) {
        let block_size = 1 << shift;
        let limits = [before, now].map(|offered| SlotLimits::new(offered, block_size));
        let [Some(before), Some(now)] = limits else {
            // The backend cannot serve the disk.
            return Ok(());
        };
        let largest = u32::from(before.segments()).min(max_fragments(block_size, SLOTS));
        let kept = Resources::new(now, bounce, largest);
        prop_assert!(kept.slots <= SLOTS as usize);

        let count = pages_of_blocks(block_size, (f64::from(largest) * share) as u32 + 1);
        let takes = Resources::new(now, bounce, count);
        prop_assert!(takes.slots <= kept.slots);
        prop_assert!(takes.pages() <= kept.pages());

        let fragments = (0..count).map(|_| PageFragment::new(0, 4096).unwrap());
        let (mut slots, mut indirect) = (0, 0);
        for part in Plan::new(0, fragments, count, now).unwrap() {
            slots += 1;
            if let SegmentPlacement::Indirect(pages) = part.placement {
                indirect += usize::from(pages);
            }
        }
        prop_assert_eq!((slots.max(1), indirect), (takes.slots, takes.indirect));
        let (data, grants) = if bounce { (count, 0) } else { (0, count) };
        prop_assert_eq!((takes.data, takes.grants), (data as usize, grants as u16));
    }
}
