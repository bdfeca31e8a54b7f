// SPDX-License-Identifier: GPL-2.0-only

//! A request of several slots is served, however many small ones want each slot that gets free.

use blkif::reservation::Reservations;
use proptest::prelude::*;

const SLOTS: usize = 32;

/// A ring: which requests are in it, by their slots.
struct Ring {
    slots: Reservations,
    in_flight: Vec<usize>,
}

impl Ring {
    fn free(&self) -> usize {
        SLOTS - self.in_flight.iter().sum::<usize>()
    }

    /// Offers a request. Returns `true` if it was taken.
    fn offer(&mut self, count: usize) -> bool {
        let free = self.free();
        let taken = self.slots.reserve(count, free);
        if taken {
            assert!(count <= free);
            self.slots.unreserve(count);
            self.in_flight.push(count);
        }
        taken
    }
}

proptest! {
    /// Between two turns some requests end, and small ones are offered for each slot that is free
    /// then. Large ones, left from an earlier connection, are offered again at their turns.
    #[test]
    fn large_requests_are_not_starved(
        mut large in proptest::collection::vec(2..=SLOTS, 1..6),
        ends in proptest::collection::vec(any::<proptest::sample::Index>(), 1..8),
    ) {
        let mut ring = Ring { slots: Reservations::new(SLOTS), in_flight: Vec::new() };
        while ring.offer(1) {}
        let turns = large.len() * 2 * SLOTS;
        for turn in 0..turns {
            if let Some(index) = ends.get(turn % ends.len()) {
                if !ring.in_flight.is_empty() {
                    ring.in_flight.swap_remove(index.index(ring.in_flight.len()));
                }
            }
            while ring.offer(1) {}
            large.retain(|count| !ring.offer(*count));
            while ring.offer(1) {}
        }
        prop_assert_eq!(large, vec![]);
    }

    /// Reservations are never more than what is free, and small ones are served when no large
    /// one waits.
    #[test]
    fn no_slot_is_given_twice(counts in proptest::collection::vec(1..=SLOTS, 0..100)) {
        let mut slots = Reservations::new(SLOTS);
        let mut reserved = 0;
        for count in counts {
            if slots.reserve(count, SLOTS) {
                reserved += count;
            } else {
                slots.unreserve(reserved);
                reserved = 0;
                prop_assert!(slots.reserve(SLOTS, SLOTS));
                slots.unreserve(SLOTS);
            }
            prop_assert!(reserved <= SLOTS);
            prop_assert_eq!(slots.reserved(), reserved);
        }
    }
}
