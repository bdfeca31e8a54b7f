// SPDX-License-Identifier: GPL-2.0-only

//! The driver of the virtual block device: its life from probe to removal.
//!
//! What is to be done when is decided by [`blkif::state`]; this carries it out. The device hears of
//! two things, both in the `xenwatch` thread: the frontend's state has changed, or the hotplug script
//! has written `physical-device`. Either may come first.
//!
//! # Who does the work
//!
//! All devices of this domain hear of changes in that one thread. There the device only notes that it
//! has something to do, and a work item of its own does it ([`Device::schedule_work`], [`Device::run`]): to open a
//! disk, to bring the page cache onto it, to close it and to wait for its last answers takes as long
//! as the disk takes, which may be forever. None of that is done with [`Device::inner`] locked, so an
//! unbind and the files in sysfs do not wait for it either.
//!
//! - [`Device::next_step`] decides, with the lock, and does what is quick. What is not, it returns.
//! - An event that comes meanwhile has the item run once more.
//! - What fails for a reason of this domain is tried again: by a timer, and at each event.
//! - The last thread of a queue lets the item go on if it has given up waiting for it.
//! - Only the `xenwatch` thread may unregister a device, so the item asks it to.
//!
//! # What is freed when
//!
//! Whatever ends a device, at whatever point of its life, each thing has one owner and ends with it:
//!
//! - The thread of a queue owns its ring, its event channel, the pages that it has mapped and the
//!   requests that it has taken. It returns when nothing is in flight, and drops them then, in the
//!   order of the fields of [`Queue`]. Nobody else unmaps or unbinds.
//! - What is in flight is owned by the block layer, and holds the disk open; see
//!   [`kernel_ext::block::bio`].
//! - A [`DeviceHandle`] lives as long as its thread, or as the attempt to start it. It keeps the [`Device`] and
//!   with that the device, and counts: the count is 0 only when all queues are gone.
//! - The watch, the timers and the files in sysfs are dropped by whoever unbinds the driver, and each
//!   waits for a call of its own that is running. None of them is dropped with a lock that its call
//!   takes.
//! - The work item keeps the [`Device`] while it waits or runs. Whoever unbinds the driver hands the disk
//!   to it, and waits until it has closed the disk, but not for long: what hangs there keeps no one
//!   else waiting.
//! - A thread, and the work item while it runs, hold the module. So neither an unbind nor the loss of the device's directory has to
//!   wait for a disk that does not answer: what waits there keeps all that it needs.
//!
//! When the driver is unbound, nothing is said to the frontend: the rings stay as they are, with the
//! requests that nobody has taken, and the next driver goes on with them.
//!
//! # What a frontend can make us do
//!
//! Each thread takes from a ring what the frontend has put there and no more, lets others run in
//! between, and gives an event back as spurious if there was nothing: a frontend that only sends
//! events, or changes the index of its requests to and fro, is slowed down by the event channels.
//! What it reads of our index, and may overwrite, nobody here looks at. Connections, and looks for a
//! disk that is not open, are counted, see [`TokenBucket`]. Other changes of its state cost a look at xenstore
//! each, and at most one message in a while; the frontend has had to write to xenstore for each.

use core::fmt::Write;

use kernel::{
    device::Core,
    fmt,
    impl_has_work,
    new_mutex,
    new_work,
    prelude::*,
    str::{
        CStr,
        CString, //
    },
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
        sysfs::{
            self,
            Output, //
        },
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
    xen::{
        xenbus::{
            self,
            DeviceAction,
            DeviceId,
            Driver,
            IdArray,
            IdTable,
            Role,
            State,
            Switched, //
        },
        xenstore::{
            Watch,
            WatchHandler, //
        },
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
        ConnectError,
        ConnectOutcome,
        Connection, //
    },
    disk::{
        Disk,
        SizePoll, //
    },
    domain::{
        self,
        DeviceRegistration, //
    },
    events::QueueEvents,
    params,
    queue::Queue,
    stats::{
        self,
        Stats, //
    }, //
};

