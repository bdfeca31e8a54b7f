// SPDX-License-Identifier: GPL-2.0-only

//! A ring as plain words, to which its user can write anything.

use core::ops::Deref;

use kernel_ext::xen::ring::SharedWords;

use blkif::{
    ring::capacity,
    wire::Abi, //
};

/// The word with the number of requests published.
pub(crate) const REQ_PROD: usize = 0;
/// The word with the number of requests after which the backend has asked for an event.
pub(crate) const REQ_EVENT: usize = 1;
/// The word with the number of responses published.
pub(crate) const RSP_PROD: usize = 2;
/// The word with the number of responses after which the frontend has asked for an event.
pub(crate) const RSP_EVENT: usize = 3;

/// Number of words before the first slot.
const HEADER_WORDS: usize = 16;

/// A ring, of this or the other domain, with the layout of an ABI.
pub(crate) struct RawRing<R> {
    pub(crate) ring: R,
    abi: Abi,
    slots: u32,
}

impl<R: Deref<Target = SharedWords>> RawRing<R> {
    pub(crate) fn new(ring: R, abi: Abi) -> Self {
        let slots = capacity(ring.len(), abi);
        Self { ring, abi, slots }
    }

    /// Returns the ABI.
    pub(crate) fn abi(&self) -> Abi {
        self.abi
    }

    /// Returns the number of slots, a power of two.
    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// Returns the first word of the slot that an index selects.
    pub(crate) fn slot(&self, index: u32) -> usize {
        let slot = index & self.slots.wrapping_sub(1);
        HEADER_WORDS.wrapping_add(slot.wrapping_mul(self.abi.slot_words()) as usize)
    }

    /// Writes words into a slot.
    pub(crate) fn put(&self, index: u32, words: &[u32]) {
        let first = self.slot(index);
        for (offset, word) in words.iter().enumerate() {
            self.ring.store(first.wrapping_add(offset), *word);
        }
    }

    /// Reads words from a slot.
    pub(crate) fn get<const N: usize>(&self, index: u32) -> [u32; N] {
        let first = self.slot(index);
        core::array::from_fn(|offset| self.ring.load(first.wrapping_add(offset)))
    }
}
