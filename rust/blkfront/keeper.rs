// SPDX-License-Identifier: GPL-2.0-only

//! The thread of a device: lets the disk go, keeps deadlines, gives back memory.
//!
//! # What waits for whom
//!
//! - The device is not served: after the module parameter `reconnect_timeout` the disk is given up, and
//!   what was in flight ends with an error.
//! - The device cannot connect for now: it tries again until then, see [`retry`](crate::retry).
//! - A request is not answered: see [`timeout`](crate::timeout).
//! - A disk is detached or unbound while its backend serves it: it is written back first, file systems
//!   and page cache. That ends when the backend leaves, or has answered nothing for the time that
//!   the parameter `detach_timeout` says, and then what was not written fails. It does not end for a
//!   backend that is slow and answers.
//! - A disk is detached that is swapped to or part of another device, which could not be written back: the
//!   toolstack waits until that has ended, or forces it.
//! - A disk goes for another reason while requests are in flight: after [`DRAIN_MS`] they end with an
//!   error, once their pages are ours again.
//! - A backend still uses pages of a request: the request *lingers*. To end it would be to give its
//!   pages to somebody else. It ends when the backend lets go, at the latest when its domain ends.
//! - A disk that has gone is still mapped by the backend: the ring and the pages for data stay until
//!   the backend says that it has closed too, if the device goes for [`UNMAP_MS`] at most. To give
//!   them up earlier is safe, but slow, see [`Queue::bury`](crate::queue::Queue::bury).
//! - The partitions of a new disk are looked for by another thread, it is written back by another
//!   one, and its users are told of its end by a third: that waits for I/O, and a backend that does
//!   not answer must not keep this thread from ending it.
//! - A disk that was removed is still open: disk and device numbers stay until it is closed. The device
//!   does not wait for that.

use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    time::{
        delay::fsleep,
        msecs_to_jiffies,
        Delta,
        Instant,
        Jiffies,
        Monotonic, //
    }, //
};

use kernel_ext::{
    base::{
        kthread::KThread,
        memalloc::NoioScope, //
    },
    block::mq::GenDisk,
    xen::xenstore::{
        Watch,
        WatchHandler, //
    },
};

use blkif::state::FrontEvent;

use crate::{
    control::Control,
    disk::Disk,
    params,
    registry::Registered,
    signal::{
        Cause,
        Signal, //
    }, //
};

/// How long a disk that goes waits for the answers to its last requests.
const DRAIN_MS: i64 = 5_000;
/// How often is looked whether a drain is over.
const DRAIN_STEP_MS: i64 = 5;
/// How often the backend is looked at while a disk is written back.
const SYNC_STEP_MS: u32 = 100;
/// How long a device that goes waits until the backend has unmapped its pages.
const UNMAP_MS: i64 = 1_000;
/// How often is looked whether it has.
const UNMAP_STEP_MS: i64 = 10;
/// How often is tried to change limits that somebody else is changing.
const LIMITS_STEP_MS: i64 = 10;
/// How often is looked whether the backend has let go of pages.
const LINGER_STEP_MS: u32 = 100;
/// How often is looked whether a backend is away for too long, at least and at most.
const OUTAGE_STEP_MS: u32 = 10_000;
const OUTAGE_LEAST_MS: u32 = 100;

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
    /// Has xenbus's thread try to connect again.
    #[pin]
    attempt: Mutex<Option<Watch<Keeper>>>,
}

impl WatchHandler for Keeper {
    /// Called once, in xenbus's thread, because the watch was made.
    fn changed(&self) {
        let _noio = NoioScope::new();
        self.control.lock().retry();
        let watch = self.attempt.lock().take();
        drop(watch);
    }
}

