// SPDX-License-Identifier: GPL-2.0-only

//! Requests that are each wrong in one way, and some that are only unusual.

use kernel_ext::xen::grant::GrantReserve;

use blkif::wire::{
    op,
    DiscardRequest,
    IndirectRequest,
    RwRequest,
    Status,
    WireRequest,
    WireSegment,
    DIRECT_SEGMENTS,
    DISCARD_SECURE, //
};

use crate::{
    session::{
        whole,
        Session,
        ELSEWHERE,
        NO_GRANT,
        SCRATCH,
        VICTIM, //
    },
    session_state::Outcome, //
};

/// Number of wrong requests in the flood.
const FLOOD: u32 = 512;

/// Number of words of a slot in the layout of x86_64.
const SLOT_WORDS: usize = 28;

/// The bits of a slot that a response uses: id, operation and status.
const RESPONSE_BITS: [u32; SLOT_WORDS] = {
    let mut words = [0; SLOT_WORDS];
    words[0] = u32::MAX;
    words[1] = u32::MAX;
    words[2] = 0xffff_00ff;
    words
};

/// A case.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&mut Session<'_>) -> Outcome,
}

const fn case(name: &'static str, run: fn(&mut Session<'_>) -> Outcome) -> Case {
    Case { name, run }
}

/// The cases for a writable disk.
pub(crate) static WRITABLE: &[Case] = &[
    case("unknown-operation-4", |a| unknown(a, 4)),
    case("unknown-operation-255", |a| unknown(a, 255)),
    case("read-without-segments", |a| a.direct(op::READ, VICTIM, &[])),
    case("write-without-segments", |a| {
        a.direct(op::WRITE, VICTIM, &[])
    }),
    case("segments-12", |a| claim_segments(a, 12)),
    case("segments-255", |a| claim_segments(a, 255)),
    case("first-after-last", |a| part(a, 5, 2)),
    case("last-8", |a| part(a, 0, 8)),
    case("last-255", |a| part(a, 0, 255)),
    case("beyond-the-end", |a| {
        let end = a.parts.session_state.facts().sectors;
        write_evil(a, end.wrapping_sub(4))
    }),
    case("at-the-end", |a| {
        let end = a.parts.session_state.facts().sectors;
        write_evil(a, end)
    }),
    case("sector-2-to-63", |a| write_evil(a, 1 << 63)),
    case("sector-overflow", |a| write_evil(a, u64::MAX - 3)),
    case("bad-grant", |a| {
        a.direct(op::WRITE, VICTIM, &[whole(NO_GRANT)])
    }),
    case("bad-second-grant", |a| {
        let poison = a.poison();
        a.direct(op::WRITE, VICTIM, &[poison, whole(NO_GRANT)])
    }),
    case("foreign-grant", |a| {
        let foreign = a.foreign();
        a.direct(op::WRITE, VICTIM, &[foreign])
    }),
    case("ended-grant", ended_grant),
    case("read-to-read-only-grant", |a| {
        let locked = a.locked();
        a.direct(op::READ, VICTIM, &[locked])
    }),
    case("write-from-read-only-grant", |a| {
        let locked = a.locked();
        a.direct(op::WRITE, ELSEWHERE, &[locked])
    }),
    case("same-grant-twice", |a| {
        let poison = a.poison();
        a.direct(op::WRITE, ELSEWHERE, &[poison, poison])
    }),
    case("same-id-twice", same_id),
    case("response-in-a-full-slot", check_rest_of_slot),
    case("indirect", |a| {
        let poison = [a.poison(); 32];
        indirect(a, op::WRITE, ELSEWHERE, &poison, |request| request)
    }),
    case("indirect-257", |a| claim_indirect(a, 257)),
    case("indirect-4097", |a| claim_indirect(a, 4097)),
    case("indirect-65535", |a| claim_indirect(a, u16::MAX)),
    case("indirect-0", |a| claim_indirect(a, 0)),
    case("indirect-bad-list", |a| {
        let poison = [a.poison(); 16];
        indirect(a, op::WRITE, VICTIM, &poison, |request| IndirectRequest {
            grefs: [NO_GRANT; 8],
            ..request
        })
    }),
    case("indirect-bad-grant", |a| {
        let poison = a.poison();
        let segments = [poison, poison, whole(NO_GRANT), poison];
        indirect(a, op::WRITE, VICTIM, &segments, |request| request)
    }),
    case("indirect-bad-segment", |a| {
        let segments = [a.poison(), a.part_of_poison(3, 8)];
        indirect(a, op::WRITE, VICTIM, &segments, |request| request)
    }),
    case("indirect-flush", |a| nested(a, op::FLUSH_DISKCACHE)),
    case("indirect-indirect", |a| nested(a, op::INDIRECT)),
    case("flush", |a| a.direct(op::FLUSH_DISKCACHE, 0, &[])),
    case("flush-with-data", |a| {
        let poison = a.poison();
        a.direct(op::FLUSH_DISKCACHE, ELSEWHERE, &[poison])
    }),
    case("flush-beyond-the-end", |a| {
        let (poison, end) = (a.poison(), a.parts.session_state.facts().sectors);
        a.direct(op::FLUSH_DISKCACHE, end, &[poison])
    }),
    case("discard-beyond-the-end", |a| {
        let end = a.parts.session_state.facts().sectors;
        discard(a, 0, end.wrapping_sub(8), 16)
    }),
    case("discard-overflow", |a| discard(a, 0, 16, u64::MAX - 7)),
    case("discard-secure", |a| {
        discard(a, DISCARD_SECURE, ELSEWHERE, 8)
    }),
    case("discard-unknown-flag", |a| discard(a, 0x80, ELSEWHERE, 8)),
    case("discard", |a| discard(a, 0, ELSEWHERE, 8)),
    case("flood", |a| {
        flood(a, Status::NotSupported, |a| WireRequest::Unknown {
            operation: 77,
            id: a.next_id(),
        })
    }),
];

