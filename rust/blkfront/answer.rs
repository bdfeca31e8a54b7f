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
    carry::{
        Carry,
        Held,
        Started, //
    },
    disk::Disk,
    queue::{
        Inner,
        Queue,
        State, //
    },
    signal::Cause,
    slots::{
        Answered,
        Waiting, //
    },
};

/// Requests that are taken out at once, under the lock.
const AT_ONCE: usize = 16;

/// Most pages of a read whose data is copied by the event handler.
const COPIED_AT_ONCE: usize = 2;

/// A request that is complete.
enum CompletedRequest {
    /// See [`Answered::Plain`].
    Plain(Started),
    Other(Waiting),
}

impl CompletedRequest {
    /// Returns the status with which the request ends.
    #[inline]
    fn blk_status(&self) -> BlkStatus {
        match self {
            Self::Plain(_) => BlkStatus::OK,
            Self::Other(waiting) => waiting.blk_status(),
        }
    }

    /// Returns the request, unless its own pages are granted.
    #[inline]
    fn bounced_mut(&mut self) -> Option<&mut Started> {
        match self {
            Self::Plain(rq) => Some(rq),
            Self::Other(waiting) => match &mut waiting.held {
                Held::Bounced(rq) => Some(rq),
                Held::Direct(_) => None,
            },
        }
    }

    /// Returns what the request carries.
    #[inline]
    fn carry_mut(&mut self) -> &mut Carry {
        match self {
            Self::Plain(rq) => rq.data_mut(),
            Self::Other(waiting) => waiting.held.carry_mut(),
        }
    }

    /// Copies the data of a small read that was bounced.
    #[inline]
    fn copy_small(&mut self) {
        let status = self.blk_status();
        if let Some(rq) = self.bounced_mut() {
            if status.is_ok() && rq.op() == Op::Read && !is_copied_later(rq) {
                copy_read(rq);
            }
        }
    }
}

/// What a look at the ring has found.
enum Found {
    /// There may be more.
    More,
    /// There is nothing more, and the backend will send an event when there is.
    Drained,
    /// What is in the ring cannot be.
    Broken,
}