/// How long a driver that is unbound waits for what is in flight, before its queues are left to
/// themselves.
const DRAIN_MS: u32 = 30_000;

/// The same for the `xenwatch` thread, in which all other devices wait too, and for the work item of a
/// device. What takes longer goes on when the last queue has ended.
const SHORT_DRAIN_MS: u32 = 500;

/// How long after a failure it is tried again: twice as long after each one, from the first to the
/// second of these.
const RETRY_MS: u32 = 100;
const MAX_RETRY_MS: u32 = 10_000;

/// Connections that a frontend may make at once, and how long each one more takes.
const CONNECTIONS: u32 = 16;
const CONNECTION_MS: u32 = 500;

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"vbd")]);

/// Runs the work items of all devices; `None` before the driver is registered and after its end.
static WORK: GlobalMutex<Option<Arc<OwnedQueue>>> = GlobalMutex::new(None);

/// The queue of the devices' work. Dropping it waits for what is left of that.
pub(crate) struct WorkQueue(Arc<OwnedQueue>);

impl WorkQueue {
    pub(crate) fn new() -> Result<Self> {
        let queue = Arc::new(OwnedQueue::new(c"rblkback")?, GFP_KERNEL)?;
        *WORK.lock() = Some(queue.clone());
        Ok(Self(queue))
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        *WORK.lock() = None;
        // After this no device has the queue any more, so no work of it is the last to have it.
        self.0.flush();
    }
}

/// A bound device.
pub(crate) struct VbdDriver {
    device: Arc<Device>,
    /// Until the device is being unbound.
    watch: Pin<KBox<Mutex<Option<Watch<DiskWatch>>>>>,
}

/// Hears of the node `physical-device`.
struct DiskWatch(Arc<Device>);

/// Has a device look again after a while.
struct RetryTimer(Arc<Device>);

/// A device, as its callbacks, files and threads share it.
#[pin_data]
pub(crate) struct Device {
    xbdev: ARef<xenbus::Device>,
    /// The frontend's directory.
    frontend: CString,
    stats: Arc<Stats>,
    /// Threads that have not ended, also of older connections.
    live_threads: Atomic<u32>,
    /// The queues were told to end; what is to be done after that waits for the last one.
    draining: Atomic<bool>,
    /// The connection whose threads may take requests.
    served_connection: Atomic<u64>,
    /// `physical-device` was written and has still to be read.
    disk_named: Atomic<bool>,
    /// The work item waits to be run.
    work_queued: Atomic<bool>,
    /// The work item runs.
    work_running: Atomic<bool>,
    /// The work item waits for the device to be unregistered, and has closed the disk before.
    unregistering: Atomic<bool>,
    /// The work item is opening the disk or bringing the page cache onto it.
    waits_for_disk: Atomic<bool>,
    workqueue: Arc<OwnedQueue>,
    #[pin]
    work: Work<Self>,
    registration: DeviceRegistration,
    #[pin]
    wait: WaitQueue,
    #[pin]
    inner: Mutex<Inner>,
}

/// What changes in a device's life.
struct Inner {
    back: BackState,
    /// What was offered to the frontend.
    limits: BackLimits,
    /// Once the hotplug script has named it.
    disk: Option<Arc<Disk>>,
    /// A disk that is to be closed.
    to_close: Option<Arc<Disk>>,
    /// One for each ring that is served.
    queue_threads: KVec<QueueThread>,
    size_poll: Option<Pin<KBox<Timer<SizePoll>>>>,
    connect_limit: TokenBucket,
    /// The frontend has to wait for its next turn.
    throttled: bool,
    /// Has the device look again; until it is being unbound.
    retry_timer: Option<Pin<KBox<Timer<RetryTimer>>>>,
    /// Failures in a row that were followed by another try.
    failures: u32,
    /// What the last of them was, as it was reported.
    reported: Option<Error>,
    /// Counts the connections, so that a thread of an old one does no harm to a new one.
    connection: u64,
}

