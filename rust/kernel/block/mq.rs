// SPDX-License-Identifier: GPL-2.0-only

//! Disks on the multi-queue block layer.
//!
//! A driver
//!
//! - implements [`Operations`] for a type `T`,
//! - creates a [`TagSet<T>`]: the hardware queues and how many requests each may have in flight,
//! - describes the disk with a [`GenDiskBuilder`] and its [`QueueLimits`],
//! - builds the [`GenDisk<T>`] and adds it to the system.
//!
//! # Requests
//!
//! A [`Request<T, S>`] is *owned*. Its state `S` says what may be done with it:
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
//! There is no second handle and no reference count, so a request cannot be ended twice, and not
//! used after it has ended. What is lost is ended with an error: dropping a request is
//! `end(BlkStatus::IOERR)`.
//!
//! A driver that has a request in flight keeps the owned `Request<T, InFlight>` in a table of its
//! own, under whatever id it gave to the device, and takes it out when the device answers. There is
//! no way from a tag back to a request; an answer for a request that the table does not have finds
//! nothing.
//!
//! Time-outs ([`Operations::timed_out`]) give the [`RequestId`] only. The request may be completing
//! on another CPU at the same moment; what to do is up to the driver, who looks it up in its table,
//! under its lock.
//!
//! # Lifetime
//!
//! A request in flight holds its disk's queue; removal of the disk waits for it. So a driver ends
//! what is in flight before it drops the [`GenDisk`], or else the drop waits.

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
