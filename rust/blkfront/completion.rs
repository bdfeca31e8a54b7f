// SPDX-License-Identifier: GPL-2.0-only

//! The way of an answer back.
//!
//! The event handler takes all answers that are there, each copied once and checked whole against
//! the slots. Requests end after their grants have ended, without the lock, in a batch. The data of a
//! read that was bounced is copied at once if it is small, for the way to where it was submitted
//! would cost more; that of a larger one is copied there, with interrupts on.

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
    wire::Status, //
};

use crate::{
    disk::Disk,
    events::Event,
    queue::{
        Inner,
        Queue,
        QueueState, //
    },
    request_data::{
        InFlightRequest,
        IssuedRequest,
        RequestData, //
    },
    slots::{
        PendingRequest,
        SlotCompletion, //
    }, //
};

/// Requests that are taken out at once, under the lock.
const AT_ONCE: usize = 16;

/// Most pages of a read whose data is copied by the event handler.
const COPIED_AT_ONCE: usize = 2;

/// A request that is complete.
enum CompletedRequest {
    /// See [`SlotCompletion::Plain`].
    Plain(InFlightRequest),
    Other(PendingRequest),
}

impl CompletedRequest {
    /// Returns the status with which the request ends.
    #[inline]
    fn blk_status(&self) -> BlkStatus {
        match self {
            Self::Plain(_) => BlkStatus::OK,
            Self::Other(pending) => pending.blk_status(),
        }
    }

    /// Returns the request, unless its own pages are granted.
    #[inline]
    fn bounced_mut(&mut self) -> Option<&mut InFlightRequest> {
        match self {
            Self::Plain(rq) => Some(rq),
            Self::Other(pending) => match &mut pending.issued {
                IssuedRequest::Bounced(rq) => Some(rq),
                IssuedRequest::Direct(_) => None,
            },
        }
    }

    /// Returns what the request carries.
    #[inline]
    fn data_mut(&mut self) -> &mut RequestData {
        match self {
            Self::Plain(rq) => rq.data_mut(),
            Self::Other(pending) => pending.issued.data_mut(),
        }
    }

    /// Copies the data of a small read that was bounced.
    #[inline]
    fn copy_inline(&mut self) {
        let status = self.blk_status();
        if let Some(rq) = self.bounced_mut() {
            if status.is_ok() && rq.op() == Op::Read && !defers_copy(rq) {
                copy_read(rq);
            }
        }
    }
}

/// What a look at the ring has found.
enum ScanResult {
    /// There may be more.
    More,
    /// There is nothing more, and the backend will send an event when there is.
    Drained,
    /// What is in the ring cannot be.
    Broken,
}

impl Handler for Queue {
    fn handle(&self) -> Eoi {
        let mut responses = 0u32;
        let mut done = [const { None }; AT_ONCE];
        loop {
            let found = self.take(&mut done, &mut responses);
            self.finish_all(&mut done);
            match found {
                ScanResult::More => {}
                ScanResult::Drained if responses == 0 => return Eoi::Spurious,
                ScanResult::Drained => return Eoi::Done,
                ScanResult::Broken => return Eoi::Later,
            }
        }
    }
}

impl Queue {
    /// Takes answers without an event.
    ///
    /// A backend can answer after the domain was saved: these answers are in the ring when it is
    /// restored, and must not be taken, for the requests are made again. So the channel is looked at
    /// under the lock, where the domain cannot be saved.
    pub(crate) fn poll(&self) {
        let mut responses = 0u32;
        let mut done = [const { None }; AT_ONCE];
        loop {
            let found = {
                let mut inner = self.inner.lock();
                if !inner.is_open() {
                    return;
                }
                self.take_from(&mut inner, &mut done, &mut responses)
            };
            self.finish_all(&mut done);
            if !matches!(found, ScanResult::More) {
                return;
            }
        }
    }

    /// Takes answers until `done` is full or the ring is empty.
    #[inline]
    fn take(&self, done: &mut [Option<CompletedRequest>], responses: &mut u32) -> ScanResult {
        self.take_from(&mut self.inner.lock(), done, responses)
    }

