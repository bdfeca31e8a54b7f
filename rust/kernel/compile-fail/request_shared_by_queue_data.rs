// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! Data that several CPUs use at the same time must be `Sync`.

use core::cell::Cell;

use kernel::{
    prelude::*,
    sync::ArcBorrow, //
};

use kernel_ext::block::mq::*;

type LocalModule = Driver;

struct Driver;

#[vtable]
impl Operations for Driver {
    type QueueData = Cell<u32>;
    type HwQueueData = ();
    type RequestData = ();

    fn new_request_data(_: u32) -> Result {
        Ok(())
    }

    fn new_hw_queue_data(_: ArcBorrow<'_, Cell<u32>>, _: u32) -> Result {
        Ok(())
    }

    fn complete(rq: Request<Self, Completed>) {
        rq.end(BlkStatus::OK);
    }

    fn queue_rq<'q>(
        _: HwQueue<'q, Self>,
        rq: Request<Self, Queued<'q>>,
        _: bool,
    ) -> Result<(), Rejected<'q, Self>> {
        Err(rq.reject())
    }
}
