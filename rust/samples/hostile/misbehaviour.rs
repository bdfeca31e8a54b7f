// SPDX-License-Identifier: GPL-2.0-only

//! The ways in which the backend breaks the protocol.

use blkif::wire::{
    op,
    WireRequest, //
};

/// A violation of the protocol, which the parameter of that name selects.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Misbehaviour {
    /// It does nothing wrong.
    Honest,
    /// Completes a write with a status that is not in the protocol.
    UnknownStatus,
    /// Completes a write as not supported, which no backend may do.
    UnsupportedWrite,
    /// Completes a flush or barrier as not supported, although it has offered it.
    UnsupportedFlush,
    /// Sends a response with an id that is not in use.
    UnknownId,
    /// Completes a write with the id of the previous request, which is already completed.
    IdTwice,
    /// Completes a write with the operation of a read.
    WrongOperation,
    /// Publishes one response more than there are requests.
    Ahead,
    /// Moves the producer index of responses backwards.
    Back,
    /// Completes a write, and keeps its pages mapped until the connection ends.
    Keep,
    /// Does not respond.
    Silence,
    /// Refuses a write whose pages contain anything besides its data.
    Peek,
    /// Responds without notification.
    LoseEvent,
    /// Ignores the next event.
    MissEvent,
    /// Delays the responses to the last writes until others follow, or for a while.
    Lag,
}

/// All variants, in the order of their numbers.
const MISBEHAVIOURS: [Misbehaviour; 15] = [
    Misbehaviour::Honest,
    Misbehaviour::UnknownStatus,
    Misbehaviour::UnsupportedWrite,
    Misbehaviour::UnsupportedFlush,
    Misbehaviour::UnknownId,
    Misbehaviour::IdTwice,
    Misbehaviour::WrongOperation,
    Misbehaviour::Ahead,
    Misbehaviour::Back,
    Misbehaviour::Keep,
    Misbehaviour::Silence,
    Misbehaviour::Peek,
    Misbehaviour::LoseEvent,
    Misbehaviour::MissEvent,
    Misbehaviour::Lag,
];

/// The number of [`Misbehaviour::Honest`].
pub(crate) const HONEST: u32 = 0;

impl Misbehaviour {
    /// Returns the variant with this number, [`Misbehaviour::Honest`] if there is none.
    pub(crate) fn from_number(number: u32) -> Self {
        let misbehaviour = MISBEHAVIOURS.get(number as usize);
        misbehaviour.copied().unwrap_or(Misbehaviour::Honest)
    }

    /// Returns `true` if it applies to this request.
    pub(crate) fn suits(self, request: &WireRequest) -> bool {
        let operation = request.response_operation();
        match self {
            Misbehaviour::Honest | Misbehaviour::MissEvent => false,
            Misbehaviour::UnsupportedFlush => {
                matches!(operation, op::FLUSH_DISKCACHE | op::WRITE_BARRIER)
            }
            _ => operation == op::WRITE,
        }
    }
}
