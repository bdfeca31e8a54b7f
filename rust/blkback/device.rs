// SPDX-License-Identifier: GPL-2.0-only

//! Devices: the state machine of a virtual block device, from probe to removal
//! (`struct backend_info`, `frontend_changed()`).
//!
//! [`blkif::state`] selects the action for each event; a [`Device`] executes it. Two kinds of
//! events arrive in the `xenwatch` thread: the frontend's state has changed, or the hotplug script
//! has written `physical-device`. Either may come first.
//!
//! # The work item
//!
//! All devices of this domain share the `xenwatch` thread. So callbacks only record what has
//! happened, and a work item of the device does the work ([`Device::schedule_work`],
//! [`Device::handle_events`]). Opening and closing a disk, writing back its page cache and waiting
//! for its I/O take as long as the disk needs, possibly forever. None of that is done with
//! [`Device::inner`] locked, so an unbind and the files in sysfs do not wait for it. Functions that
//! take `&mut Inner` run under the lock, and may sleep for an access to xenstore, but not for the
//! disk.
//!
//! - [`Device::next_step`] decides under the lock. It executes quick actions, and returns a
//!   [`Step`] for those that may sleep for a long time.
//! - An event that arrives meanwhile makes the work item run again.
//! - An operation that failed temporarily is retried by a timer and at each event.
//! - If the work item has stopped waiting for queue threads, the last of them schedules it. After a
//!   failed attempt to connect, the retry timer does.
//! - Only the `xenwatch` thread may unregister a device, so the work item makes that thread do it.
//!
//! # Ownership
//!
//! Each resource has one owner and is released with it, whenever the device is removed:
//!
//! - A queue thread owns its ring, its event channel, the pages that it has mapped and the requests
//!   that it has taken. It returns when none is in flight, and then drops them in the order of the
//!   fields of [`Queue`].
//! - A request in flight is owned by the block layer, and keeps the disk open; see
//!   [`kernel_ext::block::bio`].
//! - A [`DeviceHandle`] exists until its thread ends or fails to start. It holds a reference to the
//!   [`Device`], and is counted in `live_threads`: that is 0 only when all queues were dropped.
//! - The watch, the timers and the files in sysfs are dropped when the driver is unbound. Dropping
//!   any of them waits until its callback does not run, so none is dropped under a lock that the
//!   callback takes.
//! - The work item holds a reference to the [`Device`] while it is scheduled or runs. Unbinding the
//!   driver passes the disk to it and waits until it has closed the disk, up to a timeout: a disk
//!   that hangs blocks nothing else.
//! - A queue thread, and the work item while it handles events, hold a reference to the module. So
//!   they can outlive an unbind and the removal of the device's directory, which wait for a disk
//!   that hangs only up to a timeout.
//!
//! The frontend does not notice an unbind: the rings stay as they are, with the requests that
//! were not taken, and the next driver continues with them.
//!
//! # Limits on what a frontend can consume
//!
//! A queue thread takes from a ring only requests that the frontend has published, calls
//! `cond_resched()` after each pass, and ends an event as spurious if there was no request since
//! the last event was ended, and none is held back. So the event channel driver slows down a
//! frontend that only sends events, or that moves its request index back and forth. Once attached
//! to a ring, the backend never reads back its own indices, which the frontend may overwrite.
//! Connections and attempts to open a disk are limited by a [`TokenBucket`]. Each other change of
//! the frontend's state costs a few reads of xenstore and a rate-limited message, and the frontend
//! has to write to xenstore for it.

use core::fmt::Write;

