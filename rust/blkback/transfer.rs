// SPDX-License-Identifier: GPL-2.0-only

//! A request on its way through the disk.
//!
//! A [`Transfer`] is made once and goes around: idle in its queue, filled with a request and its
//! memory, owned by the block layer, and back over the [`Inbox`] to the thread of the queue, which
//! ends it. So each is in one place at any time, and nothing is allocated for a request that finds
//! an idle one.

use kernel::{
    alloc::Flags,
    prelude::*,
    sync::Arc, //
};

use kernel_ext::block::bio::{
    is_unsupported,
    Context,
    Io,
    Part, //
};

use blkif::{
    request::Segment,
    wire::{
        op,
        Response,
        Status, //
    },
};

use crate::{
    inbox::Inbox,
    memory::Memory, //
};

/// Number of nodes that [`Job::withdrawn`] may name.
pub(crate) const WITHDRAWN_NODES: usize = 2;

/// A request with its memory.
pub(crate) type Transfer = Io<Memory, Job>;

/// What a transfer does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Work {
    /// From the disk to the frontend's memory.
    Read,
    /// From the frontend's memory to the disk.
    Write,
    /// No data; what was written becomes durable.
    Flush,
    /// Alone on the disk: what came before has ended and becomes durable, then the data, if any, is
    /// written and becomes durable.
    Barrier,
    /// Forgets sectors, piece by piece.
    Discard {
        /// Where the next piece starts.
        sector: u64,
        /// Sectors that are left, without the piece on its way.
        left: u64,
        /// Such that they cannot be recovered.
        secure: bool,
    },
}

/// What the driver knows of a transfer.
pub(crate) struct Job {
    /// The answer, if all goes well.
    pub(crate) answer: Response,
    pub(crate) work: Work,
    /// First sector of the data, and the number of sectors.
    pub(crate) sector: u64,
    pub(crate) sectors: u64,
    /// The pieces of the data, checked.
    pub(crate) segments: KVec<Segment>,
    /// How it went.
    pub(crate) result: Result,
    /// The frontend has its answer already: only the memory is to be given up.
    pub(crate) answered: bool,
    inbox: Arc<Inbox>,
    /// The rest of the chain that it is in.
    next: Chain,
}

impl Job {
    fn new(inbox: Arc<Inbox>) -> Self {
        let answer = Response {
            id: 0,
            operation: 0,
            status: Status::Okay,
        };
        let segments = KVec::new();
        let next = Chain::new();
        Self {
            answer,
            work: Work::Flush,
            sector: 0,
            sectors: 0,
            segments,
            result: Ok(()),
            answered: false,
            inbox,
            next,
        }
    }

    /// Whether there is another piece, and all went well so far.
    pub(crate) fn has_more(&self) -> bool {
        self.result.is_ok() && matches!(self.work, Work::Discard { left, .. } if left != 0)
    }

    /// The answer, as it went.
    pub(crate) fn final_answer(&self) -> Response {
        let may_be_unsupported = matches!(
            self.work,
            Work::Flush | Work::Barrier | Work::Discard { .. }
        );
        let status = match self.result {
            Ok(()) => Status::Okay,
            Err(error) if may_be_unsupported && is_unsupported(error) => Status::NotSupported,
            Err(_) => Status::Error,
        };
        Response {
            status,
            ..self.answer
        }
    }

    /// The node that offered what the disk has refused, if it has.
    pub(crate) fn withdrawn(&self) -> Option<&'static str> {
        let flushes = matches!(self.work, Work::Flush | Work::Barrier);
        match (self.result, self.answer.operation) {
            (Err(error), _) if !flushes || !is_unsupported(error) => None,
            (Err(_), op::WRITE_BARRIER) => Some("feature-barrier"),
            (Err(_), _) => Some("feature-flush-cache"),
            (Ok(()), _) => None,
        }
    }
}

/// Whether the data of a transfer has to be copied.
pub(crate) fn is_copied(transfer: &Transfer) -> bool {
    let (_, own) = transfer.data();
    !own.is_empty()
}

/// Whether a read has brought data that is still to be copied to the frontend.
pub(crate) fn is_read_into_copy(transfer: &Transfer) -> bool {
    transfer.context.work == Work::Read && transfer.context.result.is_ok() && is_copied(transfer)
}

/// Whether nothing but an answer is missing to a transfer that the disk is done with. If `pages_stay`,
/// its pages need not be unmapped before that.
pub(crate) fn wants_only_an_answer(transfer: &Transfer, pages_stay: bool) -> bool {
    let (job, (mapped, _)) = (&transfer.context, transfer.data());
    job.result.is_ok()
        && !job.has_more()
        && job.work != Work::Barrier
        && !is_read_into_copy(transfer)
        && (pages_stay || mapped.is_empty())
}

/// Makes an idle transfer, with space for so many segments.
pub(crate) fn new_transfer(
    inbox: &Arc<Inbox>,
    segments: usize,
    flags: Flags,
) -> Result<KBox<Transfer>> {
    let job = Job::new(inbox.clone());
    let mut transfer = KBox::new(Io::new((KVec::new(), KVec::new()), job), flags)?;
    reserve(&mut transfer, segments, flags)?;
    Ok(transfer)
}

/// Makes space for so many segments in an idle transfer.
pub(crate) fn reserve(transfer: &mut Transfer, segments: usize, flags: Flags) -> Result {
    let ((mapped, _), job) = transfer.split_mut();
    job.segments.reserve(segments, flags)?;
    mapped.reserve(segments, flags)?;
    Ok(())
}

/// Whether an idle transfer has space for so many segments.
pub(crate) fn has_space(transfer: &Transfer, segments: usize) -> bool {
    let (mapped, _) = transfer.data();
    transfer.context.segments.capacity() >= segments && mapped.capacity() >= segments
}

impl Context<Memory> for Job {
    fn parts(&self) -> impl ExactSizeIterator<Item = Part> + '_ {
        self.segments.iter().map(|segment| Part {
            offset: segment.offset().into(),
            len: segment.len().into(),
        })
    }

    fn complete(mut transfer: KBox<Transfer>, result: Result) {
        transfer.context.result = result;
        let inbox = transfer.context.inbox.clone();
        inbox.done(transfer);
    }
}

/// Transfers, each one holding the next.
pub(crate) struct Chain(Option<KBox<Transfer>>);

impl Chain {
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    pub(crate) fn push(&mut self, mut transfer: KBox<Transfer>) {
        transfer.context.next = Chain(self.0.take());
        self.0 = Some(transfer);
    }

    pub(crate) fn pop(&mut self) -> Option<KBox<Transfer>> {
        let mut transfer = self.0.take()?;
        self.0 = transfer.context.next.0.take();
        Some(transfer)
    }

    /// From the one that was pushed last to the first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Transfer> {
        core::iter::successors(self.0.as_deref(), |transfer| {
            transfer.context.next.0.as_deref()
        })
    }

    /// All of them, leaving none.
    pub(crate) fn take(&mut self) -> Self {
        Self(self.0.take())
    }
}

impl Drop for Chain {
    /// One after another: the chain may be longer than the stack is deep.
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}