/// Says what is to be done without the lock.
enum Step {
    /// Nothing, until something happens.
    None,
    /// To decide again.
    Again,
    /// To wait for the threads of the queues.
    Drain,
    /// To open the disk that the hotplug script has named.
    Open,
    /// To connect to the frontend.
    Attach(Arc<Disk>),
    /// To close a disk.
    Close(Arc<Disk>),
    /// To have the device unregistered, which is closed.
    Unregister,
}

/// A queue that is served.
struct QueueThread {
    /// Dropping it stops the thread.
    _thread: KThread,
    events: Arc<QueueEvents>,
}

impl Driver for VbdDriver {
    const ROLE: Role = Role::Backend;
    const NAME: &'static CStr = c"vbd";
    const ID_TABLE: IdTable = IDS.as_table();
    const ALLOW_REBIND: bool = true;

    fn probe(xbdev: &xenbus::Device<Core<'_>>) -> impl PinInit<Self, Error> {
        Self::check_take_over(xbdev).and_then(|()| {
            // A frontend that is connected stays so: the device can be bound again.
            Self::new(xbdev)
                .inspect_err(|error| xbdev.dev_error(*error, fmt!("making a disk to offer")))
        })
    }

    fn otherend_changed(
        self: Pin<&Self>,
        _device: &xenbus::Device<Core<'_>>,
        _state: State,
    ) -> DeviceAction {
        self.device.schedule_work();
        DeviceAction::Keep
    }

    fn remove(self: Pin<&Self>, _device: &xenbus::Device<Core<'_>>) {
        // This waits for the `xenwatch` thread, with the device locked. So not after a long wait for
        // something else: by then that thread may want the lock, to remove the device.
        let watch = self.watch.lock().take();
        drop(watch);
        self.device.detach();
    }

    fn reclaim_memory(self: Pin<&Self>) {
        if let Some(inner) = self.device.inner.try_lock() {
            inner
                .queue_threads
                .iter()
                .for_each(|one| one.events.set_memory_pressure());
        }
    }
}

impl VbdDriver {
    /// Whether rings that are in use can be taken over. If not, the frontend is told nothing, so that
    /// the device can be bound later.
    fn check_take_over(xbdev: &xenbus::Device<Core<'_>>) -> Result {
        let otherend = xbdev.otherend()?;
        if domain::is_orphaned(xbdev.nodename())
            && xbdev.read_driver_state(otherend) == State::Connected
        {
            dev_err!(
                xbdev.as_ref(),
                "queues of a driver that was unbound still wait for a disk: bind again later\n"
            );
            return Err(EBUSY);
        }
        Ok(())
    }

    fn new(xbdev: &xenbus::Device<Core<'_>>) -> Result<Self> {
        let device = Device::new(xbdev)?;
        let watch = KBox::pin_init(new_mutex!(None), GFP_KERNEL)?;
        // From here on this ends what was begun, also if one of the following fails.
        let driver = Self { device, watch };
        let device = &driver.device;
        device.inner.lock().retry_timer =
            Some(Timer::new(TimerFlags::Default, RetryTimer(device.clone()))?);
        sysfs::register(xbdev.as_ref(), None, &stats::DEVICE, device.clone())?;
        let stats = device.stats.clone();
        sysfs::register(
            xbdev.as_ref(),
            Some(c"statistics"),
            &stats::STATISTICS,
            stats,
        )?;
        let handler = Arc::new(DiskWatch(device.clone()), GFP_KERNEL)?;
        let watch = Watch::new(xbdev.nodename(), fmt!("physical-device"), handler)?;
        *driver.watch.lock() = Some(watch);
        Ok(driver)
    }
}

impl Drop for VbdDriver {
    fn drop(&mut self) {
        let watch = self.watch.lock().take();
        drop(watch);
        self.device.detach();
    }
}