use kernel::{
    device::Core,
    fmt,
    impl_has_work,
    new_mutex,
    new_work,
    prelude::*,
    str::CString,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        Arc,
        Mutex, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

use kernel_ext::{
    base::{
        global_mutex::GlobalMutex,
        jiffies::{
            self,
            msecs_to_jiffies,
            Jiffies, //
        },
        kthread::{
            Current,
            KThread,
            KThreadOptions, //
        },
        memalloc::NoioScope,
        module_ref::ModuleRef,
        ratelimit::Ratelimit,
        sysfs::Output,
        timer::{
            Timer,
            TimerCallback,
            TimerFlags, //
        },
        wait::WaitQueue,
        workqueue::OwnedQueue, //
    },
    new_wait_queue,
    ratelimited,
    xen::xenbus::{
        self,
        Switched,
        UnknownState, //
    }, //
};

use blkif::{
    negotiate::BackLimits,
    ring::RingError,
    state::{
        BackAction,
        BackEvent,
        BackState,
        XenbusState, //
    },
    token_bucket::TokenBucket, //
};

use crate::{
    connect::{
        self,
        ConnectOutcome,
        Connection, //
    },
    disk::{
        Disk,
        SizePoll, //
    },
    domain::DeviceRegistration,
    error::{
        ConnectError,
        ResultExt, //
    },
    params,
    queue::Queue,
    reports::QueueReports,
    stats::Stats,
    wakeup::QueueWakeup,
    xenstore::{
        self,
        READING, //
    }, //
};

/// Longest wait of an unbind for requests in flight, in milliseconds.
///
/// After that, the device is orphaned.
const THREADS_TIMEOUT_MS: u32 = 30_000;

/// Longest wait for queue threads in the work item, or in the `xenwatch` thread, where a wait
/// delays all other devices, in milliseconds.
///
/// If the work item stops waiting, the last queue thread schedules it again.
const SHORT_TIMEOUT_MS: u32 = 500;

/// Delay of the first retry after a failure, in milliseconds.
///
/// It doubles with each failure.
const RETRY_MS: u32 = 100;

/// Longest delay of a retry, in milliseconds.
const MAX_RETRY_MS: u32 = 10_000;

/// The error of an attempt to connect that has to wait.
const LAST_QUEUES: &str = "waiting for the queues of the last attempt to connect";

/// Number of failures after which the delay has reached its maximum.
const MAX_FAILURES: u32 = 8;

/// Number of connections that a frontend may make in a row without a delay.
const CONNECTIONS: u32 = 16;

/// Time after which a frontend may make another connection, in milliseconds.
const CONNECTION_MS: u32 = 500;

/// The workqueue of all devices; `None` before the driver is registered and after it is
/// unregistered.
static WORKQUEUE: GlobalMutex<Option<Arc<OwnedQueue>>> = GlobalMutex::new(None);

/// Owner of the devices' workqueue.
///
/// Dropping it waits for their work items.
pub(crate) struct WorkQueue(Arc<OwnedQueue>);

impl WorkQueue {
    /// Creates the workqueue of all devices.
    pub(crate) fn new() -> Result<Self> {
        let queue = Arc::new(OwnedQueue::new(c"rblkback")?, GFP_KERNEL)?;
        *WORKQUEUE.lock() = Some(queue.clone());
        Ok(Self(queue))
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        *WORKQUEUE.lock() = None;
        // When this returns, no work item is left that could drop the last reference to the
        // workqueue and so wait for itself.
        self.0.flush();
    }
}

/// Timer that schedules the work item of a device to retry an operation.
struct RetryTimer(Arc<Device>);

/// A device, shared by the callbacks of the bus, the files in sysfs and the queue threads.
#[pin_data]
pub(crate) struct Device {
    xbdev: ARef<xenbus::Device>,
    /// The frontend's directory.
    frontend: CString,
    stats: Arc<Stats>,
    /// Queue threads that have not ended, including those of earlier connections.
    live_threads: Atomic<u32>,
    /// `true` while the state machine waits for queue threads that were told to stop.
    disconnecting: Atomic<bool>,
    /// Number of the connection whose threads may take requests.
    served_connection: Atomic<u64>,
    /// `true` if `physical-device` was written and has to be read.
    disk_named: Atomic<bool>,
    /// `true` if the work item is scheduled.
    work_queued: Atomic<bool>,
    /// `true` while the work item runs.
    work_running: Atomic<bool>,
    /// `true` if the work item has closed the disk and waits for the device to be unregistered.
    unregistering: Atomic<bool>,
    /// `true` while the work item opens the disk, or writes back its page cache.
    waits_for_disk: Atomic<bool>,
    workqueue: Arc<OwnedQueue>,
    #[pin]
    work: Work<Self>,
    registration: DeviceRegistration,
    /// Woken when the last queue thread or the work item ends, and when the queue threads may take
    /// requests.
    #[pin]
    wait: WaitQueue,
    #[pin]
    inner: Mutex<Inner>,
}

/// The state of a device.
struct Inner {
    back: BackState,
    /// The limits that were offered to the frontend.
    limits: BackLimits,
    /// `None` before the disk is opened, and after it was passed to the work item to be closed.
    disk: Option<Arc<Disk>>,
    /// A disk that the work item has to close.
    to_close: Option<Arc<Disk>>,
    /// One for each ring that is served.
    queue_threads: KVec<QueueThread>,
    size_poll: Option<Pin<KBox<Timer<SizePoll>>>>,
    connect_limit: TokenBucket,
    /// `true` if the frontend has connected too often and has to wait.
    throttled: bool,
    /// `None` once the driver is being unbound.
    retry_timer: Option<Pin<KBox<Timer<RetryTimer>>>>,
    /// Failures in a row that were followed by a retry.
    failures: u32,
    /// The last of these failures that was logged and written to xenstore.
    last_error: Option<ConnectError>,
    /// Rate limit of the device's errors in the log and in xenstore, so that the frontends of other
    /// devices do not use it up.
    error_limit: Ratelimit,
    /// Number of the last attempt to connect, so that a thread of an earlier one does not affect a
    /// later one.
    connection: u64,
}

/// An operation that is done without the lock.
enum Step {
    /// Wait for an event.
    None,
    /// Take another step.
    Again,
    /// Wait until the queue threads have ended.
    WaitForThreads,
    /// Open the disk that the hotplug script has named.
    Open,
    /// Connect to the frontend.
    Connect(Arc<Disk>),
    /// Close a disk.
    Close(Arc<Disk>),
    /// Unregister the device, which is closed.
    Unregister,
}

/// The thread of a queue, as its device sees it.
struct QueueThread {
    /// Dropping it stops the thread.
    _thread: KThread,
    wakeup: Arc<QueueWakeup>,
}

impl TimerCallback for RetryTimer {
    fn expired(&self) -> Option<Jiffies> {
        self.0.schedule_work();
        None
    }
}

impl_has_work! {
    impl HasWork<Self> for Device { self.work }
}

impl WorkItem for Device {
    type Pointer = Arc<Self>;

    fn run(device: Arc<Self>) {
        // In this order, so that `close` sees at least one of the two set. Pairs with the acquires
        // there.
        device.work_running.store(true, Release);
        device.work_queued.store(false, Release);
        // The module is in use while a disk hangs, so that unloading it does not wait here.
        let module = ModuleRef::new();
        let closed = device.handle_events();
        drop(module);
        device.unregistering.store(closed, Release);
        device.work_running.store(false, Release);
        device.wait.wake_up();
        if closed {
            device.unregister();
        }
    }
}

impl Device {
    /// Creates a device, whose state follows from the node `state` of the backend.
    ///
    /// [`Self::start`] has to be called next.
    pub(crate) fn new(xbdev: &xenbus::Device<Core<'_>>) -> Result<Arc<Self>> {
        let frontend = CString::try_from_fmt(fmt!("{}", xbdev.otherend()?))?;
        let stats = Arc::pin_init(Stats::new(), GFP_KERNEL)?;
        let workqueue = WORKQUEUE.lock().clone().ok_or(ENODEV)?;
        let inner = Inner {
            back: match xbdev.state() {
                XenbusState::Closing | XenbusState::Closed => BackState::StartingClosed,
                _ => BackState::Starting,
            },
            limits: params::limits(),
            disk: None,
            to_close: None,
            queue_threads: KVec::new(),
            size_poll: None,
            connect_limit: TokenBucket::new(
                CONNECTIONS,
                msecs_to_jiffies(CONNECTION_MS) as u64,
                jiffies::now() as u64,
            ),
            throttled: false,
            retry_timer: None,
            failures: 0,
            last_error: None,
            error_limit: Ratelimit::new(),
            connection: 0,
        };
        let registration = DeviceRegistration::new(xbdev)?;
        let xbdev: ARef<xenbus::Device> = ARef::from(&***xbdev);
        let device = pin_init!(Self {
            xbdev,
            frontend,
            stats,
            live_threads: Atomic::new(0),
            disconnecting: Atomic::new(false),
            served_connection: Atomic::new(0),
            disk_named: Atomic::new(false),
            work_queued: Atomic::new(false),
            work_running: Atomic::new(false),
            unregistering: Atomic::new(false),
            waits_for_disk: Atomic::new(false),
            workqueue,
            work <- new_work!("Device::work"),
            registration,
            wait <- new_wait_queue!(),
            inner <- new_mutex!(inner),
        });
        Arc::pin_init(device, GFP_KERNEL)
    }

    /// Creates the retry timer, which [`Self::shut_down`] drops.
    pub(crate) fn start(self: &Arc<Self>) -> Result {
        let timer = Timer::new(TimerFlags::Default, RetryTimer(self.clone()))?;
        self.inner.lock().retry_timer = Some(timer);
        Ok(())
    }

    /// Returns the statistics of the device.
    pub(crate) fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// Schedules the work item, which handles all that has changed.
    ///
    /// Context: any.
    pub(crate) fn schedule_work(self: &Arc<Self>) {
        self.work_queued.store(true, Release);
        // This fails if the work item is scheduled already.
        let _ = self.workqueue.enqueue(self.clone());
    }

    /// Records that the hotplug script has written `physical-device`.
    pub(crate) fn disk_named(self: &Arc<Self>) {
        self.disk_named.store(true, Relaxed);
        self.schedule_work();
    }

    /// Makes the queue threads free the memory that they do not need to serve one request each.
    ///
    /// Context: the shrinker of the bus. Does nothing if the device is locked.
    pub(crate) fn set_memory_pressure(&self) {
        if let Some(inner) = self.inner.try_lock() {
            inner
                .queue_threads
                .iter()
                .for_each(|thread| thread.wakeup.set_memory_pressure());
        }
    }

    /// Does all pending work.
    ///
    /// Returns `true` if the device is closed and has to be unregistered.
    ///
    /// Context: the work item. May sleep until I/O on the disk completes, possibly forever.
    fn handle_events(self: &Arc<Self>) -> bool {
        let mut step = Step::Again;
        loop {
            step = match step {
                Step::None => return false,
                Step::Again => self.next_step(),
                Step::WaitForThreads if self.wait_for_threads(SHORT_TIMEOUT_MS) => Step::Again,
                // The last queue thread schedules the work item.
                Step::WaitForThreads => Step::None,
                Step::Open => self.open_disk(),
                Step::Connect(disk) => self.connect_frontend(&disk),
                Step::Close(disk) => {
                    drop(disk);
                    Step::Again
                }
                Step::Unregister => {
                    let disk = self.inner.lock().to_close.take();
                    drop(disk);
                    return true;
                }
            }
        }
    }

    /// Decides what has to be done.
    ///
    /// Executes quick actions, and returns those that may sleep for a long time.
    fn next_step(self: &Arc<Self>) -> Step {
        // Queue threads take the lock too, and freeing memory may need their disks.
        let _noio = NoioScope::new();
        let mut inner = self.inner.lock();
        if let Some(disk) = inner.to_close.take() {
            return Step::Close(disk);
        }
        if inner.back == BackState::Removed {
            return Step::None;
        }
        let started = !matches!(inner.back, BackState::Starting | BackState::StartingClosed);
        if started && self.disk_named.load(Relaxed) {
            return Step::Open;
        }
        let action = if !self.disconnecting.load(Relaxed) {
            match self.read_event(&mut inner) {
                Ok(event) => inner.back.step(event),
                Err(error) => {
                    self.schedule_retry(&mut inner, &ConnectError::Local(READING, error));
                    return Step::None;
                }
            }
        } else if self.has_threads() {
            return Step::None;
        } else {
            BackAction::Disconnect
        };
        match action {
            BackAction::Disconnect if self.stop_queues(&mut inner) => Step::WaitForThreads,
            BackAction::Open if self.throttle(&mut inner) => Step::None,
            BackAction::Open => Step::Open,
            BackAction::Connect if self.has_threads() => {
                // Their rings are mapped and their event channels bound until they end.
                self.schedule_retry(&mut inner, &ConnectError::Local(LAST_QUEUES, EAGAIN));
                Step::None
            }
            BackAction::Connect if self.throttle(&mut inner) => Step::None,
            BackAction::Connect => inner.disk.clone().map_or(Step::None, Step::Connect),
            _ => self.run_action(&mut inner, action),
        }
    }

    /// Returns `true` if the frontend connects too often and has to wait.
    ///
    /// The work item is scheduled for the time when it may connect again.
    fn throttle(&self, inner: &mut Inner) -> bool {
        let Err(ticks) = inner.connect_limit.take(jiffies::now() as u64) else {
            inner.throttled = false;
            return false;
        };
        if !inner.throttled && inner.failures == 0 {
            ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "the frontend connects too often: its next attempt is delayed\n"
            ));
        }
        inner.throttled = true;
        if let Some(timer) = &inner.retry_timer {
            timer.mod_timer_after(ticks as Jiffies);
        }
        true
    }

    /// Reads the state of the frontend, and the node `online`.
    ///
    /// A failed read is not taken for a missing node: a disk in use would be removed.
    fn read_event(&self, inner: &mut Inner) -> Result<BackEvent> {
        let state = self.xbdev.read_driver_state(&self.frontend)?;
        if matches!(inner.last_error, Some(ConnectError::Local(READING, _))) {
            self.clear_failures(inner);
        }
        Ok(match state {
            Err(UnknownState) => BackEvent::BadState,
            Ok(state) => BackEvent::Frontend {
                state,
                online: xenstore::is_online(&self.xbdev, state),
                ready: inner.disk.is_some(),
            },
        })
    }

    /// Runs an action that is quick, and sets the state that it leads to.
    fn run_action(&self, inner: &mut Inner, action: BackAction) -> Step {
        let result = match action {
            BackAction::Restart => self.write_features(inner).during("writing the features"),
            BackAction::Fail => Err(xenstore::bad_state_error(&self.frontend)),
            _ => Ok(()),
        };
        match (result, action.next_state()) {
            (Err(error), _) => self.fail(inner, &error),
            (Ok(()), Some(next)) => self.set_state(inner, next),
            (Ok(()), None) => Step::None,
        }
    }

    /// Writes a state to xenstore and enters it, unless another state is found there.
    fn set_state(&self, inner: &mut Inner, next: BackState) -> Step {
        let switched = match next.xenbus() {
            Some(state) => self.xbdev.switch_state(state),
            None => Switched::Written,
        };
        match switched {
            Switched::Written => self.state_written(inner, next),
            Switched::Refused(found) => self.state_refused(inner, next, found),
            Switched::Failed(error) => {
                self.schedule_retry(inner, &ConnectError::Local("writing the state", error));
                Step::None
            }
        }
    }

    /// Enters a state that was written to xenstore.
    fn state_written(&self, inner: &mut Inner, next: BackState) -> Step {
        inner.back = next;
        if next == BackState::Removed {
            inner.to_close = inner.disk.take();
            return Step::Unregister;
        }
        Step::Again
    }

    /// Continues after another state was found where `next` was to be written.
    fn state_refused(&self, inner: &mut Inner, next: BackState, found: XenbusState) -> Step {
        if found == XenbusState::Closing {
            let action = inner.back.step(BackEvent::ToolstackClosing);
            return match action.next_state() {
                Some(closing) => self.set_state(inner, closing),
                None => Step::None,
            };
        }
        match next {
            // The directory was removed, or belongs to a new device: the bus will remove this one.
            BackState::Closing | BackState::Closed | BackState::Removed => {
                self.state_written(inner, next)
            }
            _ => Step::None,
        }
    }

    /// Handles a failure: closes the connection, or schedules a retry.
    fn fail(&self, inner: &mut Inner, error: &ConnectError) -> Step {
        let failure = error.failure(|| xenstore::was_connected(&self.xbdev));
        let action = inner.back.step(BackEvent::Failed(failure));
        let Some(next) = action.next_state() else {
            if action == BackAction::Retry {
                self.schedule_retry(inner, error);
            }
            return Step::None;
        };
        if inner.error_limit.allow() {
            self.xbdev.dev_error(error.error(), fmt!("{error}"));
        }
        self.set_state(inner, next)
    }

    /// Reports a failure, unless it is the one that was reported last, and schedules a retry.
    fn schedule_retry(&self, inner: &mut Inner, error: &ConnectError) {
        if inner.last_error != Some(*error) && inner.error_limit.allow() {
            inner.last_error = Some(*error);
            self.xbdev
                .dev_error(error.error(), fmt!("{error}: trying again"));
        }
        let time = RETRY_MS
            .checked_shl(inner.failures)
            .map_or(MAX_RETRY_MS, |time| time.min(MAX_RETRY_MS));
        inner.failures = inner.failures.saturating_add(1).min(MAX_FAILURES);
        if let Some(timer) = &inner.retry_timer {
            timer.mod_timer_after(msecs_to_jiffies(time));
        }
    }

    /// Resets the count of failures after a success, and removes the error that a retry has
    /// written.
    fn clear_failures(&self, inner: &mut Inner) {
        inner.failures = 0;
        if inner.last_error.take().is_some() {
            dev_info!(
                self.xbdev.as_ref(),
                "the failure that was reported before is over\n"
            );
            if let Err(error) = xenstore::clear_error(&self.xbdev) {
                dev_warn!(
                    self.xbdev.as_ref(),
                    "cannot remove the error from xenstore: {error:?}\n"
                );
            }
        }
    }

    /// Writes the limits within which a frontend chooses.
    ///
    /// A frontend that uses rings keeps those that it chose within the offer of the driver before
    /// this one. The next connection is within the module parameters.
    fn write_features(&self, inner: &mut Inner) -> Result {
        inner.limits = params::limits();
        if inner.back == BackState::Starting && self.has_frontend_rings()? {
            xenstore::keep_offer(self.xbdev.nodename(), &mut inner.limits)?;
        }
        xenstore::write_features(self.xbdev.nodename(), &inner.limits)
    }

    /// Returns `true` if the frontend has offered rings, or uses them.
    fn has_frontend_rings(&self) -> Result<bool> {
        let state = self.xbdev.read_driver_state(&self.frontend)?;
        Ok(matches!(
            state,
            Ok(XenbusState::Initialised | XenbusState::Connected)
        ))
    }

    /// Opens the disk if the hotplug script has named one and none is open.
    fn open_disk(&self) -> Step {
        let named = self.disk_named.xchg(false, Relaxed);
        let disk = self.inner.lock().disk.clone();
        self.waits_for_disk.store(true, Relaxed);
        let found = connect::open_disk(&self.xbdev, disk.as_deref());
        self.waits_for_disk.store(false, Relaxed);
        // As in `next_step`.
        let _noio = NoioScope::new();
        let mut inner = self.inner.lock();
        let step = self.disk_opened(&mut inner, found);
        // If only `physical-device` was written, the frontend's state was not read yet.
        match step {
            Step::None if named => Step::Again,
            step => step,
        }
    }

    /// Stores the disk that was opened, if there is one.
    fn disk_opened(
        &self,
        inner: &mut Inner,
        found: Result<Option<Arc<Disk>>, ConnectError>,
    ) -> Step {
        match found {
            Ok(Some(disk)) if inner.back == BackState::Removed => inner.to_close = Some(disk),
            Ok(Some(disk)) => inner.disk = Some(disk),
            Ok(None) => return self.write_size(inner),
            Err(error) => return self.fail(inner, &error),
        }
        Step::Again
    }

    /// Connects to the frontend.
    ///
    /// If it succeeds, the rings are served when this returns.
    ///
    /// Context: the work item. Sleeps for as long as the disk needs, and under the lock for up to
    /// 32 s for each page of a ring that is paged out.
    fn connect_frontend(self: &Arc<Self>, disk: &Arc<Disk>) -> Step {
        let written = self.drop_page_cache(disk).map(|_| ());
        let (step, connection) = self.connect_after_sync(disk, written);
        match connection {
            Some(connection) => self.start_serving(disk, connection),
            None => {
                // Threads that were started have taken no request, and end at once. Until then the
                // next attempt waits, see `next_step`.
                self.wait_for_threads(SHORT_TIMEOUT_MS);
                step
            }
        }
    }

    /// Connects to the frontend, if the page cache of the disk was `written` back.
    ///
    /// Returns the number of the connection if there is one.
    fn connect_after_sync(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        written: Result,
    ) -> (Step, Option<u64>) {
        // As in `next_step`.
        let _noio = NoioScope::new();
        let mut inner = self.inner.lock();
        if inner.back != BackState::Waiting {
            return (Step::Again, None);
        }
        let connected = written
            .during("writing back the page cache of the disk")
            .and_then(|()| self.map_rings_and_start(&mut inner, disk));
        let step = match connected {
            Ok(ConnectOutcome::Connected) => {
                inner.back = BackState::Connected;
                // Nothing has to be read again: each later change of the frontend's state causes an
                // event. If the toolstack detaches the disk, the frontend closes.
                return (Step::None, Some(inner.connection));
            }
            Ok(ConnectOutcome::Withdrawn) => Step::Again,
            Ok(ConnectOutcome::Refused(found)) => {
                self.state_refused(&mut inner, BackState::Connected, found)
            }
            Err(error) => self.fail(&mut inner, &error),
        };
        (step, None)
    }

    /// Allows the threads of a connection to take requests.
    fn start_serving(&self, disk: &Disk, connection: u64) -> Step {
        // A second time, because programs of this domain may have written to the disk before the
        // frontend saw Connected.
        match self.drop_page_cache(disk) {
            Ok(true) => {}
            Ok(false) => ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "programs of this domain keep pages of the disk in use: what they write to them may \
                 overwrite data of the guest: stop them\n"
            )),
            Err(error) => return self.connect_again(error),
        }
        self.clear_failures(&mut self.inner.lock());
        // Release: pairs with the acquire in `wait_until_served`.
        self.served_connection.store(connection, Release);
        self.wait.wake_up();
        Step::None
    }

    /// Ends a connection whose threads have taken no request, because the page cache of the disk
    /// could not be written back; another one follows.
    ///
    /// If the disk were served, the pages could be written later, over data of the guest.
    fn connect_again(&self, error: Error) -> Step {
        let _noio = NoioScope::new();
        let mut inner = self.inner.lock();
        if inner.back != BackState::Connected {
            return Step::Again;
        }
        self.schedule_retry(
            &mut inner,
            &ConnectError::Local("writing back the page cache of the disk", error),
        );
        if self.stop_queues(&mut inner) {
            return Step::WaitForThreads;
        }
        self.run_action(&mut inner, BackAction::Disconnect)
    }

    /// Writes back and drops the page cache of the disk, see [`Disk::drop_page_cache`].
    fn drop_page_cache(&self, disk: &Disk) -> Result<bool> {
        self.waits_for_disk.store(true, Relaxed);
        let result = disk.drop_page_cache();
        self.waits_for_disk.store(false, Relaxed);
        result
    }

    /// Maps the rings, starts their threads, and writes Connected.
    fn map_rings_and_start(
        self: &Arc<Self>,
        inner: &mut Inner,
        disk: &Arc<Disk>,
    ) -> Result<ConnectOutcome, ConnectError> {
        let mut connection = Connection::new(
            &self.xbdev,
            &self.frontend,
            self.registration.domain(),
            disk.clone(),
            &inner.limits,
        )?;
        inner.connection = inner.connection.wrapping_add(1);
        let mut queues = KVec::new();
        for index in 0..connection.queues() {
            push(
                &mut queues,
                (index, connection.connect_ring(index, &self.stats)?),
            )?;
        }
        // If a thread fails to start, dropping the others ends them.
        let mut queue_threads = KVec::new();
        for (index, queue) in queues {
            push(
                &mut queue_threads,
                self.start_queue_thread(queue, index, inner.connection)?,
            )?;
        }
        let size_poll = queue_threads
            .first()
            .map(|first| SizePoll::timer(disk.clone(), first.wakeup.clone()))
            .transpose()
            .during("creating a timer")?;
        // The frontend may send requests as soon as this is written. The threads take none before
        // `served_connection` is set.
        let outcome = connection.write_connected()?;
        if matches!(outcome, ConnectOutcome::Connected) {
            // Nothing may fail from here on, because Connected was written.
            if let Some(timer) = &size_poll {
                timer.mod_timer_after(SizePoll::period());
            }
            inner.size_poll = size_poll;
            inner.queue_threads = queue_threads;
            connection.log_result();
        }
        Ok(outcome)
    }

    fn start_queue_thread(
        self: &Arc<Self>,
        queue: Queue,
        index: u32,
        connection: u64,
    ) -> Result<QueueThread, ConnectError> {
        let handle = DeviceHandle::new(self, index, connection);
        let name =
            CString::try_from_fmt(fmt!("rblkback {}", queue.name())).during("naming a thread")?;
        let options = KThreadOptions { freezable: true };
        let wakeup = queue.wakeup();
        KThread::spawn(fmt!("{}", *name), options, move |thread| {
            // Memory reclaim may write to this disk, whose I/O only this thread can start: its
            // allocations must not wait for I/O.
            let _noio = NoioScope::new();
            handle.wait_until_served(thread);
            queue.serve(thread, &handle);
            drop(handle);
        })
        .map(|_thread| QueueThread { _thread, wakeup })
        .during("starting a thread")
    }

    /// Writes the size of the disk for the frontend, if it has changed.
    fn write_size(&self, inner: &mut Inner) -> Step {
        let Some(disk) = inner.disk.as_ref().filter(|disk| disk.size_changed()) else {
            return Step::None;
        };
        if inner.back != BackState::Connected || self.disconnecting.load(Relaxed) {
            return Step::None;
        }
        match xenstore::write_size(&self.xbdev, disk) {
            Ok(Switched::Refused(found)) => self.state_refused(inner, BackState::Connected, found),
            Ok(Switched::Written) => Step::None,
            Ok(Switched::Failed(error)) | Err(error) => {
                ratelimited!(dev_warn!(
                    self.xbdev.as_ref(),
                    "cannot write the new size of the disk, trying again: {error:?}\n"
                ));
                Step::None
            }
        }
    }

    /// Tells the queue threads to stop.
    ///
    /// Returns `true` if some have not ended.
    fn stop_queues(&self, inner: &mut Inner) -> bool {
        inner.size_poll = None;
        inner.queue_threads.clear();
        // A full barrier between this store and the load of the count: either the last thread sees
        // `disconnecting`, or its end is seen here. Pairs with the decrement in
        // `DeviceHandle::drop`.
        self.disconnecting.xchg(true, Full);
        let left = self.has_threads();
        if !left {
            self.disconnecting.store(false, Relaxed);
        }
        left
    }

    /// Returns `true` if queue threads of this or an earlier connection have not ended.
    fn has_threads(&self) -> bool {
        // Acquire: pairs with the decrement in `DeviceHandle::drop`.
        self.live_threads.load(Acquire) != 0
    }

    /// Waits until all queue threads have ended.
    ///
    /// Returns `false` after a timeout. A thread owns its ring and memory, so it can end without
    /// the device.
    ///
    /// Context: may sleep for `time_ms`.
    fn wait_for_threads(&self, time_ms: u32) -> bool {
        let time = msecs_to_jiffies(time_ms);
        let ended = self.wait.wait_timeout(time, || !self.has_threads());
        if !ended {
            let threads = self.live_threads.load(Relaxed);
            ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "{threads} queues have not ended after {time_ms} ms: each ends when its requests have \
                 completed and their pages are not in use\n"
            ));
        }
        ended
    }

    /// Stops and closes the device, because the driver is unbound.
    ///
    /// A second call has no effect.
    ///
    /// Context: unbinding by the driver core, which has locked the device; may be the `xenwatch`
    /// thread. Sleeps for up to 60 s.
    pub(crate) fn shut_down(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        let Some(timer) = inner.retry_timer.take() else {
            return;
        };
        inner.back = BackState::Removed;
        self.stop_queues(&mut inner);
        // The state machine no longer waits for the threads.
        self.disconnecting.store(false, Relaxed);
        drop(inner);
        drop(timer);
        // A device without a directory cannot be bound again, so its rings will not be served
        // again.
        let own = self.xbdev.read_driver_state(self.xbdev.nodename());
        let gone = matches!(own, Ok(Ok(XenbusState::Unknown)));
        let time_ms = if gone {
            SHORT_TIMEOUT_MS
        } else {
            THREADS_TIMEOUT_MS
        };
        if !self.wait_for_threads(time_ms) && !gone {
            self.mark_orphaned();
        }
        self.close(time_ms);
    }

    /// Makes the work item close the disk, and waits for that, up to a timeout.
    ///
    /// Context: may sleep for `time_ms`.
    fn close(self: &Arc<Self>, time_ms: u32) {
        let mut inner = self.inner.lock();
        if let Some(disk) = inner.disk.take() {
            inner.to_close = Some(disk);
            self.schedule_work();
        }
        drop(inner);
        let time_ms = if self.waits_for_disk.load(Relaxed) {
            SHORT_TIMEOUT_MS
        } else {
            time_ms
        };
        // The acquires pair with the releases in `run`.
        let idle = || {
            self.unregistering.load(Acquire)
                || !self.work_queued.load(Acquire) && !self.work_running.load(Acquire)
        };
        if !self.wait.wait_timeout(msecs_to_jiffies(time_ms), idle) {
            ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "the disk is still being opened, written back or closed after {time_ms} ms: this ends \
                 when the disk responds\n"
            ));
        }
    }

    /// Unregisters the device, which is closed.
    ///
    /// Context: not the `xenwatch` thread. Sleeps until that thread has time.
    fn unregister(&self) {
        if let Err(error) = xenbus::unregister_device(&self.xbdev) {
            dev_warn!(
                self.xbdev.as_ref(),
                "cannot unregister the device now: {error:?}: it stays until the toolstack removes \
                 its directory\n"
            );
        }
    }

    /// Records that queue threads run without a driver, so that `probe` refuses the device.
    ///
    /// `xen-blkback` cannot be bound instead: it has the same driver name, and the threads keep
    /// this module loaded.
    fn mark_orphaned(&self) {
        // A full barrier between this store and the load of the count: either the last thread
        // clears the flag, or its end is seen here. Pairs with the decrement in
        // `DeviceHandle::drop`.
        self.registration.orphaned().xchg(true, Full);
        if !self.has_threads() {
            self.clear_orphaned();
        }
    }

    /// Records that no queue thread runs without a driver.
    fn clear_orphaned(&self) {
        self.registration.orphaned().xchg(false, Full);
    }

    /// Writes the content of the file `physical_device`.
    pub(crate) fn show_physical_device(&self, out: &mut Output<'_>) -> fmt::Result {
        match &self.inner.lock().disk {
            Some(disk) => writeln!(out, "{:x}:{:x}", disk.number.major(), disk.number.minor()),
            None => Ok(()),
        }
    }

    /// Writes the content of the file `mode`.
    pub(crate) fn show_mode(&self, out: &mut Output<'_>) -> fmt::Result {
        match &self.inner.lock().disk {
            Some(disk) => out.write_fmt(fmt!("{}\n", *disk.mode)),
            None => Ok(()),
        }
    }
}

