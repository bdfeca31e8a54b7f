// SPDX-License-Identifier: GPL-2.0

//! The thread of a device: lets the disk go, keeps deadlines, gives back memory.
//!
//! # What waits for whom
//!
//! - The device is not served: after [`OUTAGE_MS`] the disk is given up, and what was in flight ends
//!   with an error.
//! - A disk goes while requests are in flight: after [`DRAIN_MS`] they end with an error, once their
//!   pages are ours again.
//! - A backend still uses pages of a request: the request *lingers*. To end it would be to give its
//!   pages to somebody else. It ends when the backend lets go, at the latest when its domain ends.
//! - A disk that has gone is still mapped by the backend: the ring and the pages for data stay until
//!   the backend says that it has closed too, if the device goes for [`UNMAP_MS`] at most. To give
//!   them up earlier is safe, but slow, see [`Queue::bury`](crate::queue::Queue::bury).
//! - The partitions of a new disk are looked for by another thread, and its users are told of its end
//!   by another one: that waits for I/O, and a backend that does not answer must not keep anybody
//!   from ending it.

use blkif::state::FrontEvent;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::sync::Mutex;
use kernel::time::delay::fsleep;
use kernel::time::msecs_to_jiffies;
use kernel::time::Delta;
use kernel::time::Instant;
use kernel::time::Jiffies;
use kernel::time::Monotonic;

use crate::control::Control;
use crate::signal::Cause;
use crate::signal::Signal;

/// How long a disk waits for a backend that is away.
const OUTAGE_MS: i64 = 300_000;
/// How long a disk that goes waits for the answers to its last requests.
const DRAIN_MS: i64 = 5_000;
/// How often is looked whether a drain is over.
const DRAIN_STEP_MS: i64 = 5;
/// How long a device that goes waits until the backend has unmapped its pages.
const UNMAP_MS: i64 = 1_000;
/// How often is looked whether it has.
const UNMAP_STEP_MS: i64 = 10;
/// How often is tried to change limits that somebody else is changing.
const LIMITS_STEP_MS: i64 = 10;
/// How often is looked whether the backend has let go of pages.
const LINGER_STEP_MS: u32 = 100;
/// How often is looked whether a backend is away for too long.
const OUTAGE_STEP_MS: u32 = 10_000;

/// How often pages that nobody needs are looked for, while there may be some.
const SPARE_STEP_MS: u32 = 10_000;
/// How often that is done in vain. A backend need not let go of pages that are granted to stay.
const SPARE_TRIES: u32 = 18;

/// When to look for spare pages.
#[derive(Default)]
struct Spares {
    /// The last look, or when the pool has grown; `None` if there is nothing to look for.
    last: Option<Instant<Monotonic>>,
    /// Looks in a row that have found nothing.
    vain: u32,
}

/// A device, as its thread and xenbus share it.
#[pin_data]
pub(crate) struct Keeper {
    signal: Arc<Signal>,
    #[pin]
    pub(crate) control: Mutex<Control>,
}

