// SPDX-License-Identifier: GPL-2.0-only

//! Batches of requests that end together.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use kernel::bindings;

use super::{
    BlkStatus,
    Operations,
    Request,
    State, //
};

/// Requests that end together, which is cheaper: their tags are freed at once, and the time is read
/// once.
///
/// They end when the batch is dropped.
///
/// # Invariants
///
/// The list contains requests that have succeeded, whose ownership the driver has given up.
pub struct EndBatch(bindings::io_comp_batch);

impl EndBatch {
    /// Creates an empty batch.
    pub fn new() -> Self {
        // INVARIANT: The list is empty.
        Self(pin_init::zeroed())
    }

    /// Ends `rq` with the batch, or at once if it cannot be part of a batch.
    #[inline]
    pub fn end<T: Operations, S: State>(&mut self, rq: Request<T, S>, status: BlkStatus) {
        let rq = rq.into_raw().as_ptr();
        // SAFETY: By the invariants of `Request` the driver owned it until now, so it may be put
        // into the batch.
        //
        // INVARIANT: A request with an error is not added.
        let added = unsafe {
            bindings_ext::blk_mq_add_to_batch(
                rq,
                &mut self.0,
                !status.is_ok(),
                Some(bindings::blk_mq_end_request_batch),
            )
        };
        if !added {
            // SAFETY: As above, and the batch did not take it.
            unsafe { bindings::blk_mq_end_request(rq, status.as_raw()) };
        }
    }
}

impl Default for EndBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for EndBatch {
    fn drop(&mut self) {
        if !self.0.req_list.head.is_null() {
            // SAFETY: By the type invariant all requests in the list may be ended as done.
            unsafe { bindings::blk_mq_end_request_batch(&mut self.0) };
        }
    }
}
