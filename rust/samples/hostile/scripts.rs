// SPDX-License-Identifier: GPL-2.0-only

//! The scripts: the actions of a connection from start to end.

use kernel_ext::xen::xenbus::XenbusState;

use blkif::wire::{
    op,
    Abi,
    Status,
    WireRequest, //
};

use crate::{
    raw_ring::RSP_PROD,
    requests::{
        flood_with_reads,
        Case,
        READ_ONLY,
        WRITABLE, //
    },
    session::{
        Pages,
        Parts,
        Session,
        ELSEWHERE,
        SCRATCH, //
    },
    session_state::Outcome, //
};

/// Number of events in the event storm.
const STORM: u32 = 10_000;
/// Pause between two events without a request, in milliseconds.
const EVENT_MS: u32 = 10;
/// Time for which a request waits for a lost event, in milliseconds.
const LOST_MS: u32 = 200;
/// Number of times that the ring is filled without reading responses.
const ROUNDS: u32 = 10;
/// Number of times that a request is changed while the backend reads it.
const CHANGES: u32 = 2_000;

/// A connection and its actions.
pub(crate) struct Script {
    pub(crate) name: &'static str,
    pub(crate) abi: Abi,
    /// Binary logarithm of the ring's pages.
    pub(crate) order: u32,
    /// Offers persistent grants.
    pub(crate) persistent: bool,
    /// Initial producer indices of requests and responses.
    pub(crate) start: (u32, u32),
    /// Toggles the state after connecting.
    pub(crate) toggle: bool,
    pub(crate) run: fn(Session<'_>, &'static str),
}

impl Script {
    /// Returns `true` if the ring is broken or withdrawn before the backend reads it.
    pub(crate) fn is_harsh(&self) -> bool {
        self.start != (0, 0) || self.toggle
    }
}

const fn script(name: &'static str, run: fn(Session<'_>, &'static str)) -> Script {
    Script {
        name,
        abi: Abi::X86_64,
        order: 0,
        persistent: false,
        start: (0, 0),
        toggle: false,
        run,
    }
}

const fn layout(name: &'static str, abi: Abi, order: u32, persistent: bool) -> Script {
    Script {
        abi,
        order,
        persistent,
        ..script(name, use_whole_ring)
    }
}

/// A ring whose indices are invalid from the start.
const BORN_BROKEN: Script = Script {
    start: (0, 1000),
    ..script("born-broken", only_check)
};

const END: Script = script("end", hold);

/// The scripts for a writable disk.
pub(crate) static WRITABLE_DISK: &[Script] = &[
    script("requests", |session, _| run_cases(session, WRITABLE)),
    // Invalid indices, events, and changes of the ring while it is in use.
    script("req-prod-ahead", |session, name| {
        let slots = session.parts.raw_ring.slots();
        claim_requests(session, name, slots.wrapping_add(1));
    }),
    script("req-prod-far", |session, name| {
        claim_requests(session, name, 1 << 31)
    }),
    script("req-prod-back", |session, name| {
        claim_requests(session, name, u32::MAX)
    }),
    BORN_BROKEN,
    script("event-storm", storm),
    script("lost-event", lose_event),
    script("responses-left", leave_responses),
    script("request-changes", change_request),
    script("pages-withdrawn", withdraw_pages),
    script("ring-withdrawn", withdraw_ring),
    script("close-in-flight", close_in_flight),
    Script {
        toggle: true,
        ..script("toggle", only_check)
    },
    // Rings of every size and layout.
    layout("x86_32-abi-0", Abi::X86_32, 0, false),
    layout("x86_32-abi-1", Abi::X86_32, 1, true),
    layout("x86_32-abi-2", Abi::X86_32, 2, false),
    layout("x86_32-abi-3", Abi::X86_32, 3, true),
    layout("x86_32-abi-4", Abi::X86_32, 4, false),
    layout("x86_64-abi-1", Abi::X86_64, 1, false),
    layout("x86_64-abi-4", Abi::X86_64, 4, true),
    layout("arm-abi-0", Abi::Arm, 0, false),
    END,
];

/// The scripts for a read-only disk.
pub(crate) static READ_ONLY_DISK: &[Script] = &[
    script("requests", |session, _| run_cases(session, READ_ONLY)),
    END,
];

/// The script for any disk: wrong requests, then events without requests.
pub(crate) static TROUBLE: &[Script] = &[script("end", trouble)];

/// Runs each case, and valid requests after it.
fn run_cases(mut session: Session<'_>, cases: &[Case]) {
    let before = session.check_disk();
    session.parts.session_state.report("valid", before, before);
    for case in cases {
        let outcome = (case.run)(&mut session);
        let after = session.check_disk();
        session
            .parts
            .session_state
            .report(case.name, outcome, after);
    }
}

/// Sends valid requests, then waits until the connection ends.
fn hold(mut session: Session<'_>, name: &'static str) {
    let outcome = session.check_disk();
    session.parts.session_state.report(name, outcome, outcome);
    while !session.wait(u32::MAX, || session.is_closing()) {}
}

/// Sends wrong requests, then events without requests until the connection ends.
fn trouble(mut session: Session<'_>, name: &'static str) {
    let outcome = flood_with_reads(&mut session);
    let after = session.check_disk();
    session.parts.session_state.report(name, outcome, after);
    while !session.wait(EVENT_MS, || session.is_closing()) {
        session.parts.channel.notify();
    }
}

