// SPDX-License-Identifier: GPL-2.0-only

//! The block device: its data for the block layer, and its limits.
//!
//! In `xen-blkfront.c`, `blkif_set_queue_limits()` computes the limits.

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Arc, //
    },
};

use kernel_ext::block::mq::{
    Feature,
    QueueLimits, //
};

use blkif::{
    negotiate::{
        self,
        DiscardLimits,
        Features, //
    },
    plan::{
        max_fragments,
        SlotLimits, //
    },
    vdev::DiskName, //
};

use crate::{
    params,
    queue::Queue,
    registry::Serial,
    wakeup::{
        DeviceWakeup,
        WakeReason, //
    }, //
};

/// A disk: the queue data of blk-mq.
pub(crate) struct Disk {
    /// One for each hardware queue.
    queues: KVec<Arc<Queue>>,
    /// Number of queues that have a ring. Other hardware queues use one of these rings.
    rings: Atomic<u32>,
    cdrom: bool,
    name: DiskName,
    serial: Serial,
    wakeup: Arc<DeviceWakeup>,
    /// 1 if the device worker waits for openers or holders of the disk to close it.
    notify_on_release: Atomic<i32>,
}

impl Disk {
    /// Creates the data of a disk with these queues.
    pub(crate) fn new(
        queues: KVec<Arc<Queue>>,
        cdrom: bool,
        name: DiskName,
        wakeup: Arc<DeviceWakeup>,
    ) -> Self {
        Self {
            rings: Atomic::new(queues.len() as u32),
            queues,
            cdrom,
            name,
            serial: Serial::new(),
            wakeup,
            notify_on_release: Atomic::new(0),
        }
    }

    /// Returns the name of the disk.
    pub(crate) fn name(&self) -> DiskName {
        self.name
    }

    /// Returns the number that distinguishes the disk from others with its name.
    pub(crate) fn serial(&self) -> Serial {
        self.serial
    }

    /// Returns `true` if the disk is a CD-ROM.
    pub(crate) fn is_cdrom(&self) -> bool {
        self.cdrom
    }

    /// Makes each later close of the disk set [`WakeReason::Released`].
    ///
    /// The caller has to check for openers afterwards.
    pub(crate) fn notify_release(&self) {
        self.notify_on_release.xchg(1, Full);
    }

    /// Handles a close of the disk.
    pub(crate) fn released(&self) {
        if self.notify_on_release.load(Relaxed) != 0 {
            self.wakeup.set(WakeReason::Released);
        }
    }

    /// Sets the number of queues that have a ring.
    ///
    /// Context: the block layer's queue is quiesced.
    pub(crate) fn set_rings(&self, rings: u32) {
        self.rings.store(rings, Relaxed);
    }

    /// Returns the queue whose ring a hardware queue uses.
    #[inline]
    pub(crate) fn queue(&self, hw_queue: u32) -> Option<&Queue> {
        let ring = hw_queue.checked_rem(self.rings.load(Relaxed)).unwrap_or(0);
        self.queues.get(ring as usize).map(|queue| &**queue)
    }
}

/// Properties from which the limits of a disk are computed.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) struct LimitInputs {
    block_size: u32,
    physical_block_size: u32,
    slot_limits: SlotLimits,
    write_cache: bool,
    discard: Option<DiscardLimits>,
}

impl LimitInputs {
    /// Returns the properties of a disk with this logical block size, according to the features of
    /// the connection.
    pub(crate) fn new(
        block_size: u32,
        properties: &negotiate::DiskProperties,
        features: &Features,
        slot_limits: SlotLimits,
    ) -> Self {
        Self {
            block_size,
            physical_block_size: properties.physical_block_size,
            slot_limits,
            write_cache: features.write_cache(),
            discard: features.discard,
        }
    }

    /// Returns the same properties without discard.
    pub(crate) fn without_discard(self) -> Self {
        Self {
            discard: None,
            ..self
        }
    }

    /// Returns `true` if the disk has a write cache, so that the block layer sends flushes.
    pub(crate) fn write_cache(&self) -> bool {
        self.write_cache
    }

    /// Sets the limits of a disk with these properties.
    ///
    /// Each segment is aligned to the logical block, or to the page if a block is larger: blkif.h
    /// requires whole blocks, and backends reject others.
    pub(crate) fn apply(&self, limits: &mut QueueLimits) {
        let most = max_fragments(self.block_size, params::MAX_PARTS as u32);
        let segments = u32::from(self.slot_limits.segments()).min(most) as u16;
        limits
            .set_logical_block_size(self.block_size)
            .set_physical_block_size(self.physical_block_size)
            .set_max_hw_sectors(u32::from(segments).wrapping_mul(SECTORS_PER_PAGE))
            .set_max_segments(segments)
            .set_max_segment_size(blkif::wire::PAGE_SIZE)
            .set_seg_boundary_mask(blkif::wire::PAGE_SIZE as usize - 1)
            .set_dma_alignment(self.block_size.min(blkif::wire::PAGE_SIZE).wrapping_sub(1))
            .set_feature(Feature::WriteCache, self.write_cache);

        let discard = self.discard;
        let limit_if = |can: bool| if can { u32::MAX } else { 0 };
        limits
            .set_max_discard_sectors(limit_if(discard.is_some()))
            .set_max_secure_erase_sectors(limit_if(discard.is_some_and(|discard| discard.secure)))
            .set_discard_granularity(discard.map_or(0, |discard| discard.granularity))
            .set_discard_alignment(discard.map_or(0, |discard| discard.alignment));
    }
}

const SECTORS_PER_PAGE: u32 = blkif::wire::SECTORS_PER_PAGE as u32;
