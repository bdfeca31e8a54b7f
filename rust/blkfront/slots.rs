// SPDX-License-Identifier: GPL-2.0-only

//! Slots: which request an answer belongs to.
//!
//! A request takes one slot of its queue, or several if it is larger than what the backend takes at
//! once. The slot's number is in the id that the backend repeats in its answer; the whole id is kept
//! and compared, see [`blkif::id`]. The request itself waits in the first of its slots, which is not
//! free before all of them are answered.

use kernel::prelude::*;

use kernel_ext::block::mq::{
    BlkStatus,
    Op,
    RequestId, //
};

use blkif::{
    id::RingId,
    negotiate::Flush,
    reservation::Reservations,
    wire::{
        Response,
        Status, //
    }, //
};

use crate::{
    request_data::{
        InFlightRequest,
        IssuedRequest, //
    },
    timeout::GIVE_UP_AFTER, //
};

/// A slot.
struct Slot {
    /// What the answer must repeat; `None` if no answer is awaited.
    id: Option<RingId>,
    /// The operation that the answer must name.
    operation: u8,
    /// The slot that has the request.
    first: u16,
    /// The request, if this is its first slot.
    pending: Option<PendingRequest>,
}

/// A request that waits for answers, or has got them.
pub(crate) struct PendingRequest {
    pub(crate) issued: IssuedRequest,
    /// Answers that are missing.
    pub(crate) missing: u16,
    /// The worst answer so far.
    pub(crate) status: Status,
    /// How often it has timed out.
    pub(crate) timeouts: u8,
    /// How to flush what was written, before the request ends.
    pub(crate) flush: Option<Flush>,
}

impl PendingRequest {
    /// For so many answers.
    pub(crate) fn new(issued: IssuedRequest, parts: u16) -> Self {
        Self {
            issued,
            missing: parts,
            status: Status::Okay,
            timeouts: 0,
            flush: None,
        }
    }

    /// Returns `true` if the request was not answered for so long that its connection is given up.
    pub(crate) fn has_stalled(&self) -> bool {
        self.timeouts >= GIVE_UP_AFTER
    }

    /// Returns `true` if what was written is to be flushed now.
    #[inline]
    pub(crate) fn needs_flush(&self) -> bool {
        self.flush.is_some()
    }

    /// Returns `true` if the request was successful, has no pages of its own granted, and nothing to
    /// flush.
    #[inline]
    fn is_plain(&self) -> bool {
        self.status == Status::Okay
            && self.flush.is_none()
            && matches!(self.issued, IssuedRequest::Bounced(_))
    }

    /// Makes it end with an error.
    pub(crate) fn failed(mut self) -> Self {
        self.status = Status::Error;
        self
    }

    /// How the request has ended, if all answers are there.
    pub(crate) fn final_status(&self) -> Option<BlkStatus> {
        (self.missing == 0).then(|| self.blk_status())
    }

    /// How the request has ended, as far as it has. Who discards must be ready to hear that this is not
    /// possible. Of any other request the system may take that for a success.
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
}

/// What an answer has done to its request.
pub(crate) enum SlotCompletion {
    /// Other answers are missing.
    Incomplete,
    /// The request is complete and plain, as nearly all are: it was successful, has no pages of its
    /// own granted, and nothing to flush.
    Plain(InFlightRequest),
    /// Any other request is complete: it waits in this slot for [`Slots::take`].
    Other(u16),
}

/// An answer that does not belong to any request.
pub(crate) struct UnknownResponse;

/// The slots of a queue.
pub(crate) struct Slots {
    slots: KVVec<Slot>,
    /// Numbers of free slots.
    free: KVVec<u16>,
    /// Those of these that are promised to requests that are being prepared.
    reservations: Reservations,
    /// Counts the uses of slots.
    epoch: u32,
}

impl Slots {
    /// No slots.
    pub(crate) const fn empty() -> Self {
        Self {
            slots: KVVec::new(),
            free: KVVec::new(),
            reservations: Reservations::new(),
            epoch: 0,
        }
    }

