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
//!   them up earlier is safe, but slow, see [`Queue::free_stale_grants`](crate::queue::Queue::free_stale_grants).
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
    device::Device,
    events::{
        DeviceEvents,
        Event, //
    },
    params,
    registry::Registered,
    request_data::BlkfrontOps, //
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
const RELEASE_STEP_MS: u32 = 100;
/// How often is looked whether a backend is away for too long, at least and at most.
const OUTAGE_STEP_MS: u32 = 10_000;
const OUTAGE_MIN_STEP_MS: u32 = 100;

/// How often pages that nobody needs are looked for, while there may be some.
const TRIM_INTERVAL_MS: u32 = 10_000;
/// How often that is done in vain. A backend need not let go of pages that are granted to stay.
const MAX_IDLE_SCANS: u32 = 18;

/// When to look for spare pages.
#[derive(Default)]
struct TrimTimer {
    /// The last look, or when the pool has grown; `None` if there is nothing to look for.
    last: Option<Instant<Monotonic>>,
    /// Looks in a row that have found nothing.
    idle_scans: u32,
}

/// A device, as its thread and xenbus share it.
#[pin_data]
pub(crate) struct DeviceWorker {
    events: Arc<DeviceEvents>,
    #[pin]
    pub(crate) device: Mutex<Device>,
    /// Has xenbus's thread try to connect again.
    #[pin]
    retry_watch: Mutex<Option<Watch<DeviceWorker>>>,
}

impl WatchHandler for DeviceWorker {
    /// Called once, in xenbus's thread, because the watch was made.
    fn changed(&self) {
        let _noio = NoioScope::new();
        self.device.lock().retry();
        let watch = self.retry_watch.lock().take();
        drop(watch);
    }
}

impl DeviceWorker {
    pub(crate) fn new(device: Device, events: Arc<DeviceEvents>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                events,
                device <- new_mutex!(device),
                retry_watch <- new_mutex!(None),
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
        let mut disconnected_since = None;
        let mut trim = TrimTimer::default();
        while !self.events.is_removing() {
            self.handle_events(open);
            self.retry_connect();
            self.check_outage(&mut disconnected_since);
            self.trim_pools(&mut trim);
            self.events
                .wait(self.wait_timeout(&disconnected_since, trim.last.is_some()));
        }
    }

    fn end(&self, open: &mut Option<RemovedDisk>) {
        self.close();
        while self.device.lock().has_granted_requests() {
            fsleep(Delta::from_millis(RELEASE_STEP_MS.into()));
            self.device.lock().end_released();
        }
        self.await_unmap();
        self.remove_disk(open);
        self.events.finish();
        while open.is_some() {
            self.events.wait_for(Event::Released);
            drop_closed(open);
        }
    }

    /// How long to sleep if nothing happens. `disconnected_since` is since when the backend is; `spares`: pages are
    /// looked for that nobody needs.
    fn wait_timeout(
        &self,
        disconnected_since: &Option<Instant<Monotonic>>,
        trim: bool,
    ) -> Option<Jiffies> {
        let device = self.device.lock();
        let left = |since: &Instant<Monotonic>| {
            let left = params::reconnect_timeout_ms().saturating_sub(since.elapsed().as_millis());
            left.clamp(OUTAGE_MIN_STEP_MS.into(), OUTAGE_STEP_MS.into()) as u32
        };
        let times = [
            device.has_granted_requests().then_some(RELEASE_STEP_MS),
            device
                .retry_wait_ms()
                .map(|wait| wait.min(OUTAGE_STEP_MS.into()) as u32),
            disconnected_since.as_ref().map(left),
            trim.then_some(TRIM_INTERVAL_MS),
            device.is_detach_deferred().then_some(OUTAGE_STEP_MS),
        ];
        times.into_iter().flatten().min().map(msecs_to_jiffies)
    }

    /// Has xenbus's thread connect again, if it is time: it is the one that deals with Initialising.
    fn retry_connect(self: &Arc<Self>) {
        if !self.device.lock().take_retry() {
            return;
        }
        let mut retry_watch = self.retry_watch.lock();
        if retry_watch.is_some() {
            // The last one was not made yet.
            return;
        }
        match Watch::new(c"domid", fmt!(""), self.clone()) {
            Ok(watch) => *retry_watch = Some(watch),
            Err(error) => {
                drop(retry_watch);
                self.device.lock().postpone_retry(error);
            }
        }
    }

    /// Deals with what has happened.
    fn handle_events(&self, open: &mut Option<RemovedDisk>) {
        if self.events.take(Event::Failed) {
            self.device.lock().handle_event(FrontEvent::Failed);
        }
        if self.events.take(Event::NoDiscard) {
            self.device.lock().withdraw_discard();
        }
        if self.events.take(Event::TimedOut) {
            self.check_rings();
        }
        if self.events.take(Event::Shortage) {
            self.device.lock().trim_unused();
        }
        if self.events.take(Event::Limits) {
            fsleep(Delta::from_millis(LIMITS_STEP_MS));
            self.device.lock().retry_limits();
        }
        // Whether that is so is found out by looking.
        self.events.take(Event::Backend);
        self.events.take(Event::Close);
        self.events.take(Event::Released);
        self.device.lock().retry_detach();
        if self.device.lock().must_close() {
            self.close();
        }
        self.device.lock().end_released();
        self.remove_disk(open);
        drop_closed(open);
        self.free_stale_grants();
    }

    /// Makes up for lost events, and gives up a connection without answers.
    fn check_rings(&self) {
        for number in 0.. {
            let queue = self.device.lock().ring(number);
            let Some(queue) = queue else { break };
            queue.check_ring();
        }
        self.device.lock().drop_stalled();
    }