/// Publishes more requests than were written, after some valid ones.
fn claim_requests(mut session: Session<'_>, name: &'static str, more: u32) {
    let before = session.check_disk();
    session.claim(session.sent.wrapping_add(more));
    let outcome = session.watch_backend();
    session.parts.session_state.report(name, outcome, before);
}

/// Sends valid requests only, because the connection itself is the case.
fn only_check(mut session: Session<'_>, name: &'static str) {
    let after = session.check_disk();
    session
        .parts
        .session_state
        .report(name, Outcome::Done, after);
}

fn storm(mut session: Session<'_>, name: &'static str) {
    for _ in 0..STORM {
        session.parts.channel.notify();
    }
    let after = session.check_disk();
    session
        .parts
        .session_state
        .report(name, Outcome::Done, after);
}

/// Sends many events without a request, then a request without an event, and the event later.
fn lose_event(mut session: Session<'_>, name: &'static str) {
    for _ in 0..STORM {
        session.parts.channel.notify();
    }
    let read = session.rw(op::READ, SCRATCH, &[session.many(0)]);
    session.put(&WireRequest::Rw(read));
    session.show(session.sent);
    session.wait(LOST_MS, || session.is_closing());
    session.parts.channel.notify();
    let outcome = match session.take() {
        Ok(_) => Outcome::Okay,
        Err(outcome) => outcome,
    };
    let after = session.check_disk();
    session.parts.session_state.report(name, outcome, after);
}

/// Fills the ring with reads.
fn put_reads(session: &mut Session<'_>) {
    for index in 0..session.parts.raw_ring.slots() {
        let read = session.rw(op::READ, SCRATCH, &[session.many(index)]);
        session.put(&WireRequest::Rw(read));
    }
    session.publish();
}

/// Fills the ring with writes.
///
/// Their pages may be withdrawn: if the guest reuses a grant reference then, a write only reads the
/// page.
fn put_writes(session: &mut Session<'_>) {
    for index in 0..session.parts.raw_ring.slots() {
        let write = session.rw(op::WRITE, ELSEWHERE, &[session.many(index)]);
        session.put(&WireRequest::Rw(write));
    }
    session.publish();
}

/// Sends requests without reading responses.
fn leave_responses(mut session: Session<'_>, name: &'static str) {
    let mut outcome = Outcome::Okay;
    for _ in 0..ROUNDS {
        put_reads(&mut session);
        outcome = session.await_responses(session.sent);
    }
    session.received = session.sent;
    let after = session.check_disk();
    session.parts.session_state.report(name, outcome, after);
}

/// Uses every slot more than once, with each kind of request.
fn use_whole_ring(mut session: Session<'_>, name: &'static str) {
    let outcome = fill_and_drain(&mut session);
    let after = session.check_disk();
    session.parts.session_state.report(name, outcome, after);
}

fn fill_and_drain(session: &mut Session<'_>) -> Outcome {
    let outcome = session.check_indirect();
    if outcome != Outcome::Okay {
        return outcome;
    }
    for _ in 0..2 {
        put_reads(session);
        for _ in 0..session.parts.raw_ring.slots() {
            match session.take() {
                Ok(read) if (read.operation, read.status) == (op::READ, Status::Okay) => {}
                Ok(_) => return Outcome::Stray,
                Err(outcome) => return outcome,
            }
        }
    }
    Outcome::Okay
}

/// Changes a request repeatedly after it was published.
fn change_request(mut session: Session<'_>, name: &'static str) {
    let page = session.poison();
    let mut outcome = Outcome::Done;
    for _ in 0..session.parts.raw_ring.slots() {
        let slot = session.parts.raw_ring.slot(session.sent);
        let read = session.rw(op::READ, SCRATCH, &[page]);
        session.put(&WireRequest::Rw(read));
        let first = session.ring().load(slot);
        session.publish();
        for change in 0..CHANGES {
            // The operation and the number of segments.
            let wrong = first ^ (change << 6 & 0xff07);
            session.ring().store(slot, wrong);
            if session.ring().load(RSP_PROD) == session.sent {
                break;
            }
        }
        if let Err(error) = session.take() {
            outcome = error;
            break;
        }
    }
    let after = session.check_disk();
    session.parts.session_state.report(name, outcome, after);
}

/// Ends the grants of pages that requests in flight use.
fn withdraw_pages(mut session: Session<'_>, name: &'static str) {
    put_writes(&mut session);
    let outcome = match Pages::new(&session.parts.device) {
        Ok(pages) => {
            session.parts.pages = pages;
            session.await_responses(session.sent)
        }
        Err(_) => Outcome::Own,
    };
    session.received = session.sent;
    let after = session.check_disk();
    session.parts.session_state.report(name, outcome, after);
}

/// Ends the grants of the ring while it is in use.
fn withdraw_ring(mut session: Session<'_>, name: &'static str) {
    let before = session.check_disk();
    put_writes(&mut session);
    let Parts {
        session_state,
        raw_ring,
        channel,
        ..
    } = session.parts;
    drop(raw_ring);
    channel.notify();
    session_state.report(name, Outcome::Done, before);
}

/// Closes and frees everything while the ring is full of requests.
fn close_in_flight(mut session: Session<'_>, name: &'static str) {
    let before = session.check_disk();
    put_writes(&mut session);
    session.parts.device.switch_state(XenbusState::Closing);
    session
        .parts
        .session_state
        .report(name, Outcome::Done, before);
}
