// SPDX-License-Identifier: GPL-2.0-only

//! The device worker: the kernel thread of a device, which removes the disk, enforces deadlines,
//! and frees memory.
//!
//! # What the worker waits for
//!
//! - The backend is not connected: after the time in the module parameter `reconnect_timeout` the
//!   disk is removed, and requests in flight fail.
//! - The device cannot connect for now: it tries again during that time, see
//!   [`retry`](crate::retry).
//! - A request gets no response: see [`timeout`](crate::timeout).
//! - A disk is detached or unbound while its backend serves it: file systems and page cache are
//!   written back first. Writing back ends when the backend disconnects, or has sent no response
//!   for the time in the module parameter `detach_timeout` although requests are in flight; then
//!   the rest of the data is lost. A slow backend gets all the time that it needs.
//! - A disk that is used for swap or as part of another device is detached: it stays until that use
//!   has ended, or until the detach is forced.
//! - A disk is removed for another reason while requests are in flight: they fail after
//!   [`DRAIN_TIMEOUT_MS`], or at once if the backend does not serve the disk. Each request ends
//!   when its pages are unmapped.
//! - A backend still has pages of a request mapped: the request stays in flight, because its pages
//!   would be reused otherwise. It ends when the backend unmaps them, at the latest when its domain
//!   ends.
//! - A removed disk is still mapped by the backend: the ring and the pool stay until the backend is
//!   Closed too, or for [`UNMAP_TIMEOUT_MS`] if the device is unbound. It is safe to free them
//!   earlier, but the kernel then tries to end only ten of the grants per second.
//! - A removed disk is still open: its name and device numbers stay until it is closed. The device
//!   does not wait for that.
//!
//! # Threads
//!
//! The disk is added, written back and marked dead by other threads, because these operations wait
//! for I/O. So a backend that does not respond cannot keep the worker from ending the I/O.

use core::mem;

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
    params,
    registry::Registered,
    request_data::BlkfrontOps,
    wakeup::{
        DeviceWakeup,
        WakeReason, //
    }, //
};

/// Time for which a removed disk waits for the responses to its last requests, in milliseconds.
const DRAIN_TIMEOUT_MS: i64 = 5_000;
/// Poll interval while draining, in milliseconds.
const DRAIN_POLL_MS: i64 = 5;
/// Poll interval while a disk is written back, in milliseconds.
const SYNC_POLL_MS: u32 = 100;
/// Time for which a device waits until the backend has unmapped its pages, in milliseconds.
const UNMAP_TIMEOUT_MS: i64 = 1_000;
/// Poll interval while waiting for that, in milliseconds.
const UNMAP_POLL_MS: i64 = 10;
/// Interval between attempts to set limits that are locked, in milliseconds.
const LIMITS_POLL_MS: i64 = 10;
/// Interval between checks for pages that the backend has unmapped, in milliseconds.
const RELEASE_POLL_MS: u32 = 100;
/// Longest time between checks of deadlines, and between messages about a wait, in milliseconds.
const MAX_POLL_MS: u32 = 10_000;
/// Shortest interval between checks of `reconnect_timeout`, in milliseconds.
const OUTAGE_MIN_POLL_MS: u32 = 100;

/// Interval between scans for idle pages of the pools, in milliseconds.
const TRIM_INTERVAL_MS: u32 = 10_000;
/// Scanning ends after this many consecutive scans that free nothing: a backend may keep persistent
/// grants mapped.
const MAX_EMPTY_SCANS: u32 = 18;

/// Schedule of scans for idle pages.
#[derive(Default)]
struct TrimTimer {
    /// Time of the last scan, or, before the first one, of the growth of a pool. `None` if no scan
    /// is scheduled.
    last: Option<Instant<Monotonic>>,
    /// Number of consecutive scans that have freed nothing.
    empty_scans: u32,
}

/// The data of a device worker: the device, which its thread shares with the xenbus driver.
#[pin_data]
pub(crate) struct DeviceWorker {
    wakeup: Arc<DeviceWakeup>,
    #[pin]
    pub(crate) device: Mutex<Device>,
    /// Makes the `xenwatch` thread call [`Device::retry`].
    #[pin]
    retry_watch: Mutex<Option<Watch<DeviceWorker>>>,
}

