// SPDX-License-Identifier: GPL-2.0-only

//! Queue limits: the limits of a request.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use kernel::{
    bindings,
    page::PAGE_SIZE,
    prelude::*, //
};

use super::SECTOR_SIZE;

/// A feature of a disk (`BLK_FEAT_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Feature {
    /// A volatile write cache: data is on stable storage only after a flush.
    WriteCache = 1 << 0,
    /// Single writes can bypass the write cache.
    Fua = 1 << 1,
}

/// The limits of a request: `struct queue_limits`.
///
/// The block layer chooses the limits that are not set. Sectors are 512 bytes.
#[repr(transparent)]
pub struct QueueLimits(bindings::queue_limits);

macro_rules! limits {
    ($($(#[$attr:meta])* $set:ident, $field:ident: $ty:ty;)*) => {
        $(
            $(#[$attr])*
            pub fn $set(&mut self, value: $ty) -> &mut Self {
                self.0.$field = value;
                self
            }
        )*
    };
}

impl QueueLimits {
    /// Creates limits of which none is set.
    pub fn new() -> Self {
        Self(pin_init::zeroed())
    }

    limits! {
        /// Sets the logical block size, in bytes: a power of two, at least 512.
        set_logical_block_size, logical_block_size: u32;
        /// Sets the physical block size, in bytes: a power of two.
        set_physical_block_size, physical_block_size: u32;
        /// Sets the minimum I/O size that is efficient, in bytes.
        set_io_min, io_min: u32;
        /// Sets the optimal I/O size, in bytes. 0: unknown.
        set_io_opt, io_opt: u32;
        /// Sets the maximum length of a request, in sectors: at least a page.
        set_max_hw_sectors, max_hw_sectors: u32;
        /// Sets the maximum number of segments of a request.
        set_max_segments, max_segments: u16;
        /// Sets the maximum length of a segment, in bytes: at least a page.
        set_max_segment_size, max_segment_size: u32;
        /// Sets the mask of the addresses that no segment crosses: at least the page size minus 1.
        set_seg_boundary_mask, seg_boundary_mask: usize;
        /// Sets the mask of the bits that are 0 in the address and the length of each segment.
        set_dma_alignment, dma_alignment: u32;
        /// Sets the maximum length of a discard, in sectors. 0: the disk does not support discard.
        set_max_discard_sectors, max_hw_discard_sectors: u32;
        /// Sets the unit of discards, in bytes.
        set_discard_granularity, discard_granularity: u32;
        /// Sets the offset of the first unit of discards, in bytes.
        set_discard_alignment, discard_alignment: u32;
        /// Sets the maximum number of ranges of a discard.
        set_max_discard_segments, max_discard_segments: u16;
        /// Sets the maximum length of a secure erase, in sectors. 0: the disk does not support it.
        set_max_secure_erase_sectors, max_secure_erase_sectors: u32;
        /// Sets the maximum length of a write of zeroes, in sectors. 0: the block layer writes
        /// zeroes.
        set_max_write_zeroes_sectors, max_write_zeroes_sectors: u32;
    }

    /// Sets or clears a feature.
    pub fn set_feature(&mut self, feature: Feature, has: bool) -> &mut Self {
        if has {
            self.0.features |= feature as u32;
        } else {
            self.0.features &= !(feature as u32);
        }
        self
    }

    /// Returns the maximum length of a request, in sectors.
    pub fn max_hw_sectors(&self) -> u32 {
        self.0.max_hw_sectors
    }

    /// Returns the maximum number of segments of a request.
    pub fn max_segments(&self) -> u16 {
        self.0.max_segments
    }

    /// Returns the logical block size, in bytes.
    pub fn logical_block_size(&self) -> u32 {
        self.0.logical_block_size
    }

    /// Returns an error for limits of which the block layer would warn.
    pub(super) fn check(&self) -> Result {
        let is_block_size = |size: u32| size == 0 || size.is_power_of_two() && size >= SECTOR_SIZE;
        let page_sectors = PAGE_SIZE as u32 / SECTOR_SIZE;
        let block_sectors = self.0.logical_block_size / SECTOR_SIZE;

        let good = is_block_size(self.0.logical_block_size)
            && is_block_size(self.0.physical_block_size)
            && (self.0.max_hw_sectors == 0
                || self.0.max_hw_sectors >= page_sectors && self.0.max_hw_sectors >= block_sectors)
            && (self.0.max_segment_size == 0 || self.0.max_segment_size >= PAGE_SIZE as u32)
            && (self.0.seg_boundary_mask == 0 || self.0.seg_boundary_mask >= PAGE_SIZE - 1)
            && self.0.dma_alignment as usize <= PAGE_SIZE;
        good.then_some(()).ok_or(EINVAL)
    }

    pub(super) fn as_raw(&mut self) -> *mut bindings::queue_limits {
        &mut self.0
    }
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self::new()
    }
}