impl Keeper {
    pub(crate) fn new(control: Control, signal: Arc<Signal>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                signal,
                control <- new_mutex!(control),
                attempt <- new_mutex!(None),
            }),
            GFP_KERNEL,
        )
    }

    /// The life of the device.
    pub(crate) fn run(this: &Arc<Self>) {
        let mut open = None;
        this.live(&mut open);
        this.end(&mut open);
    }

    fn live(self: &Arc<Self>, open: &mut Option<RemovedDisk>) {
        let mut away = None;
        let mut spares = Spares::default();
        while !self.signal.removed() {
            self.attend(open);
            self.try_again();
            self.check_outage(&mut away);
            self.look_for_spares(&mut spares);
            self.signal
                .wait(self.patience(&away, spares.last.is_some()));
        }
    }

    fn end(&self, open: &mut Option<RemovedDisk>) {
        self.close();
        while self.control.lock().lingers() {
            fsleep(Delta::from_millis(LINGER_STEP_MS.into()));
            self.control.lock().release();
        }
        self.await_unmap();
        self.remove_disk(open);
        self.signal.finish();
        while open.is_some() {
            self.signal.await_cause(Cause::Released);
            drop_closed(open);
        }
    }

    /// How long to sleep if nothing happens. `away` is since when the backend is; `spares`: pages are
    /// looked for that nobody needs.
    fn patience(&self, away: &Option<Instant<Monotonic>>, spares: bool) -> Option<Jiffies> {
        let control = self.control.lock();
        let left = |since: &Instant<Monotonic>| {
            let left = params::reconnect_timeout_ms().saturating_sub(since.elapsed().as_millis());
            left.clamp(OUTAGE_LEAST_MS.into(), OUTAGE_STEP_MS.into()) as u32
        };
        let times = [
            control.lingers().then_some(LINGER_STEP_MS),
            control
                .retry_wait_ms()
                .map(|wait| wait.min(OUTAGE_STEP_MS.into()) as u32),
            away.as_ref().map(left),
            spares.then_some(SPARE_STEP_MS),
            control.waits().then_some(OUTAGE_STEP_MS),
        ];
        times.into_iter().flatten().min().map(msecs_to_jiffies)
    }

    /// Has xenbus's thread connect again, if it is time: it is the one that deals with Initialising.
    fn try_again(self: &Arc<Self>) {
        if !self.control.lock().take_retry() {
            return;
        }
        let mut attempt = self.attempt.lock();
        if attempt.is_some() {
            // The last one was not made yet.
            return;
        }
        match Watch::new(c"domid", fmt!(""), self.clone()) {
            Ok(watch) => *attempt = Some(watch),
            Err(error) => {
                drop(attempt);
                self.control.lock().put_off(error);
            }
        }
    }

    /// Deals with what has happened.
    fn attend(&self, open: &mut Option<RemovedDisk>) {
        if self.signal.take(Cause::Failed) {
            self.control.lock().follow(FrontEvent::Failed);
        }
        if self.signal.take(Cause::NoDiscard) {
            self.control.lock().withdraw_discard();
        }
        if self.signal.take(Cause::TimedOut) {
            self.check_rings();
        }
        if self.signal.take(Cause::Shortage) {
            self.control.lock().give_back_unused();
        }
        if self.signal.take(Cause::Limits) {
            fsleep(Delta::from_millis(LIMITS_STEP_MS));
            self.control.lock().retry_limits();
        }
        // Whether that is so is found out by looking.
        self.signal.take(Cause::Backend);
        self.signal.take(Cause::Close);
        self.signal.take(Cause::Released);
        self.control.lock().retry_detach();
        if self.control.lock().must_close() {
            self.close();
        }
        self.control.lock().release();
        self.remove_disk(open);
        drop_closed(open);
        self.bury();
    }

    /// Makes up for lost events, and gives up a connection without answers.
    fn check_rings(&self) {
        for number in 0.. {
            let queue = self.control.lock().ring(number);
            let Some(queue) = queue else { break };
            queue.check_ring();
        }
        self.control.lock().drop_stalled();
    }

    /// Gives up a disk that is not served for too long. `away` is since when it is not.
    fn check_outage(&self, away: &mut Option<Instant<Monotonic>>) {
        let mut control = self.control.lock();
        if control.is_settled() {
            *away = None;
            return;
        }
        let since = *away.get_or_insert_with(Instant::now);
        if since.elapsed().as_millis() < params::reconnect_timeout_ms() {
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

    /// Ends the connection, and the disk with it.
    fn close(&self) {
        let patient = self.write_back();
        if self.control.lock().begin_close() && patient {
            self.drain();
        }
        self.control.lock().finish_close();
        self.signal.settle();
    }

    /// Has the disk written back and removed, if that is due. Returns `true` if requests that are still
    /// in flight may be answered soon.
    fn write_back(&self) -> bool {
        let (served, remover) = {
            let mut control = self.control.lock();
            (control.is_served(), control.begin_remove())
        };
        let Some(remover) = remover else {
            return served;
        };
        self.signal.set_syncing(true);
        let removed = self.await_removal(&remover);
        self.signal.set_syncing(false);
        self.control.lock().keep_remover(remover);
        removed
    }

    /// Waits until the disk is written back and removed. Returns `false` if the backend does not serve
    /// the disk any more.
    fn await_removal(&self, remover: &KThread) -> bool {
        let mut last = (self.control.lock().answered(), Instant::<Monotonic>::now());
        while !remover.join(msecs_to_jiffies(SYNC_STEP_MS)) {
            let control = self.control.lock();
            let answered = control.answered();
            if answered != last.0 {
                last = (answered, Instant::now());
            }
            if !control.is_served() {
                pr_err!(
                    "{}: the backend left while the disk was written back: data may be lost\n",
                    control.name()
                );
                return false;
            }
            if last.1.elapsed().as_millis() >= params::detach_timeout_ms() {
                pr_err!(
                    "{}: the backend does not answer while the disk is written back: data may be lost (see detach_timeout)\n",
                    control.name()
                );
                return false;
            }
        }
        true
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
        if !mapped && control.is_dead() {
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

    /// Removes a disk that is dead, if all its requests have ended. Goes on in `open` if it is still
    /// open.
    fn remove_disk(&self, open: &mut Option<RemovedDisk>) {
        let Some((disk, threads, registered)) = self.control.lock().take_disk() else {
            return;
        };
        for thread in threads.into_iter().flatten() {
            while !thread.join(msecs_to_jiffies(OUTAGE_STEP_MS)) {
                pr_warn!(
                    "{}: the disk is still being added or told to end\n",
                    self.control.lock().name()
                );
            }
        }
        // Waits for the openers that are inside of the block layer, whose requests fail.
        disk.remove();
        disk.queue_data().await_release();
        *open = Some((disk, registered));
        drop_closed(open);
    }
}

/// A disk that was removed, and the place in the list of disks that it keeps.
type RemovedDisk = (Arc<GenDisk<Disk>>, Option<Registered>);

/// Drops a removed disk that is not open any more.
fn drop_closed(open: &mut Option<RemovedDisk>) {
    if (open.as_ref()).is_some_and(|(disk, _)| disk.openers() == 0) {
        *open = None;
    }
}
