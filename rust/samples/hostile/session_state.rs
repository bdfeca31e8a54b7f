// SPDX-License-Identifier: GPL-2.0-only

//! State shared by the driver and the threads of its connections: the backend's state and disk, and
//! the report.

use core::fmt::Write;

use kernel::{
    fmt,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Release, //
        },
        new_mutex,
        Arc,
        Mutex, //
    },
    time::msecs_to_jiffies, //
};

use kernel_ext::{
    base::{
        kthread::Current,
        sysfs::Output,
        wait::{
            new_wait_queue,
            WaitQueue, //
        }, //
    },
    xen::{
        events::{
            Eoi,
            Handler, //
        },
        xenbus::XenbusState, //
    },
};

use blkif::wire::Status;

/// Poll interval of a thread, in milliseconds.
const LOOK_MS: u32 = 10;

/// The result of a case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The status was `BLKIF_RSP_OKAY`.
    Okay,
    /// The status was `BLKIF_RSP_ERROR`.
    Error,
    /// The status was `BLKIF_RSP_EOPNOTSUPP`.
    NotSupported,
    /// The response was for another request.
    Stray,
    /// The data is wrong.
    WrongData,
    /// The backend neither responded nor closed.
    Silent,
    /// The backend closed.
    Closing,
    /// The case was run, and has no visible result.
    Done,
    /// The frontend itself failed.
    Own,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Outcome::Okay => "okay",
            Outcome::Error => "error",
            Outcome::NotSupported => "notsupp",
            Outcome::Stray => "stray",
            Outcome::WrongData => "wrong-data",
            Outcome::Silent => "silent",
            Outcome::Closing => "closing",
            Outcome::Done => "done",
            Outcome::Own => "own-failure",
        }
    }
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        match status {
            Status::Okay => Outcome::Okay,
            Status::Error => Outcome::Error,
            Status::NotSupported => Outcome::NotSupported,
        }
    }
}

/// The backend's description of its disk.
#[derive(Clone, Copy, Default)]
pub(crate) struct DiskFacts {
    pub(crate) sectors: u64,
    pub(crate) read_only: bool,
}

/// A line of the report.
struct Line {
    case: &'static str,
    outcome: Outcome,
    /// The result of the valid requests that followed.
    after: Outcome,
}

/// State shared by the driver and the threads of its connections.
#[pin_data]
pub(crate) struct SessionState {
    event: Atomic<bool>,
    /// The last known state of the backend.
    backend: Atomic<u32>,
    #[pin]
    wait: WaitQueue,
    #[pin]
    facts: Mutex<DiskFacts>,
    #[pin]
    lines: Mutex<KVec<Line>>,
}

impl SessionState {
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                event: Atomic::new(false),
                backend: Atomic::new(0),
                wait <- new_wait_queue!(),
                facts <- new_mutex!(DiskFacts::default()),
                lines <- new_mutex!(KVec::new()),
            }),
            GFP_KERNEL,
        )
    }

    /// Records the state of the backend and wakes the thread.
    pub(crate) fn set_backend_state(&self, state: XenbusState) {
        self.backend.store(state.number(), Release);
        self.wait.wake_up();
    }

    /// Returns `true` if the last known state of the backend is this one.
    pub(crate) fn backend_is(&self, state: XenbusState) -> bool {
        self.backend.load(Acquire) == state.number()
    }

    pub(crate) fn set_facts(&self, facts: DiskFacts) {
        *self.facts.lock() = facts;
    }

    pub(crate) fn facts(&self) -> DiskFacts {
        *self.facts.lock()
    }

    /// Sleeps until an event, a state change, or the poll interval is over.
    pub(crate) fn wait(&self, current: &Current) {
        let woken = || self.event.load(Acquire) || current.should_stop();
        let _ = self.wait.wait_timeout(msecs_to_jiffies(LOOK_MS), woken);
        self.event.store(false, Release);
    }

    /// Adds a line to the report.
    pub(crate) fn report(&self, case: &'static str, outcome: Outcome, after: Outcome) {
        let line = Line {
            case,
            outcome,
            after,
        };
        if self.lines.lock().push(line, GFP_KERNEL).is_err() {
            pr_err!("no memory for the result of {}\n", case);
        }
    }

    /// Writes the report: case, outcome, and the outcome of the valid requests that followed.
    pub(crate) fn show(&self, output: &mut Output<'_>) -> fmt::Result {
        for line in self.lines.lock().iter() {
            let (outcome, after) = (line.outcome.name(), line.after.name());
            output.write_fmt(fmt!("{} {} {}\n", line.case, outcome, after))?;
        }
        Ok(())
    }
}

impl Handler for SessionState {
    fn handle(&self) -> Eoi {
        self.event.store(true, Release);
        self.wait.wake_up();
        Eoi::Done
    }
}
