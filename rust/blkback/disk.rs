// SPDX-License-Identifier: GPL-2.0-only

//! Disks: the block device that a hotplug script has written to `physical-device`
//! (`struct xen_vbd`).
//!
//! The kernel does not notify users of a block device when its size changes, so the size is polled:
//! a queue checks it in each pass; for the time in which no queue thread runs there is a
//! [`SizePoll`], which wakes no idle CPU. The hotplug script may write `physical-device` again to
//! have the size checked at once.

use kernel::{
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

use kernel_ext::{
    base::{
        jiffies::{
            msecs_to_jiffies,
            Jiffies, //
        },
        timer::{
            Timer,
            TimerCallback,
            TimerFlags, //
        },
    },
    block::{
        bdev::{
            Access,
            BlockDevice,
            Claim,
            DeviceNumber,
            DiscardSupport, //
        },
        bio::MAX_DISCARD_SECTORS, //
    },
};

use blkif::{
    request::{
        max_pages_per_request,
        max_segments_per_request,
        DiskLimits, //
    },
    wire::{
        info,
        SECTOR_SIZE, //
    },
};

use crate::wakeup::QueueWakeup;

/// Largest number of segments of an indirect request (`MAX_INDIRECT_SEGMENTS` of `xen-blkback`).
pub(crate) const MAX_INDIRECT_SEGMENTS: u16 = 256;

/// Largest number of segments of any request.
pub(crate) const MAX_REQUEST_SEGMENTS: usize = max_segments_per_request(MAX_INDIRECT_SEGMENTS);

/// Largest number of the frontend's pages that one request uses at a time.
pub(crate) const MAX_REQUEST_PAGES: usize = max_pages_per_request(MAX_INDIRECT_SEGMENTS);

/// Largest number of sectors of one piece of a discard.
const DISCARD_PIECE: u64 = 1 << 22;
const _: () = assert!(DISCARD_PIECE <= MAX_DISCARD_SECTORS as u64);

/// An open disk.
pub(crate) struct Disk {
    pub(crate) number: DeviceNumber,
    /// The node `mode`.
    pub(crate) mode: CString,
    pub(crate) bdev: Arc<BlockDevice>,
    /// The discard support that is offered; `None` if discard is not offered.
    pub(crate) discard: Option<DiscardSupport>,
    block_size: u32,
    /// `true` if the frontend was told that the disk is read-only. Its writes are rejected.
    read_only: Atomic<bool>,
    /// Size in sectors that was last written to xenstore.
    written_sectors: Atomic<u64>,
}

impl Disk {
    /// Opens a disk.
    ///
    /// `discard` is `true` unless the toolstack forbids discard.
    ///
    /// Context: may sleep until I/O on the disk completes, possibly forever.
    pub(crate) fn open(
        number: DeviceNumber,
        access: Access,
        claim: Claim,
        mode: CString,
        discard: bool,
    ) -> Result<Self> {
        let bdev = BlockDevice::open(number, access, claim)?;
        let discard = bdev
            .discard()
            .filter(|_| discard && access == Access::ReadWrite);
        let block_size = bdev.logical_block_size();
        let written_sectors = Atomic::new(bdev.sectors());
        Ok(Self {
            number,
            mode,
            bdev,
            discard,
            block_size,
            read_only: Atomic::new(access == Access::ReadOnly),
            written_sectors,
        })
    }

    /// Writes the page cache of the disk back and drops it, because requests bypass it.
    ///
    /// Returns `false` if programs of this domain keep using pages of a disk that is served for
    /// writing.
    ///
    /// Context: may sleep until I/O on the disk completes, possibly forever.
    pub(crate) fn drop_page_cache(&self) -> Result<bool> {
        let empty = self.bdev.sync_and_forget_cache()?;
        Ok(empty || self.is_read_only())
    }

    /// Returns `true` if the disk was opened for reading, or has become read-only since.
    fn is_read_only(&self) -> bool {
        self.bdev.access() == Access::ReadOnly || self.bdev.read_only()
    }

    /// Returns the length of the first piece of a discard of `left` sectors.
    ///
    /// It is at most what the device discards at once. The piece ends at a multiple of the discard
    /// granularity: a device may ignore the parts of a unit that is split over two pieces.
    pub(crate) fn discard_piece(&self, sector: u64, left: u64) -> u64 {
        let Some(discard) = self.discard else {
            return left.min(DISCARD_PIECE);
        };
        let piece = DISCARD_PIECE.min(discard.max_sectors.max(1).into());
        if left <= piece {
            return left;
        }
        let end = sector
            .wrapping_add(piece)
            .wrapping_sub(u64::from(discard.alignment) / u64::from(SECTOR_SIZE));
        let granularity = u64::from(discard.granularity) / u64::from(SECTOR_SIZE);
        match end.checked_rem(granularity) {
            Some(excess) if excess < piece => piece.wrapping_sub(excess),
            _ => piece,
        }
    }

    /// Returns the limits that requests are checked against, with the current size.
    #[inline]
    pub(crate) fn limits(&self) -> DiskLimits {
        DiskLimits {
            sectors: self.bdev.sectors(),
            block_size: self.block_size,
            read_only: self.read_only.load(Relaxed),
            discard: self.discard.is_some(),
            secure_discard: self.discard.is_some_and(|discard| discard.secure),
            indirect_segments: MAX_INDIRECT_SEGMENTS,
        }
    }

    /// Returns `true` if the size is not the one that was last written for the frontend.
    ///
    /// Context: any.
    #[inline]
    pub(crate) fn size_changed(&self) -> bool {
        self.bdev.sectors() != self.written_sectors.load(Relaxed)
    }

    /// Records the size that was written for the frontend.
    pub(crate) fn set_written_sectors(&self, sectors: u64) {
        self.written_sectors.store(sectors, Relaxed);
    }

    /// Returns the value of the node `info`, to be told to a frontend.
    ///
    /// From now on, writes to a disk that is read-only are rejected.
    pub(crate) fn announce_info(&self, cdrom: bool) -> u32 {
        let read_only = self.is_read_only();
        self.read_only.store(read_only, Relaxed);
        let flag = |flag, set| if set { flag } else { 0 };
        flag(info::CDROM, cdrom || self.bdev.is_cdrom())
            | flag(info::REMOVABLE, self.bdev.is_removable())
            | flag(info::READONLY, read_only)
    }
}

/// Interval of the size poll.
const SIZE_POLL_MS: u32 = 1000;

/// Timer that polls the size of the disk, for the time in which no queue thread runs.
pub(crate) struct SizePoll {
    disk: Arc<Disk>,
    wakeup: Arc<QueueWakeup>,
}

impl SizePoll {
    /// Creates the timer.
    ///
    /// The caller starts it once, with the delay [`Self::period`]; then it repeats.
    ///
    /// `wakeup` wakes the queue thread that has to report a new size.
    pub(crate) fn timer(
        disk: Arc<Disk>,
        wakeup: Arc<QueueWakeup>,
    ) -> Result<Pin<KBox<Timer<Self>>>> {
        Timer::new(TimerFlags::Deferrable, Self { disk, wakeup })
    }

    /// Returns the interval of the poll.
    pub(crate) fn period() -> Jiffies {
        msecs_to_jiffies(SIZE_POLL_MS)
    }
}

impl TimerCallback for SizePoll {
    fn expired(&self) -> Option<Jiffies> {
        if self.disk.size_changed() {
            self.wakeup.set_pending();
        }
        Some(Self::period())
    }
}
