// SPDX-License-Identifier: GPL-2.0-only

//! The path of requests to the backend.
//!
//! Requests that blk-mq queues together are submitted as a batch; a single request is a batch of
//! one. A batch is collected and reserved as a whole. Then each request is prepared, granted and
//! written; small ones are written together at the end. The phases, in the order of the functions
//! below:
//!
//! 1. *Collect*, without a lock: the fragments of the data are stored.
//! 2. *Reserve*, under the lock of the queue: the slots of each request are reserved, and pages are
//!    taken from the pool as long as it has some. The resources that a request needs are computed
//!    here, once, and stored in its [`RequestData`](crate::request_data::RequestData).
//! 3. *Prepare*, without the lock: pages that the pool did not have are allocated, and grant
//!    references are reserved. Data of a bounced write is copied.
//! 4. *Grant*: the request is started, and its own pages are granted unless its data is bounced.
//! 5. *Write to the ring*, under the lock. The backend sees the requests when they are published,
//!    and is notified once for the batch, without the lock.
//!
//! In `xen-blkfront.c`, `blkif_queue_rq()` and `blkif_queue_rw_req()` have this role.

use kernel::prelude::*;

use kernel_ext::{
    base::spinlock_irqsave::SpinLockIrqSaveGuard,
    block::mq::{
        BlkStatus,
        InFlight,
        Op,
        Queued,
        Request,
        RequestList,
        State, //
    },
    ratelimited,
    xen::grant::{
        GrantAccess,
        GrantReserve,
        Granted, //
    },
};

use blkif::{
    negotiate::Flush,
    plan::{
        self,
        Direction,
        Plan,
        SegmentPlacement,
        SlotLimits, //
    },
    resources::is_small,
    wire::{
        op,
        Encode,
        Status, //
    },
};

use crate::{
    pending_request::PendingRequest,
    pool,
    queue::{
        ConnectionConfig,
        Inner,
        Queue,
        QueueState, //
    },
    request_data::{
        BlkfrontOps,
        InFlightRequest,
        IssuedRequest,
        RequestData,
        RequestKind,
        RequestSegments, //
    },
    shortage,
    wakeup::WakeReason, //
};

/// Requests that blk-mq has queued and that were not started.
type QueuedList<'q> = RequestList<BlkfrontOps, Queued<'q>>;

/// Outcome of the attempt to reserve the slots of a request.
enum ReserveOutcome {
    /// The request has its slots.
    Reserved,
    /// There are no slots now.
    Busy,
    /// The request ends with this status, without the backend.
    Ended(BlkStatus),
}

/// A batch of requests on its path to the ring.
struct Batch<'q> {
    /// Requests that have their slots.
    reserved: QueuedList<'q>,
    /// Requests for which there is no room now.
    busy: QueuedList<'q>,
    /// Requests that end without the backend, with the status in their data.
    ended: QueuedList<'q>,
}

/// The shadows of a request that was written to the ring, one for each of its slots.
#[derive(Clone, Copy)]
struct Written {
    /// The first shadow; `None` if a slot could not be written.
    first: Option<u16>,
    /// Number of shadows.
    parts: u16,
}

/// Collects the fragments of the requests.
///
/// Ends requests that cannot be expressed in the protocol.
fn collect<'q>(queue: &Queue, mut requests: QueuedList<'q>) -> QueuedList<'q> {
    let mut collected = RequestList::new();
    while let Some(mut rq) = requests.pop() {
        let Some(kind) = RequestKind::new(rq.op()) else {
            end(rq, BlkStatus::NOTSUPP);
            continue;
        };
        let (segments, data) = rq.segments_and_data();
        data.kind = kind;
        if data.collect_fragments(segments) {
            collected.push(rq);
        } else {
            let name = queue.name.as_str();
            ratelimited!(pr_err!(
                "{name}: a request is too large or not made of whole sectors: failing it\n"
            ));
            end(rq, BlkStatus::IOERR);
        }
    }
    collected
}

/// Ends a request that is not sent to the backend.
///
/// The next request with its tag has not stalled.
fn end<S: State>(mut rq: Request<BlkfrontOps, S>, status: BlkStatus) {
    rq.data_mut().stalled = false;
    rq.end(status);
}

