// SPDX-License-Identifier: GPL-2.0

//! The way of an answer back.
//!
//! The event handler takes all answers that are there, each copied once and checked whole against
//! the slots. Requests end after their grants have ended, without the lock, in a batch. A read that
//! was bounced has its data copied where it was submitted.

use blkif::ring::RingError;
use blkif::wire::Status;
use kernel::prelude::*;
use kernel_ext::base::shown::Shown;
use kernel_ext::block::mq::BlkStatus;
use kernel_ext::block::mq::Completed;
use kernel_ext::block::mq::EndBatch;
use kernel_ext::block::mq::Op;
use kernel_ext::block::mq::Request;
use kernel_ext::ratelimited;
use kernel_ext::xen::events::Eoi;
use kernel_ext::xen::events::Handler;
use kernel_ext::xen::grant::GrantedPage;

use crate::carry::Held;
use crate::carry::Started;
use crate::disk::Disk;
use crate::queue::Inner;
use crate::queue::Queue;
use crate::queue::State;
use crate::signal::Cause;
use crate::slots::Waiting;

/// Requests that are taken out at once, under the lock.
const AT_ONCE: usize = 16;

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
        loop {
            let mut done = [const { None }; AT_ONCE];
            let found = self.take(&mut done, &mut answers);
            let mut batch = EndBatch::new();
            for waiting in done.into_iter().flatten() {
                self.finish(waiting, &mut batch);
            }
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
    /// Takes answers until `done` is full or the ring is empty.
    fn take(&self, done: &mut [Option<Waiting>], answers: &mut u32) -> Found {
        let mut inner = self.inner.lock();
        if inner.broken {
            return Found::Broken;
        }
        for place in done {
            match self.next(&mut inner, answers) {
                Ok(Some(waiting)) => *place = Some(waiting),
                Ok(None) => {
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

    /// The next request that is complete, or `None` if the ring is empty.
    fn next(&self, inner: &mut Inner, answers: &mut u32) -> Result<Option<Waiting>, ()> {
        loop {
            let Some(link) = &mut inner.link else {
                return Ok(None);
            };
            let response = match link.ring.take_response() {
                Ok(Some(response)) => response,
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.complain_ring(error);
                    return Err(());
                }
            };
            *answers = answers.wrapping_add(1);
            match inner.slots.answer(&response) {
                Ok(Some(mut waiting)) => {
                    inner.reclaim(&mut waiting);
                    return Ok(Some(waiting));
                }
                Ok(None) => {}
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

    /// Ends a request that is complete, if its pages are ours again.
    fn finish(&self, waiting: Waiting, batch: &mut EndBatch) {
        let status = waiting.blk_status();
        let refused = waiting.status == Status::NotSupported;
        match waiting.release() {
            Ok(rq) if status.is_ok() && must_copy(&rq) => rq.complete(),
            Ok(rq) => {
                if refused {
                    self.revoke(rq.op());
                }
                batch.end(rq, status);
            }
            Err(waiting) => self.complain_pages(waiting),
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
            Shown(error)
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
        let mut data = core::mem::take(&mut rq.data_mut().data);
        for (segment, page) in rq.segments_mut().zip(&data) {
            if let Some(from) = page.slice(segment.offset(), segment.len()) {
                segment.copy_from(from);
            }
        }
        self.inner.lock().give_back(rq.data().generation, &mut data);
        rq.data_mut().data = data;
        rq.end(BlkStatus::OK);
    }
}

/// Whether data stands in pages of ours and belongs into those of the request.
fn must_copy(rq: &Started) -> bool {
    rq.op() == Op::Read && !rq.data().data.is_empty()
}

impl Inner {
    /// Takes back the pages of a request that is complete, as far as they are not needed any more.
    fn reclaim(&mut self, waiting: &mut Waiting) {
        self.pool.give(&mut waiting.indirect);
        let status = waiting.blk_status();
        if let Held::Bounced(rq) = &mut waiting.held {
            if !(status.is_ok() && must_copy(&*rq)) {
                self.pool.give(&mut rq.data_mut().data);
            }
        }
    }

    /// Takes back pages, if they belong to the connection that there is now.
    fn give_back(&mut self, generation: u32, pages: &mut KVec<GrantedPage>) {
        match self.state {
            State::Live(terms) if terms.generation == generation => self.pool.give(pages),
            // They end with their connection.
            _ => pages.clear(),
        }
    }
}

impl Waiting {
    /// Ends the grants of the request's own pages, and gives the request back, unless the backend
    /// still uses one of them. Then it can be tried again.
    pub(crate) fn release(self) -> Result<Started, Self> {
        let Waiting {
            held,
            indirect,
            missing,
            status,
        } = self;
        match held {
            Held::Bounced(mut rq) => {
                rq.data_mut().indirect = indirect;
                Ok(rq)
            }
            Held::Direct(granted) => match granted.try_end() {
                Ok((mut rq, references)) => {
                    let carry = rq.data_mut();
                    carry.references = references;
                    carry.indirect = indirect;
                    Ok(rq)
                }
                Err(granted) => Err(Waiting {
                    held: Held::Direct(granted),
                    indirect,
                    missing,
                    status,
                }),
            },
        }
    }
}