/// A queue thread's reference to its device.
struct DeviceHandle {
    device: Arc<Device>,
    index: u32,
    connection: u64,
}

impl DeviceHandle {
    fn new(device: &Arc<Device>, index: u32, connection: u64) -> Self {
        device.live_threads.fetch_add(1, Relaxed);
        Self {
            device: device.clone(),
            index,
            connection,
        }
    }

    /// Waits until the thread may take requests, or has to stop.
    fn wait_until_served(&self, thread: &Current) {
        let device = &self.device;
        device.wait.wait_idle(|| {
            thread.should_stop() || device.served_connection.load(Acquire) == self.connection
        });
    }
}

impl QueueReports for DeviceHandle {
    fn withdraw_feature(&self, node: &str) {
        let inner = self.device.inner.lock();
        if inner.connection != self.connection {
            return;
        }
        let xbdev = &self.device.xbdev;
        ratelimited!(dev_info!(
            xbdev.as_ref(),
            "the disk does not support an operation that was offered: writing {node} = 0\n"
        ));
        if let Err(error) = xenstore::withdraw_feature(xbdev, node) {
            ratelimited!(dev_warn!(
                xbdev.as_ref(),
                "cannot write {node} = 0: {error:?}\n"
            ));
        }
    }

    fn ring_broken(&self, error: RingError) {
        let mut inner = self.device.inner.lock();
        if inner.connection == self.connection {
            self.device
                .fail(&mut inner, &ConnectError::Ring(self.index, error));
        }
        drop(inner);
        self.device.schedule_work();
    }

    fn size_changed(&self) {
        let mut inner = self.device.inner.lock();
        if inner.connection != self.connection {
            return;
        }
        let step = self.device.write_size(&mut inner);
        drop(inner);
        if !matches!(step, Step::None) {
            self.device.schedule_work();
        }
    }
}

impl Drop for DeviceHandle {
    /// Records that the thread has ended and has released all that it owned.
    fn drop(&mut self) {
        let device = &self.device;
        // A full barrier between the decrement and the load of `disconnecting`. Pairs with the
        // exchanges in `stop_queues` and `mark_orphaned`.
        if device.live_threads.fetch_sub(1, Full) == 1 {
            device.wait.wake_up();
            device.clear_orphaned();
            if device.disconnecting.load(Relaxed) {
                device.schedule_work();
            }
        }
    }
}

fn push<T>(list: &mut KVec<T>, item: T) -> Result<(), ConnectError> {
    list.push(item, GFP_KERNEL)
        .map_err(|_| ConnectError::Local("creating a queue", ENOMEM))
}
