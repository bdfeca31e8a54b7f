// SPDX-License-Identifier: GPL-2.0-only

//! The block device: its limits, and what the block layer asks of it.

use kernel::{
    error::code::ENOTTY,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Arc,
        ArcBorrow, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

use kernel_ext::{
    block::mq::{
        BlkStatus,
        Completed,
        Feature,
        Geometry,
        HwQueue,
        Op,
        OpenMode,
        Operations,
        QueueLimits,
        Queued,
        Rejected,
        Request,
        RequestId,
        RequestList, //
    },
    ratelimited, //
};

use blkif::{
    negotiate::{
        self,
        DiscardLimits,
        Features, //
    },
    plan::{
        max_fragments,
        Direction,
        SlotLimits, //
    },
    vdev::DiskName, //
};

use crate::{
    events::{
        DeviceEvents,
        Event, //
    },
    params,
    queue::{
        Queue,
        RequestKind, //
    },
    registry::{
        self,
        Serial, //
    },
    request_data::RequestData, //
};

/// `CDROMMULTISESSION`
const CDROM_MULTISESSION: u32 = 0x5310;
/// `CDROM_GET_CAPABILITY`
const CDROM_GET_CAPABILITY: u32 = 0x5331;
/// Bytes of `struct cdrom_multisession`.
const MULTISESSION_BYTES: usize = 8;

/// Geometry of disks of which nobody knows it.
const HEADS: u8 = 255;
const SECTORS_PER_TRACK: u8 = 63;

/// A disk, as the block layer knows it.
pub(crate) struct Disk {
    /// One for each hardware queue.
    queues: KVec<Arc<Queue>>,
    /// How many of these have a ring; the others use one of theirs.
    rings: Atomic<u32>,
    cdrom: bool,
    name: DiskName,
    serial: Serial,
    events: Arc<DeviceEvents>,
    /// 1 if the device's thread waits until the disk is closed.
    notify_on_release: Atomic<i32>,
}

impl Disk {
    /// Creates the data of a disk with these queues.
    pub(crate) fn new(
        queues: KVec<Arc<Queue>>,
        cdrom: bool,
        name: DiskName,
        events: Arc<DeviceEvents>,
    ) -> Self {
        Self {
            rings: Atomic::new(queues.len() as u32),
            queues,
            cdrom,
            name,
            serial: Serial::new(),
            events,
            notify_on_release: Atomic::new(0),
        }
    }

    /// Returns which of the disks of its name it is.
    pub(crate) fn serial(&self) -> Serial {
        self.serial
    }

    /// Raises [`Event::Released`] from now on when an opener closes the disk. Who calls this looks for
    /// openers after it.
    pub(crate) fn notify_release(&self) {
        self.notify_on_release.xchg(1, Full);
    }

    /// Sets how many queues have a ring. No request is being queued.
    pub(crate) fn set_rings(&self, rings: u32) {
        self.rings.store(rings, Relaxed);
    }

    /// The queue whose ring a hardware queue uses.
    fn queue(&self, hw_queue: u32) -> Option<&Queue> {
        let ring = hw_queue.checked_rem(self.rings.load(Relaxed)).unwrap_or(0);
        self.queues.get(ring as usize).map(|queue| &**queue)
    }
}

/// What the limits of a disk follow from.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) struct LimitInputs {
    block_size: u32,
    physical_block_size: u32,
    slot: SlotLimits,
    write_cache: bool,
    discard: Option<DiscardLimits>,
}

impl LimitInputs {
    /// Of a disk with this logical block size, by what both sides can do.
    pub(crate) fn new(
        block_size: u32,
        disk: &negotiate::DiskProperties,
        features: &Features,
        slot: SlotLimits,
    ) -> Self {
        Self {
            block_size,
            physical_block_size: disk.physical_block_size,
            slot,
            write_cache: features.write_cache(),
            discard: features.discard,
        }
    }

    /// The same, but nothing can be discarded.
    pub(crate) fn without_discard(self) -> Self {
        Self {
            discard: None,
            ..self
        }
    }

    /// Returns `true` if the block layer asks for flushes.
    pub(crate) fn write_cache(&self) -> bool {
        self.write_cache
    }