impl Keeper {
    pub(crate) fn new(control: Control, signal: Arc<Signal>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                signal,
                control <- new_mutex!(control),
            }),
            GFP_KERNEL,
        )
    }

    /// The life of the device.
    pub(crate) fn run(&self) {
        let mut away = None;
        let mut spares = Spares::default();
        while !self.signal.removed() {
            self.attend();
            self.check_outage(&mut away);
            self.look_for_spares(&mut spares);
            self.signal
                .wait(self.patience(away.is_some() || spares.last.is_some()));
        }

        self.close();
        while self.control.lock().lingers() {
            fsleep(Delta::from_millis(LINGER_STEP_MS.into()));
            self.control.lock().release();
        }
        self.await_unmap();
        self.remove_disk();
    }

    /// How long to sleep if nothing happens. `watching`: for a backend that is away, or for memory.
    fn patience(&self, watching: bool) -> Option<Jiffies> {
        if self.control.lock().lingers() {
            Some(msecs_to_jiffies(LINGER_STEP_MS))
        } else if watching {
            Some(msecs_to_jiffies(OUTAGE_STEP_MS.min(SPARE_STEP_MS)))
        } else {
            None
        }
    }

    /// Deals with what has happened.
    fn attend(&self) {
        if self.signal.take(Cause::Failed) {
            self.control.lock().follow(FrontEvent::Failed);
        }
        if self.signal.take(Cause::NoDiscard) {
            self.control.lock().withdraw_discard();
        }
        if self.signal.take(Cause::Limits) {
            fsleep(Delta::from_millis(LIMITS_STEP_MS));
            self.control.lock().retry_limits();
        }
        // Whether that is so is found out by looking.
        self.signal.take(Cause::Backend);
        self.signal.take(Cause::Close);
        if self.control.lock().must_close() {
            self.close();
        }
        self.control.lock().release();
        self.remove_disk();
        self.bury();
    }

    /// Gives up a disk that is not served for too long. `away` is since when it is not.
    fn check_outage(&self, away: &mut Option<Instant<Monotonic>>) {
        let mut control = self.control.lock();
        if control.is_settled() {
            *away = None;
            return;
        }
        let since = *away.get_or_insert_with(Instant::now);
        if since.elapsed().as_millis() < OUTAGE_MS {
            return;
        }
        *away = Some(Instant::now());
        let disk = control.has_disk();
        if disk {
            pr_err!("{}: the backend is away for too long\n", control.name());
        }
        control.follow(FrontEvent::Deadline { disk });
    }

    /// Gives back pages that nobody needs any more.
    fn look_for_spares(&self, spares: &mut Spares) {
        if self.signal.take(Cause::Grown) {
            spares.vain = 0;
            spares.last.get_or_insert_with(Instant::now);
        }
        let due = |last: &Instant<Monotonic>| last.elapsed().as_millis() >= SPARE_STEP_MS.into();
        if !spares.last.as_ref().is_some_and(due) {
            return;
        }
        let found = self.control.lock().give_back_spare();
        spares.vain = if found.freed {
            0
        } else {
            spares.vain.wrapping_add(1)
        };
        let go_on = found.grown && spares.vain < SPARE_TRIES;
        spares.last = go_on.then(Instant::now);
    }

    /// Lets the disk go. What is in flight gets a while to be answered, and fails then.
    fn close(&self) {
        if self.control.lock().begin_close() {
            self.drain();
        }
        self.control.lock().finish_close();
        self.signal.settle();
    }

    fn drain(&self) {
        let start = Instant::<Monotonic>::now();
        while !self.control.lock().is_drained() {
            if start.elapsed().as_millis() >= DRAIN_MS {
                let control = self.control.lock();
                pr_warn!(
                    "{}: the backend does not answer, requests fail\n",
                    control.name()
                );
                return;
            }
            fsleep(Delta::from_millis(DRAIN_STEP_MS));
        }
    }

    /// Frees what the backend has had mapped of a disk that has gone, if it has let go of it. Whether
    /// nothing is left.
    fn bury(&self) -> bool {
        let control = self.control.lock();
        let mapped = control.is_mapped();
        if !mapped {
            control.bury();
        }
        !mapped
    }

    /// Gives the backend the time to let go of what it has mapped.
    fn await_unmap(&self) {
        let start = Instant::<Monotonic>::now();
        while !self.bury() && start.elapsed().as_millis() < UNMAP_MS {
            fsleep(Delta::from_millis(UNMAP_STEP_MS));
        }
        self.control.lock().bury();
    }

    /// Removes a disk that is dead, if all its requests have ended.
    fn remove_disk(&self) {
        let (disk, helpers) = self.control.lock().take_disk();
        // Waits for the openers that are inside of the block layer, whose requests fail.
        drop(disk);
        for helper in helpers.into_iter().flatten() {
            while !helper.join(msecs_to_jiffies(OUTAGE_STEP_MS)) {
                pr_warn!(
                    "{}: the disk is still being added or told to end\n",
                    self.control.lock().name()
                );
            }
        }
    }
}