impl Queue {
    /// Submits requests and returns those for which there is no room now.
    ///
    /// If `last`, all requests that were written to the ring are published.
    ///
    /// Context: process or softirq; does not sleep.
    pub(crate) fn submit<'q>(&self, requests: QueuedList<'q>, last: bool) -> QueuedList<'q> {
        let mut batch = Batch {
            reserved: RequestList::new(),
            busy: RequestList::new(),
            ended: RequestList::new(),
        };
        match self.reserve_all(&mut batch, collect(self, requests)) {
            Some(config) => self.issue_all(&mut batch, &config, last),
            None if last => self.commit(),
            None => {}
        }
        while let Some(rq) = batch.ended.pop() {
            let status = rq.data().status;
            end(rq, status);
        }
        batch.busy
    }

    /// Reserves slots for the requests of a batch, and takes pages as long as the pool has some.
    ///
    /// Returns the parameters of the connection if there is one.
    #[inline]
    fn reserve_all<'q>(
        &self,
        batch: &mut Batch<'q>,
        mut requests: QueuedList<'q>,
    ) -> Option<ConnectionConfig> {
        let mut inner = self.inner.lock();
        let config = match inner.state {
            QueueState::Connected(config) => config,
            QueueState::Disconnected => {
                batch.busy = requests;
                return None;
            }
            QueueState::Removed => {
                while let Some(mut rq) = requests.pop() {
                    rq.data_mut().status = BlkStatus::IOERR;
                    batch.ended.push(rq);
                }
                return None;
            }
        };
        while let Some(mut rq) = requests.pop() {
            match self.reserve(&mut inner, &config, rq.data_mut()) {
                ReserveOutcome::Reserved => batch.reserved.push(rq),
                ReserveOutcome::Busy => batch.busy.push(rq),
                ReserveOutcome::Ended(status) => {
                    rq.data_mut().status = status;
                    batch.ended.push(rq);
                }
            }
        }
        Some(config)
    }

    /// Reserves slots for a request, and takes pages as long as the pool has some.
    #[inline(always)]
    fn reserve(
        &self,
        inner: &mut Inner,
        config: &ConnectionConfig,
        data: &mut RequestData,
    ) -> ReserveOutcome {
        let kind = data.kind;
        if let Some(status) = config.complete_locally(kind) {
            return ReserveOutcome::Ended(status);
        }
        let resources = config.resources(data.fragments.len() as u32);
        if !inner.shadow.reserve(resources.slots) {
            return self.no_slots(inner, resources.slots);
        }
        data.resources = resources;
        if data.generation != config.generation {
            // The pages are granted to the backend of an earlier connection.
            data.bounce_pages.clear();
            data.indirect_pages.clear();
            data.generation = config.generation;
        }
        inner.pool.fill(&mut data.bounce_pages, resources.data);
        inner
            .pool
            .fill(&mut data.indirect_pages, resources.indirect);
        ReserveOutcome::Reserved
    }

    /// Returns the outcome for a request whose `slots` slots could not be reserved.
    #[cold]
    fn no_slots(&self, inner: &Inner, slots: usize) -> ReserveOutcome {
        let capacity = inner.shadow.capacity();
        if slots <= capacity {
            return ReserveOutcome::Busy;
        }
        let name = self.name.as_str();
        ratelimited!(pr_err!(
            "{name}: a request needs {slots} slots, and the ring has {capacity}: failing it\n"
        ));
        ReserveOutcome::Ended(BlkStatus::IOERR)
    }

    /// Prepares, starts and writes the requests that have their slots.
    #[inline]
    fn issue_all(&self, batch: &mut Batch<'_>, config: &ConnectionConfig, last: bool) {
        // Requests that need one slot and no grants of their own are written together, with the
        // lock taken once.
        let mut small: RequestList<BlkfrontOps, InFlight> = RequestList::new();
        while let Some(mut rq) = batch.reserved.pop() {
            let Ok(reserve) = self.prepare(&mut rq, config) else {
                self.cancel_reservation(rq.data_mut());
                batch.busy.push(rq);
                continue;
            };
            match grant_request(rq.start(), config, reserve) {
                Ok(IssuedRequest::Bounced(rq)) if is_small(rq.data().resources.fragments) => {
                    small.push(rq);
                }
                Ok(issued) => self.write_alone(config, issued),
                Err(mut rq) => {
                    self.cancel_reservation(rq.data_mut());
                    // Not reachable: the reserve and the vector have room for all fragments.
                    end(rq, BlkStatus::IOERR);
                }
            }
        }
        if last || !small.is_empty() {
            self.write_together(config, small, last);
        }
    }

    /// Allocates pages that the pool did not have, reserves grant references, and copies the data
    /// of a bounced write.
    #[inline(always)]
    fn prepare(
        &self,
        rq: &mut Request<BlkfrontOps, Queued<'_>>,
        config: &ConnectionConfig,
    ) -> Result<GrantReserve> {
        let resources = rq.data().resources;
        if resources.grants != 0 && shortage::is_active() && self.has_requests() {
            return Err(ENOSPC);
        }
        let reserve = GrantReserve::new(resources.grants)?;
        self.alloc_pages(rq.data_mut(), config)?;
        if config.bounce && rq.op() == Op::Write {
            copy_to_bounce_pages(rq);
        }
        Ok(reserve)
    }

    /// Allocates the pages of a request that the pool did not have.
    #[inline(always)]
    fn alloc_pages(&self, data: &mut RequestData, config: &ConnectionConfig) -> Result {
        let resources = data.resources;
        if data.bounce_pages.len() < resources.data
            || data.indirect_pages.len() < resources.indirect
        {
            self.wakeup.set(WakeReason::PoolGrown);
            pool::grow(config.domain, &mut data.bounce_pages, resources.data)?;
            pool::grow(config.domain, &mut data.indirect_pages, resources.indirect)?;
        }
        Ok(())
    }

    /// Returns `true` if requests are in the ring.
    #[cold]
    fn has_requests(&self) -> bool {
        let inner = self.inner.lock();
        (inner.ring_channel.as_ref()).is_some_and(|ring_channel| ring_channel.ring.in_flight() != 0)
    }

    /// Gives up the reservation of a request that is not written to the ring.
    #[cold]
    fn cancel_reservation(&self, data: &mut RequestData) {
        let mut inner = self.inner.lock();
        inner.shadow.unreserve(data.resources.slots);
        inner.pool.put(&mut data.bounce_pages);
        inner.pool.put(&mut data.indirect_pages);
    }

    /// Writes bounced requests of one slot each to the ring, and publishes them if `publish`.
    #[inline(always)]
    fn write_together(
        &self,
        config: &ConnectionConfig,
        mut small: RequestList<BlkfrontOps, InFlight>,
        publish: bool,
    ) {
        let mut inner = self.inner.lock();
        while let Some(rq) = small.pop() {
            let written = self.write_to_ring(&mut inner, config, RequestSegments::bounced(&rq));
            let issued = IssuedRequest::Bounced(rq);
            if let Err(pending) = store(&mut inner, config, written, issued) {
                self.mark_broken(inner, pending);
                return;
            }
        }
        let notifier = if publish { inner.publish() } else { None };
        drop(inner);
        if let Some(notifier) = notifier {
            notifier.notify();
        }
    }

    /// Writes a single request to the ring: one that is large, or has grants of its own.
    #[inline(always)]
    fn write_alone(&self, config: &ConnectionConfig, issued: IssuedRequest) {
        let segments = RequestSegments::new(&issued);
        segments.fill_indirect_pages(config.slot_limits);
        let mut inner = self.inner.lock();
        let written = self.write_to_ring(&mut inner, config, segments);
        if let Err(pending) = store(&mut inner, config, written, issued) {
            self.mark_broken(inner, pending);
        }
    }

    /// Writes a request into its reserved slots.
    ///
    /// It is inlined: each caller knows whether the data is bounced, which saves a check for each
    /// segment.
    #[inline(always)]
    fn write_to_ring(
        &self,
        inner: &mut Inner,
        config: &ConnectionConfig,
        segments: RequestSegments<'_>,
    ) -> Written {
        let RequestData {
            kind, resources, ..
        } = *segments.data();
        inner.shadow.unreserve(resources.slots);
        match kind {
            RequestKind::Transfer(direction) if is_small(resources.fragments) => {
                self.write_single(inner, |id| {
                    plan::direct(
                        direction,
                        self.handle,
                        id,
                        segments.sector(),
                        segments.all(),
                    )
                })
            }
            _ => self.write_other(inner, config.slot_limits, config.flush, kind, segments),
        }
    }

    /// Writes a request that is not a small transfer.
    #[inline(never)]
    fn write_other(
        &self,
        inner: &mut Inner,
        slot_limits: SlotLimits,
        flush: Flush,
        kind: RequestKind,
        segments: RequestSegments<'_>,
    ) -> Written {
        match kind {
            RequestKind::Transfer(direction) => {
                self.write_parts(inner, slot_limits, direction, segments)
            }
            RequestKind::Flush => self.write_flush(inner, flush),
            RequestKind::Discard { secure } => self.write_single(inner, |id| {
                let (sector, sectors) = (segments.sector(), segments.sectors());
                plan::discard(self.handle, id, sector, sectors, secure)
            }),
        }
    }

    /// Writes the parts of a large transfer, each into a slot of its own.
    fn write_parts(
        &self,
        inner: &mut Inner,
        slot_limits: SlotLimits,
        direction: Direction,
        segments: RequestSegments<'_>,
    ) -> Written {
        let failed = Written {
            first: None,
            parts: 0,
        };
        let count = segments.count();
        let Some(plan) = Plan::new(segments.sector(), segments.fragments(), count, slot_limits)
        else {
            return failed;
        };
        let mut written = failed;
        for part in plan {
            let (first, index) = (written.first, part.index);
            let number = match part.placement {
                SegmentPlacement::Direct => self.write_slot(inner, first, index, |id| {
                    part.direct(direction, self.handle, id, segments.of_part(&part))
                }),
                SegmentPlacement::Indirect(_) => self.write_slot(inner, first, index, |id| {
                    let pages = segments.indirect_pages_of_part(&part, slot_limits);
                    part.indirect(direction, self.handle, id, pages)
                }),
            };
            if number.is_none() {
                return failed;
            }
            written = Written {
                first: first.or(number),
                parts: written.parts.wrapping_add(1),
            };
        }
        written
    }

    /// Writes a flush.
    fn write_flush(&self, inner: &mut Inner, flush: Flush) -> Written {
        let operation = flush.operation().unwrap_or(op::FLUSH_DISKCACHE);
        self.write_single(inner, |id| plan::flush(operation, self.handle, id))
    }

    /// Writes a request that takes one slot.
    #[inline(always)]
    fn write_single<R: Encode>(&self, inner: &mut Inner, make: impl FnOnce(u64) -> R) -> Written {
        Written {
            first: self.write_slot(inner, None, 0, make),
            parts: 1,
        }
    }

    /// Writes one slot and returns the number of its shadow.
    ///
    /// `first` is the first shadow of the request, if this is part `part` of several.
    #[inline(always)]
    fn write_slot<R: Encode>(
        &self,
        inner: &mut Inner,
        first: Option<u16>,
        part: u16,
        make: impl FnOnce(u64) -> R,
    ) -> Option<u16> {
        let ring = &mut inner.ring_channel.as_mut()?.ring;
        let shadow = inner.shadow.alloc(first, self.index, part)?;
        let request = make(shadow.id.to_wire());
        let operation = request.response_operation();
        ring.put(request).ok()?;
        inner.shadow.expect_response(&shadow, operation);
        Some(shadow.number)
    }

    /// Writes a flush of the data that a completed request has written; the request ends when the
    /// backend has responded.
    ///
    /// Returns the request if there is nothing to flush, or if there is no slot.
    #[cold]
    pub(crate) fn flush_written(
        &self,
        inner: &mut Inner,
        mut pending: PendingRequest,
    ) -> Option<PendingRequest> {
        let flush = pending.flush.take()?;
        if pending.status != Status::Okay {
            return Some(pending);
        }
        let written = self.write_flush(inner, flush);
        pending.missing = written.parts;
        inner.unpublished_flushes = true;
        // The slots of the write have just become free.
        let stored = inner.shadow.store(written.first, pending);
        stored.err().map(PendingRequest::failed)
    }

    /// Marks the ring broken because a request is only partly in it.
    ///
    /// Not reachable: a reservation guarantees the slots.
    #[cold]
    fn mark_broken(&self, mut inner: SpinLockIrqSaveGuard<'_, Inner>, pending: PendingRequest) {
        inner.broken = true;
        drop(inner);
        self.wakeup.set(WakeReason::Failed);
        drop(pending);
    }

    /// Publishes the requests that were written to the ring, and notifies the backend if it asks
    /// for that.
    ///
    /// Context: any.
    pub(crate) fn commit(&self) {
        let notifier = self.inner.lock().publish();
        if let Some(notifier) = notifier {
            notifier.notify();
        }
    }
}

