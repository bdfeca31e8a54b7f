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
    slots::Waiting, //
};

/// Requests that are taken out at once, under the lock.
const AT_ONCE: usize = 16;

/// Most pages of a read whose data is copied by the event handler.
const COPIED_AT_ONCE: usize = 2;

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
    fn take(&self, done: &mut [Option<Waiting>], answers: &mut u32) -> Found {
        self.take_from(&mut self.inner.lock(), done, answers)
    }

    #[inline]
    fn take_from(
        &self,
        inner: &mut Inner,
        done: &mut [Option<Waiting>],
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
    fn next(
        &self,
        inner: &mut Inner,
        answers: &mut u32,
        place: &mut Option<Waiting>,
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
            match inner.slots.answer(&response, place) {
                Ok(true) if place.as_ref().is_some_and(Waiting::wants_flush) => {
                    *place = place
                        .take()
                        .and_then(|written| self.flush_written(inner, written));
                    if place.is_some() {
                        return Ok(true);
                    }
                }
                Ok(true) => return Ok(true),
                Ok(false) => {}
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

    /// Ends requests that are complete: those in front of the first `None`, and leaves none.
    fn finish_all(&self, done: &mut [Option<Waiting>]) {
        for waiting in done.iter_mut().map_while(Option::as_mut) {
            waiting.copy_small();
        }
        let notifier = {
            let mut inner = self.inner.lock();
            for waiting in done.iter_mut().map_while(Option::as_mut) {
                inner.reclaim(waiting);
            }
            inner.publish_flushes()
        };
        if let Some(notifier) = notifier {
            notifier.notify();
        }
        let mut batch = EndBatch::new();
        for place in done {
            if let Some(rq) = Waiting::take_simple(place) {
                self.end(rq, BlkStatus::OK, &mut batch);
            } else if let Some(waiting) = place.take() {
                self.finish(waiting, &mut batch);
            } else {
                break;
            }
        }
    }

    /// Ends a request that is complete, if its pages are ours again.
    fn finish(&self, waiting: Waiting, batch: &mut EndBatch) {
        let status = waiting.blk_status();
        let refused = waiting.status == Status::NotSupported;
        match waiting.release() {
            Ok(mut rq) => {
                rq.data_mut().stalled = false;
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
    fn reclaim(&mut self, waiting: &mut Waiting) {
        self.pool.give(waiting.held.indirect_mut());
        let status = waiting.blk_status();
        if let Held::Bounced(rq) = &mut waiting.held {
            rq.data_mut().stalled = false;
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
    /// Copies the data of a small read that was bounced.
    fn copy_small(&mut self) {
        let status = self.blk_status();
        if let Held::Bounced(rq) = &mut self.held {
            if status.is_ok() && rq.op() == Op::Read && !is_copied_later(rq) {
                copy_read(rq);
            }
        }
    }

    /// Takes out a request that has gone well and needs nothing more. The other ones stay.
    #[inline]
    fn take_simple(place: &mut Option<Self>) -> Option<Started> {
        let simple = |waiting: &Self| {
            waiting.status == Status::Okay && matches!(waiting.held, Held::Bounced(_))
        };
        if !place.as_ref().is_some_and(simple) {
            return None;
        }
        // Nothing else is moved than the request.
        match place.take()?.held {
            Held::Bounced(rq) => Some(rq),
            Held::Direct { .. } => None,
        }
    }

    /// Ends the grants of the request's own pages, and gives the request back, unless the backend
    /// still uses one of them. Then it can be tried again.
    #[inline]
    pub(crate) fn release(self) -> Result<Started, Self> {
        let (granted, indirect) = match self.held {
            Held::Bounced(rq) => return Ok(rq),
            Held::Direct { granted, indirect } => (granted, indirect),
        };
        match granted.try_end() {
            Ok((mut rq, references)) => {
                let carry = rq.data_mut();
                carry.references = references;
                carry.indirect = indirect;
                Ok(rq)
            }
            Err(granted) => Err(Waiting {
                held: Held::Direct { granted, indirect },
                missing: self.missing,
                status: self.status,
                timeouts: self.timeouts,
                flush: self.flush,
            }),
        }
    }
}
