// SPDX-License-Identifier: GPL-2.0-only

//! The id of a request: epoch, queue, part, and number of the shadow.
//!
//! A backend copies the id of a request to its response and does not use it otherwise. A response
//! may be late, repeated or invented, so a request is not looked up by the number of its shadow
//! alone: the frontend stores the whole id of each request that it has published, and a response
//! with a different id matches no request.
//!
//! | bits | field | meaning |
//! |---|---|---|
//! | 0..16 | shadow | number of the entry in the frontend's shadow table |
//! | 16..28 | part | index of the request among the parts of the block request |
//! | 28..40 | queue | number of the queue |
//! | 40..64 | epoch | incremented with each use of a shadow, so that a response to an earlier use has another id |
//!
//! # Examples
//!
//! ```
//! use blkif::id::RingId;
//!
//! let id = RingId::new(5, 1, 0, 31).unwrap();
//! assert_eq!(RingId::from_wire(id.to_wire()), id);
//! // The next use of the same shadow.
//! assert_ne!(RingId::new(6, 1, 0, 31), Some(id));
//! ```

const PART_SHIFT: u32 = 16;
const QUEUE_SHIFT: u32 = 28;
const EPOCH_SHIFT: u32 = 40;
const FIELD_MASK: u16 = 0xfff;

/// Epochs are counted modulo this number.
pub const EPOCHS: u32 = 1 << 24;

/// Number of possible values of the fields part and queue.
pub const FIELD_LIMIT: u16 = FIELD_MASK + 1;

/// The id in a request and in its response. Compare all of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RingId(u64);

impl RingId {
    /// Packs an id, or returns `None` if `queue` or `part` is not below [`FIELD_LIMIT`].
    ///
    /// Only the low 24 bits of `epoch` are used, so it may be a wrapping counter of 32 bits.
    #[inline]
    pub const fn new(epoch: u32, queue: u16, part: u16, shadow: u16) -> Option<Self> {
        if queue > FIELD_MASK || part > FIELD_MASK {
            return None;
        }
        Some(RingId(
            ((epoch as u64) << EPOCH_SHIFT)
                | ((queue as u64) << QUEUE_SHIFT)
                | ((part as u64) << PART_SHIFT)
                | shadow as u64,
        ))
    }

    /// Returns the id of a response.
    ///
    /// Any number is an id; the caller has to check that a request has it.
    #[inline]
    pub const fn from_wire(id: u64) -> Self {
        RingId(id)
    }

    /// Returns the number on the wire.
    #[inline]
    pub const fn to_wire(self) -> u64 {
        self.0
    }

    /// Returns the count of uses, modulo [`EPOCHS`].
    #[inline]
    pub const fn epoch(self) -> u32 {
        (self.0 >> EPOCH_SHIFT) as u32
    }

    /// Returns the number of the queue.
    #[inline]
    pub const fn queue(self) -> u16 {
        (self.0 >> QUEUE_SHIFT) as u16 & FIELD_MASK
    }

    /// Returns the part: the number of the slot among those of the request.
    #[inline]
    pub const fn part(self) -> u16 {
        (self.0 >> PART_SHIFT) as u16 & FIELD_MASK
    }

    /// Returns the number of the shadow.
    #[inline]
    pub const fn shadow(self) -> u16 {
        self.0 as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_their_places() {
        let id = RingId::new(0x00ab_cdef, 0x123, 0x456, 0x789a).unwrap();
        assert_eq!(id.to_wire(), 0xabcd_ef12_3456_789a);
        assert_eq!(RingId::from_wire(0xabcd_ef12_3456_789a), id);
        assert_eq!(id.epoch(), 0x00ab_cdef);
        assert_eq!(id.queue(), 0x123);
        assert_eq!(id.part(), 0x456);
        assert_eq!(id.shadow(), 0x789a);
    }

    #[test]
    fn largest_fields() {
        let most = FIELD_LIMIT - 1;
        assert_eq!(
            RingId::new(EPOCHS - 1, most, most, u16::MAX)
                .unwrap()
                .to_wire(),
            u64::MAX
        );
        assert_eq!(RingId::new(0, FIELD_LIMIT, 0, 0), None);
        assert_eq!(RingId::new(0, 0, FIELD_LIMIT, 0), None);
    }

    #[test]
    fn epochs_wrap() {
        assert_eq!(RingId::new(EPOCHS, 0, 0, 1), RingId::new(0, 0, 0, 1));
        assert_ne!(RingId::new(1, 0, 0, 1), RingId::new(0, 0, 0, 1));
    }
}
