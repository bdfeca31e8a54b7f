// SPDX-License-Identifier: GPL-2.0-only

//! A request on its way through the disk.
//!
//! A [`PendingReq`] is made once and goes around: idle in its queue, filled with a request and its
//! memory, owned by the block layer, and back over the [`QueueEvents`] to the thread of the queue, which
//! ends it. So each is in one place at any time, and nothing is allocated for a request that finds
//! an idle one.

use kernel::{
    alloc::Flags,
    prelude::*,
    sync::Arc, //
};

use kernel_ext::block::bio::{
    is_unsupported,
    BioContext,
    BioRequest,
    PageRange, //
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
    data_path::RequestPages,
    events::QueueEvents, //
};

/// Number of nodes that [`ReqContext::rejected_feature`] may name.
pub(crate) const REJECTABLE_FEATURES: usize = 2;

/// A request with its memory.
pub(crate) type PendingReq = BioRequest<RequestPages, ReqContext>;

/// What a request does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ReqOp {
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

/// What the driver knows of a request.
pub(crate) struct ReqContext {
    /// The answer, if all goes well.
    pub(crate) response: Response,
    pub(crate) op: ReqOp,
    /// First sector of the data, and the number of sectors.
    pub(crate) sector: u64,
    pub(crate) sectors: u64,
    /// The pieces of the data, checked.
    pub(crate) segments: KVec<Segment>,
    /// How it went.
    pub(crate) result: Result,
    /// The frontend has its answer already: only the memory is to be given up.
    pub(crate) responded: bool,
    events: Arc<QueueEvents>,
    /// The rest of the chain that it is in.
    next: ReqList,
}

impl ReqContext {
    fn new(events: Arc<QueueEvents>) -> Self {
        let response = Response {
            id: 0,
            operation: 0,
            status: Status::Okay,
        };
        let segments = KVec::new();
        let next = ReqList::new();
        Self {
            response,
            op: ReqOp::Flush,
            sector: 0,
            sectors: 0,
            segments,
            result: Ok(()),
            responded: false,
            events,
            next,
        }
    }

    /// Whether there is another piece, and all went well so far.
    pub(crate) fn has_more(&self) -> bool {
        self.result.is_ok() && matches!(self.op, ReqOp::Discard { left, .. } if left != 0)
    }

    /// The answer, as it went.
    pub(crate) fn final_response(&self) -> Response {
        let may_be_unsupported = matches!(
            self.op,
            ReqOp::Flush | ReqOp::Barrier | ReqOp::Discard { .. }
        );
        let status = match self.result {
            Ok(()) => Status::Okay,
            Err(error) if may_be_unsupported && is_unsupported(error) => Status::NotSupported,
            Err(_) => Status::Error,
        };
        Response {
            status,
            ..self.response
        }
    }

    /// The node that offered what the disk has refused, if it has.
    pub(crate) fn rejected_feature(&self) -> Option<&'static str> {
        let flushes = matches!(self.op, ReqOp::Flush | ReqOp::Barrier);
        match (self.result, self.response.operation) {
            (Err(error), _) if !flushes || !is_unsupported(error) => None,
            (Err(_), op::WRITE_BARRIER) => Some("feature-barrier"),
            (Err(_), _) => Some("feature-flush-cache"),
            (Ok(()), _) => None,
        }
    }
}

/// Whether the data of a request has to be copied.
pub(crate) fn is_grant_copied(req: &PendingReq) -> bool {
    let (_, own) = req.data();
    !own.is_empty()
}

/// Whether a read has brought data that is still to be copied to the frontend.
pub(crate) fn needs_copy_out(req: &PendingReq) -> bool {
    req.context.op == ReqOp::Read && req.context.result.is_ok() && is_grant_copied(req)
}

/// Whether nothing but an answer is missing to a request that the disk is done with. If `pages_stay`,
/// its pages need not be unmapped before that.
pub(crate) fn needs_only_response(req: &PendingReq, pages_stay: bool) -> bool {
    let (ctx, (mapped, _)) = (&req.context, req.data());
    ctx.result.is_ok()
        && !ctx.has_more()
        && ctx.op != ReqOp::Barrier
        && !needs_copy_out(req)
        && (pages_stay || mapped.is_empty())
}

/// Makes an idle request, with space for so many segments.
pub(crate) fn new_pending_req(
    events: &Arc<QueueEvents>,
    segments: usize,
    flags: Flags,
) -> Result<KBox<PendingReq>> {
    let ctx = ReqContext::new(events.clone());
    let mut req = KBox::new(BioRequest::new((KVec::new(), KVec::new()), ctx), flags)?;
    reserve_segments(&mut req, segments, flags)?;
    Ok(req)
}

/// Makes space for so many segments in an idle request.
pub(crate) fn reserve_segments(req: &mut PendingReq, segments: usize, flags: Flags) -> Result {
    let ((mapped, _), ctx) = req.split_mut();
    ctx.segments.reserve(segments, flags)?;
    mapped.reserve(segments, flags)?;
    Ok(())
}

/// Whether an idle request has space for so many segments.
pub(crate) fn has_capacity(req: &PendingReq, segments: usize) -> bool {
    let (mapped, _) = req.data();
    req.context.segments.capacity() >= segments && mapped.capacity() >= segments
}

impl BioContext<RequestPages> for ReqContext {
    fn ranges(&self) -> impl ExactSizeIterator<Item = PageRange> + '_ {
        self.segments.iter().map(|segment| PageRange {
            offset: segment.offset().into(),
            len: segment.len().into(),
        })
    }

    fn complete(mut req: KBox<PendingReq>, result: Result) {
        req.context.result = result;
        let events = req.context.events.clone();
        events.complete(req);
    }
}

/// Transfers, each one holding the next.
pub(crate) struct ReqList(Option<KBox<PendingReq>>);

impl ReqList {
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    pub(crate) fn push(&mut self, mut req: KBox<PendingReq>) {
        req.context.next = ReqList(self.0.take());
        self.0 = Some(req);
    }

    pub(crate) fn pop(&mut self) -> Option<KBox<PendingReq>> {
        let mut req = self.0.take()?;
        self.0 = req.context.next.0.take();
        Some(req)
    }

    /// From the one that was pushed last to the first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &PendingReq> {
        core::iter::successors(self.0.as_deref(), |req| req.context.next.0.as_deref())
    }

    /// All of them, leaving none.
    pub(crate) fn take(&mut self) -> Self {
        Self(self.0.take())
    }
}

impl Drop for ReqList {
    /// One after another: the chain may be longer than the stack is deep.
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}
