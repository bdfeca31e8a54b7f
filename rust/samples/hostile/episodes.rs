// SPDX-License-Identifier: GPL-2.0-only

//! What is done on a connection, from its start to its end.

use kernel_ext::xen::xenbus::State;

use blkif::wire::{
    op,
    Abi,
    Status,
    WireRequest, //
};

use crate::{
    actor::{
        Actor,
        Pages,
        Parts,
        ELSEWHERE,
        SCRATCH, //
    },
    requests::{
        flood_with_reads,
        Case,
        READ_ONLY,
        WRITABLE, //
    },
    stage::Outcome,
    words::RSP_PROD, //
};

/// Events of a storm.
const STORM: u32 = 10_000;
/// How long to wait between two events without a request.
const EVENT_MS: u32 = 10;
/// How long a request waits for an event that was lost.
const LOST_MS: u32 = 200;
/// How often a ring is filled without a look at the answers.
const ROUNDS: u32 = 10;
/// How often a request is changed while the backend looks at it.
const CHANGES: u32 = 2_000;

/// A connection, and what is done on it.
pub(crate) struct Episode {
    pub(crate) name: &'static str,
    pub(crate) abi: Abi,
    /// Binary logarithm of the ring's pages.
    pub(crate) order: u32,
    /// Whether the backend may keep our pages mapped.
    pub(crate) persistent: bool,
    /// Requests and responses that the ring begins with.
    pub(crate) start: (u32, u32),
    /// Once connected, toggle the state before anything else.
    pub(crate) toggle: bool,
    pub(crate) script: fn(Actor<'_>, &'static str),
}

impl Episode {
    /// Whether its ring is broken, or gone, before the backend looks at it.
    pub(crate) fn is_harsh(&self) -> bool {
        self.start != (0, 0) || self.toggle
    }
}

const fn episode(name: &'static str, script: fn(Actor<'_>, &'static str)) -> Episode {
    Episode {
        name,
        abi: Abi::X86_64,
        order: 0,
        persistent: false,
        start: (0, 0),
        toggle: false,
        script,
    }
}

const fn layout(name: &'static str, abi: Abi, order: u32, persistent: bool) -> Episode {
    Episode {
        abi,
        order,
        persistent,
        ..episode(name, use_whole_ring)
    }
}

/// A ring that makes no sense from the start.
const BORN_BROKEN: Episode = Episode {
    start: (0, 1000),
    ..episode("born-broken", only_check)
};

const END: Episode = episode("end", hold);

