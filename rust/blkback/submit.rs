// SPDX-License-Identifier: GPL-2.0-only

//! Submission: from requests in the ring to I/O in flight (`do_block_io_op()`,
//! `dispatch_rw_block_io()`).
//!
//! [`Queue::start_requests`] takes requests from the ring. Each is checked
//! ([`Queue::handle_request`]), gets a [`PendingReq`] with segments and pages ([`Queue::prepare`]),
//! and is submitted, after a copy if it is a small write ([`Queue::issue`]). A barrier waits for
//! all queues first.

use kernel::prelude::*;

use kernel_ext::{
    block::bio::{
        self,
        Operation, //
    },
    ratelimited, //
};

use blkif::{
    request::{
        self,
        Data,
        DiskLimits,
        Extent,
        Request, //
    },
    wire::{
        op,
        RwRequest,
        Status,
        WireRequest,
        WireSegment,
        DIRECT_SEGMENTS, //
    },
};

use crate::{
    data_path::DataError,
    disk::Disk,
    domain,
    pending_req::{
        is_grant_copied,
        PendingReq,
        ReqContext,
        ReqOp, //
    },
    queue::{
        BarrierState,
        Queue, //
    },
    reports::RingStatus, //
};

/// Initial content of the buffer for requests.
///
/// It is a read because the buffer is cleared only when the kind of request changes, and nearly all
/// requests are reads and writes.
const READ_WITHOUT_DATA: WireRequest = WireRequest::Rw(RwRequest {
    operation: op::READ,
    nr_segments: 0,
    handle: 0,
    id: 0,
    sector: 0,
    segments: [WireSegment::EMPTY; DIRECT_SEGMENTS],
});

impl Queue {
    /// Takes and starts the requests that can be started now, at most a full ring.
    ///
    /// Returns `true` if a request was taken, or if the deferred one was started.
    pub(crate) fn start_requests(&mut self, stopping: bool) -> bool {
        let limits = self.disk.limits();
        let took = bio::with_plug(|| {
            let took = self.take_requests(stopping, &limits);
            self.copy_writes();
            took
        });
        self.advance_barrier();
        took
    }

    /// Starts the deferred request, and takes and starts the requests in the ring, until one is
    /// deferred.
    ///
    /// Takes no more than fit into the ring, because a frontend that reuses the slots of refused
    /// requests could otherwise keep the thread here.
    ///
    /// Returns `true` if a request was taken, or if the deferred one was started.
    fn take_requests(&mut self, stopping: bool, limits: &DiskLimits) -> bool {
        let mut took = false;
        if let Some(wire) = self.deferred.take() {
            if !self.handle_request(&wire, limits) {
                return false;
            }
            self.retries.reset();
            took = true;
        }
        // One buffer is reused for all requests, because a request is large.
        let mut wire = READ_WITHOUT_DATA;
        let mut left = self.ring.as_ref().map_or(0, |ring| ring.capacity());
        while left != 0 && self.accepts_requests(stopping) {
            left = left.wrapping_sub(1);
            let Some(ring) = self.ring.as_mut() else {
                break;
            };
            match ring.take_request_to(&mut wire) {
                Ok(true) => {
                    took = true;
                    if !self.handle_request(&wire, limits) {
                        self.counters.out_of_memory.add(1);
                        break;
                    }
                }
                Ok(false) => break,
                Err(error) => self.ring_status = RingStatus::Broken(error),
            }
        }
        took
    }

    /// Checks a request and starts it.
    ///
    /// Returns `false` if it is deferred.
    fn handle_request(&mut self, wire: &WireRequest, limits: &DiskLimits) -> bool {
        match request::check(wire, limits) {
            Ok(request) => self.dispatch(wire, request, limits),
            Err(refusal) => {
                let name = &*self.name;
                ratelimited!(dev_warn!(
                    self.xbdev.as_ref(),
                    "{name}: the frontend has sent an invalid request: {}\n",
                    format_args!("{refusal}")
                ));
                self.make_response(wire.response(refusal.status()));
                true
            }
        }
    }

