// SPDX-License-Identifier: GPL-2.0-only

//! Pending requests: requests that were taken from a ring, with their pages, until the queue thread
//! has completed them (`struct pending_req`).
//!
//! A [`PendingReq`] is allocated once and reused. While unused, it is in the [`ReqPool`]. It is set
//! up with a request and its pages, is owned by the block layer during I/O, and returns through the
//! [`Handoff`] to the queue thread, which completes it. So each has one owner at any time, and no
//! `PendingReq` is allocated while there is an unused one.

use kernel::{
    alloc::Flags,
    prelude::*,
    sync::Arc, //
};

use kernel_ext::{
    base::page::Page,
    block::bio::{
        is_unsupported,
        BioContext,
        BioRequest,
        PageRange, //
    },
    xen::grant::map::MappedPage, //
};

use blkif::{
    request::{
        Extent,
        Segment, //
    },
    wire::{
        op,
        Response,
        Status, //
    },
};

use crate::{
    handoff::{
        Handoff,
        Respond, //
    },
    list::{
        Linked,
        List, //
    },
};

/// Number of features that [`ReqContext::rejected_feature`] may name.
pub(crate) const REJECTABLE_FEATURES: usize = 2;

/// The pages of a request, one for each segment: mapped pages of the frontend, or pages of this
/// domain that data is copied to or from.
pub(crate) type RequestPages = (KVec<MappedPage>, KVec<Page>);

/// A request with its pages.
pub(crate) type PendingReq = BioRequest<RequestPages, ReqContext>;

/// A list of requests.
pub(crate) type ReqList = List<PendingReq>;

/// Operation of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ReqOp {
    /// Reads from the disk to the frontend's pages.
    Read,
    /// Writes from the frontend's pages to the disk.
    Write,
    /// Makes completed writes durable. It has no data.
    Flush,
    /// Runs alone on the disk: all earlier requests complete and become durable, then the data, if
    /// any, is written and becomes durable.
    Barrier,
    /// Discards sectors, piece by piece.
    Discard {
        /// Start of the next piece.
        sector: u64,
        /// Number of sectors that are left, without the piece in flight.
        left: u64,
        /// `true` if the data must not be readable afterwards.
        secure: bool,
    },
}

/// The driver's data in a request.
pub(crate) struct ReqContext {
    /// The response, if all succeeds.
    pub(crate) response: Response,
    pub(crate) op: ReqOp,
    /// First sector of the data.
    pub(crate) sector: u64,
    /// Number of sectors of the data.
    pub(crate) sectors: u64,
    /// The checked segments of the data.
    pub(crate) segments: KVec<Segment>,
    /// The result of the I/O.
    pub(crate) result: Result,
    /// `true` if the response was written: only the pages have to be released.
    pub(crate) responded: bool,
    handoff: Arc<Handoff<PendingReq>>,
    /// The requests behind this one in the list that it is in.
    next: ReqList,
}

impl ReqContext {
    fn new(handoff: Arc<Handoff<PendingReq>>) -> Self {
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
            handoff,
            next,
        }
    }

    /// Sets up an unused request.
    ///
    /// The caller then adds the segments, and calls [`Self::set_extent`].
    #[inline]
    pub(crate) fn set_up(&mut self, op: ReqOp, response: Response) {
        self.response = response;
        self.op = op;
        self.result = Ok(());
        self.responded = false;
        self.segments.clear();
    }

    /// Sets the sectors of the data; `None` if there is no data.
    #[inline]
    pub(crate) fn set_extent(&mut self, extent: Option<Extent>) {
        (self.sector, self.sectors) =
            extent.map_or((0, 0), |extent| (extent.sector(), extent.sectors()));
    }

    /// Returns `true` if a discard has another piece, and all earlier ones have succeeded.
    pub(crate) fn has_more(&self) -> bool {
        self.result.is_ok() && matches!(self.op, ReqOp::Discard { left, .. } if left != 0)
    }

    /// Returns the response with the status that follows from the result.
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

    /// Returns the feature node of a flush or barrier that the disk does not support.
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