    /// Gives up a disk that is not served for too long. `disconnected_since` is since when it is not.
    fn check_outage(&self, disconnected_since: &mut Option<Instant<Monotonic>>) {
        let mut device = self.device.lock();
        if device.is_connected_or_dead() {
            *disconnected_since = None;
            return;
        }
        let since = *disconnected_since.get_or_insert_with(Instant::now);
        if since.elapsed().as_millis() < params::reconnect_timeout_ms() {
            return;
        }
        *disconnected_since = Some(Instant::now());
        let disk = device.has_disk();
        if disk {
            pr_err!("{}: the backend is away for too long\n", device.name());
        }
        device.handle_event(FrontEvent::Deadline { disk });
    }

    /// Gives back pages that nobody needs any more.
    fn trim_pools(&self, trim: &mut TrimTimer) {
        if self.events.take(Event::PoolGrown) {
            trim.idle_scans = 0;
            trim.last.get_or_insert_with(Instant::now);
        }
        let due = |last: &Instant<Monotonic>| last.elapsed().as_millis() >= TRIM_INTERVAL_MS.into();
        if !trim.last.as_ref().is_some_and(due) {
            return;
        }
        let found = self.device.lock().trim_pool();
        trim.idle_scans = if found.freed {
            0
        } else {
            trim.idle_scans.wrapping_add(1)
        };
        let go_on = found.grown && trim.idle_scans < MAX_IDLE_SCANS;
        trim.last = go_on.then(Instant::now);
    }

    /// Ends the connection, and the disk with it.
    fn close(&self) {
        let patient = self.write_back();
        if self.device.lock().begin_close() && patient {
            self.drain();
        }
        self.device.lock().finish_close();
        self.events.mark_ready();
    }

    /// Has the disk written back and removed, if that is due. Returns `true` if requests that are still
    /// in flight may be answered soon.
    fn write_back(&self) -> bool {
        let (served, remove_thread) = {
            let mut device = self.device.lock();
            (device.is_served(), device.begin_remove())
        };
        let Some(remove_thread) = remove_thread else {
            return served;
        };
        self.events.set_syncing(true);
        let removed = self.await_removal(&remove_thread);
        self.events.set_syncing(false);
        self.device.lock().store_remove_thread(remove_thread);
        removed
    }

    /// Waits until the disk is written back and removed. Returns `false` if the backend does not serve
    /// the disk any more.
    fn await_removal(&self, remove_thread: &KThread) -> bool {
        let mut last = (self.device.lock().responses(), Instant::<Monotonic>::now());
        while !remove_thread.join(msecs_to_jiffies(SYNC_STEP_MS)) {
            let device = self.device.lock();
            let answered = device.responses();
            if answered != last.0 {
                last = (answered, Instant::now());
            }
            if !device.is_served() {
                pr_err!(
                    "{}: the backend left while the disk was written back: data may be lost\n",
                    device.name()
                );
                return false;
            }
            if last.1.elapsed().as_millis() >= params::detach_timeout_ms() {
                pr_err!(
                    "{}: the backend does not answer while the disk is written back: data may be lost (see detach_timeout)\n",
                    device.name()
                );
                return false;
            }
        }
        true
    }

    fn drain(&self) {
        let start = Instant::<Monotonic>::now();
        while !self.device.lock().is_drained() {
            if start.elapsed().as_millis() >= DRAIN_MS {
                let device = self.device.lock();
                pr_warn!(
                    "{}: the backend does not answer, requests fail\n",
                    device.name()
                );
                return;
            }
            fsleep(Delta::from_millis(DRAIN_STEP_MS));
        }
    }

    /// Frees what the backend has had mapped of a disk that has gone, if it has let go of it. Whether
    /// nothing is left.
    fn free_stale_grants(&self) -> bool {
        let device = self.device.lock();
        let mapped = device.is_mapped();
        if !mapped && device.is_dead() {
            device.free_stale_grants();
        }
        !mapped
    }

    /// Gives the backend the time to let go of what it has mapped.
    fn await_unmap(&self) {
        let start = Instant::<Monotonic>::now();
        while !self.free_stale_grants() && start.elapsed().as_millis() < UNMAP_MS {
            fsleep(Delta::from_millis(UNMAP_STEP_MS));
        }
        self.device.lock().free_stale_grants();
    }

    /// Removes a disk that is dead, if all its requests have ended. Goes on in `open` if it is still
    /// open.
    fn remove_disk(&self, open: &mut Option<RemovedDisk>) {
        let Some((disk, threads, registered)) = self.device.lock().take_disk() else {
            return;
        };
        for thread in threads.into_iter().flatten() {
            while !thread.join(msecs_to_jiffies(OUTAGE_STEP_MS)) {
                pr_warn!(
                    "{}: the disk is still being added or told to end\n",
                    self.device.lock().name()
                );
            }
        }
        // Waits for the openers that are inside of the block layer, whose requests fail.
        disk.remove();
        disk.queue_data().notify_release();
        *open = Some((disk, registered));
        drop_closed(open);
    }
}

/// A disk that was removed, and the place in the list of disks that it keeps.
type RemovedDisk = (Arc<GenDisk<BlkfrontOps>>, Option<Registered>);

/// Drops a removed disk that is not open any more.
fn drop_closed(open: &mut Option<RemovedDisk>) {
    if (open.as_ref()).is_some_and(|(disk, _)| disk.openers() == 0) {
        *open = None;
    }
}