/// Stores a request in its first shadow, after it was written to the ring, until the backend has
/// responded.
#[inline(always)]
fn store(
    inner: &mut Inner,
    config: &ConnectionConfig,
    written: Written,
    issued: IssuedRequest,
) -> Result<(), PendingRequest> {
    let kind = issued.data().kind;
    let mut pending = PendingRequest::new(issued, written.parts);
    if config.write_through {
        pending.flush = kind.is_write().then_some(config.flush);
    }
    inner.shadow.store(written.first, pending)
}

/// Copies the data of a write to the pages that the backend may use.
#[inline(always)]
fn copy_to_bounce_pages(rq: &Request<BlkfrontOps, Queued<'_>>) {
    for (segment, page) in rq.segments().zip(&rq.data().bounce_pages) {
        if let Some(copy) = page.slice_mut(segment.offset(), segment.len()) {
            copy.copy_from(segment);
        }
    }
}

/// Grants the pages of a started request to the backend, unless its data is bounced.
#[inline(always)]
fn grant_request(
    mut rq: InFlightRequest,
    config: &ConnectionConfig,
    mut reserve: GrantReserve,
) -> Result<IssuedRequest, InFlightRequest> {
    if rq.data().resources.grants == 0 {
        return Ok(IssuedRequest::Bounced(rq));
    }
    let references = core::mem::take(&mut rq.data_mut().references);
    // `Granted` grants the pages of a write read-only, whatever is passed here.
    match Granted::new(
        rq,
        GrantAccess::ReadWrite,
        config.domain,
        &mut reserve,
        references,
    ) {
        Ok(granted) => Ok(IssuedRequest::Direct(granted)),
        Err((_, mut rq, references)) => {
            rq.data_mut().references = references;
            Err(rq)
        }
    }
}
