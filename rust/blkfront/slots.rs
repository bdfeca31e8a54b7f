// SPDX-License-Identifier: GPL-2.0-only

//! The slots of a ring: which request a response belongs to.
//!
//! A block request takes one slot, or several if it is larger than the backend accepts at once. A
//! slot here is an entry of the slot table; its number is not a position in the ring. The number is
//! part of the id that the backend repeats in its response; the whole id is stored and compared,
//! see [`blkif::id`]. The request itself is stored in the first of its slots, which is not free
//! before the backend has answered all of them.
//!
//! In `xen-blkfront.c`, `blkfront_ring_info.shadow` and `get_id_from_freelist()` have this role.

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

/// An entry of the slot table.
struct Slot {
    /// The id that the response must repeat; `None` if no response is expected.
    id: Option<RingId>,
    /// The operation that the response must name.
    operation: u8,
    /// Number of the slot that stores the request.
    first: u16,
    /// The request, if this is its first slot.
    pending: Option<PendingRequest>,
}

/// Effect of a response on its request.
pub(crate) enum SlotCompletion {
    /// Other responses are missing.
    Incomplete,
    /// The request is complete and [plain](PendingRequest::is_plain), as nearly all are.
    Plain(InFlightRequest),
    /// The request is complete. [`Slots::take`] takes it out of this slot.
    Other(u16),
}

/// A response that does not belong to any request.
pub(crate) struct UnknownResponse;

/// The slot table of a queue.
pub(crate) struct Slots {
    slots: KVVec<Slot>,
    /// Numbers of free slots.
    free: KVVec<u16>,
    /// Free slots that are reserved for requests that are being prepared.
    reservations: Reservations,
    /// Number of allocations of slots, in this table and earlier ones, modulo 2^32.
    epoch: u32,
}

impl Slots {
    /// Creates an empty table.
    pub(crate) const fn empty() -> Self {
        Self {
            slots: KVVec::new(),
            free: KVVec::new(),
            reservations: Reservations::new(),
            epoch: 0,
        }
    }

    /// Creates a table of `capacity` free slots. `epoch` is that of the previous table.
    ///
    /// Context: may sleep.
    pub(crate) fn new(capacity: u16, epoch: u32) -> Result<Self> {
        let mut slots = KVVec::with_capacity(capacity.into(), GFP_KERNEL)?;
        let mut free = KVVec::with_capacity(capacity.into(), GFP_KERNEL)?;
        for number in (0..capacity).rev() {
            let slot = Slot {
                id: None,
                operation: 0,
                first: 0,
                pending: None,
            };
            slots.push(slot, GFP_KERNEL)?;
            free.push(number, GFP_KERNEL)?;
        }
        Ok(Self {
            slots,
            free,
            reservations: Reservations::new(),
            epoch,
        })
    }

    /// Returns the number of allocations of slots, in this table and earlier ones, modulo 2^32.
    pub(crate) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Returns the number of slots.
    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Returns `true` if no request waits for a response or is being prepared.
    pub(crate) fn is_idle(&self) -> bool {
        self.reservations.reserved() == 0 && self.free.len() == self.slots.len()
    }

    /// Returns the number of slots that were freed, in this table and earlier ones, modulo 2^32.
    pub(crate) fn responses(&self) -> u32 {
        let used = self.slots.len().saturating_sub(self.free.len());
        self.epoch.wrapping_sub(used as u32)
    }

    /// Reserves `count` slots. Returns `false` if there are fewer, or if a larger request waits for
    /// them.
    #[inline]
    pub(crate) fn reserve(&mut self, count: usize) -> bool {
        self.reservations.reserve(count, self.free.len())
    }

    /// Ends a reservation: the slots are allocated now, or not needed.
    #[inline]
    pub(crate) fn unreserve(&mut self, count: usize) {
        self.reservations.unreserve(count);
    }

    /// Allocates a slot for a request.
    ///
    /// `first` is the first slot of the request, or `None` if that is this one. `queue` and `part`
    /// are stored in the id.
    #[inline]
    pub(crate) fn alloc_slot(
        &mut self,
        first: Option<u16>,
        queue: u16,
        part: u16,
    ) -> Option<SlotId> {
        let number = self.free.pop()?;
        let id = RingId::new(self.epoch, queue, part, number)?;
        self.epoch = self.epoch.wrapping_add(1);
        let slot = self.slots.get_mut(usize::from(number))?;
        slot.id = Some(id);
        slot.first = first.unwrap_or(number);
        Some(SlotId { number, id })
    }

