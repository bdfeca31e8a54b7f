// SPDX-License-Identifier: GPL-2.0-only

//! The disk behind a device: what a hotplug script has put at `physical-device`.
//!
//! Nobody tells a user of a block device that its size has changed, so one has to look. A queue looks
//! whenever it has something to do. For a disk without I/O there is a [`SizePoll`], which wakes no
//! idle CPU; and the hotplug script may write `physical-device` again to have it looked at now.

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
    ratelimited, //
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

use crate::events::QueueEvents;

/// Segments that an indirect request may have (`MAX_INDIRECT_SEGMENTS` of the C backend).
pub(crate) const MAX_INDIRECT_SEGMENTS: u16 = 256;

/// Segments that any request may have.
pub(crate) const MAX_SEGMENTS: usize = max_segments_per_request(MAX_INDIRECT_SEGMENTS);

/// Pages of the frontend that one request uses at a time, at most.
pub(crate) const MAX_PAGES: usize = max_pages_per_request(MAX_INDIRECT_SEGMENTS);

/// Sectors of one piece of a discard, at most.
const DISCARD_PIECE: u64 = 1 << 22;
const _: () = assert!(DISCARD_PIECE <= MAX_DISCARD_SECTORS as u64);

/// An open disk, as it is offered to a frontend.
pub(crate) struct Disk {
    pub(crate) number: DeviceNumber,
    /// The node `mode`.
    pub(crate) mode: CString,
    pub(crate) bdev: Arc<BlockDevice>,
    /// Discard as it is offered; none if the toolstack forbids it.
    pub(crate) discard: Option<DiscardSupport>,
    block_size: u32,
    /// Size in sectors that the frontend was told.
    reported_sectors: Atomic<u64>,
}

impl Disk {
    /// Opens a disk. `discard`: the toolstack does not forbid it.
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
        let reported_sectors = Atomic::new(bdev.sectors());
        Ok(Self {
            number,
            mode,
            bdev,
            discard,
            block_size,
            reported_sectors,
        })
    }

    /// Brings the page cache onto the disk and empties it, for requests go beside it. May sleep for as
    /// long as the disk takes.
    pub(crate) fn drop_page_cache(&self) -> Result {
        let empty = self.bdev.sync_and_forget_cache()?;
        if !empty && !self.read_only() {
            ratelimited!(pr_warn!(
                "{:x}:{:x}: programs of this domain use pages of the disk, which is served: what they \
                 write there replaces what its guest has written\n",
                self.number.major(),
                self.number.minor()
            ));
        }
        Ok(())
    }

    /// Writes are refused.
    pub(crate) fn read_only(&self) -> bool {
        self.bdev.access() == Access::ReadOnly || self.bdev.read_only()
    }

    /// How much of a discard of `left` sectors is asked for at once: what the device does at once, to
    /// the end of a granule, so that none is spared because two halves of it were discarded.
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
        let granule = u64::from(discard.granularity) / u64::from(SECTOR_SIZE);
        match end.checked_rem(granule) {
            Some(excess) if excess < piece => piece.wrapping_sub(excess),
            _ => piece,
        }
    }

    /// What requests are checked against. The size is that of now.
    #[inline]
    pub(crate) fn limits(&self) -> DiskLimits {
        DiskLimits {
            sectors: self.bdev.sectors(),
            block_size: self.block_size,
            read_only: self.bdev.access() == Access::ReadOnly,
            discard: self.discard.is_some(),
            secure_discard: self.discard.is_some_and(|discard| discard.secure),
            indirect_segments: MAX_INDIRECT_SEGMENTS,
        }
    }

    /// Whether the size is another one than the frontend was told. Any context.
    #[inline]
    pub(crate) fn size_changed(&self) -> bool {
        self.bdev.sectors() != self.reported_sectors.load(Relaxed)
    }

    /// The frontend was told this size.
    pub(crate) fn set_reported(&self, sectors: u64) {
        self.reported_sectors.store(sectors, Relaxed);
    }

    /// The node `info`.
    pub(crate) fn info(&self, cdrom: bool) -> u32 {
        let flag = |flag, set| if set { flag } else { 0 };
        flag(info::CDROM, cdrom || self.bdev.is_cdrom())
            | flag(info::REMOVABLE, self.bdev.is_removable())
            | flag(info::READONLY, self.read_only())
    }
}

/// How often to look for a new size of a disk without I/O.
const SIZE_POLL_MS: u32 = 1000;

/// Looks for a new size of a disk without I/O.
pub(crate) struct SizePoll {
    disk: Arc<Disk>,
    events: Arc<QueueEvents>,
}

impl SizePoll {
    /// A timer that is to be set after [`Self::period`], and goes on by itself. `events` is of the
    /// queue that has to tell the frontend.
    pub(crate) fn timer(
        disk: Arc<Disk>,
        events: Arc<QueueEvents>,
    ) -> Result<Pin<KBox<Timer<Self>>>> {
        Timer::new(TimerFlags::Deferrable, Self { disk, events })
    }

    /// The time from one look to the next.
    pub(crate) fn period() -> Jiffies {
        msecs_to_jiffies(SIZE_POLL_MS)
    }
}

impl TimerCallback for SizePoll {
    fn expired(&self) -> Option<Jiffies> {
        if self.disk.size_changed() {
            self.events.kick();
        }
        Some(Self::period())
    }
}