impl Handler for Queue {
    fn handle(&self) -> Eoi {
        let mut answers = 0u32;
        let mut done = [const { None }; AT_ONCE];
        loop {
            let found = self.take(&mut done, &mut answers);
            self.finish_all(&mut done);
            match found {
                Found::More => {}
                Found::Drained if answers == 0 => return Eoi::Spurious,
                Found::Drained => return Eoi::Done,
                Found::Broken => return Eoi::Later,
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
        let mut answers = 0u32;
        let mut done = [const { None }; AT_ONCE];
        loop {
            let found = {
                let mut inner = self.inner.lock();
                if !inner.is_open() {
                    return;
                }
                self.take_from(&mut inner, &mut done, &mut answers)
            };
            self.finish_all(&mut done);
            if !matches!(found, Found::More) {
                return;
            }
        }
    }

    /// Takes answers until `done` is full or the ring is empty.
    #[inline]
    fn take(&self, done: &mut [Option<CompletedRequest>], answers: &mut u32) -> Found {
        self.take_from(&mut self.inner.lock(), done, answers)
    }

    #[inline]
    fn take_from(
        &self,
        inner: &mut Inner,
        done: &mut [Option<CompletedRequest>],
        answers: &mut u32,
    ) -> Found {
        if inner.broken {
            return Found::Broken;
        }
        for place in done {
            match self.next(inner, answers, place) {
                Ok(true) => {}
                Ok(false) => {
                    let link = inner.link.as_mut();
                    let more = link.is_some_and(|link| link.ring.final_check(1));
                    return if more { Found::More } else { Found::Drained };
                }
                Err(()) => {
                    inner.broken = true;
                    self.signal.raise(Cause::Failed);
                    return Found::Broken;
                }
            }
        }
        Found::More
    }

    /// Puts the next request that is complete to `place`. `false` if the ring is empty.
    #[inline]
    fn next(
        &self,
        inner: &mut Inner,
        answers: &mut u32,
        place: &mut Option<CompletedRequest>,
    ) -> Result<bool, ()> {
        loop {
            let Some(link) = &mut inner.link else {
                return Ok(false);
            };
            let response = match link.ring.take_response() {
                Ok(Some(response)) => response,
                Ok(None) => return Ok(false),
                Err(error) => {
                    self.complain_ring(error);
                    return Err(());
                }
            };
            *answers = answers.wrapping_add(1);
            match inner.slots.answer(&response) {
                Ok(Answered::Incomplete) => {}
                Ok(Answered::Plain(rq)) => {
                    *place = Some(CompletedRequest::Plain(rq));
                    return Ok(true);
                }
                Ok(Answered::Other(first)) => {
                    if let Some(waiting) = self.take_other(inner, first) {
                        *place = Some(CompletedRequest::Other(waiting));
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
    fn take_other(&self, inner: &mut Inner, first: u16) -> Option<Waiting> {
        let waiting = inner.slots.take(first)?;
        if waiting.wants_flush() {
            return self.flush_written(inner, waiting);
        }
        Some(waiting)
    }

    /// Ends requests that are complete: those in front of the first `None`, and leaves none.
    fn finish_all(&self, done: &mut [Option<CompletedRequest>]) {
        for completed in done.iter_mut().map_while(Option::as_mut) {
            completed.copy_small();
        }
        let notifier = {
            let mut inner = self.inner.lock();
            for completed in done.iter_mut().map_while(Option::as_mut) {
                inner.reclaim(completed);
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
                CompletedRequest::Other(waiting) => self.finish(waiting, &mut batch),
            }
        }
    }

    /// Ends a request that is complete, if its pages are ours again.
    fn finish(&self, waiting: Waiting, batch: &mut EndBatch) {
        let status = waiting.blk_status();
        let refused = waiting.status == Status::NotSupported;
        match waiting.release() {
            Ok(rq) => {
                if refused {
                    self.revoke(rq.op());
                }
                self.end(rq, status, batch);
            }
            Err(waiting) => self.complain_pages(waiting),
        }
    }

    /// Ends a request, or has it end where its data is copied.
    #[inline]
    fn end(&self, rq: Started, status: BlkStatus, batch: &mut EndBatch) {
        if status.is_ok() && is_copied_later(&rq) {
            rq.complete();
        } else {
            batch.end(rq, status);
        }
    }

    /// The backend cannot do an operation, though it had said so.
    ///
    /// A flush goes on to be asked for, and is an error each time: if it were turned off, the block
    /// layer would report flushes done of which nobody knows whether data needs them.
    fn revoke(&self, op: Op) {
        match op {
            Op::Flush => {
                ratelimited!(pr_err!(
                    "{}: the backend has refused a flush: data may be lost\n",
                    self.name.as_str()
                ));
            }
            Op::Discard | Op::SecureErase => self.signal.raise(Cause::NoDiscard),
            Op::Read | Op::Write | Op::WriteZeroes | Op::Other(_) => {}
        }
    }

    fn complain_ring(&self, error: RingError) {
        ratelimited!(pr_err!(
            "{}: the backend broke a ring: {}; closing the device\n",
            self.name.as_str(),
            AsKernelDisplay(error)
        ));
    }

    /// The backend has answered a request and still uses its pages.
    fn complain_pages(&self, waiting: Waiting) {
        ratelimited!(pr_err!(
            "{}: the backend has answered a request and still uses its pages; closing the device\n",
            self.name.as_str()
        ));
        let kept = {
            let mut inner = self.inner.lock();
            inner.broken = true;
            inner.answered.push_within_capacity(waiting)
        };
        // There is room for as many as there are slots. Otherwise the request is never ended, and
        // its pages are never used for anything else.
        drop(kept);
        self.signal.raise(Cause::Failed);
    }

    /// Copies the data of a read that was bounced, and ends it. Softirq, or any other context.
    pub(crate) fn complete_read(&self, mut rq: Request<Disk, Completed>) {
        copy_read(&mut rq);
        let carry = rq.data_mut();
        let generation = carry.generation;
        self.inner.lock().give_back(generation, &mut carry.data);
        rq.end(BlkStatus::OK);
    }
}

/// Copies the data of a read from our pages to those of the request.
fn copy_read<S: mq::State>(rq: &mut Request<Disk, S>) {
    let (segments, carry) = rq.segments_mut_and_data();
    for (segment, page) in segments.zip(&carry.data) {
        if let Some(from) = page.slice(segment.offset(), segment.len()) {
            segment.copy_from(from);
        }
    }
}

/// Whether the data of a read stands in so many pages of ours that it is not copied at once.
fn is_copied_later(rq: &Started) -> bool {
    rq.op() == Op::Read && rq.data().data.len() > COPIED_AT_ONCE
}

impl Inner {
    /// Takes back the pages of a request that is complete, as far as they are not needed any more.
    #[inline]
    fn reclaim(&mut self, completed: &mut CompletedRequest) {
        let carry = completed.carry_mut();
        carry.stalled = false;
        self.pool.give(&mut carry.indirect);
        let status = completed.blk_status();
        if let Some(rq) = completed.bounced_mut() {
            if !(status.is_ok() && is_copied_later(rq)) {
                self.pool.give(&mut rq.data_mut().data);
            }
        }
    }

    /// Takes back pages, if they belong to the connection that there is now.
    fn give_back(&mut self, generation: u32, pages: &mut KVec<GrantedPage>) {
        match self.state {
            State::Live(terms) if terms.generation == generation => self.pool.give(pages),
            _ => self.give_back_late(pages),
        }
    }
}

impl Waiting {
    /// Ends the grants of the request's own pages, and gives the request back, unless the backend
    /// still uses one of them. Then it can be tried again.
    #[inline]
    pub(crate) fn release(self) -> Result<Started, Self> {
        let granted = match self.held {
            Held::Bounced(rq) => return Ok(rq),
            Held::Direct(granted) => granted,
        };
        match granted.try_end() {
            Ok((mut rq, references)) => {
                rq.data_mut().references = references;
                Ok(rq)
            }
            Err(granted) => Err(Waiting {
                held: Held::Direct(granted),
                missing: self.missing,
                status: self.status,
                timeouts: self.timeouts,
                flush: self.flush,
            }),
        }
    }
}