    /// Starts a request that is valid.
    ///
    /// Returns `false` if it is deferred.
    fn dispatch(&mut self, wire: &WireRequest, request: Request<'_>, limits: &DiskLimits) -> bool {
        let Some(mut req) = self.pool.alloc(request.segments()) else {
            return self.defer(wire);
        };
        let mut prepared = self.prepare(&mut req, wire, request, limits);
        if prepared
            .as_ref()
            .is_err_and(|error| self.reclaim_pages(error))
        {
            prepared = self.prepare(&mut req, wire, request, limits);
        }
        match prepared {
            Ok(()) => self.issue(req),
            Err(error) if error.is_shortage() => {
                self.pool.free(req);
                self.report_shortage(&error);
                return self.defer(wire);
            }
            Err(error) => {
                let name = &*self.name;
                ratelimited!(dev_warn!(
                    self.xbdev.as_ref(),
                    "{name}: a request has failed: {error}\n"
                ));
                self.pool.free(req);
                self.make_response(wire.response(error.status()));
            }
        }
        true
    }

    /// Unmaps persistent grants that are not in use, if a request lacks pages.
    ///
    /// Logs that Xen allows no more mappings, even if the next attempt succeeds: other disks have
    /// lost their persistent grants.
    ///
    /// Returns `true` if the request may be tried again at once.
    fn reclaim_pages(&mut self, error: &DataError) -> bool {
        if error.lacks_mappings() {
            let name = &*self.name;
            ratelimited!(dev_warn!(self.xbdev.as_ref(), "{name}: {error}\n"));
            domain::reclaim_mappings();
        } else if self.in_flight != 0 || !error.is_shortage() {
            return false;
        }
        self.data_path.unmap_all_cached()
    }

    /// Logs why a request waits, unless it only waits for another request of the queue.
    ///
    /// `reclaim_pages` has logged that Xen allows no more mappings.
    fn report_shortage(&self, error: &DataError) {
        if self.in_flight == 0 && !error.lacks_mappings() {
            let name = &*self.name;
            ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "{name}: a request waits for memory or mappings: {error}\n"
            ));
        }
    }

    /// Stores a request, which is tried again when memory or mappings may be available.
    ///
    /// Returns `false`.
    fn defer(&mut self, wire: &WireRequest) -> bool {
        self.deferred = Some(*wire);
        false
    }

    /// Sets up a pending request: operation, segments, pages.
    fn prepare(
        &mut self,
        req: &mut PendingReq,
        wire: &WireRequest,
        request: Request<'_>,
        limits: &DiskLimits,
    ) -> Result<(), DataError> {
        let (op, data) = operation(request);
        req.context.set_up(op, wire.response(Status::Okay));
        let extent = match data {
            None => None,
            Some(data) => Some(self.add_segments(&mut req.context, data, limits)?),
        };
        req.context.set_extent(extent);
        self.data_path.attach_pages(req)
    }

    /// Adds the segments of a request.
    ///
    /// Those of an indirect request are fetched from the frontend.
    #[inline]
    fn add_segments(
        &mut self,
        ctx: &mut ReqContext,
        data: Data<'_>,
        limits: &DiskLimits,
    ) -> Result<Extent, DataError> {
        match data {
            Data::Direct(direct) => {
                for segment in direct.segments() {
                    ctx.segments
                        .push_within_capacity(segment)
                        .map_err(|_| ENOMEM)?;
                }
                Ok(direct.extent())
            }
            Data::Indirect(unfetched) => {
                self.data_path.fetch(&unfetched, limits, &mut ctx.segments)
            }
        }
    }

    /// Submits a prepared request, or adds it to the writes to be copied, or makes it the queue's
    /// barrier.
    fn issue(&mut self, req: KBox<PendingReq>) {
        self.count(&req);
        if req.context.op == ReqOp::Barrier {
            self.barrier = BarrierState::Waiting(req);
            self.gate.request_run(false);
            return;
        }
        self.in_flight = self.in_flight.wrapping_add(1);
        if req.context.op == ReqOp::Write && is_grant_copied(&req) {
            if self.writes.push(req) {
                self.copy_writes();
            }
        } else {
            self.submit(req);
        }
    }

    /// Copies the data of writes from the frontend, and submits them.
    fn copy_writes(&mut self) {
        if self.writes.is_empty() {
            return;
        }
        let mut writes = self.writes.take();
        self.data_path.copy(&self.name, &mut writes);
        while let Some(req) = writes.pop() {
            if req.context.result.is_ok() {
                self.submit(req);
            } else {
                self.handoff.complete(req);
            }
        }
    }

    /// Counts a request for the statistics.
    fn count(&self, req: &PendingReq) {
        let counters = &self.counters;
        let sectors = req.context.sectors;
        match req.context.op {
            ReqOp::Read => {
                counters.reads.add(1);
                counters.sectors_read.add(sectors);
            }
            ReqOp::Write => {
                counters.writes.add(1);
                counters.sectors_written.add(sectors);
            }
            ReqOp::Flush | ReqOp::Barrier => {
                counters.flushes.add(1);
                counters.sectors_written.add(sectors);
            }
            ReqOp::Discard { .. } => counters.discards.add(1),
        }
    }

    /// Submits the barrier if all earlier requests have completed, or marks the queue as drained
    /// for the barrier of another queue.
    fn advance_barrier(&mut self) {
        let idle = self.in_flight == 0 && self.deferred.is_none();
        match core::mem::replace(&mut self.barrier, BarrierState::None) {
            BarrierState::None if idle && self.gate.is_closed() => self.gate.set_drained(),
            BarrierState::Waiting(req) if self.gate.request_run(idle) => {
                self.barrier = BarrierState::Running;
                self.in_flight = self.in_flight.wrapping_add(1);
                self.submit(req);
            }
            other => self.barrier = other,
        }
    }

    /// Submits a request to the disk, or the next piece of a discard.
    pub(crate) fn submit(&mut self, mut req: KBox<PendingReq>) {
        let (operation, sector) = next_bio(&self.disk, &mut req);
        if let Err((error, mut req)) = bio::submit(&self.disk.bdev, operation, sector, req) {
            req.context.result = Err(error);
            self.handoff.complete(req);
        }
    }
}