    /// Sets the operation that the response must name, once the request is in the ring.
    #[inline]
    pub(crate) fn expect_response(&mut self, id: &SlotId, operation: u8) {
        if let Some(slot) = self.slots.get_mut(usize::from(id.number)) {
            slot.operation = operation;
        }
    }

    /// Stores a request in its first slot until all its slots are answered. Returns the request if
    /// there is no such slot.
    #[inline]
    pub(crate) fn store(
        &mut self,
        first: Option<u16>,
        pending: PendingRequest,
    ) -> Result<(), PendingRequest> {
        match first.and_then(|first| self.slots.get_mut(usize::from(first))) {
            Some(slot) => {
                slot.pending = Some(pending);
                Ok(())
            }
            None => Err(pending),
        }
    }

    /// Applies a response to the request that it belongs to.
    #[inline]
    pub(crate) fn complete_slot(
        &mut self,
        response: &Response,
    ) -> Result<SlotCompletion, UnknownResponse> {
        let id = RingId::from_wire(response.id);
        let number = usize::from(id.tag());
        let slot = self.slots.get_mut(number).ok_or(UnknownResponse)?;
        if slot.id != Some(id) || slot.operation != response.operation {
            return Err(UnknownResponse);
        }
        slot.id = None;
        let first = slot.first;
        if first != id.tag() {
            self.free_slot(id.tag());
        }

        let slot = self.slots.get_mut(usize::from(first));
        let pending = &mut slot.ok_or(UnknownResponse)?.pending;
        let Some(request) = pending else {
            return Err(UnknownResponse);
        };
        request.status = worse(request.status, response.status);
        request.missing = request.missing.saturating_sub(1);
        if request.missing > 0 {
            return Ok(SlotCompletion::Incomplete);
        }
        if !request.is_plain() {
            return Ok(SlotCompletion::Other(first));
        }
        match pending.take() {
            Some(PendingRequest {
                issued: IssuedRequest::Bounced(rq),
                ..
            }) => {
                self.free_slot(first);
                Ok(SlotCompletion::Plain(rq))
            }
            other => {
                // Not reachable. Without a destructor here, the compiler moves only the request out
                // of `pending` above.
                mem::forget(other);
                Err(UnknownResponse)
            }
        }
    }

    /// Takes a complete request out of its first slot.
    #[inline]
    pub(crate) fn take(&mut self, first: u16) -> Option<PendingRequest> {
        let pending = self.slots.get_mut(usize::from(first))?.pending.take();
        self.free_slot(first);
        pending
    }

    /// Takes any request, even if responses are missing. The ring must not be in use any more.
    pub(crate) fn take_pending(&mut self) -> Option<PendingRequest> {
        self.slots.iter_mut().find_map(|slot| slot.pending.take())
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
        let mut pending = self.slots.iter().flat_map(|slot| &slot.pending);
        pending.any(PendingRequest::has_stalled)
    }

    /// Resets the number of timeouts of all requests.
    pub(crate) fn reset_timeouts(&mut self) {
        for pending in self.pending_mut() {
            pending.timeouts = 0;
        }
    }

    /// Iterates over the stored requests.
    fn pending_mut(&mut self) -> impl Iterator<Item = &mut PendingRequest> {
        self.slots.iter_mut().flat_map(|slot| &mut slot.pending)
    }

    /// Frees a slot.
    #[inline]
    fn free_slot(&mut self, number: u16) {
        // The list has room for all slots.
        let _ = self.free.push_within_capacity(number);
    }
}

/// An allocated slot.
pub(crate) struct SlotId {
    /// Number of the slot.
    pub(crate) number: u16,
    /// The id that the request must have.
    pub(crate) id: RingId,
}

/// Returns the worse of two statuses: an error is worse than an operation that is not supported,
/// and that is worse than success.
#[inline]
fn worse(one: Status, other: Status) -> Status {
    match (one, other) {
        (Status::Error, _) | (_, Status::Error) => Status::Error,
        (Status::NotSupported, _) | (_, Status::NotSupported) => Status::NotSupported,
        (Status::Okay, Status::Okay) => Status::Okay,
    }
}
