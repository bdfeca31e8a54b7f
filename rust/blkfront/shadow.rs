// SPDX-License-Identifier: GPL-2.0-only

//! The shadow table of a ring: which request a response belongs to.
//!
//! A block request takes one slot of the ring, or several if it is larger than the backend accepts
//! at once. The table has a shadow for each slot, as `shadow[]` of `struct blkfront_ring_info`; the
//! number of a shadow is not a position in the ring. It is part of the id that the backend repeats
//! in its response. The whole id is stored and compared, see [`blkif::id`]. The request itself is
//! stored in the first of its shadows, which is not free before the backend has responded to all of
//! them.

use core::mem;

use kernel::prelude::*;

use kernel_ext::block::mq::RequestId;

use blkif::{
    id::RingId,
    reservation::Reservations,
    wire::{
        Response,
        Status, //
    }, //
};

use crate::{
    pending_request::PendingRequest,
    request_data::{
        InFlightRequest,
        IssuedRequest, //
    },
};

/// An entry of the shadow table (`struct blk_shadow`).
struct Shadow {
    /// The id that the response must repeat; `None` if no response is expected.
    id: Option<RingId>,
    /// The operation that the response must name.
    operation: u8,
    /// Number of the shadow that stores the request.
    first: u16,
    /// The request, if this is its first shadow.
    pending: Option<PendingRequest>,
}

/// Effect of a response on its request.
pub(crate) enum ShadowCompletion {
    /// Other responses are missing.
    Incomplete,
    /// The request is complete and [plain](PendingRequest::is_plain), as nearly all are if data is
    /// bounced.
    Plain(InFlightRequest),
    /// The request is complete. [`ShadowTable::take`] takes it out of this shadow.
    Other(u16),
}

/// A response that does not belong to any request.
pub(crate) struct UnknownResponse;

/// The shadow table of a queue.
pub(crate) struct ShadowTable {
    shadows: KVVec<Shadow>,
    /// Numbers of free shadows (`shadow_free`).
    free: KVVec<u16>,
    /// Free shadows that are reserved for requests that are being prepared.
    reservations: Reservations,
    /// Number of allocations, in this table and earlier ones, modulo 2^32.
    epoch: u32,
}

impl ShadowTable {
    /// Creates an empty table.
    pub(crate) const fn empty() -> Self {
        Self {
            shadows: KVVec::new(),
            free: KVVec::new(),
            reservations: Reservations::new(0),
            epoch: 0,
        }
    }

    /// Creates a table of `capacity` free shadows.
    ///
    /// `epoch` is that of the previous table.
    ///
    /// Context: may sleep.
    pub(crate) fn new(capacity: u16, epoch: u32) -> Result<Self> {
        let mut shadows = KVVec::with_capacity(capacity.into(), GFP_KERNEL)?;
        let mut free = KVVec::with_capacity(capacity.into(), GFP_KERNEL)?;
        for number in (0..capacity).rev() {
            let shadow = Shadow {
                id: None,
                operation: 0,
                first: 0,
                pending: None,
            };
            shadows.push(shadow, GFP_KERNEL)?;
            free.push(number, GFP_KERNEL)?;
        }
        Ok(Self {
            shadows,
            free,
            reservations: Reservations::new(capacity.into()),
            epoch,
        })
    }

    /// Returns the number of allocations, in this table and earlier ones, modulo 2^32.
    pub(crate) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Returns the number of shadows.
    pub(crate) fn capacity(&self) -> usize {
        self.shadows.len()
    }

    /// Returns `true` if no request waits for a response or is being prepared.
    pub(crate) fn is_idle(&self) -> bool {
        self.reservations.reserved() == 0 && self.free.len() == self.shadows.len()
    }

    /// Returns a number that grows with the responses, modulo 2^32.
    ///
    /// The response to the first part of a request counts when the request is complete. The number
    /// also grows by the requests without a response when a new table replaces this one.
    pub(crate) fn responses(&self) -> u32 {
        let used = self.shadows.len().saturating_sub(self.free.len());
        self.epoch.wrapping_sub(used as u32)
    }

    /// Reserves `count` shadows.
    ///
    /// Returns `false` if fewer are free, or if a larger request waits for them. A request that
    /// needs more shadows than the table has is never served, see [`ShadowTable::capacity`].
    #[inline]
    pub(crate) fn reserve(&mut self, count: usize) -> bool {
        self.reservations.reserve(count, self.free.len())
    }

    /// Ends a reservation, because the shadows are about to be allocated or are not needed.
    #[inline]
    pub(crate) fn unreserve(&mut self, count: usize) {
        self.reservations.unreserve(count);
    }

    /// Allocates a shadow for a request (`get_id_from_freelist()`).
    ///
    /// `first` is the first shadow of the request, or `None` if that is this one. `queue` and
    /// `part` are stored in the id.
    #[inline]
    pub(crate) fn alloc(
        &mut self,
        first: Option<u16>,
        queue: u16,
        part: u16,
    ) -> Option<AllocatedShadow> {
        let number = self.free.pop()?;
        let id = RingId::new(self.epoch, queue, part, number)?;
        self.epoch = self.epoch.wrapping_add(1);
        let shadow = self.shadows.get_mut(usize::from(number))?;
        shadow.id = Some(id);
        shadow.first = first.unwrap_or(number);
        Some(AllocatedShadow { number, id })
    }