/// Returns the operation of a request, and its data if it has any.
#[inline]
fn operation(request: Request<'_>) -> (ReqOp, Option<Data<'_>>) {
    match request {
        Request::Read(data) => (ReqOp::Read, Some(data)),
        Request::Write(data) => (ReqOp::Write, Some(data)),
        Request::Flush => (ReqOp::Flush, None),
        Request::Barrier(data) => (ReqOp::Barrier, data.map(Data::Direct)),
        Request::Discard { extent, secure } => {
            let op = ReqOp::Discard {
                sector: extent.sector(),
                left: extent.sectors(),
                secure,
            };
            (op, None)
        }
    }
}

/// Returns the next operation of a request and its first sector.
fn next_bio(disk: &Disk, req: &mut PendingReq) -> (Operation, u64) {
    let ctx = &mut req.context;
    match ctx.op {
        ReqOp::Read => (Operation::Read, ctx.sector),
        ReqOp::Write => (Operation::Write, ctx.sector),
        ReqOp::Flush => (Operation::Flush, 0),
        ReqOp::Barrier if ctx.segments.is_empty() => (Operation::Flush, 0),
        ReqOp::Barrier => (Operation::FlushWrite, ctx.sector),
        ReqOp::Discard {
            sector,
            left,
            secure,
        } => {
            let piece = disk.discard_piece(sector, left);
            ctx.op = ReqOp::Discard {
                sector: sector.wrapping_add(piece),
                left: left.wrapping_sub(piece),
                secure,
            };
            // A piece that is too long is rejected by `bio::submit`.
            let sectors = u32::try_from(piece).unwrap_or(u32::MAX);
            let operation = if secure {
                Operation::SecureErase(sectors)
            } else {
                Operation::Discard(sectors)
            };
            (operation, sector)
        }
    }
}
