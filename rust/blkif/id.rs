// SPDX-License-Identifier: GPL-2.0-only

//! The frontend's name for a slot of the ring: which use of which tag it belongs to.
//!
//! A backend repeats the id of a request in its response and otherwise never looks at it. A
//! response may be late, doubled or invented, so an id is never looked up by its tag alone: the
//! frontend keeps the whole id of what it published, and a response whose id is not equal to it in
//! every bit finds nothing.
//!
//! | bits | field | meaning |
//! |---|---|---|
//! | 0..16 | tag | number of the entry in the frontend's shadow table |
//! | 16..28 | part | which slot of a request that needs several |
//! | 28..40 | queue | hardware queue |
//! | 40..64 | epoch | count of uses; an answer to an older use has another one |
//!
//! # Examples
//!
//! ```
//! use blkif::id::RingId;
//!
//! let id = RingId::new(5, 1, 0, 31).unwrap();
//! assert_eq!(RingId::from_wire(id.to_wire()), id);
//! // The next use of the same slot.
//! assert_ne!(RingId::new(6, 1, 0, 31), Some(id));
//! ```

const PART_SHIFT: u32 = 16;
const QUEUE_SHIFT: u32 = 28;
const EPOCH_SHIFT: u32 = 40;
const FIELD_MASK: u16 = 0xfff;

/// Epochs are counted modulo this number.
pub const EPOCHS: u32 = 1 << 24;

/// Hardware queues and parts are numbered below this.
pub const FIELD_LIMIT: u16 = FIELD_MASK + 1;

/// An id as it stands in a request and in its response. Compare it whole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RingId(u64);

impl RingId {
    /// Packs an id, or returns `None` if `queue` or `part` is not below [`FIELD_LIMIT`]. Of `epoch`
    /// the low 24 bits count, so it may be an ordinary wrapping counter.
    #[inline]
    pub const fn new(epoch: u32, queue: u16, part: u16, tag: u16) -> Option<Self> {
        if queue > FIELD_MASK || part > FIELD_MASK {
            return None;
        }
        Some(RingId(
            ((epoch as u64) << EPOCH_SHIFT)
                | ((queue as u64) << QUEUE_SHIFT)
                | ((part as u64) << PART_SHIFT)
                | tag as u64,
        ))
    }

    /// Returns the id of a response. Any number is one; whether it was ever given out is for the
    /// owner of the slots to say.
    #[inline]
    pub const fn from_wire(id: u64) -> Self {
        RingId(id)
    }

    /// Returns the number for the request.
    #[inline]
    pub const fn to_wire(self) -> u64 {
        self.0
    }

    /// Returns the count of uses, modulo [`EPOCHS`].
    #[inline]
    pub const fn epoch(self) -> u32 {
        (self.0 >> EPOCH_SHIFT) as u32
    }

    /// Returns the hardware queue.
    #[inline]
    pub const fn queue(self) -> u16 {
        (self.0 >> QUEUE_SHIFT) as u16 & FIELD_MASK
    }

    /// Returns the part: the number of the slot among those of the request.
    #[inline]
    pub const fn part(self) -> u16 {
        (self.0 >> PART_SHIFT) as u16 & FIELD_MASK
    }

    /// Returns the tag.
    #[inline]
    pub const fn tag(self) -> u16 {
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
        assert_eq!(id.tag(), 0x789a);
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
