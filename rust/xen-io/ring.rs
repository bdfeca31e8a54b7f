// SPDX-License-Identifier: GPL-2.0-only

//! The memory of rings that two domains share.
//!
//! Header: `xen/include/public/io/ring.h`, whose macros work on such memory. The protocol of the
//! device defines the layout of a ring; that of block devices is in `blkif::ring`.

use core::ops::Deref;

/// Memory that two domains share, as 32-bit words.
///
/// # Requirements
///
/// - `load` and `store` are single accesses to memory: never torn, repeated or omitted
///   (`READ_ONCE`, `WRITE_ONCE`). The other side may write any word at any time.
/// - A `load` at or beyond `words` gives 0, a `store` there does nothing.
/// - `rmb` orders loads before it against loads and stores after it, `wmb` loads and stores before
///   it against stores after it, `mb` everything (`virt_rmb`, `virt_wmb`, `virt_mb`; in the terms
///   of the language: acquire, release and sequentially consistent fences).
pub trait SharedMemory {
    /// Returns the size in words: 1024 for each page.
    ///
    /// Never changes.
    fn words(&self) -> usize;
    /// Reads a word.
    fn load(&self, word: usize) -> u32;
    /// Writes a word.
    fn store(&self, word: usize, value: u32);
    /// Orders loads before it against loads and stores after it (`virt_rmb`).
    fn rmb(&self);
    /// Orders loads and stores before it against stores after it (`virt_wmb`).
    fn wmb(&self);
    /// Orders all loads and stores (`virt_mb`).
    fn mb(&self);
}

/// A pointer to shared memory is shared memory.
impl<D> SharedMemory for D
where
    D: Deref,
    D::Target: SharedMemory,
{
    #[inline]
    fn words(&self) -> usize {
        self.deref().words()
    }

    #[inline]
    fn load(&self, word: usize) -> u32 {
        self.deref().load(word)
    }

    #[inline]
    fn store(&self, word: usize, value: u32) {
        self.deref().store(word, value);
    }

    #[inline]
    fn rmb(&self) {
        self.deref().rmb();
    }

    #[inline]
    fn wmb(&self) {
        self.deref().wmb();
    }

    #[inline]
    fn mb(&self) {
        self.deref().mb();
    }
}