/// The cases for a read-only disk, which has no discard.
pub(crate) static READ_ONLY: &[Case] = &[
    case("read-only-write", |a| write_evil(a, VICTIM)),
    case("read-only-indirect-write", |a| {
        let poison = [a.poison(); 16];
        indirect(a, op::WRITE, VICTIM, &poison, |request| request)
    }),
    case("read-only-flush-with-data", |a| {
        let poison = a.poison();
        a.direct(op::FLUSH_DISKCACHE, VICTIM, &[poison])
    }),
    case("read-only-barrier-with-data", |a| {
        let poison = a.poison();
        a.direct(op::WRITE_BARRIER, VICTIM, &[poison])
    }),
    case("read-only-discard", |a| discard(a, 0, VICTIM, 8)),
    case("read-only-flush", |a| a.direct(op::FLUSH_DISKCACHE, 0, &[])),
    case("read-only-read", |a| {
        let poison = a.poison();
        a.direct(op::READ, SCRATCH, &[poison])
    }),
];

fn unknown(a: &mut Session<'_>, operation: u8) -> Outcome {
    let id = a.next_id();
    a.ask(WireRequest::Unknown { operation, id })
}

fn write_evil(a: &mut Session<'_>, sector: u64) -> Outcome {
    let poison = a.poison();
    a.direct(op::WRITE, sector, &[poison])
}

fn part(a: &mut Session<'_>, first: u8, last: u8) -> Outcome {
    let segment = a.part_of_poison(first, last);
    a.direct(op::WRITE, VICTIM, &[segment])
}

/// Sends a write with more segments than a slot has.
fn claim_segments(a: &mut Session<'_>, nr_segments: u8) -> Outcome {
    let poison = [a.poison(); 11];
    let request = a.rw(op::WRITE, VICTIM, &poison);
    a.ask(WireRequest::Rw(RwRequest {
        nr_segments,
        ..request
    }))
}

fn indirect(
    a: &mut Session<'_>,
    operation: u8,
    sector: u64,
    segments: &[WireSegment],
    change: impl FnOnce(IndirectRequest) -> IndirectRequest,
) -> Outcome {
    let request = change(a.indirect(operation, sector, segments));
    a.ask(WireRequest::Indirect(request))
}