impl WatchHandler for DiskWatch {
    fn changed(&self) {
        self.0.disk_named.store(true, Relaxed);
        self.0.schedule_work();
    }
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
        // Whoever looks sees the one or the other.
        device.work_running.store(true, Release);
        device.work_queued.store(false, Release);
        // So that the module is in use while a disk hangs, and its end does not have to wait.
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
    fn new(xbdev: &xenbus::Device<Core<'_>>) -> Result<Arc<Self>> {
        let frontend = CString::try_from_fmt(fmt!("{}", xbdev.otherend()?))?;
        let stats = Arc::pin_init(Stats::new(), GFP_KERNEL)?;
        let workqueue = WORK.lock().clone().ok_or(ENODEV)?;
        let inner = Inner {
            back: match xbdev.state() {
                State::Closing | State::Closed => BackState::StartingClosed,
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
            reported: None,
            connection: 0,
        };
        let registration = DeviceRegistration::new(xbdev)?;
        let xbdev: ARef<xenbus::Device> = ARef::from(&***xbdev);
        let device = pin_init!(Self {
            xbdev,
            frontend,
            stats,
            live_threads: Atomic::new(0),
            draining: Atomic::new(false),
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

    /// Has the work item run soon. Any context.
    fn schedule_work(self: &Arc<Self>) {
        self.work_queued.store(true, Release);
        // It comes back if it waits to be run already.
        let _ = self.workqueue.enqueue(self.clone());
    }

    /// Does what there is to do. Returns `true` if the device is closed and to be unregistered.
    fn handle_events(self: &Arc<Self>) -> bool {
        let mut step = Step::Again;
        loop {
            step = match step {
                Step::None => return false,
                Step::Again => self.next_step(),
                Step::Drain if self.drain(SHORT_DRAIN_MS) => Step::Again,
                // The last thread goes on.
                Step::Drain => Step::None,
                Step::Open => self.open_disk(),
                Step::Attach(disk) => self.connect(&disk),
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

    /// Decides what is to be done, and does it if it is quick.
    fn next_step(self: &Arc<Self>) -> Step {
        let mut inner = self.inner.lock();
        if let Some(disk) = inner.to_close.take() {
            return Step::Close(disk);
        }
        if inner.back == BackState::Gone {
            return Step::None;
        }
        let started = !matches!(inner.back, BackState::Starting | BackState::StartingClosed);
        if started && self.disk_named.load(Relaxed) {
            return Step::Open;
        }
        let event = self.read_event(&inner);
        let action = if !self.draining.load(Relaxed) {
            inner.back.step(event)
        } else if self.has_threads() {
            return Step::None;
        } else {
            BackAction::Drain
        };
        match action {
            BackAction::Drain if self.stop_queues(&mut inner) => Step::Drain,
            BackAction::Open if self.throttle(&mut inner) => Step::None,
            BackAction::Open => Step::Open,
            BackAction::Attach if self.throttle(&mut inner) => Step::None,
            BackAction::Attach => inner.disk.clone().map_or(Step::None, Step::Attach),
            _ => self.run_action(&mut inner, action),
        }
    }

    /// Returns `true` if the frontend connects more often than it may. The device looks again in time.
    fn throttle(&self, inner: &mut Inner) -> bool {
        let Err(ticks) = inner.connect_limit.take(jiffies::now() as u64) else {
            inner.throttled = false;
            return false;
        };
        if !inner.throttled && inner.failures == 0 {
            ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "the frontend connects too often: it has to wait\n"
            ));
        }
        inner.throttled = true;
        if let Some(retry_timer) = &inner.retry_timer {
            retry_timer.mod_timer_after(ticks as Jiffies);
        }
        true
    }

    /// What is to be seen now.
    fn read_event(&self, inner: &Inner) -> BackEvent {
        let state = self.xbdev.read_driver_state(&self.frontend).number();
        match XenbusState::from_number(state) {
            None => BackEvent::BadState,
            Some(XenbusState::Unknown) if connect::has_invalid_state(&self.frontend) => {
                BackEvent::BadState
            }
            Some(state) => BackEvent::Frontend {
                state,
                online: connect::is_online(&self.xbdev, state),
                ready: inner.disk.is_some(),
            },
        }
    }

    /// Carries out an action that is quick, and enters the state that it leads to.
    fn run_action(&self, inner: &mut Inner, action: BackAction) -> Step {
        let result = match action {
            BackAction::Restart => self
                .write_features(inner)
                .map_err(|error| ConnectError::Local("offering", error)),
            BackAction::Fail => Err(connect::bad_state_error(&self.frontend)),
            _ => Ok(()),
        };
        match (result, action.next_state()) {
            (Err(error), _) => self.fail(inner, &error),
            (Ok(()), Some(next)) => self.set_state(inner, next),
            (Ok(()), None) => Step::None,
        }
    }

    /// Takes over a state, and shows it, unless the toolstack wants another one.
    fn set_state(&self, inner: &mut Inner, next: BackState) -> Step {
        let switched = match next.xenbus() {
            Some(state) => self.xbdev.switch_state(shown(state)),
            None => Switched::Written,
        };
        match switched {
            Switched::Written => self.state_set(inner, next),
            Switched::Refused(found) => self.state_refused(inner, next, found),
            Switched::Failed(error) => {
                self.schedule_retry(inner, &ConnectError::Local("writing the state", error));
                Step::None
            }
        }
    }

    fn state_set(&self, inner: &mut Inner, next: BackState) -> Step {
        inner.back = next;
        if next == BackState::Gone {
            inner.to_close = inner.disk.take();
            return Step::Unregister;
        }
        Step::Again
    }

    /// Another state was found where a state was to be written.
    fn state_refused(&self, inner: &mut Inner, next: BackState, found: State) -> Step {
        if found == State::Closing {
            let action = inner.back.step(BackEvent::ToolstackClosing);
            return match action.next_state() {
                Some(closing) => self.set_state(inner, closing),
                None => Step::None,
            };
        }
        match next {
            // The directory is gone, or is that of a new device: the bus will remove this one.
            BackState::Closing | BackState::Closed | BackState::Gone => self.state_set(inner, next),
            _ => Step::None,
        }
    }

    /// Deals with a failure: the frontend is to close, or it is tried again after a while.
    fn fail(&self, inner: &mut Inner, error: &ConnectError) -> Step {
        let failure = error.failure(|| connect::was_connected(&self.xbdev));
        let action = inner.back.step(BackEvent::Failed(failure));
        let Some(next) = action.next_state() else {
            if action == BackAction::Retry {
                self.schedule_retry(inner, error);
            }
            return Step::None;
        };
        ratelimited!(self.xbdev.dev_error(error.error(), fmt!("{error}")));
        self.set_state(inner, next)
    }

    /// Reports what has failed, if that is new, and looks again after a while.
    fn schedule_retry(&self, inner: &mut Inner, error: &ConnectError) {
        if inner.reported != Some(error.error()) {
            inner.reported = Some(error.error());
            ratelimited!(self
                .xbdev
                .dev_error(error.error(), fmt!("{error}: it is tried again")));
        }
        let time = RETRY_MS
            .checked_shl(inner.failures)
            .map_or(MAX_RETRY_MS, |time| time.min(MAX_RETRY_MS));
        // No more than the longest time needs.
        inner.failures = inner.failures.saturating_add(1).min(u32::BITS / 4);
        if let Some(retry_timer) = &inner.retry_timer {
            retry_timer.mod_timer_after(msecs_to_jiffies(time));
        }
    }

    /// What has failed before works now.
    fn clear_failures(&self, inner: &mut Inner) {
        inner.failures = 0;
        if inner.reported.take().is_some() {
            dev_info!(self.xbdev.as_ref(), "the disk is served\n");
            if let Err(error) = connect::clear_error(&self.xbdev) {
                dev_warn!(
                    self.xbdev.as_ref(),
                    "cannot remove the error from xenstore: {error:?}\n"
                );
            }
        }
    }

    /// Writes what a frontend may choose from.
    fn write_features(&self, inner: &mut Inner) -> Result {
        inner.limits = params::limits();
        connect::write_features(self.xbdev.nodename(), &inner.limits)
    }

    /// Opens the disk if the hotplug script has named one, and none is open.
    fn open_disk(&self) -> Step {
        let disk_named = self.disk_named.xchg(false, Relaxed);
        let disk = self.inner.lock().disk.clone();
        self.waits_for_disk.store(true, Relaxed);
        let found = connect::open_disk(&self.xbdev, disk.as_deref());
        self.waits_for_disk.store(false, Relaxed);
        let mut inner = self.inner.lock();
        let step = self.disk_opened(&mut inner, found);
        // If this was about the name alone, the frontend has not been looked at yet.
        match step {
            Step::None if disk_named => Step::Again,
            step => step,
        }
    }

    /// Takes the disk that was opened, if there is one.
    fn disk_opened(
        &self,
        inner: &mut Inner,
        found: Result<Option<Arc<Disk>>, ConnectError>,
    ) -> Step {
        match found {
            Ok(Some(disk)) if inner.back == BackState::Gone => inner.to_close = Some(disk),
            Ok(Some(disk)) => inner.disk = Some(disk),
            Ok(None) => {
                self.report_size(inner);
                return Step::None;
            }
            Err(error) => return self.fail(inner, &error),
        }
        Step::Again
    }

    /// Connects to the frontend: its rings are served when this returns.
    fn connect(self: &Arc<Self>, disk: &Arc<Disk>) -> Step {
        if let Err(error) = self.drop_page_cache(disk) {
            let error = ConnectError::Local("writing back the page cache of the disk", error);
            return self.fail(&mut self.inner.lock(), &error);
        }
        let mut inner = self.inner.lock();
        if inner.back != BackState::Waiting {
            return Step::Again;
        }
        let step = match self.connect_rings(&mut inner, disk) {
            Ok(ConnectOutcome::Connected) => {
                inner.back = BackState::Live;
                self.clear_failures(&mut inner);
                // What the frontend does from now on is told, and the toolstack has to wait for it.
                Step::None
            }
            Ok(ConnectOutcome::Withdrawn) => Step::Again,
            Ok(ConnectOutcome::Refused(found)) => {
                self.state_refused(&mut inner, BackState::Live, found)
            }
            Err(error) => self.fail(&mut inner, &error),
        };
        let live = inner.back == BackState::Live;
        let connection = inner.connection;
        drop(inner);
        if live {
            self.start_serving(disk, connection);
        } else {
            // Threads that were started have taken nothing, and have to be gone before the next ones.
            self.drain(SHORT_DRAIN_MS);
        }
        step
    }

    /// Lets the threads of a connection take requests.
    fn start_serving(&self, disk: &Disk, connection: u64) {
        // Again, for what was written to the disk before anybody could see that it is connected.
        if let Err(error) = self.drop_page_cache(disk) {
            dev_err!(
                self.xbdev.as_ref(),
                "cannot write back the page cache of the disk: {error:?}\n"
            );
        }
        self.served_connection.store(connection, Release);
        self.wait.wake_up();
    }

    fn drop_page_cache(&self, disk: &Disk) -> Result {
        self.waits_for_disk.store(true, Relaxed);
        let result = disk.drop_page_cache();
        self.waits_for_disk.store(false, Relaxed);
        result
    }

    /// Maps the rings, starts their threads, and shows Connected.
    fn connect_rings(
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
        // If one of these does not start, those that did are dropped, and end.
        let mut queue_threads = KVec::new();
        for (index, queue) in queues {
            push(
                &mut queue_threads,
                self.spawn_queue_thread(queue, index, inner.connection)?,
            )?;
        }
        let size_poll = queue_threads
            .first()
            .map(|first| SizePoll::timer(disk.clone(), first.events.clone()))
            .transpose()
            .map_err(|error| ConnectError::Local("making a timer", error))?;
        // The frontend may ask as soon as this is written: the threads take nothing before `served_connection`
        // says so.
        let described = connection.describe_disk()?;
        if matches!(described, ConnectOutcome::Connected) {
            // Nothing may fail any more: the frontend has been told that it is served.
            if let Some(timer) = &size_poll {
                timer.mod_timer_after(SizePoll::period());
            }
            inner.size_poll = size_poll;
            inner.queue_threads = queue_threads;
            connection.report();
        }
        Ok(described)
    }

    fn spawn_queue_thread(
        self: &Arc<Self>,
        queue: Queue,
        index: u32,
        connection: u64,
    ) -> Result<QueueThread, ConnectError> {
        let handle = DeviceHandle::new(self, index, connection);
        let name = CString::try_from_fmt(fmt!("rblkback {}", queue.name()))
            .map_err(|error| ConnectError::Local("naming a thread", error))?;
        let kind = KThreadOptions { freezable: true };
        let events = queue.events();
        KThread::spawn(fmt!("{}", *name), kind, move |thread| {
            // What it serves may be where memory is freed to.
            let _noio = NoioScope::new();
            handle.wait_until_serving(thread);
            queue.serve(thread, &handle);
            drop(handle);
        })
        .map(|_thread| QueueThread { _thread, events })
        .map_err(|error| ConnectError::Local("starting a thread", error))
    }

    /// Tells the frontend of a new size of the disk, if there is one.
    fn report_size(&self, inner: &Inner) {
        let Some(disk) = inner.disk.as_ref().filter(|disk| disk.size_changed()) else {
            return;
        };
        if inner.back != BackState::Live || self.draining.load(Relaxed) {
            return;
        }
        if let Err(error) = connect::write_size(&self.xbdev, disk) {
            ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "cannot tell the frontend of the new size: {error:?}\n"
            ));
        }
    }

    /// Has the threads end what they have taken from their rings. Whether there are any left.
    fn stop_queues(&self, inner: &mut Inner) -> bool {
        inner.size_poll = None;
        inner.queue_threads.clear();
        // A full barrier: either the last thread sees this, or its end is seen below.
        self.draining.xchg(true, Full);
        let left = self.has_threads();
        if !left {
            self.draining.store(false, Relaxed);
        }
        left
    }

    fn has_threads(&self) -> bool {
        self.live_threads.load(Acquire) != 0
    }

    /// Waits until all threads have ended. A thread that does not get there in time goes on alone: it
    /// owns its ring and memory.
    fn drain(&self, time_ms: u32) -> bool {
        let time = msecs_to_jiffies(time_ms);
        let drained = self.wait.wait_timeout(time, || !self.has_threads());
        if !drained {
            ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "{} queues still wait for the disk after {time_ms} ms: they end when it answers\n",
                self.live_threads.load(Relaxed)
            ));
        }
        drained
    }

    /// The driver is unbound.
    fn detach(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        let Some(retry_timer) = inner.retry_timer.take() else {
            // That is done.
            return;
        };
        inner.back = BackState::Gone;
        self.stop_queues(&mut inner);
        // There is nothing to be done after that.
        self.draining.store(false, Relaxed);
        drop(inner);
        drop(retry_timer);
        // Without its directory the device goes for good: nobody else will serve its rings.
        let gone = self.xbdev.read_driver_state(self.xbdev.nodename()) == State::Unknown;
        let time_ms = if gone { SHORT_DRAIN_MS } else { DRAIN_MS };
        if !self.drain(time_ms) && !gone {
            self.mark_orphaned();
        }
        self.close(time_ms);
    }

    /// Has the work item close the disk, and waits for that, but not for a disk that does not answer.
    fn close(self: &Arc<Self>, time_ms: u32) {
        let mut inner = self.inner.lock();
        if let Some(disk) = inner.disk.take() {
            inner.to_close = Some(disk);
            self.schedule_work();
        }
        drop(inner);
        let time_ms = if self.waits_for_disk.load(Relaxed) {
            SHORT_DRAIN_MS
        } else {
            time_ms
        };
        let idle = || {
            self.unregistering.load(Acquire)
                || !self.work_queued.load(Acquire) && !self.work_running.load(Acquire)
        };
        if !self.wait.wait_timeout(msecs_to_jiffies(time_ms), idle) {
            ratelimited!(dev_warn!(
                self.xbdev.as_ref(),
                "the disk is still being opened or closed after {time_ms} ms: that ends when it answers\n"
            ));
        }
    }

    /// Has the device unregistered, which is closed.
    fn unregister(&self) {
        if let Err(error) = xenbus::unregister_device(&self.xbdev) {
            dev_warn!(
                self.xbdev.as_ref(),
                "cannot be unregistered ({error:?}): that is done when its directory is removed\n"
            );
        }
    }

    /// The threads go on, and nobody may take over their rings meanwhile.
    fn mark_orphaned(&self) {
        // A full barrier: either the last thread sees this, or its end is seen below.
        self.registration.orphaned().xchg(true, Full);
        if !self.has_threads() {
            self.clear_orphaned();
        }
    }

    /// The last thread has ended.
    fn clear_orphaned(&self) {
        self.registration.orphaned().xchg(false, Full);
    }

    /// The file `physical_device`.
    pub(crate) fn show_physical_device(&self, out: &mut Output<'_>) -> fmt::Result {
        match &self.inner.lock().disk {
            Some(disk) => writeln!(out, "{:x}:{:x}", disk.number.major(), disk.number.minor()),
            None => Ok(()),
        }
    }

    /// The file `mode`.
    pub(crate) fn show_mode(&self, out: &mut Output<'_>) -> fmt::Result {
        match &self.inner.lock().disk {
            Some(disk) => out.write_fmt(fmt!("{}\n", *disk.mode)),
            None => Ok(()),
        }
    }
}

/// What the thread of a queue tells its device.
pub(crate) struct DeviceHandle {
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

