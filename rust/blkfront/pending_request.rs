// SPDX-License-Identifier: GPL-2.0-only

//! Block requests that are in the ring, or whose responses have arrived but whose grants have not
//! ended.
//!
//! A [`PendingRequest`] is created when its request is written to the ring, and is stored in the
//! first of its shadows ([`shadow`](crate::shadow)) until the backend has responded to all of them.
//! In `xen-blkfront.c`, `struct blk_shadow` has this role.

use kernel_ext::block::mq::{
    BlkStatus,
    Op, //
};

use blkif::{
    negotiate::Flush,
    wire::Status, //
};

use crate::request_data::{
    InFlightRequest,
    IssuedRequest, //
};

/// Number of timeouts of a request after which its connection is closed.
const GIVE_UP_AFTER: u8 = 10;
/// Number of times that its timeouts are reset: a backend that reconnects again and again must not
/// make a request wait forever.
const MAX_RESETS: u8 = 2;

/// A block request that is in the ring, or whose responses have arrived but whose grants have not
/// ended.
pub(crate) struct PendingRequest {
    /// The request.
    pub(crate) issued: IssuedRequest,
    /// Number of responses that are missing.
    pub(crate) missing: u16,
    /// The worst status of a response so far.
    pub(crate) status: Status,
    /// Number of times that the request has timed out.
    pub(crate) timeouts: u8,
    /// Number of times that `timeouts` was reset.
    resets: u8,
    /// Operation that flushes the written data before the request ends, if each write is flushed.
    pub(crate) flush: Option<Flush>,
}

impl PendingRequest {
    /// Creates a pending request that waits for `parts` responses.
    #[inline]
    pub(crate) fn new(issued: IssuedRequest, parts: u16) -> Self {
        Self {
            issued,
            missing: parts,
            status: Status::Okay,
            timeouts: 0,
            resets: 0,
            flush: None,
        }
    }

    /// Returns `true` if the request has timed out so often that its connection is closed.
    pub(crate) fn has_stalled(&self) -> bool {
        self.timeouts >= GIVE_UP_AFTER
    }

    /// Resets the timeouts, because the backend was replaced or has reconnected.
    pub(crate) fn reset_timeouts(&mut self) {
        if self.resets < MAX_RESETS {
            self.resets = self.resets.saturating_add(1);
            self.timeouts = 0;
        }
    }

    /// Returns `true` if written data must be flushed before the request ends.
    #[inline]
    pub(crate) fn needs_flush(&self) -> bool {
        self.flush.is_some()
    }

    /// Returns `true` if the request was successful, none of its own pages are granted, and there
    /// is nothing to flush.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.status == Status::Okay
            && self.flush.is_none()
            && matches!(self.issued, IssuedRequest::Bounced(_))
    }

    /// Makes the request end with an error.
    pub(crate) fn failed(mut self) -> Self {
        self.status = Status::Error;
        self
    }

    /// Returns the status of the request if all responses have arrived.
    pub(crate) fn final_status(&self) -> Option<BlkStatus> {
        (self.missing == 0).then(|| self.blk_status())
    }

    /// Returns the status of the request according to the responses so far.
    ///
    /// Only a discard may end with `BLK_STS_NOTSUPP`: callers of other operations may take it for a
    /// success.
    pub(crate) fn blk_status(&self) -> BlkStatus {
        match self.status {
            Status::Okay => BlkStatus::OK,
            Status::Error => BlkStatus::IOERR,
            Status::NotSupported => match self.issued.request().op() {
                Op::Discard | Op::SecureErase => BlkStatus::NOTSUPP,
                Op::Read | Op::Write | Op::Flush | Op::WriteZeroes | Op::Other(_) => {
                    BlkStatus::IOERR
                }
            },
        }
    }

    /// Ends the grants of the request's own pages and returns the request.
    ///
    /// Fails while the backend still has one of the pages mapped; the caller can try again later.
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
                ..self
            }),
        }
    }
}
