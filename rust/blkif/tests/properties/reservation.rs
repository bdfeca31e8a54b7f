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
    /// In each round one request completes, and small requests are offered for each free slot.
    /// Large requests, left from an earlier connection, are offered again once in each round.
    #[test]
    fn large_requests_are_not_starved(
        mut large in proptest::collection::vec(2..=SLOTS, 1..6),
        ends in proptest::collection::vec(any::<proptest::sample::Index>(), 1..8),
    ) {
        let mut ring = Ring { slots: Reservations::new(SLOTS), in_flight: Vec::new() };
        while ring.offer(1) {}
        let rounds = large.len() * 2 * SLOTS;
        for round in 0..rounds {
            if let Some(index) = ends.get(round % ends.len()) {
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