    #[inline]
    fn take_from(
        &self,
        inner: &mut Inner,
        done: &mut [Option<CompletedRequest>],
        responses: &mut u32,
    ) -> ScanResult {
        if inner.broken {
            return ScanResult::Broken;
        }
        for place in done {
            match self.next(inner, responses, place) {
                Ok(true) => {}
                Ok(false) => {
                    let connection = inner.connection.as_mut();
                    let more = connection.is_some_and(|connection| connection.ring.final_check(1));
                    return if more {
                        ScanResult::More
                    } else {
                        ScanResult::Drained
                    };
                }
                Err(()) => {
                    inner.broken = true;
                    self.events.set(Event::Failed);
                    return ScanResult::Broken;
                }
            }
        }
        ScanResult::More
    }

    /// Puts the next request that is complete to `place`. `false` if the ring is empty.
    #[inline]
    fn next(
        &self,
        inner: &mut Inner,
        responses: &mut u32,
        place: &mut Option<CompletedRequest>,
    ) -> Result<bool, ()> {
        loop {
            let Some(connection) = &mut inner.connection else {
                return Ok(false);
            };
            let response = match connection.ring.take_response() {
                Ok(Some(response)) => response,
                Ok(None) => return Ok(false),
                Err(error) => {
                    self.report_broken_ring(error);
                    return Err(());
                }
            };
            *responses = responses.wrapping_add(1);
            match inner.slots.complete_slot(&response) {
                Ok(SlotCompletion::Incomplete) => {}
                Ok(SlotCompletion::Plain(rq)) => {
                    *place = Some(CompletedRequest::Plain(rq));
                    return Ok(true);
                }
                Ok(SlotCompletion::Other(first)) => {
                    if let Some(pending) = self.take_other(inner, first) {
                        *place = Some(CompletedRequest::Other(pending));
                        return Ok(true);
                    }
                }
                Err(_) => {
                    ratelimited!(pr_err!(
                        "{}: the backend has answered id {:#x} operation {}, which nobody asked for; closing the device\n",
                        self.name.as_str(),
                        response.id,
                        response.operation
                    ));
                    return Err(());
                }
            }
        }
    }

    /// Takes a request that is complete, unless what it has written is to be flushed first.
    #[inline]
    fn take_other(&self, inner: &mut Inner, first: u16) -> Option<PendingRequest> {
        let pending = inner.slots.take(first)?;
        if pending.needs_flush() {
            return self.flush_written(inner, pending);
        }
        Some(pending)
    }

    /// Ends requests that are complete: those in front of the first `None`, and leaves none.
    fn finish_all(&self, done: &mut [Option<CompletedRequest>]) {
        for completed in done.iter_mut().map_while(Option::as_mut) {
            completed.copy_inline();
        }
        let notifier = {
            let mut inner = self.inner.lock();
            for completed in done.iter_mut().map_while(Option::as_mut) {
                inner.recycle_pages(completed);
            }
            inner.publish_flushes()
        };
        if let Some(notifier) = notifier {
            notifier.notify();
        }
        let mut batch = EndBatch::new();
        for completed in done.iter_mut().map_while(Option::take) {
            match completed {
                CompletedRequest::Plain(rq) => self.end(rq, BlkStatus::OK, &mut batch),
                CompletedRequest::Other(pending) => self.finish(pending, &mut batch),
            }
        }
    }

    /// Ends a request that is complete, if its pages are ours again.
    fn finish(&self, pending: PendingRequest, batch: &mut EndBatch) {
        let status = pending.blk_status();
        let refused = pending.status == Status::NotSupported;
        match pending.end_grants() {
            Ok(rq) => {
                if refused {
                    self.operation_rejected(rq.op());
                }
                self.end(rq, status, batch);
            }
            Err(pending) => self.report_kept_pages(pending),
        }
    }

    /// Ends a request, or has it end where its data is copied.
    #[inline]
    fn end(&self, rq: InFlightRequest, status: BlkStatus, batch: &mut EndBatch) {
        if status.is_ok() && defers_copy(&rq) {
            rq.complete();
        } else {
            batch.end(rq, status);
        }
    }