    /// So many slots, all free. `epoch` is that of the slots that were there before.
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

    pub(crate) fn epoch(&self) -> u32 {
        self.epoch
    }

    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Whether no request is waiting or being prepared.
    pub(crate) fn is_idle(&self) -> bool {
        self.reservations.reserved() == 0 && self.free.len() == self.slots.len()
    }

    /// Returns how many slots the backend has answered, of this ring and those before. Wraps around.
    pub(crate) fn responses(&self) -> u32 {
        let used = self.slots.len().saturating_sub(self.free.len());
        self.epoch.wrapping_sub(used as u32)
    }

    /// Promises so many slots, if there are as many, and no larger request waits for them.
    pub(crate) fn reserve(&mut self, count: usize) -> bool {
        self.reservations.reserve(count, self.free.len())
    }

    /// Takes a promise back, or begins to keep it.
    pub(crate) fn unreserve(&mut self, count: usize) {
        self.reservations.unreserve(count);
    }

    /// Takes a slot for a request, whose first slot is `first`, or this one. `queue` and `part` go
    /// into the id.
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

    /// A claimed slot waits for the answer to what was put into the ring, which names `operation`.
    pub(crate) fn expect_response(&mut self, slot_id: &SlotId, operation: u8) {
        if let Some(slot) = self.slots.get_mut(usize::from(slot_id.number)) {
            slot.operation = operation;
        }
    }

    /// Keeps a request in its first slot until all its slots are answered. It comes back if there is
    /// no such slot.
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

    /// Takes an answer to account.
    #[inline]
    pub(crate) fn complete_slot(
        &mut self,
        response: &Response,
    ) -> Result<SlotCompletion, UnknownResponse> {
        let id = RingId::from_wire(response.id);
        let slot = self
            .slots
            .get_mut(usize::from(id.tag()))
            .ok_or(UnknownResponse)?;
        if slot.id != Some(id) || slot.operation != response.operation {
            return Err(UnknownResponse);
        }
        slot.id = None;
        let first = slot.first;
        if first != id.tag() {
            self.release(id.tag());
        }

        let pending = &mut self
            .slots
            .get_mut(usize::from(first))
            .ok_or(UnknownResponse)?
            .pending;
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
                self.release(first);
                Ok(SlotCompletion::Plain(rq))
            }
            other => {
                // Not possible. Without a destructor here only the request is moved.
                core::mem::forget(other);
                Err(UnknownResponse)
            }
        }
    }

    /// Takes a request that is complete out of its first slot.
    #[inline]
    pub(crate) fn take(&mut self, first: u16) -> Option<PendingRequest> {
        let pending = self.slots.get_mut(usize::from(first))?.pending.take();
        self.release(first);
        pending
    }

    /// Takes out a request that waits, whatever is missing. For when the ring is gone.
    pub(crate) fn take_pending(&mut self) -> Option<PendingRequest> {
        self.slots.iter_mut().find_map(|slot| slot.pending.take())
    }

    /// Counts a time-out of a request, if it waits here.
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

    /// Begins to count time-outs of all requests again.
    pub(crate) fn reset_timeouts(&mut self) {
        for pending in self.pending_mut() {
            pending.timeouts = 0;
        }
    }

    fn pending_mut(&mut self) -> impl Iterator<Item = &mut PendingRequest> {
        self.slots.iter_mut().flat_map(|slot| &mut slot.pending)
    }

    #[inline]
    fn release(&mut self, number: u16) {
        // There is room for all slots.
        let _ = self.free.push_within_capacity(number);
    }
}

/// A slot that was taken, with the id that the request must have.
pub(crate) struct SlotId {
    pub(crate) number: u16,
    pub(crate) id: RingId,
}

/// An error is worse than what is not supported, and that is worse than success.
fn worse(one: Status, other: Status) -> Status {
    match (one, other) {
        (Status::Error, _) | (_, Status::Error) => Status::Error,
        (Status::NotSupported, _) | (_, Status::NotSupported) => Status::NotSupported,
        (Status::Okay, Status::Okay) => Status::Okay,
    }
}