impl WatchHandler for DeviceWorker {
    /// Calls [`Device::retry`].
    ///
    /// A new watch fires once, in the `xenwatch` thread.
    fn changed(&self) {
        let _noio = NoioScope::new();
        // Before the attempt: if that fails, the next one needs another watch.
        let watch = self.retry_watch.lock().take();
        self.device.lock().retry();
        drop(watch);
    }
}

impl DeviceWorker {
    /// Creates a worker, whose thread is not started.
    pub(crate) fn new(device: Device, wakeup: Arc<DeviceWakeup>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                wakeup,
                device <- new_mutex!(device),
                retry_watch <- new_mutex!(None),
            }),
            GFP_KERNEL,
        )
    }

    /// Runs the device worker.
    pub(crate) fn run(this: &Arc<Self>) {
        let mut still_open = None;
        this.run_until_unbound(&mut still_open);
        this.shut_down(&mut still_open);
    }

    /// Handles wake reasons and deadlines until the device is unbound.
    fn run_until_unbound(self: &Arc<Self>, still_open: &mut Option<RemovedDisk>) {
        let mut disconnected_since = None;
        let mut trim = TrimTimer::default();
        while !self.wakeup.is_removing() {
            self.handle_wakeups(still_open);
            self.device.lock().check_shortage();
            self.retry_connect();
            self.check_outage(&mut disconnected_since);
            self.trim_pools(&mut trim);
            self.wakeup
                .wait(self.wait_timeout(&disconnected_since, trim.last.is_some()));
        }
    }

    /// Ends the connection, and waits until nothing uses the device.
    fn shut_down(&self, still_open: &mut Option<RemovedDisk>) {
        self.close();
        while self.device.lock().has_granted_requests() {
            fsleep(Delta::from_millis(RELEASE_POLL_MS.into()));
            self.device.lock().end_released();
        }
        self.await_unmap();
        self.remove_disk(still_open);
        self.wakeup.finish();
        while still_open.is_some() {
            self.wakeup.wait_for(WakeReason::Released);
            drop_closed(still_open);
        }
    }

    /// Returns the time after which a disconnected backend is reported, or its disk removed, in
    /// milliseconds.
    fn outage_limit_ms(device: &Device) -> i64 {
        let limit = params::reconnect_timeout_ms();
        if device.has_disk() {
            limit
        } else {
            limit.max(MAX_POLL_MS.into())
        }
    }

    /// Returns the time to sleep without an event.
    ///
    /// `trim` is `true` if a scan for idle pages is scheduled.
    fn wait_timeout(
        &self,
        disconnected_since: &Option<Instant<Monotonic>>,
        trim: bool,
    ) -> Option<Jiffies> {
        let device = self.device.lock();
        let left = |since: &Instant<Monotonic>| {
            let left = Self::outage_limit_ms(&device).saturating_sub(since.elapsed().as_millis());
            left.clamp(OUTAGE_MIN_POLL_MS.into(), MAX_POLL_MS.into()) as u32
        };
        let at_most_poll = |wait: u64| wait.min(MAX_POLL_MS.into()) as u32;
        let times = [
            device.has_granted_requests().then_some(RELEASE_POLL_MS),
            device.retry_wait_ms().map(at_most_poll),
            device.shortage_wait_ms().map(at_most_poll),
            disconnected_since.as_ref().map(left),
            trim.then_some(TRIM_INTERVAL_MS),
            device.is_detach_deferred().then_some(MAX_POLL_MS),
        ];
        times.into_iter().flatten().min().map(msecs_to_jiffies)
    }

    /// Makes the `xenwatch` thread call [`Device::retry`], if that is due.
    ///
    /// Only that thread may enter and leave Initialising, see [`device`](crate::device).
    fn retry_connect(self: &Arc<Self>) {
        if !self.device.lock().take_retry() {
            return;
        }
        let mut retry_watch = self.retry_watch.lock();
        if retry_watch.is_some() {
            // The watch of the last attempt has not fired yet.
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

    /// Handles the wake reasons that are set.
    fn handle_wakeups(&self, still_open: &mut Option<RemovedDisk>) {
        if self.wakeup.take(WakeReason::Failed) {
            self.device.lock().handle_event(FrontEvent::Failed);
        }
        if self.wakeup.take(WakeReason::NoDiscard) {
            self.device.lock().withdraw_discard();
        }
        if self.wakeup.take(WakeReason::TimedOut) {
            self.check_rings();
        }
        if self.wakeup.take(WakeReason::Shortage) {
            self.device.lock().trim_unused();
        }
        if self.wakeup.take(WakeReason::Limits) {
            fsleep(Delta::from_millis(LIMITS_POLL_MS));
            self.device.lock().retry_limits();
        }
        // These only wake the thread; the checks below find the work.
        self.wakeup.take(WakeReason::Backend);
        self.wakeup.take(WakeReason::Close);
        self.wakeup.take(WakeReason::Released);
        self.device.lock().retry_detach();
        if self.device.lock().must_close() {
            self.close();
        }
        self.device.lock().end_released();
        self.remove_disk(still_open);
        drop_closed(still_open);
        self.free_stale_grants();
    }

    /// Handles lost events, and closes a connection whose backend does not respond.
    fn check_rings(&self) {
        for number in 0.. {
            let queue = self.device.lock().ring(number);
            let Some(queue) = queue else { break };
            if queue.has_missed_responses() {
                // The connection must not be replaced while its responses are taken.
                let _device = self.device.lock();
                queue.take_missed_responses();
            } else {
                queue.notify_again();
            }
        }
        self.device.lock().close_stalled();
    }

    /// Handles lost events if a wait for responses is half over, unless it has done so before.
    fn check_rings_once(&self, checked: &mut bool, half_over: bool) {
        if half_over && !mem::replace(checked, true) {
            self.check_rings();
        }
    }

    /// Removes a disk whose backend has been disconnected for too long.
    ///
    /// `disconnected_since` is the time when the backend was first found disconnected, or `None`
    /// while it is connected.
    fn check_outage(&self, disconnected_since: &mut Option<Instant<Monotonic>>) {
        let mut device = self.device.lock();
        if device.has_serving_backend() || device.is_dead() {
            *disconnected_since = None;
            return;
        }
        let since = *disconnected_since.get_or_insert_with(Instant::now);
        if since.elapsed().as_millis() < Self::outage_limit_ms(&device) {
            return;
        }
        *disconnected_since = Some(Instant::now());
        let disk = device.has_disk();
        if disk {
            let name = device.name();
            dev_err!(
                device.dev(),
                "{name}: the backend has been disconnected for too long: removing the disk (see reconnect_timeout)\n"
            );
        }
        device.handle_event(FrontEvent::Deadline { disk });
    }

    /// Frees idle pages of the pools, if a scan is due.
    fn trim_pools(&self, trim: &mut TrimTimer) {
        if self.wakeup.take(WakeReason::PoolGrown) {
            trim.empty_scans = 0;
            trim.last.get_or_insert_with(Instant::now);
        }
        let due = |last: &Instant<Monotonic>| last.elapsed().as_millis() >= TRIM_INTERVAL_MS.into();
        if !trim.last.as_ref().is_some_and(due) {
            return;
        }
        let found = self.device.lock().trim_pool();
        trim.empty_scans = if found.freed {
            0
        } else {
            trim.empty_scans.wrapping_add(1)
        };
        let scheduled = found.grown && trim.empty_scans < MAX_EMPTY_SCANS;
        trim.last = scheduled.then(Instant::now);
    }

    /// Ends the connection permanently.
    fn close(&self) {
        let responsive = self.write_back();
        if self.device.lock().begin_close() && responsive {
            self.drain();
        }
        self.device.lock().finish_close();
        self.wakeup.mark_ready();
    }

    /// Writes the disk back and removes it, in another thread, if the backend serves it.
    ///
    /// Returns `true` if responses to the requests in flight can be expected.
    fn write_back(&self) -> bool {
        let (served, remove_thread) = {
            let mut device = self.device.lock();
            (device.is_served(), device.begin_remove())
        };
        let Some(remove_thread) = remove_thread else {
            return served;
        };
        self.wakeup.set_syncing(true);
        let removed = self.await_removal(&remove_thread);
        self.wakeup.set_syncing(false);
        self.device.lock().store_remove_thread(remove_thread);
        removed
    }

    /// Waits until the disk is written back and removed.
    ///
    /// Returns `false` if the backend no longer serves the disk.
    fn await_removal(&self, remove_thread: &KThread) -> bool {
        let mut last = (self.device.lock().responses(), Instant::<Monotonic>::now());
        let mut checked = false;
        while !remove_thread.join(msecs_to_jiffies(SYNC_POLL_MS)) {
            let waited = last.1.elapsed().as_millis();
            self.check_rings_once(&mut checked, waited >= params::detach_timeout_ms() / 2);
            let device = self.device.lock();
            let responses = device.responses();
            // The backend is not at fault while no request waits for it.
            if responses != last.0 || device.is_idle() {
                last = (responses, Instant::now());
                checked = false;
            }
            let failure = if !device.is_served() {
                "the backend has disconnected while the disk was written back: data may be lost"
            } else if last.1.elapsed().as_millis() >= params::detach_timeout_ms() {
                "the backend does not respond while the disk is written back: data may be lost (see detach_timeout)"
            } else if params::gives_up() && device.has_stalled() {
                "a request has timed out too often while the disk is written back: data may be lost (see io_timeout)"
            } else {
                continue;
            };
            let name = device.name();
            dev_err!(device.dev(), "{name}: {failure}\n");
            return false;
        }
        true
    }

    /// Waits for the responses to the requests in flight.
    fn drain(&self) {
        let start = Instant::<Monotonic>::now();
        let mut checked = false;
        while !self.device.lock().is_drained() {
            let waited = start.elapsed().as_millis();
            self.check_rings_once(&mut checked, waited >= DRAIN_TIMEOUT_MS / 2);
            let device = self.device.lock();
            if start.elapsed().as_millis() >= DRAIN_TIMEOUT_MS && !device.is_drained() {
                let name = device.name();
                dev_warn!(
                    device.dev(),
                    "{name}: the backend does not respond: requests fail\n"
                );
                return;
            }
            drop(device);
            fsleep(Delta::from_millis(DRAIN_POLL_MS));
        }
    }

    /// Frees the rings and pools of a dead disk, if the backend has unmapped them.
    ///
    /// Returns `true` if the backend has nothing mapped.
    fn free_stale_grants(&self) -> bool {
        let device = self.device.lock();
        let mapped = device.is_mapped();
        if !mapped && device.is_dead() {
            device.free_stale_grants();
        }
        !mapped
    }

    /// Waits until the backend has unmapped rings and pools, for a limited time.
    fn await_unmap(&self) {
        let start = Instant::<Monotonic>::now();
        while !self.free_stale_grants() && start.elapsed().as_millis() < UNMAP_TIMEOUT_MS {
            self.device.lock().retry_final_state();
            fsleep(Delta::from_millis(UNMAP_POLL_MS));
        }
        self.device.lock().free_stale_grants();
    }

    /// Removes a dead disk if its requests no longer wait for the backend, and stores it in
    /// `still_open` if it is still open.
    fn remove_disk(&self, still_open: &mut Option<RemovedDisk>) {
        let Some((disk, threads, registered)) = self.device.lock().take_disk() else {
            return;
        };
        for thread in threads.into_iter().flatten() {
            while !thread.join(msecs_to_jiffies(MAX_POLL_MS)) {
                let device = self.device.lock();
                let name = device.name();
                dev_warn!(
                    device.dev(),
                    "{name}: still waiting for the threads that add the disk, mark it dead or remove it\n"
                );
            }
        }
        // This waits for requests of other tasks, which fail, so the wait ends.
        disk.remove();
        disk.queue_data().notify_release();
        *still_open = Some((disk, registered));
        drop_closed(still_open);
    }
}

/// A removed disk, and its entry in the registry.
type RemovedDisk = (Arc<GenDisk<BlkfrontOps>>, Option<Registered>);

/// Drops a removed disk if it is no longer open.
fn drop_closed(still_open: &mut Option<RemovedDisk>) {
    if (still_open.as_ref()).is_some_and(|(disk, _)| disk.openers() == 0) {
        *still_open = None;
    }
}
