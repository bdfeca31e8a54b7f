// SPDX-License-Identifier: GPL-2.0-only

//! The memory of a ring: pages of the frontend that are mapped one behind the other.

use blkif::ring::SharedMemory;
use std::sync::atomic::fence;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::Ordering::Release;
use std::sync::atomic::Ordering::SeqCst;
use xen_user::memory::Pages;

/// The memory of a ring.
pub(crate) struct RingMemory(Pages);

impl RingMemory {
    pub(crate) fn new(pages: Pages) -> Self {
        Self(pages)
    }
}

impl SharedMemory for RingMemory {
    fn words(&self) -> usize {
        self.0.len() / 4
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
        fence(Acquire);
    }

    #[inline]
    fn wmb(&self) {
        fence(Release);
    }

    #[inline]
    fn mb(&self) {
        fence(SeqCst);
    }
}
