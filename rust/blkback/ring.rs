// SPDX-License-Identifier: GPL-2.0

//! The memory of a ring, as the protocol sees it.

use kernel_ext::xen::ring::MappedRing;

/// A mapped ring.
pub(crate) struct Memory(pub(crate) MappedRing);

impl blkif::ring::Memory for Memory {
    #[inline]
    fn words(&self) -> usize {
        self.0.len()
    }

    #[inline]
    fn load(&self, word: usize) -> u32 {
        self.0.load(word)
    }

    #[inline]
    fn store(&self, word: usize, value: u32) {
        self.0.store(word, value);
    }

    #[inline]
    fn rmb(&self) {
        self.0.read_fence();
    }

    #[inline]
    fn wmb(&self) {
        self.0.write_fence();
    }

    #[inline]
    fn mb(&self) {
        self.0.full_fence();
    }
}
