// SPDX-License-Identifier: GPL-2.0-only

//! The completion path: from responses in the ring to finished requests.
//!
//! The event handler takes all responses of the ring. It copies each one once, and compares it with
//! the [`shadow`](crate::shadow) table. Requests end in batches, without the lock, after their
//! grants have ended. Data of a bounced read is copied by the handler if it is small, because
//! completing the request elsewhere would cost more. Otherwise blk-mq completes the request: in the
//! handler if there are several hardware queues and the handler's CPU is the one that submitted it
//! or shares a cache with it; if not, in a softirq, usually on the CPU that submitted it.
//!
//! In `xen-blkfront.c`, `blkif_interrupt()` and `blkif_completion()` have this role.

use core::mem;

use kernel::prelude::*;

use kernel_ext::{
    base::fmt::AsKernelDisplay,
    block::mq::{
        self,
        BlkStatus,
        Completed,
        EndBatch,
        Op,
        Request, //
    },
    ratelimited,
    xen::{
        events::{
            Eoi,
            Handler, //
        },
        grant::GrantedPage, //
    },
};

use blkif::{
    ring::RingError,
    wire::{
        Response,
        Status, //
    },
};

use crate::{
    pending_request::PendingRequest,
    queue::{
        Inner,
        Queue,
        QueueState, //
    },
    request_data::{
        BlkfrontOps,
        InFlightRequest, //
    },
    shadow::ShadowCompletion,
    wakeup::WakeReason, //
};

/// Number of requests that are completed at once.
const BATCH: usize = 16;

/// Number of pages up to which the data of a read is copied by the event handler.
const MAX_INLINE_COPY: usize = 2;

/// A request whose responses have all arrived.
///
/// If data is bounced, nearly all requests are plain; they have a variant of their own because a
/// [`PendingRequest`] is expensive to move.
enum CompletedRequest {
    /// A [plain](PendingRequest::is_plain) request.
    Plain(InFlightRequest),
    /// Any other request.
    Other(PendingRequest),
}

/// Completed requests that end together.
struct CompletedBatch {
    /// The plain requests, in front of the first `None`.
    plain: [Option<InFlightRequest>; BATCH],
    others: Others,
    /// Number of responses that were taken from the ring for the batch.
    responses: u32,
}

/// The requests of a batch that are not plain.
///
/// If data is bounced, few batches have any, so the array is created for the first of them:
/// initialising it costs a third of what completing a plain request does.
struct Others {
    requests: Option<[Option<PendingRequest>; BATCH]>,
    len: usize,
}

/// Reason why no more responses were taken.
enum FillResult {
    /// The batch is full, or a response has just arrived.
    More,
    /// The ring has no response, and the backend will send an event for the next one.
    Empty,
    /// The backend violated the protocol.
    Broken,
}

/// A protocol violation of the backend, which has been reported.
struct ProtocolViolation;

impl Others {
    /// Adds a request.
    ///
    /// Returns `true` if there is no room for another one.
    #[inline]
    fn push(&mut self, pending: PendingRequest) -> bool {
        if self.requests.is_none() {
            self.requests = Some([const { None }; BATCH]);
        }
        let place = self.requests.as_mut();
        if let Some(place) = place.and_then(|requests| requests.get_mut(self.len)) {
            *place = Some(pending);
        }
        self.len = self.len.wrapping_add(1);
        self.len >= BATCH
    }

    /// Iterates over the requests.
    #[inline]
    fn iter_mut(&mut self) -> impl Iterator<Item = &mut PendingRequest> {
        self.requests.iter_mut().flatten().map_while(Option::as_mut)
    }

    /// Takes the requests out.
    #[inline]
    fn drain(&mut self) -> impl Iterator<Item = PendingRequest> + '_ {
        self.len = 0;
        self.requests.iter_mut().flatten().map_while(Option::take)
    }
}

impl CompletedBatch {
    /// Creates an empty batch.
    #[inline]
    fn new() -> Self {
        Self {
            plain: [const { None }; BATCH],
            others: Others {
                requests: None,
                len: 0,
            },
            responses: 0,
        }
    }

    /// Takes responses until the batch is full or the ring is empty.
    #[inline]
    fn fill(&mut self, queue: &Queue, inner: &mut Inner) -> FillResult {
        if inner.broken {
            return FillResult::Broken;
        }
        for place in &mut self.plain {
            loop {
                let response = match queue.next_response(inner) {
                    Ok(Some(response)) => response,
                    Ok(None) => return inner.check_for_responses(),
                    Err(ProtocolViolation) => return queue.set_broken(inner),
                };
                self.responses = self.responses.wrapping_add(1);
                match queue.complete(inner, &response) {
                    Ok(None) => {}
                    Ok(Some(CompletedRequest::Plain(rq))) => {
                        *place = Some(rq);
                        break;
                    }
                    Ok(Some(CompletedRequest::Other(pending))) => {
                        if self.others.push(pending) {
                            return FillResult::More;
                        }
                    }
                    Err(ProtocolViolation) => return queue.set_broken(inner),
                }
            }
        }
        FillResult::More
    }

