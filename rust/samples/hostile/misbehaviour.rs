// SPDX-License-Identifier: GPL-2.0-only

//! The ways in which a backend may be wrong.

use blkif::wire::{
    op,
    WireRequest, //
};

/// What the backend does wrong, as long as it is told to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Misbehaviour {
    /// Nothing.
    Honest,
    /// Answers a write by a status that the protocol does not have.
    UnknownStatus,
    /// Cannot do a write, which no backend may say.
    UnsupportedWrite,
    /// Cannot do a flush or a barrier, though it has offered that.
    UnsupportedFlush,
    /// Answers a request that nobody has made.
    UnknownId,
    /// Answers a write by the id of the request before it, which is answered already.
    IdTwice,
    /// Answers a write as if it were a read.
    WrongOperation,
    /// Claims an answer more than there are requests.
    Ahead,
    /// Takes answers back.
    Back,
    /// Answers a write, and goes on using its pages until the connection ends.
    Keep,
    /// Does not answer.
    Silence,
    /// Looks at what else is in the pages of a write, and refuses one that shows anything.
    Peek,
    /// Answers without an event.
    LoseEvent,
    /// Behaves as if the next event had not come.
    MissEvent,
    /// Does not answer the last writes before others follow, or a while has gone by.
    Lag,
}

/// In the order of their numbers.
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
    /// The one with a number.
    pub(crate) fn from_number(number: u32) -> Self {
        let misbehaviour = MISBEHAVIOURS.get(number as usize);
        misbehaviour.copied().unwrap_or(Misbehaviour::Honest)
    }

    /// Whether a request is one to play it on.
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
