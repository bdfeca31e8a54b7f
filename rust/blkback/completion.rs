// SPDX-License-Identifier: GPL-2.0-only

//! Completion: from completed I/O to responses in the ring (`end_block_io_op()`,
//! `make_response()`).
//!
//! [`Queue::complete_all`] runs in the queue thread. Most requests get their response before that,
//! where their I/O completes, see [`handoff`](crate::handoff).

use kernel::prelude::*;

use blkif::wire::Response;

use crate::{
    data_path::CopyBatch,
    pending_req::{
        needs_copy_out,
        PendingReq,
        ReqList,
        ReqOp, //
    },
    queue::{
        BarrierState,
        Queue, //
    },
};

impl Queue {
    /// Completes all requests whose I/O has completed.
    ///
    /// Returns `true` if there were any.
    pub(crate) fn complete_all(&mut self) -> bool {
        let mut any = false;
        let mut busy = self.busy.take();
        while let Some(req) = busy.pop() {
            any |= self.complete(req);
        }
        let mut completed = self.handoff.take_completed();
        let mut reads = CopyBatch::new();
        while let Some(req) = completed.pop() {
            if req.context.has_more() {
                self.submit(req);
            } else if needs_copy_out(&req) {
                if reads.push(req) {
                    any |= self.copy_reads(reads.take());
                }
            } else {
                any |= self.complete(req);
            }
        }
        self.copy_reads(reads.take()) || any
    }

    /// Copies the data of reads to the frontend, and completes them.
    ///
    /// Returns `true` if there were any.
    fn copy_reads(&mut self, mut reads: ReqList) -> bool {
        if reads.is_empty() {
            return false;
        }
        self.data_path.copy(&self.name, &mut reads);
        while let Some(req) = reads.pop() {
            self.complete(req);
        }
        true
    }

    /// Releases the pages of a request, and responds to it.
    ///
    /// Returns `false` if its pages are busy, so that it has to wait.
    pub(crate) fn complete(&mut self, mut req: KBox<PendingReq>) -> bool {
        if !self.data_path.put_pages(&mut req) {
            self.busy.push(req);
            return false;
        }
        self.in_flight = self.in_flight.wrapping_sub(1);
        if req.context.responded {
            self.pool.free(req);
            return true;
        }
        if req.context.op == ReqOp::Barrier {
            self.barrier = BarrierState::None;
            self.gate.open();
        }
        if let Some(node) = req.context.rejected_feature() {
            self.rejected.add(node);
        }
        self.make_response(req.context.final_response());
        self.pool.free(req);
        true
    }

    /// Writes a response, which the frontend sees after [`Queue::push_responses`].
    pub(crate) fn make_response(&mut self, response: Response) {
        // Each request that was taken gets one response, so there is a slot.
        let _ = self.ring.as_mut().map(|ring| ring.put(&response));
    }

    /// Unmaps the pages of completed requests, publishes the responses, and notifies the frontend
    /// if it waits for them.
    pub(crate) fn push_responses(&mut self) {
        self.data_path.unmap_queued();
        if self.ring.as_mut().is_some_and(|ring| ring.publish()) {
            self.channel.notify();
        }
    }
}
