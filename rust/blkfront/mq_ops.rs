// SPDX-License-Identifier: GPL-2.0-only

//! The operations of blk-mq: the callbacks from the block layer.
//!
//! In `xen-blkfront.c`, `blkfront_mq_ops` and `xlvbd_block_fops` have this role.

use kernel::{
    error::code::ENOTTY,
    prelude::*,
    sync::ArcBorrow,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

use kernel_ext::{
    block::mq::{
        BlkStatus,
        Completed,
        Geometry,
        HwQueue,
        OpenMode,
        Operations,
        Queued,
        Rejected,
        Request,
        RequestId,
        RequestList, //
    },
    ratelimited, //
};

use crate::{
    disk::Disk,
    registry,
    request_data::{
        BlkfrontOps,
        RequestData, //
    }, //
};

/// `CDROMMULTISESSION`
const CDROM_MULTISESSION: u32 = 0x5310;
/// `CDROM_GET_CAPABILITY`
const CDROM_GET_CAPABILITY: u32 = 0x5331;
/// Size of `struct cdrom_multisession` in bytes.
const MULTISESSION_BYTES: usize = 8;

/// Number of heads in the geometry that is reported to programs.
const HEADS: u8 = 255;
/// Number of sectors per track in the geometry that is reported to programs.
const SECTORS_PER_TRACK: u8 = 63;

#[vtable]
impl Operations for BlkfrontOps {
    type QueueData = Disk;
    type HwQueueData = ();
    type RequestData = RequestData;

    fn new_request_data(_hw_queue: u32) -> Result<RequestData> {
        RequestData::new()
    }

    fn new_hw_queue_data(_disk: ArcBorrow<'_, Disk>, _hw_queue: u32) -> Result {
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
        let mut requests = RequestList::new();
        requests.push(rq);
        match queue.submit(requests, last).pop() {
            None => Ok(()),
            Some(busy) => Err(busy.reject()),
        }
    }

    fn queue_rqs<'q>(
        hw_queue: HwQueue<'q, Self>,
        requests: RequestList<Self, Queued<'q>>,
    ) -> RequestList<Self, Queued<'q>> {
        match hw_queue.queue_data().queue(hw_queue.index()) {
            Some(queue) => queue.submit(requests, true),
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

    fn timed_out(disk: ArcBorrow<'_, Disk>, id: RequestId) {
        if let Some(queue) = disk.queue(id.hw_queue) {
            queue.timed_out(id);
        }
    }

    fn open(disk: ArcBorrow<'_, Disk>, mode: OpenMode) -> Result {
        if mode.exclusive && registry::has_claimed_predecessor(disk.name(), disk.serial()) {
            let name = disk.name();
            let name = name.as_str();
            ratelimited!(pr_warn!(
                "{name}: busy: the disk that had this name before is still mounted or in use by the kernel\n"
            ));
            return Err(EBUSY);
        }
        Ok(())
    }

    fn release(disk: ArcBorrow<'_, Disk>) {
        disk.released();
    }

    fn ioctl(disk: ArcBorrow<'_, Disk>, cmd: u32, arg: usize) -> Result<i32> {
        match cmd {
            CDROM_MULTISESSION => {
                let user = UserSlice::new(UserPtr::from_addr(arg), MULTISESSION_BYTES);
                user.writer().write_slice(&[0; MULTISESSION_BYTES])?;
                Ok(0)
            }
            CDROM_GET_CAPABILITY if disk.is_cdrom() => Ok(0),
            CDROM_GET_CAPABILITY => Err(EINVAL),
            _ => Err(ENOTTY),
        }
    }

    fn getgeo(_disk: ArcBorrow<'_, Disk>, capacity: u64) -> Result<Geometry> {
        let cylinder = u64::from(HEADS).wrapping_mul(SECTORS_PER_TRACK.into());
        let cylinders = capacity.checked_div(cylinder).unwrap_or(0);
        Ok(Geometry {
            heads: HEADS,
            sectors: SECTORS_PER_TRACK,
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
        })
    }
}