    /// The backend cannot do an operation, though it had said so.
    ///
    /// A flush goes on to be asked for, and is an error each time: if it were turned off, the block
    /// layer would report flushes done of which nobody knows whether data needs them.
    fn operation_rejected(&self, op: Op) {
        match op {
            Op::Flush => {
                ratelimited!(pr_err!(
                    "{}: the backend has refused a flush: data may be lost\n",
                    self.name.as_str()
                ));
            }
            Op::Discard | Op::SecureErase => self.events.set(Event::NoDiscard),
            Op::Read | Op::Write | Op::WriteZeroes | Op::Other(_) => {}
        }
    }

    fn report_broken_ring(&self, error: RingError) {
        ratelimited!(pr_err!(
            "{}: the backend broke a ring: {}; closing the device\n",
            self.name.as_str(),
            AsKernelDisplay(error)
        ));
    }

    /// The backend has answered a request and still uses its pages.
    fn report_kept_pages(&self, pending: PendingRequest) {
        ratelimited!(pr_err!(
            "{}: the backend has answered a request and still uses its pages; closing the device\n",
            self.name.as_str()
        ));
        let kept = {
            let mut inner = self.inner.lock();
            inner.broken = true;
            inner.still_granted.push_within_capacity(pending)
        };
        // There is room for as many as there are slots. Otherwise the request is never ended, and
        // its pages are never used for anything else.
        drop(kept);
        self.events.set(Event::Failed);
    }

    /// Copies the data of a read that was bounced, and ends it. Softirq, or any other context.
    pub(crate) fn complete_read(&self, mut rq: Request<Disk, Completed>) {
        copy_read(&mut rq);
        let data = rq.data_mut();
        let generation = data.generation;
        self.inner
            .lock()
            .return_pages(generation, &mut data.bounce_pages);
        rq.end(BlkStatus::OK);
    }
}

/// Copies the data of a read from our pages to those of the request.
fn copy_read<S: mq::State>(rq: &mut Request<Disk, S>) {
    let (segments, data) = rq.segments_mut_and_data();
    for (segment, page) in segments.zip(&data.bounce_pages) {
        if let Some(from) = page.slice(segment.offset(), segment.len()) {
            segment.copy_from(from);
        }
    }
}

/// Whether the data of a read stands in so many pages of ours that it is not copied at once.
fn defers_copy(rq: &InFlightRequest) -> bool {
    rq.op() == Op::Read && rq.data().bounce_pages.len() > COPIED_AT_ONCE
}

impl Inner {
    /// Takes back the pages of a request that is complete, as far as they are not needed any more.
    #[inline]
    fn recycle_pages(&mut self, completed: &mut CompletedRequest) {
        let data = completed.data_mut();
        data.stalled = false;
        self.pool.put(&mut data.indirect_pages);
        let status = completed.blk_status();
        if let Some(rq) = completed.bounced_mut() {
            if !(status.is_ok() && defers_copy(rq)) {
                self.pool.put(&mut rq.data_mut().bounce_pages);
            }
        }
    }

    /// Takes back pages, if they belong to the connection that there is now.
    fn return_pages(&mut self, generation: u32, pages: &mut KVec<GrantedPage>) {
        match self.state {
            QueueState::Live(config) if config.generation == generation => self.pool.put(pages),
            _ => self.return_stale(pages),
        }
    }
}

impl PendingRequest {
    /// Ends the grants of the request's own pages, and gives the request back, unless the backend
    /// still uses one of them. Then it can be tried again.
    #[inline]
    pub(crate) fn end_grants(self) -> Result<InFlightRequest, Self> {
        let granted = match self.issued {
            IssuedRequest::Bounced(rq) => return Ok(rq),
            IssuedRequest::Direct(granted) => granted,
        };
        match granted.try_end() {
            Ok((mut rq, references)) => {
                rq.data_mut().references = references;
                Ok(rq)
            }
            Err(granted) => Err(PendingRequest {
                issued: IssuedRequest::Direct(granted),
                missing: self.missing,
                status: self.status,
                timeouts: self.timeouts,
                flush: self.flush,
            }),
        }
    }
}