/// Sends an indirect write with any number of segments.
fn claim_indirect(a: &mut Session<'_>, nr_segments: u16) -> Outcome {
    let poison = [a.poison(); 16];
    indirect(a, op::WRITE, VICTIM, &poison, |request| IndirectRequest {
        nr_segments,
        ..request
    })
}

/// Sends an indirect request whose operation is neither read nor write.
fn nested(a: &mut Session<'_>, operation: u8) -> Outcome {
    let poison = [a.poison(); 16];
    indirect(a, operation, VICTIM, &poison, |request| request)
}

fn discard(a: &mut Session<'_>, flag: u8, sector: u64, nr_sectors: u64) -> Outcome {
    let (handle, id) = (a.handle(), a.next_id());
    a.ask(WireRequest::Discard(DiscardRequest {
        flag,
        handle,
        id,
        sector,
        nr_sectors,
    }))
}

/// Sends a write from a page whose grant has ended.
fn ended_grant(a: &mut Session<'_>) -> Outcome {
    let Ok(page) = a.grant_page() else {
        return Outcome::Own;
    };
    let segment = whole(page.reference().value());
    drop(page);
    // The reference that was freed last is the next one to be reserved, so nothing else uses it.
    let reserve = GrantReserve::new(1);
    let outcome = a.direct(op::WRITE, VICTIM, &[segment]);
    drop(reserve);
    outcome
}

/// Sends two reads with the same id; each must get a response.
fn same_id(a: &mut Session<'_>) -> Outcome {
    let poison = a.poison();
    let read = WireRequest::Rw(a.rw(op::READ, SCRATCH, &[poison]));
    a.put(&read);
    a.put(&read);
    a.publish();
    for _ in 0..2 {
        match a.take() {
            Ok(response) if response == read.response(Status::Okay) => {}
            Ok(_) => return Outcome::Stray,
            Err(outcome) => return outcome,
        }
    }
    Outcome::Okay
}

/// Sends a read in a full slot; besides the response, the slot must be unchanged or zero.
fn check_rest_of_slot(a: &mut Session<'_>) -> Outcome {
    let (slot, page) = (a.sent, a.many(0));
    let read = WireRequest::Rw(a.rw(op::READ, SCRATCH, &[page; DIRECT_SEGMENTS]));
    a.put(&read);
    let put: [u32; SLOT_WORDS] = a.parts.raw_ring.get(slot);
    a.publish();
    match a.take() {
        Ok(response) if response == read.response(Status::Okay) => {}
        Ok(_) => return Outcome::Stray,
        Err(outcome) => return outcome,
    }
    let now: [u32; SLOT_WORDS] = a.parts.raw_ring.get(slot);
    let mut words = put.iter().zip(now).zip(RESPONSE_BITS);
    if words.all(|((put, now), bits)| now & !bits == put & !bits || now & !bits == 0) {
        Outcome::Okay
    } else {
        Outcome::WrongData
    }
}

/// Sends many reads without segments, each of which is an error.
pub(crate) fn flood_with_reads(a: &mut Session<'_>) -> Outcome {
    flood(a, Status::Error, |a| {
        WireRequest::Rw(a.rw(op::READ, SCRATCH, &[]))
    })
}

/// Sends wrong requests, as many at once as the ring holds; each must get a response.
fn flood(
    a: &mut Session<'_>,
    expected: Status,
    wrong: impl Fn(&mut Session<'_>) -> WireRequest,
) -> Outcome {
    let mut left = FLOOD;
    while left > 0 {
        let batch = left.min(a.parts.raw_ring.slots());
        for _ in 0..batch {
            let request = wrong(a);
            a.put(&request);
        }
        a.publish();
        for _ in 0..batch {
            match a.take() {
                Ok(response) if response.status == expected => {}
                Ok(_) => return Outcome::Stray,
                Err(outcome) => return outcome,
            }
        }
        left = left.wrapping_sub(batch);
    }
    expected.into()
}
