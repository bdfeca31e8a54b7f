// SPDX-License-Identifier: GPL-2.0-only

//! The disk as it is offered to the frontend.

use blkif::request::DiskLimits;
use blkif::wire::info;
use blkif::wire::SECTOR_SIZE;
use engine::Discard;
use engine::Info;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// Segments that an indirect request may have (`MAX_INDIRECT_SEGMENTS` of xen-blkback).
pub(crate) const MAX_INDIRECT_SEGMENTS: u16 = 256;

/// The disk as it is offered to the frontend.
pub struct Disk {
    info: Info,
    block_size: u32,
    discard: Option<Discard>,
    removable: bool,
    sectors: AtomicU64,
}

impl Disk {
    /// Returns the disk for an open image.
    ///
    /// `block_size` replaces the image's logical block size if it is larger. `discard` is `false`
    /// if the toolstack forbids it.
    pub fn new(info: Info, block_size: u32, discard: bool, removable: bool) -> Self {
        Self {
            block_size: info.logical_block_size.max(block_size),
            discard: info.discard.filter(|_| discard && !info.read_only),
            removable,
            sectors: AtomicU64::new(0),
            info,
        }
        .with_size(info.size)
    }

    fn with_size(self, size: u64) -> Self {
        self.set_size(size);
        self
    }

    /// Sets the size in bytes. What is not a whole block is not offered.
    pub(crate) fn set_size(&self, size: u64) {
        let blocks = size.checked_div(self.block_size.into()).unwrap_or(0);
        let sectors = blocks.saturating_mul(u64::from(self.block_size / SECTOR_SIZE));
        self.sectors.store(sectors, Relaxed);
    }

    /// Returns the size in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.load(Relaxed)
    }

    /// Returns the limits that requests are checked against.
    #[inline]
    pub(crate) fn limits(&self) -> DiskLimits {
        DiskLimits {
            sectors: self.sectors(),
            block_size: self.block_size,
            read_only: self.info.read_only,
            discard: self.discard.is_some(),
            secure_discard: false,
            indirect_segments: MAX_INDIRECT_SEGMENTS,
        }
    }

    /// Returns the logical block size in bytes.
    pub(crate) fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Returns the physical block size in bytes.
    pub(crate) fn physical_block_size(&self) -> u32 {
        self.info.physical_block_size.max(self.block_size)
    }

    /// Returns how sectors can be discarded, if that is offered.
    pub(crate) fn discard(&self) -> Option<Discard> {
        self.discard
    }

    /// Returns the value of the node `info`. `cdrom`: the toolstack says that it is a CD-ROM.
    pub(crate) fn info_node(&self, cdrom: bool) -> u32 {
        let flag = |flag, set| if set { flag } else { 0 };
        flag(info::CDROM, cdrom)
            | flag(info::REMOVABLE, self.removable)
            | flag(info::READONLY, self.info.read_only)
    }
}