/// Returns `true` if the data of a request is copied by Xen.
pub(crate) fn is_grant_copied(req: &PendingReq) -> bool {
    let (_, own) = req.data();
    !own.is_empty()
}

/// Returns `true` if a read has succeeded and its data has still to be copied to the frontend.
pub(crate) fn needs_copy_out(req: &PendingReq) -> bool {
    req.context.op == ReqOp::Read && req.context.result.is_ok() && is_grant_copied(req)
}

impl Linked for PendingReq {
    #[inline]
    fn next(&self) -> &ReqList {
        &self.context.next
    }

    #[inline]
    fn next_mut(&mut self) -> &mut ReqList {
        &mut self.context.next
    }
}

impl Respond for PendingReq {
    fn response_alone(&self, persistent: bool) -> Option<Response> {
        let (ctx, (mapped, _)) = (&self.context, self.data());
        let alone = ctx.result.is_ok()
            && !ctx.has_more()
            && ctx.op != ReqOp::Barrier
            && !needs_copy_out(self)
            && (persistent || mapped.is_empty());
        alone.then(|| ctx.final_response())
    }

    #[inline]
    fn set_responded(&mut self) {
        self.context.responded = true;
    }
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
        let handoff = req.context.handoff.clone();
        handoff.complete(req);
    }
}

/// The unused requests of a queue.
pub(crate) struct ReqPool {
    handoff: Arc<Handoff<PendingReq>>,
    unused: ReqList,
    /// A request with space for `max_segments` segments, for when memory is short.
    reserve: Option<KBox<PendingReq>>,
    max_segments: usize,
}

impl ReqPool {
    /// Creates a pool whose requests complete through `handoff` and have up to `max_segments`
    /// segments.
    pub(crate) fn new(handoff: &Arc<Handoff<PendingReq>>, max_segments: usize) -> Result<Self> {
        Ok(Self {
            handoff: handoff.clone(),
            unused: ReqList::new(),
            reserve: Some(new_pending_req(handoff, max_segments, GFP_KERNEL)?),
            max_segments,
        })
    }

    /// Returns a request with space for `segments`, or `None` if there is no memory.
    ///
    /// `None` is only possible while another request uses the reserve.
    pub(crate) fn alloc(&mut self, segments: usize) -> Option<KBox<PendingReq>> {
        let req = match self.unused.pop() {
            Some(req) => Ok(req),
            None => new_pending_req(&self.handoff, segments, GFP_NOWAIT),
        };
        if let Ok(mut req) = req {
            if has_capacity(&req, segments)
                || reserve_segments(&mut req, segments, GFP_NOWAIT).is_ok()
            {
                return Some(req);
            }
            self.unused.push(req);
        }
        self.reserve.take()
    }

    /// Puts back a request that is no longer used.
    pub(crate) fn free(&mut self, mut req: KBox<PendingReq>) {
        req.context.segments.clear();
        if self.reserve.is_none() && has_capacity(&req, self.max_segments) {
            self.reserve = Some(req);
        } else {
            self.unused.push(req);
        }
    }

    /// Frees all requests but the reserve.
    pub(crate) fn shrink(&mut self) {
        drop(self.unused.take());
    }
}

/// Allocates a request with space for `segments`.
fn new_pending_req(
    handoff: &Arc<Handoff<PendingReq>>,
    segments: usize,
    flags: Flags,
) -> Result<KBox<PendingReq>> {
    let ctx = ReqContext::new(handoff.clone());
    let mut req = KBox::new(BioRequest::new((KVec::new(), KVec::new()), ctx), flags)?;
    reserve_segments(&mut req, segments, flags)?;
    Ok(req)
}

/// Makes space for `segments` in an unused request.
fn reserve_segments(req: &mut PendingReq, segments: usize, flags: Flags) -> Result {
    let ((mapped, _), ctx) = req.split_mut();
    ctx.segments.reserve(segments, flags)?;
    mapped.reserve(segments, flags)?;
    Ok(())
}

/// Returns `true` if an unused request has space for `segments`.
fn has_capacity(req: &PendingReq, segments: usize) -> bool {
    let (mapped, _) = req.data();
    req.context.segments.capacity() >= segments && mapped.capacity() >= segments
}
