// SPDX-License-Identifier: GPL-2.0-only

//! Slots that are set aside for requests while they are prepared.
//!
//! A request reserves all its slots at once. Nearly all requests need one. After a reconnect to a
//! backend with smaller limits some need more, up to all slots of the ring, which are never free
//! together as long as small requests take each slot that becomes free. So while a request of
//! several slots waits, smaller ones are refused, until enough slots are free for the large one.
//!
//! Only the number of slots of a refused request is stored, not the request. The block layer queues
//! each refused request again until it is accepted, so a request of that size will follow. A
//! request that needs more slots than the ring has is refused without being stored: it has to fail.
//!
//! The frontend counts shadows, of which there is one for each slot.
//!
//! # Examples
//!
//! With 4 free slots, a request of 5 slots waits, and smaller ones wait behind it:
//!
//! ```
//! use blkif::reservation::Reservations;
//!
//! let mut reservations = Reservations::new(32);
//! assert!(!reservations.reserve(5, 4));
//! assert!(!reservations.reserve(1, 4));
//! assert!(reservations.reserve(5, 5));
//! ```

/// Reserved slots of a ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reservations {
    /// Number of slots of the ring.
    capacity: usize,
    reserved: usize,
    /// Number of slots of the largest request of several slots that was refused since a request of
    /// that size got its slots; 0 if there is none.
    refused: usize,
}

impl Reservations {
    /// Creates a state without reservations, for a ring of `capacity` slots.
    pub const fn new(capacity: usize) -> Self {
        Self {
            capacity,
            reserved: 0,
            refused: 0,
        }
    }

    /// Returns the number of reserved slots.
    #[inline]
    pub const fn reserved(&self) -> usize {
        self.reserved
    }

    /// Reserves `count` slots of `free`.
    ///
    /// Returns `false` if there are not enough, or if a larger request waits for them.
    #[inline]
    pub fn reserve(&mut self, count: usize, free: usize) -> bool {
        let reserved = self.reserved.saturating_add(count);
        if reserved > free || self.refused != 0 {
            return self.reserve_contended(count, free);
        }
        self.reserved = reserved;
        true
    }

    /// Reserves like [`Self::reserve`], when there are too few slots or a larger request waits.
    #[cold]
    fn reserve_contended(&mut self, count: usize, free: usize) -> bool {
        let reserved = self.reserved.saturating_add(count);
        if reserved > free || count < self.refused {
            // A refused request of one slot is not recorded: any slot that becomes free suffices.
            if count > 1 && count <= self.capacity {
                self.refused = self.refused.max(count);
            }
            return false;
        }
        self.reserved = reserved;
        self.refused = 0;
        true
    }

    /// Ends a reservation, because the slots are about to be used or are not needed.
    #[inline]
    pub fn unreserve(&mut self, count: usize) {
        self.reserved = self.reserved.saturating_sub(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserves_what_is_free() {
        let mut slots = Reservations::new(4);
        assert!(slots.reserve(3, 4));
        assert!(!slots.reserve(1, 3));
        assert!(slots.reserve(1, 4));
        assert_eq!(slots.reserved(), 4);
        slots.unreserve(4);
        assert_eq!(slots, Reservations::new(4));
        assert!(!slots.reserve(usize::MAX, 4));
        assert_eq!(slots, Reservations::new(4));
    }

    #[test]
    fn a_request_of_one_slot_keeps_no_other_waiting() {
        let mut slots = Reservations::new(8);
        assert!(!slots.reserve(1, 0));
        assert_eq!(slots, Reservations::new(8));
    }

    #[test]
    fn smaller_requests_wait_for_a_larger_one() {
        let mut slots = Reservations::new(8);
        assert!(!slots.reserve(4, 3));
        assert!(!slots.reserve(1, 3));
        assert!(!slots.reserve(3, 3));
        // One that is refused meanwhile changes nothing.
        assert!(!slots.reserve(2, 1));
        assert!(slots.reserve(4, 4));
        slots.unreserve(4);
        assert!(slots.reserve(1, 4));
    }

    #[test]
    fn the_largest_one_is_waited_for() {
        let mut slots = Reservations::new(8);
        assert!(!slots.reserve(2, 1));
        assert!(!slots.reserve(5, 4));
        assert!(!slots.reserve(2, 4));
        assert!(slots.reserve(6, 6));
        slots.unreserve(6);
        // A request at least as large was served: the refused one is recorded again when it is
        // queued again.
        assert!(slots.reserve(1, 6));
    }

    #[test]
    fn a_request_of_all_slots_is_waited_for_and_a_larger_one_is_not() {
        let mut slots = Reservations::new(8);
        assert!(!slots.reserve(9, 8));
        assert!(slots.reserve(1, 8));
        assert!(!slots.reserve(8, 8));
        assert!(!slots.reserve(1, 8));
        slots.unreserve(1);
        assert!(slots.reserve(8, 8));
    }
}