    /// Iterates over the plain requests.
    #[inline]
    fn plain_mut(&mut self) -> impl Iterator<Item = &mut InFlightRequest> {
        self.plain.iter_mut().map_while(Option::as_mut)
    }
}

impl Handler for Queue {
    fn handle(&self) -> Eoi {
        let mut spurious = true;
        let mut batch = CompletedBatch::new();
        let eoi = loop {
            let result = batch.fill(self, &mut self.inner.lock());
            spurious &= batch.responses == 0;
            self.finish_all(&mut batch);
            match result {
                FillResult::More => {}
                FillResult::Empty if spurious => break Eoi::Spurious,
                FillResult::Empty => break Eoi::Done,
                FillResult::Broken => break Eoi::Later,
            }
        };
        // `finish_all` has emptied the batch; dropping it would only check each place again.
        mem::forget(batch);
        eoi
    }
}

impl Inner {
    /// Asks the backend for an event when the next response arrives, unless a response is there
    /// already. Returns [`FillResult::More`] in that case.
    #[inline]
    fn check_for_responses(&mut self) -> FillResult {
        let ring_channel = self.ring_channel.as_mut();
        if ring_channel.is_some_and(|ring_channel| ring_channel.ring.final_check(1)) {
            FillResult::More
        } else {
            FillResult::Empty
        }
    }

    /// Returns the pages of a plain request to the pool, except those from which data is copied
    /// later.
    #[inline]
    fn recycle_pages(&mut self, rq: &mut InFlightRequest) {
        let deferred = defers_copy(rq);
        let data = rq.data_mut();
        data.stalled = false;
        self.pool.put(&mut data.indirect_pages);
        if !deferred {
            self.pool.put(&mut data.bounce_pages);
        }
    }

    /// Returns pages of a completed request that is not plain to the pool.
    ///
    /// No page is still needed: a bounced read that has succeeded is plain.
    #[inline]
    fn recycle_pages_of_other(&mut self, pending: &mut PendingRequest) {
        let data = pending.issued.data_mut();
        data.stalled = false;
        self.pool.put(&mut data.indirect_pages);
        self.pool.put(&mut data.bounce_pages);
    }

    /// Returns pages to the pool if they belong to the current connection.
    fn return_pages(&mut self, generation: u32, pages: &mut KVec<GrantedPage>) {
        match self.state {
            QueueState::Connected(config) if config.generation == generation => {
                self.pool.put(pages)
            }
            _ => self.stash_pages(pages),
        }
    }
}

impl Queue {
    /// Takes responses without an event.
    ///
    /// A backend can still respond after the domain was saved. When the domain is restored, these
    /// responses are in the ring and must not be taken, because the requests are issued again. So
    /// this checks the event channel under the lock: the domain cannot be saved while interrupts
    /// are disabled.
    ///
    /// Context: process; the device is locked, so that the connection is not replaced before the
    /// pages of the requests are returned to its pool.
    pub(crate) fn poll(&self) {
        let mut batch = CompletedBatch::new();
        loop {
            let result = {
                let mut inner = self.inner.lock();
                if !inner.is_open() {
                    return;
                }
                batch.fill(self, &mut inner)
            };
            self.finish_all(&mut batch);
            if !matches!(result, FillResult::More) {
                return;
            }
        }
    }

    /// Takes the next response of the ring, if there is one.
    #[inline]
    fn next_response(&self, inner: &mut Inner) -> Result<Option<Response>, ProtocolViolation> {
        let Some(ring_channel) = &mut inner.ring_channel else {
            return Ok(None);
        };
        ring_channel.ring.take_response().map_err(|error| {
            self.report_broken_ring(error);
            ProtocolViolation
        })
    }

    /// Applies a response to its request.
    ///
    /// Returns the request if it is complete.
    #[inline]
    fn complete(
        &self,
        inner: &mut Inner,
        response: &Response,
    ) -> Result<Option<CompletedRequest>, ProtocolViolation> {
        match inner.shadow.apply_response(response) {
            Ok(ShadowCompletion::Plain(rq)) => Ok(Some(CompletedRequest::Plain(rq))),
            Ok(ShadowCompletion::Incomplete) => Ok(None),
            Ok(ShadowCompletion::Other(first)) => {
                Ok(self.take_other(inner, first).map(CompletedRequest::Other))
            }
            Err(_) => {
                self.report_unknown_response(response);
                Err(ProtocolViolation)
            }
        }
    }

    /// Takes a complete request, unless the data that it has written has to be flushed first.
    #[inline]
    fn take_other(&self, inner: &mut Inner, first: u16) -> Option<PendingRequest> {
        let pending = inner.shadow.take(first)?;
        if pending.needs_flush() {
            return self.flush_written(inner, pending);
        }
        Some(pending)
    }