    /// Waits until the thread may take requests, or is to end.
    fn wait_until_serving(&self, thread: &Current) {
        let device = &self.device;
        device.wait.wait_idle(|| {
            thread.should_stop() || device.served_connection.load(Acquire) == self.connection
        });
    }

    /// The disk has refused what a node has offered.
    pub(crate) fn withdraw_feature(&self, node: &str) {
        let inner = self.device.inner.lock();
        if inner.connection != self.connection {
            return;
        }
        let xbdev = &self.device.xbdev;
        dev_info!(xbdev.as_ref(), "the disk has refused this: {node} = 0\n");
        if let Err(error) = connect::withdraw_feature(xbdev, node) {
            dev_warn!(xbdev.as_ref(), "cannot write {node}: {error:?}\n");
        }
    }

    /// The frontend has broken the ring.
    pub(crate) fn ring_broken(&self, error: RingError) {
        let mut inner = self.device.inner.lock();
        if inner.connection == self.connection {
            self.device
                .fail(&mut inner, &ConnectError::Ring(self.index, error));
        }
        drop(inner);
        self.device.schedule_work();
    }

    /// The size of the disk has changed.
    pub(crate) fn resized(&self) {
        let inner = self.device.inner.lock();
        if inner.connection == self.connection {
            self.device.report_size(&inner);
        }
    }
}

impl Drop for DeviceHandle {
    /// The thread has ended, and all that it had is gone.
    fn drop(&mut self) {
        let device = &self.device;
        if device.live_threads.fetch_sub(1, Full) == 1 {
            device.wait.wake_up();
            device.clear_orphaned();
            if device.draining.load(Relaxed) {
                device.schedule_work();
            }
        }
    }
}

fn push<T>(list: &mut KVec<T>, item: T) -> Result<(), ConnectError> {
    list.push(item, GFP_KERNEL)
        .map_err(|_| ConnectError::Local("making a queue", ENOMEM))
}

/// A state as the bus has it.
fn shown(state: XenbusState) -> State {
    match state {
        XenbusState::Unknown => State::Unknown,
        XenbusState::Initialising => State::Initialising,
        XenbusState::InitWait => State::InitWait,
        XenbusState::Initialised => State::Initialised,
        XenbusState::Connected => State::Connected,
        XenbusState::Closing => State::Closing,
        XenbusState::Closed => State::Closed,
        XenbusState::Reconfiguring => State::Reconfiguring,
        XenbusState::Reconfigured => State::Reconfigured,
    }
}
