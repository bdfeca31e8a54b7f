// SPDX-License-Identifier: GPL-2.0-only

//! The resources of a ring that a block request needs: slots, granted pages, grants.
//!
//! A ring keeps pages for one request of the largest size that its disk may have in flight, so that
//! one request can always proceed, even if there is no memory. A request that was queued under the
//! larger limits of an earlier connection may need more than that; it also gets all its slots and
//! pages at once.

use crate::{
    plan::SlotLimits,
    wire::DIRECT_SEGMENTS, //
};

/// The resources that a request needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Resources {
    /// Fragments of data.
    pub fragments: u32,
    /// Slots.
    pub slots: usize,
    /// Pages to bounce data.
    pub data: usize,
    /// Pages for the segments of indirect requests.
    pub indirect: usize,
    /// Grants of the data pages of the block request, 0 if they are bounced.
    pub grants: u16,
}

impl Resources {
    /// Returns the resources of a request of `fragments` fragments.
    ///
    /// `bounce` is `true` if its data is copied.
    #[inline]
    pub fn new(limits: SlotLimits, bounce: bool, fragments: u32) -> Self {
        let (slots, indirect) = if is_small(fragments) {
            (1, 0)
        } else {
            let indirect = limits.grants(fragments).saturating_sub(fragments);
            (limits.slots(fragments) as usize, indirect as usize)
        };
        let bounced = if bounce { fragments } else { 0 };
        Self {
            fragments,
            slots,
            data: bounced as usize,
            indirect,
            grants: fragments.saturating_sub(bounced) as u16,
        }
    }

    /// Returns the number of pages from the pool that the request needs.
    pub const fn pages(&self) -> usize {
        self.data.saturating_add(self.indirect)
    }
}

/// Returns `true` if a request of `fragments` fragments, or of none, needs one slot and, apart from
/// its data pages, nothing else.
#[inline]
pub const fn is_small(fragments: u32) -> bool {
    fragments as usize <= DIRECT_SEGMENTS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(offered: u16, bounce: bool, fragments: u32) -> Resources {
        Resources::new(SlotLimits::new(offered, 512).unwrap(), bounce, fragments)
    }

    #[test]
    fn a_small_request_takes_one_slot() {
        for fragments in [0, 1, 11] {
            for offered in [0, 256] {
                let direct = resources(offered, false, fragments);
                assert_eq!((direct.slots, direct.pages()), (1, 0));
                assert_eq!(u32::from(direct.grants), fragments);
                let bounced = resources(offered, true, fragments);
                assert_eq!((bounced.slots, bounced.grants), (1, 0));
                assert_eq!(bounced.pages(), fragments as usize);
            }
        }
    }

    #[test]
    fn a_large_request_takes_pages_for_its_segments() {
        let direct = resources(256, false, 256);
        assert_eq!((direct.slots, direct.data, direct.indirect), (1, 0, 1));
        assert_eq!(direct.grants, 256);
        let bounced = resources(256, true, 300);
        assert_eq!((bounced.slots, bounced.data, bounced.indirect), (2, 300, 2));
        assert_eq!(bounced.grants, 0);
    }

    #[test]
    fn a_request_of_a_better_backend_takes_several_slots() {
        let split = resources(0, true, 32);
        assert_eq!((split.slots, split.data, split.indirect), (3, 32, 0));
        assert_eq!(split.pages(), 32);
    }
}