    /// Ends the requests of a batch, and empties it.
    fn finish_all(&self, batch: &mut CompletedBatch) {
        batch.plain_mut().for_each(copy_inline);
        let notifier = {
            let mut inner = self.inner.lock();
            for rq in batch.plain_mut() {
                inner.recycle_pages(rq);
            }
            for pending in batch.others.iter_mut() {
                inner.recycle_pages_of_other(pending);
            }
            inner.publish_flushes()
        };
        if let Some(notifier) = notifier {
            notifier.notify();
        }
        let mut end_batch = EndBatch::new();
        for rq in batch.plain.iter_mut().map_while(Option::take) {
            self.end(rq, BlkStatus::OK, &mut end_batch);
        }
        for pending in batch.others.drain() {
            self.finish(pending, &mut end_batch);
        }
        batch.responses = 0;
    }

    /// Ends the grants of a completed request, and the request.
    fn finish(&self, pending: PendingRequest, end_batch: &mut EndBatch) {
        let status = pending.blk_status();
        let rejected = pending.status == Status::NotSupported;
        match pending.end_grants() {
            Ok(rq) => {
                if rejected {
                    self.operation_rejected(rq.op());
                }
                self.end(rq, status, end_batch);
            }
            Err(pending) => self.report_kept_pages(pending),
        }
    }

    /// Ends a request, or has blk-mq complete it if its data has not been copied.
    #[inline]
    fn end(&self, rq: InFlightRequest, status: BlkStatus, end_batch: &mut EndBatch) {
        if status.is_ok() && defers_copy(&rq) {
            rq.complete();
        } else {
            end_batch.end(rq, status);
        }
    }

    /// Copies the data of a bounced read, and ends the request.
    ///
    /// Context: any.
    pub(crate) fn complete_read(&self, mut rq: Request<BlkfrontOps, Completed>) {
        copy_read(&mut rq);
        let data = rq.data_mut();
        let generation = data.generation;
        let mut inner = self.inner.lock();
        inner.return_pages(generation, &mut data.bounce_pages);
        drop(inner);
        rq.end(BlkStatus::OK);
    }

    /// Handles the rejection of an operation whose feature the backend has offered.
    ///
    /// Flushes stay enabled and fail each time: if they were disabled, the block layer would report
    /// success for flushes that data may depend on.
    fn operation_rejected(&self, op: Op) {
        match op {
            Op::Flush => {
                let name = self.name.as_str();
                ratelimited!(pr_err!(
                    "{name}: the backend has rejected a flush: data may be lost\n"
                ));
            }
            Op::Discard | Op::SecureErase => self.wakeup.set(WakeReason::NoDiscard),
            Op::Read | Op::Write | Op::WriteZeroes | Op::Other(_) => {}
        }
    }

    /// Marks the ring broken, and makes the device worker remove the disk.
    #[cold]
    fn set_broken(&self, inner: &mut Inner) -> FillResult {
        inner.broken = true;
        self.wakeup.set(WakeReason::Failed);
        FillResult::Broken
    }

    /// Reports a response that belongs to no request.
    #[cold]
    fn report_unknown_response(&self, response: &Response) {
        let name = self.name.as_str();
        let Response { id, operation, .. } = *response;
        ratelimited!(pr_err!(
            "{name}: unexpected response: id {id:#x}, operation {operation}: removing the disk\n"
        ));
    }

    /// Reports an index of the ring that is out of range.
    #[cold]
    fn report_broken_ring(&self, error: RingError) {
        let name = self.name.as_str();
        let error = AsKernelDisplay(error);
        ratelimited!(pr_err!(
            "{name}: the backend has broken the ring: {error}: removing the disk\n"
        ));
    }

    /// Reports that the backend has responded to a request while it still has pages of the request
    /// mapped, and makes the device worker remove the disk.
    #[cold]
    fn report_kept_pages(&self, pending: PendingRequest) {
        let name = self.name.as_str();
        ratelimited!(pr_err!(
            "{name}: the backend still has the pages of a completed request mapped: removing the disk\n"
        ));
        let rejected = {
            let mut inner = self.inner.lock();
            inner.broken = true;
            inner.completed_granted.push_within_capacity(pending)
        };
        // The list has room for all slots. Without room, the request would never end, and its pages
        // would never be reused.
        drop(rejected);
        self.wakeup.set(WakeReason::Failed);
    }
}

/// Copies the data of a small read.
#[inline]
fn copy_inline(rq: &mut InFlightRequest) {
    if rq.op() == Op::Read && !defers_copy(rq) {
        copy_read(rq);
    }
}

/// Copies the data of a read from the bounce pages to the pages of the request.
#[inline]
fn copy_read<S: mq::State>(rq: &mut Request<BlkfrontOps, S>) {
    let (segments, data) = rq.segments_mut_and_data();
    for (segment, page) in segments.zip(&data.bounce_pages) {
        if let Some(from) = page.slice(segment.offset(), segment.len()) {
            segment.copy_from(from);
        }
    }
}

/// Returns `true` if the data of a request is copied by [`Queue::complete_read`].
#[inline]
fn defers_copy(rq: &InFlightRequest) -> bool {
    rq.op() == Op::Read && rq.data().bounce_pages.len() > MAX_INLINE_COPY
}