/// For a disk that can be written.
pub(crate) static WRITABLE_DISK: &[Episode] = &[
    episode("requests", |actor, _| run_cases(actor, WRITABLE)),
    // Nonsense in and around the ring.
    episode("req-prod-ahead", |actor, name| {
        let slots = actor.parts.words.slots();
        claim_nonsense(actor, name, slots.wrapping_add(1));
    }),
    episode("req-prod-far", |actor, name| {
        claim_nonsense(actor, name, 1 << 31)
    }),
    episode("req-prod-back", |actor, name| {
        claim_nonsense(actor, name, u32::MAX)
    }),
    BORN_BROKEN,
    episode("event-storm", storm),
    episode("lost-event", lose_event),
    episode("answers-left", leave_answers),
    episode("request-changes", change_request),
    episode("pages-withdrawn", withdraw_pages),
    episode("ring-withdrawn", withdraw_ring),
    episode("close-in-flight", close_in_flight),
    Episode {
        toggle: true,
        ..episode("toggle", only_check)
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

/// For a disk that can only be read.
pub(crate) static READ_ONLY_DISK: &[Episode] = &[
    episode("requests", |actor, _| run_cases(actor, READ_ONLY)),
    END,
];

/// For any disk: wrong requests, then events alone.
pub(crate) static TROUBLE: &[Episode] = &[episode("end", trouble)];

/// Each case, and valid requests after it.
fn run_cases(mut actor: Actor<'_>, cases: &[Case]) {
    let before = actor.check_disk();
    actor.parts.stage.report("valid", before, before);
    for case in cases {
        let outcome = (case.run)(&mut actor);
        let after = actor.check_disk();
        actor.parts.stage.report(case.name, outcome, after);
    }
}

/// Valid requests only, until the connection ends.
fn hold(mut actor: Actor<'_>, name: &'static str) {
    let outcome = actor.check_disk();
    actor.parts.stage.report(name, outcome, outcome);
    while !actor.wait(u32::MAX, || actor.is_over()) {}
}

/// Wrong requests, and then events without a request until the connection ends.
fn trouble(mut actor: Actor<'_>, name: &'static str) {
    let outcome = flood_with_reads(&mut actor);
    let after = actor.check_disk();
    actor.parts.stage.report(name, outcome, after);
    while !actor.wait(EVENT_MS, || actor.is_over()) {
        actor.parts.channel.notify();
    }
}

/// Claims so many more requests than were put, after some that were.
fn claim_nonsense(mut actor: Actor<'_>, name: &'static str, more: u32) {
    let before = actor.check_disk();
    actor.claim(actor.sent.wrapping_add(more));
    let outcome = actor.watch_backend();
    actor.parts.stage.report(name, outcome, before);
}

/// Nothing but valid requests: the connection itself was the case.
fn only_check(mut actor: Actor<'_>, name: &'static str) {
    let after = actor.check_disk();
    actor.parts.stage.report(name, Outcome::Done, after);
}

fn storm(mut actor: Actor<'_>, name: &'static str) {
    for _ in 0..STORM {
        actor.parts.channel.notify();
    }
    let after = actor.check_disk();
    actor.parts.stage.report(name, Outcome::Done, after);
}

/// Shows a request without an event, after many events without a request, and sends one later.
fn lose_event(mut actor: Actor<'_>, name: &'static str) {
    for _ in 0..STORM {
        actor.parts.channel.notify();
    }
    let read = actor.rw(op::READ, SCRATCH, &[actor.many(0)]);
    actor.put(&WireRequest::Rw(read));
    actor.show(actor.sent);
    actor.wait(LOST_MS, || actor.is_over());
    actor.parts.channel.notify();
    let outcome = match actor.take() {
        Ok(_) => Outcome::Okay,
        Err(outcome) => outcome,
    };
    let after = actor.check_disk();
    actor.parts.stage.report(name, outcome, after);
}

/// Fills the ring with reads.
fn put_reads(actor: &mut Actor<'_>) {
    for index in 0..actor.parts.words.slots() {
        let read = actor.rw(op::READ, SCRATCH, &[actor.many(index)]);
        actor.put(&WireRequest::Rw(read));
    }
    actor.publish();
}

/// Fills the ring with writes. Their pages may be withdrawn: if the guest uses a grant reference for
/// something else then, a write does no harm to it.
fn put_writes(actor: &mut Actor<'_>) {
    for index in 0..actor.parts.words.slots() {
        let write = actor.rw(op::WRITE, ELSEWHERE, &[actor.many(index)]);
        actor.put(&WireRequest::Rw(write));
    }
    actor.publish();
}

/// Goes on with requests, and takes no answer.
fn leave_answers(mut actor: Actor<'_>, name: &'static str) {
    let mut outcome = Outcome::Okay;
    for _ in 0..ROUNDS {
        put_reads(&mut actor);
        outcome = actor.await_responses(actor.sent);
    }
    actor.answered = actor.sent;
    let after = actor.check_disk();
    actor.parts.stage.report(name, outcome, after);
}

/// Uses every slot more than once, and each form of a request.
fn use_whole_ring(mut actor: Actor<'_>, name: &'static str) {
    let outcome = fill_and_drain(&mut actor);
    let after = actor.check_disk();
    actor.parts.stage.report(name, outcome, after);
}

fn fill_and_drain(actor: &mut Actor<'_>) -> Outcome {
    let outcome = actor.check_indirect();
    if outcome != Outcome::Okay {
        return outcome;
    }
    for _ in 0..2 {
        put_reads(actor);
        for _ in 0..actor.parts.words.slots() {
            match actor.take() {
                Ok(read) if (read.operation, read.status) == (op::READ, Status::Okay) => {}
                Ok(_) => return Outcome::Stray,
                Err(outcome) => return outcome,
            }
        }
    }
    Outcome::Okay
}

/// Changes a request again and again after it was published.
fn change_request(mut actor: Actor<'_>, name: &'static str) {
    let page = actor.evil();
    let mut outcome = Outcome::Done;
    for _ in 0..actor.parts.words.slots() {
        let slot = actor.parts.words.slot(actor.sent);
        let read = actor.rw(op::READ, SCRATCH, &[page]);
        actor.put(&WireRequest::Rw(read));
        let first = actor.ring().load(slot);
        actor.publish();
        for change in 0..CHANGES {
            // The operation and the number of segments.
            let wrong = first ^ (change << 6 & 0xff07);
            actor.ring().store(slot, wrong);
            if actor.ring().load(RSP_PROD) == actor.sent {
                break;
            }
        }
        if let Err(error) = actor.take() {
            outcome = error;
            break;
        }
    }
    let after = actor.check_disk();
    actor.parts.stage.report(name, outcome, after);
}

/// Ends the grants of pages that requests in flight use.
fn withdraw_pages(mut actor: Actor<'_>, name: &'static str) {
    put_writes(&mut actor);
    let outcome = match Pages::new(&actor.parts.device) {
        Ok(pages) => {
            actor.parts.pages = pages;
            actor.await_responses(actor.sent)
        }
        Err(_) => Outcome::Own,
    };
    actor.answered = actor.sent;
    let after = actor.check_disk();
    actor.parts.stage.report(name, outcome, after);
}

/// Ends the grants of the ring while it is in use.
fn withdraw_ring(mut actor: Actor<'_>, name: &'static str) {
    let before = actor.check_disk();
    put_writes(&mut actor);
    let Parts {
        stage,
        words,
        channel,
        ..
    } = actor.parts;
    drop(words);
    channel.notify();
    stage.report(name, Outcome::Done, before);
}

/// Closes, and lets go of everything, with the ring full of requests.
fn close_in_flight(mut actor: Actor<'_>, name: &'static str) {
    let before = actor.check_disk();
    put_writes(&mut actor);
    actor.parts.device.switch_state(State::Closing);
    actor.parts.stage.report(name, Outcome::Done, before);
}
