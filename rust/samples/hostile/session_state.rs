// SPDX-License-Identifier: GPL-2.0-only

//! What the driver and the thread of a connection share: what the backend is and does, and what the
//! thread has seen.

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
        xenbus::State, //
    },
};

use blkif::wire::Status;

/// How long a thread sleeps before it looks again by itself.
const LOOK_MS: u32 = 10;

/// What came of a case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The response says that it is done.
    Okay,
    /// The response says that it failed.
    Error,
    /// The response says that there is no such operation.
    NotSupported,
    /// The response is one to another request.
    Stray,
    /// The data is not what it should be.
    WrongData,
    /// The backend does not answer, and does not close either.
    Silent,
    /// The backend closes.
    Closing,
    /// It was tried, and there is nothing to be seen of it.
    Done,
    /// Something of our own failed.
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

/// What the backend says of its disk.
#[derive(Clone, Copy, Default)]
pub(crate) struct DiskFacts {
    pub(crate) sectors: u64,
    pub(crate) read_only: bool,
}

/// A line of the report.
struct Line {
    case: &'static str,
    outcome: Outcome,
    /// How the valid requests went that followed.
    after: Outcome,
}

/// Shared by the driver and the threads of its connections, one after another.
#[pin_data]
pub(crate) struct SessionState {
    event: Atomic<bool>,
    /// The backend's state, when we set_backend_state of it last.
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

    /// The backend is in this state now.
    pub(crate) fn set_backend_state(&self, state: State) {
        self.backend.store(state.number(), Release);
        self.wait.wake_up();
    }

    /// Whether the backend is in this state, as far as we set_backend_state.
    pub(crate) fn backend_is(&self, state: State) -> bool {
        self.backend.load(Acquire) == state.number()
    }

    pub(crate) fn set_facts(&self, facts: DiskFacts) {
        *self.facts.lock() = facts;
    }

    pub(crate) fn facts(&self) -> DiskFacts {
        *self.facts.lock()
    }

    /// Sleeps until something may have changed, or it is time to look anyway.
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

    /// The report: case, outcome, and how the valid requests went that followed.
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
