// SPDX-License-Identifier: GPL-2.0-only

//! Disks on the multi-queue block layer.
//!
//! To implement a block device driver, a module must do the following:
//!
//! - Implement [`Operations`] for a type `T`. Only [`Operations::queue_rq`] and
//!   [`Operations::complete`] are called for each request; neither may sleep.
//! - Create a [`TagSet<T>`]: the hardware queues, and the number of requests that can be in flight
//!   in each.
//! - Describe the disk with a [`GenDiskBuilder`] and its [`QueueLimits`].
//! - Build the [`GenDisk<T>`], and add it to the system with [`GenDisk::add`].
//! - End each request that it has started, and only then drop the [`GenDisk`].
//!
//! The types with direct C counterparts are:
//!
//! | type | C |
//! |---|---|
//! | [`Operations`] | `struct blk_mq_ops` and `struct block_device_operations` |
//! | [`TagSet`], [`TagSetParams`] | `struct blk_mq_tag_set` |
//! | [`GenDisk`] | `struct gendisk` and its `struct request_queue` |
//! | [`QueueLimits`], [`Feature`] | `struct queue_limits`, `BLK_FEAT_*` |
//! | [`HwQueue`] | `struct blk_mq_hw_ctx` |
//! | [`Request`], [`Op`] | `struct request`, `REQ_OP_*` |
//! | [`RequestList`], [`EndBatch`] | `struct rq_list`, `struct io_comp_batch` |
//! | [`BlkStatus`] | `blk_status_t` |
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)
//!
//! # Examples
//!
//! A disk that completes each request at once, in `queue_rq`:
//!
//! ```ignore
//! #[vtable]
//! impl Operations for Null {
//!     type RequestData = ();
//!     type QueueData = ();
//!     type HwQueueData = ();
//!
//!     fn new_request_data(_hw_queue: u32) -> Result {
//!         Ok(())
//!     }
//!
//!     fn new_hw_queue_data(_queue_data: ArcBorrow<'_, ()>, _hw_queue: u32) -> Result {
//!         Ok(())
//!     }
//!
//!     fn queue_rq<'q>(
//!         _hw_queue: HwQueue<'q, Self>,
//!         rq: Request<Self, Queued<'q>>,
//!         _last: bool,
//!     ) -> Result<(), Rejected<'q, Self>> {
//!         rq.start().end(BlkStatus::OK);
//!         Ok(())
//!     }
//!
//!     fn complete(rq: Request<Self, Completed>) {
//!         rq.end(BlkStatus::OK);
//!     }
//! }
//!
//! /// Creates the disk `/dev/null0` of 1 MiB.
//! fn create() -> Result<GenDisk<Null>> {
//!     let tag_set = Arc::pin_init(
//!         TagSet::new(TagSetParams {
//!             nr_hw_queues: 1,
//!             queue_depth: 256,
//!             timeout: msecs_to_jiffies(30_000),
//!             no_scheduler: true,
//!         }),
//!         GFP_KERNEL,
//!     )?;
//!     let disk = GenDiskBuilder::new(QueueLimits::new())
//!         .capacity((1 << 20) / u64::from(SECTOR_SIZE))
//!         .build(fmt!("null0"), tag_set, Arc::new((), GFP_KERNEL)?)?;
//!     disk.add(None)?;
//!     Ok(disk)
//! }
//! ```
//!
//! The data of a request is in its segments. This completes a read with data from memory:
//!
//! ```ignore
//! fn complete_read(mut rq: Request<Null, InFlight>, mut data: &[u8]) {
//!     for segment in rq.segments_mut() {
//!         let len = segment.write(data);
//!         data = data.get(len..).unwrap_or_default();
//!     }
//!     rq.end(BlkStatus::OK);
//! }
//! ```
//!
//! # Requests
//!
//! A [`Request<T, S>`] is *owned*. Its state `S` determines the functions that it has:
//!
//! ```text
//!   blk-mq --queue_rq--> Request<T, Queued<'q>> --start--> Request<T, InFlight> --end--> blk-mq
//!             ^                |         |                   |    |      ^
//!             |             reject      end              requeue  |      |
//!             +----------------+         |                   |  complete |
//!             |                          v                   |    v      |
//!             |                        blk-mq                |  Request<T, Completed>
//!             +----------------------------------------------+
//! ```
//!
//! There is no second handle and no reference count, so a request cannot be ended twice, nor used
//! after it has ended. Dropping a request ends it with `BlkStatus::IOERR`, so no request is lost.
//!
//! A driver stores a request in flight, the owned `Request<T, InFlight>`, in a table, under the id
//! that it has sent to the device, and takes it out when the device responds. A request cannot be
//! looked up by its tag; a response with an id that is not in the table has no effect.
//!
//! Timeouts ([`Operations::timed_out`]) have only the [`RequestId`]. The request may be completing
//! on another CPU at the same moment, so the driver looks it up in its table, under its lock.
//!
//! # Lifetime
//!
//! A request in flight holds its disk's queue, and removal of the disk waits for it. So a driver
//! ends all requests in flight before it drops the [`GenDisk`]; otherwise the drop waits.

mod batch;
mod gen_disk;
mod hw_queue;
mod limits;
mod list;
mod operations;
mod request;
mod status;
mod tag_set;

pub use self::{
    batch::EndBatch,
    gen_disk::{
        GenDisk,
        GenDiskBuilder,
        Geometry, //
    },
    hw_queue::HwQueue,
    limits::{
        Feature,
        QueueLimits, //
    },
    list::RequestList,
    operations::{
        OpenMode,
        Operations, //
    },
    request::{
        Completed,
        InFlight,
        Op,
        Queued,
        Rejected,
        Request,
        RequestId,
        Segments,
        State, //
    },
    status::BlkStatus,
    tag_set::{
        TagSet,
        TagSetParams, //
    },
};

/// The unit of capacities and positions, whatever the disk's block size: 512 bytes.
pub const SECTOR_SIZE: u32 = 512;