    /// Sets what follows.
    ///
    /// Each segment is aligned to the logical block, or to the page if a block is larger: blkif.h
    /// asks for whole blocks, and backends refuse others.
    pub(crate) fn apply(&self, limits: &mut QueueLimits) {
        let most = max_fragments(self.block_size, params::MOST_PARTS as u32);
        let segments = u32::from(self.slot.segments()).min(most) as u16;
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
        let most = |can: bool| if can { u32::MAX } else { 0 };
        limits
            .set_max_discard_sectors(most(discard.is_some()))
            .set_max_secure_erase_sectors(most(discard.is_some_and(|discard| discard.secure)))
            .set_discard_granularity(discard.map_or(0, |discard| discard.granularity))
            .set_discard_alignment(discard.map_or(0, |discard| discard.alignment));
    }
}

const SECTORS_PER_PAGE: u32 = blkif::wire::SECTORS_PER_PAGE as u32;

#[vtable]
impl Operations for Disk {
    type QueueData = Self;
    type HwQueueData = ();
    type RequestData = RequestData;

    fn new_request_data(_hw_queue: u32) -> Result<RequestData> {
        RequestData::new()
    }

    fn new_hw_queue_data(_disk: ArcBorrow<'_, Self>, _hw_queue: u32) -> Result {
        Ok(())
    }

    fn queue_rq<'q>(
        hw_queue: HwQueue<'q, Self>,
        rq: Request<Self, Queued<'q>>,
        last: bool,
    ) -> Result<(), Rejected<'q, Self>> {
        let disk = hw_queue.queue_data();
        let Some(queue) = disk.queue(hw_queue.index()) else {
            rq.end(BlkStatus::IOERR);
            return Ok(());
        };
        let kind = match rq.op() {
            Op::Read => RequestKind::Transfer(Direction::Read),
            Op::Write => RequestKind::Transfer(Direction::Write),
            Op::Flush => RequestKind::Flush,
            Op::Discard => RequestKind::Discard { secure: false },
            Op::SecureErase => RequestKind::Discard { secure: true },
            Op::WriteZeroes | Op::Other(_) => {
                rq.end(BlkStatus::NOTSUPP);
                queue.commit();
                return Ok(());
            }
        };
        queue.submit(rq, kind, last)
    }

    fn queue_rqs<'q>(
        hw_queue: HwQueue<'q, Self>,
        requests: RequestList<Self, Queued<'q>>,
    ) -> RequestList<Self, Queued<'q>> {
        match hw_queue.queue_data().queue(hw_queue.index()) {
            Some(queue) => queue.submit_all(requests),
            None => requests,
        }
    }

    fn commit_rqs(hw_queue: HwQueue<'_, Self>) {
        if let Some(queue) = hw_queue.queue_data().queue(hw_queue.index()) {
            queue.commit();
        }
    }

    fn complete(rq: Request<Self, Completed>) {
        let disk = rq.queue_data();
        match disk.queue(rq.id().hw_queue) {
            Some(queue) => queue.complete_read(rq),
            None => rq.end(BlkStatus::IOERR),
        }
    }

    fn timed_out(disk: ArcBorrow<'_, Self>, id: RequestId) {
        if let Some(queue) = disk.queue(id.hw_queue) {
            queue.timed_out(id);
        }
    }

    fn open(disk: ArcBorrow<'_, Self>, mode: OpenMode) -> Result {
        if mode.exclusive && registry::has_claimed_predecessor(disk.name, disk.serial) {
            ratelimited!(pr_warn!(
                "{}: busy: the disk that had this name before is still mounted or in use by the kernel\n",
                disk.name.as_str()
            ));
            return Err(EBUSY);
        }
        Ok(())
    }

    fn release(disk: ArcBorrow<'_, Self>) {
        if disk.notify_on_release.load(Relaxed) != 0 {
            disk.events.set(Event::Released);
        }
    }

    fn ioctl(disk: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<i32> {
        match cmd {
            CDROM_MULTISESSION => {
                let user = UserSlice::new(UserPtr::from_addr(arg), MULTISESSION_BYTES);
                user.writer().write_slice(&[0; MULTISESSION_BYTES])?;
                Ok(0)
            }
            CDROM_GET_CAPABILITY if disk.cdrom => Ok(0),
            CDROM_GET_CAPABILITY => Err(EINVAL),
            _ => Err(ENOTTY),
        }
    }

    fn getgeo(_disk: ArcBorrow<'_, Self>, capacity: u64) -> Result<Geometry> {
        let cylinder = u64::from(HEADS).wrapping_mul(SECTORS_PER_TRACK.into());
        let cylinders = capacity.checked_div(cylinder).unwrap_or(0);
        Ok(Geometry {
            heads: HEADS,
            sectors: SECTORS_PER_TRACK,
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
        })
    }
}