    /// Sets the operation that the response must name, once the request is in the ring.
    #[inline]
    pub(crate) fn expect_response(&mut self, allocated: &AllocatedShadow, operation: u8) {
        if let Some(shadow) = self.shadows.get_mut(usize::from(allocated.number)) {
            shadow.operation = operation;
        }
    }

    /// Stores a request in its first shadow until there is a response for each of its shadows.
    ///
    /// Returns the request if there is no such shadow.
    #[inline]
    pub(crate) fn store(
        &mut self,
        first: Option<u16>,
        pending: PendingRequest,
    ) -> Result<(), PendingRequest> {
        match first.and_then(|first| self.shadows.get_mut(usize::from(first))) {
            Some(shadow) => {
                shadow.pending = Some(pending);
                Ok(())
            }
            None => Err(pending),
        }
    }

    /// Applies a response to the request that it belongs to.
    #[inline]
    pub(crate) fn apply_response(
        &mut self,
        response: &Response,
    ) -> Result<ShadowCompletion, UnknownResponse> {
        let id = RingId::from_wire(response.id);
        let number = usize::from(id.shadow());
        let shadow = self.shadows.get_mut(number).ok_or(UnknownResponse)?;
        if shadow.id != Some(id) || shadow.operation != response.operation {
            return Err(UnknownResponse);
        }
        shadow.id = None;
        let first = shadow.first;
        if first != id.shadow() {
            self.free_shadow(id.shadow());
        }

        let shadow = self.shadows.get_mut(usize::from(first));
        let pending = &mut shadow.ok_or(UnknownResponse)?.pending;
        let Some(request) = pending else {
            return Err(UnknownResponse);
        };
        request.status = worse(request.status, response.status);
        request.missing = request.missing.saturating_sub(1);
        if request.missing > 0 {
            return Ok(ShadowCompletion::Incomplete);
        }
        if !request.is_plain() {
            return Ok(ShadowCompletion::Other(first));
        }
        match pending.take() {
            Some(PendingRequest {
                issued: IssuedRequest::Bounced(rq),
                ..
            }) => {
                self.free_shadow(first);
                Ok(ShadowCompletion::Plain(rq))
            }
            other => {
                // Not reachable. Without a destructor here, the compiler moves only the request out
                // of `pending` above.
                mem::forget(other);
                Err(UnknownResponse)
            }
        }
    }

    /// Takes a complete request out of its first shadow.
    #[inline]
    pub(crate) fn take(&mut self, first: u16) -> Option<PendingRequest> {
        let pending = self.shadows.get_mut(usize::from(first))?.pending.take();
        self.free_shadow(first);
        pending
    }

    /// Takes any request, even if responses are missing.
    ///
    /// The ring must no longer be in use.
    pub(crate) fn take_pending(&mut self) -> Option<PendingRequest> {
        self.shadows
            .iter_mut()
            .find_map(|shadow| shadow.pending.take())
    }

    /// Counts a timeout of a request, if it is stored here.
    pub(crate) fn timed_out(&mut self, id: RequestId) {
        let mut pending = self.pending_mut();
        if let Some(pending) = pending.find(|pending| pending.issued.request().id() == id) {
            pending.timeouts = pending.timeouts.saturating_add(1);
        }
    }

    /// Returns `true` if a request has timed out too often.
    pub(crate) fn has_stalled(&self) -> bool {
        let mut pending = self.shadows.iter().flat_map(|shadow| &shadow.pending);
        pending.any(PendingRequest::has_stalled)
    }

    /// Resets the timeouts of all requests.
    pub(crate) fn reset_timeouts(&mut self) {
        self.pending_mut().for_each(PendingRequest::reset_timeouts);
    }

    /// Iterates over the stored requests.
    fn pending_mut(&mut self) -> impl Iterator<Item = &mut PendingRequest> {
        self.shadows
            .iter_mut()
            .flat_map(|shadow| &mut shadow.pending)
    }

    /// Frees a shadow (`add_id_to_freelist()`).
    #[inline]
    fn free_shadow(&mut self, number: u16) {
        // The list has room for all shadows.
        let _ = self.free.push_within_capacity(number);
    }
}

/// An allocated shadow.
pub(crate) struct AllocatedShadow {
    /// Number of the shadow.
    pub(crate) number: u16,
    /// The id that the request must have.
    pub(crate) id: RingId,
}

/// Returns the worse of two statuses: `Error`, then `NotSupported`, then `Okay`.
#[inline]
fn worse(one: Status, other: Status) -> Status {
    match (one, other) {
        (Status::Error, _) | (_, Status::Error) => Status::Error,
        (Status::NotSupported, _) | (_, Status::NotSupported) => Status::NotSupported,
        (Status::Okay, Status::Okay) => Status::Okay,
    }
}
