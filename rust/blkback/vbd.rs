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
//! has something to do, and a work item of its own does it ([`Vbd::kick`], [`Vbd::run`]): to open a
//! disk, to bring the page cache onto it, to close it and to wait for its last answers takes as long
//! as the disk takes, which may be forever. None of that is done with [`Vbd::inner`] locked, so an
//! unbind and the files in sysfs do not wait for it either.
//!
//! - [`Vbd::next_step`] decides, with the lock, and does what is quick. What is not, it returns.
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
//! - A [`Link`] lives as long as its thread, or as the attempt to start it. It keeps the [`Vbd`] and
//!   with that the device, and counts: the count is 0 only when all queues are gone.
//! - The watch, the timers and the files in sysfs are dropped by whoever unbinds the driver, and each
//!   waits for a call of its own that is running. None of them is dropped with a lock that its call
//!   takes.
//! - The work item keeps the [`Vbd`] while it waits or runs. Whoever unbinds the driver hands the disk
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
//! disk that is not open, are counted, see [`Pace`]. Other changes of its state cost a look at xenstore
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
            Kind, //
        },
        module_ref::ModuleRef,
        noio::Noio,
        sysfs::{
            self,
            Output, //
        },
        timer::{
            IdleCpu,
            Target,
            Timer, //
        },
        wait::WaitQueue,
        workqueue::OwnedQueue, //
    },
    new_wait_queue,
    ratelimited,
    xen::{
        xenbus::{
            self,
            After,
            Device,
            DeviceId,
            Driver,
            IdArray,
            IdTable,
            Side,
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
    pace::Pace,
    ring::RingError,
    state::{
        Back,
        BackAction,
        BackEvent,
        XenbusState, //
    }, //
};

use crate::{
    connect::{
        self,
        Connection,
        Described,
        Fault, //
    },
    disk::{
        Disk,
        SizeWatch, //
    },
    domain::{
        self,
        Seated, //
    },
    inbox::Inbox,
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
    vbd: Arc<Vbd>,
    /// Until the device is being unbound.
    watch: Pin<KBox<Mutex<Option<Watch<PhysicalDevice>>>>>,
}

/// Hears of the node `physical-device`.
struct PhysicalDevice(Arc<Vbd>);

/// Has a device look again after a while.
struct Later(Arc<Vbd>);

/// A device, as its callbacks, files and threads share it.
#[pin_data]
pub(crate) struct Vbd {
    device: ARef<Device>,
    /// The frontend's directory.
    frontend: CString,
    stats: Arc<Stats>,
    /// Threads that have not ended, also of older connections.
    threads: Atomic<u32>,
    /// The queues were told to end; what is to be done after that waits for the last one.
    draining: Atomic<bool>,
    /// The connection whose threads may take requests.
    served: Atomic<u64>,
    /// `physical-device` was written and has still to be read.
    named: Atomic<bool>,
    /// The work item waits to be run.
    queued: Atomic<bool>,
    /// The work item runs.
    working: Atomic<bool>,
    /// The work item waits for the device to be unregistered, and has closed the disk before.
    unregistering: Atomic<bool>,
    /// The work item is opening the disk or bringing the page cache onto it.
    waits_for_disk: Atomic<bool>,
    queue: Arc<OwnedQueue>,
    #[pin]
    work: Work<Self>,
    seat: Seated,
    #[pin]
    ended: WaitQueue,
    #[pin]
    inner: Mutex<Inner>,
}

/// What changes in a device's life.
struct Inner {
    back: Back,
    /// What was offered to the frontend.
    limits: BackLimits,
    /// Once the hotplug script has named it.
    disk: Option<Arc<Disk>>,
    /// A disk that is to be closed.
    discarded: Option<Arc<Disk>>,
    /// One for each ring that is served.
    serving: KVec<Serving>,
    size_watch: Option<Pin<KBox<Timer<SizeWatch>>>>,
    pace: Pace,
    /// The frontend has to wait for its next turn.
    paced: bool,
    /// Has the device look again; until it is being unbound.
    later: Option<Pin<KBox<Timer<Later>>>>,
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
struct Serving {
    /// Dropping it stops the thread.
    _thread: KThread,
    inbox: Arc<Inbox>,
}

impl Driver for VbdDriver {
    const SIDE: Side = Side::Backend;
    const NAME: &'static CStr = c"vbd";
    const ID_TABLE: IdTable = IDS.as_table();
    const ALLOW_REBIND: bool = true;

    fn probe(device: &Device<Core<'_>>) -> impl PinInit<Self, Error> {
        Self::check_take_over(device).and_then(|()| {
            // A frontend that is connected stays so: the device can be bound again.
            Self::new(device)
                .inspect_err(|error| device.dev_error(*error, fmt!("making a disk to offer")))
        })
    }

    fn otherend_changed(self: Pin<&Self>, _device: &Device<Core<'_>>, _state: State) -> After {
        self.vbd.kick();
        After::Keep
    }

    fn remove(self: Pin<&Self>, _device: &Device<Core<'_>>) {
        // This waits for the `xenwatch` thread, with the device locked. So not after a long wait for
        // something else: by then that thread may want the lock, to remove the device.
        let watch = self.watch.lock().take();
        drop(watch);
        self.vbd.leave();
    }

    fn reclaim_memory(self: Pin<&Self>) {
        if let Some(inner) = self.vbd.inner.try_lock() {
            inner
                .serving
                .iter()
                .for_each(|one| one.inbox.memory_is_short());
        }
    }
}

impl VbdDriver {
    /// Whether rings that are in use can be taken over. If not, the frontend is told nothing, so that
    /// the device can be bound later.
    fn check_take_over(device: &Device<Core<'_>>) -> Result {
        let otherend = device.otherend()?;
        if domain::is_left_alone(device.nodename())
            && device.read_driver_state(otherend) == State::Connected
        {
            dev_err!(
                device.as_ref(),
                "queues of a driver that was unbound still wait for a disk: bind again later\n"
            );
            return Err(EBUSY);
        }
        Ok(())
    }

    fn new(device: &Device<Core<'_>>) -> Result<Self> {
        let vbd = Vbd::new(device)?;
        let watch = KBox::pin_init(new_mutex!(None), GFP_KERNEL)?;
        // From here on this ends what was begun, also if one of the following fails.
        let driver = Self { vbd, watch };
        let vbd = &driver.vbd;
        vbd.inner.lock().later = Some(Timer::new(IdleCpu::Wakes, Later(vbd.clone()))?);
        sysfs::register(device.as_ref(), None, &stats::DEVICE, vbd.clone())?;
        let stats = vbd.stats.clone();
        sysfs::register(
            device.as_ref(),
            Some(c"statistics"),
            &stats::STATISTICS,
            stats,
        )?;
        let handler = Arc::new(PhysicalDevice(vbd.clone()), GFP_KERNEL)?;
        let watch = Watch::new(device.nodename(), fmt!("physical-device"), handler)?;
        *driver.watch.lock() = Some(watch);
        Ok(driver)
    }
}

impl Drop for VbdDriver {
    fn drop(&mut self) {
        let watch = self.watch.lock().take();
        drop(watch);
        self.vbd.leave();
    }
}

impl WatchHandler for PhysicalDevice {
    fn changed(&self) {
        self.0.named.store(true, Relaxed);
        self.0.kick();
    }
}

impl Target for Later {
    fn expired(&self) -> Option<Jiffies> {
        self.0.kick();
        None
    }
}

impl_has_work! {
    impl HasWork<Self> for Vbd { self.work }
}

impl WorkItem for Vbd {
    type Pointer = Arc<Self>;

    fn run(vbd: Arc<Self>) {
        // Whoever looks sees the one or the other.
        vbd.working.store(true, Release);
        vbd.queued.store(false, Release);
        // So that the module is in use while a disk hangs, and its end does not have to wait.
        let module = ModuleRef::new();
        let closed = vbd.handle_events();
        drop(module);
        vbd.unregistering.store(closed, Release);
        vbd.working.store(false, Release);
        vbd.ended.wake_up();
        if closed {
            vbd.unregister();
        }
    }
}

impl Vbd {
    fn new(device: &Device<Core<'_>>) -> Result<Arc<Self>> {
        let frontend = CString::try_from_fmt(fmt!("{}", device.otherend()?))?;
        let stats = Arc::pin_init(Stats::new(), GFP_KERNEL)?;
        let queue = WORK.lock().clone().ok_or(ENODEV)?;
        let inner = Inner {
            back: match device.state() {
                State::Closing | State::Closed => Back::StartingClosed,
                _ => Back::Starting,
            },
            limits: params::limits(),
            disk: None,
            discarded: None,
            serving: KVec::new(),
            size_watch: None,
            pace: Pace::new(
                CONNECTIONS,
                msecs_to_jiffies(CONNECTION_MS) as u64,
                jiffies::now() as u64,
            ),
            paced: false,
            later: None,
            failures: 0,
            reported: None,
            connection: 0,
        };
        let seat = Seated::new(device)?;
        let device: ARef<Device> = ARef::from(&***device);
        let vbd = pin_init!(Self {
            device,
            frontend,
            stats,
            threads: Atomic::new(0),
            draining: Atomic::new(false),
            served: Atomic::new(0),
            named: Atomic::new(false),
            queued: Atomic::new(false),
            working: Atomic::new(false),
            unregistering: Atomic::new(false),
            waits_for_disk: Atomic::new(false),
            queue,
            work <- new_work!("Vbd::work"),
            seat,
            ended <- new_wait_queue!(),
            inner <- new_mutex!(inner),
        });
        Arc::pin_init(vbd, GFP_KERNEL)
    }

    /// Has the work item run soon. Any context.
    fn kick(self: &Arc<Self>) {
        self.queued.store(true, Release);
        // It comes back if it waits to be run already.
        let _ = self.queue.enqueue(self.clone());
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
                Step::Open => self.open(),
                Step::Attach(disk) => self.attach(&disk),
                Step::Close(disk) => {
                    drop(disk);
                    Step::Again
                }
                Step::Unregister => {
                    let disk = self.inner.lock().discarded.take();
                    drop(disk);
                    return true;
                }
            }
        }
    }

    /// Decides what is to be done, and does it if it is quick.
    fn next_step(self: &Arc<Self>) -> Step {
        let mut inner = self.inner.lock();
        if let Some(disk) = inner.discarded.take() {
            return Step::Close(disk);
        }
        if inner.back == Back::Gone {
            return Step::None;
        }
        let started = !matches!(inner.back, Back::Starting | Back::StartingClosed);
        if started && self.named.load(Relaxed) {
            return Step::Open;
        }
        let event = self.look(&inner);
        let action = if !self.draining.load(Relaxed) {
            inner.back.step(event)
        } else if self.has_threads() {
            return Step::None;
        } else {
            BackAction::Drain
        };
        match action {
            BackAction::Drain if self.stop(&mut inner) => Step::Drain,
            BackAction::Open if self.must_wait(&mut inner) => Step::None,
            BackAction::Open => Step::Open,
            BackAction::Attach if self.must_wait(&mut inner) => Step::None,
            BackAction::Attach => inner.disk.clone().map_or(Step::None, Step::Attach),
            _ => self.carry_out(&mut inner, action),
        }
    }

    /// Returns `true` if the frontend connects more often than it may. The device looks again in time.
    fn must_wait(&self, inner: &mut Inner) -> bool {
        let Err(ticks) = inner.pace.take(jiffies::now() as u64) else {
            inner.paced = false;
            return false;
        };
        if !inner.paced && inner.failures == 0 {
            ratelimited!(dev_warn!(
                self.device.as_ref(),
                "the frontend connects too often: it has to wait\n"
            ));
        }
        inner.paced = true;
        if let Some(later) = &inner.later {
            later.set_after(ticks as Jiffies);
        }
        true
    }

    /// What is to be seen now.
    fn look(&self, inner: &Inner) -> BackEvent {
        let state = self.device.read_driver_state(&self.frontend).number();
        match XenbusState::from_number(state) {
            None => BackEvent::BadState,
            Some(XenbusState::Unknown) if connect::has_wrong_state(&self.frontend) => {
                BackEvent::BadState
            }
            Some(state) => BackEvent::Frontend {
                state,
                online: connect::is_online(&self.device, state),
                ready: inner.disk.is_some(),
            },
        }
    }

    /// Carries out an action that is quick, and enters the state that it leads to.
    fn carry_out(&self, inner: &mut Inner, action: BackAction) -> Step {
        let result = match action {
            BackAction::Restart => self
                .offer(inner)
                .map_err(|error| Fault::Own("offering", error)),
            BackAction::Fail => Err(connect::wrong_state(&self.frontend)),
            _ => Ok(()),
        };
        match (result, action.leads_to()) {
            (Err(fault), _) => self.fail(inner, &fault),
            (Ok(()), Some(next)) => self.enter(inner, next),
            (Ok(()), None) => Step::None,
        }
    }

    /// Takes over a state, and shows it, unless the toolstack wants another one.
    fn enter(&self, inner: &mut Inner, next: Back) -> Step {
        let switched = match next.xenbus() {
            Some(state) => self.device.switch_state(shown(state)),
            None => Switched::Written,
        };
        match switched {
            Switched::Written => self.entered(inner, next),
            Switched::Refused(found) => self.refused(inner, next, found),
            Switched::Failed(error) => {
                self.try_later(inner, &Fault::Own("writing the state", error));
                Step::None
            }
        }
    }

    fn entered(&self, inner: &mut Inner, next: Back) -> Step {
        inner.back = next;
        if next == Back::Gone {
            inner.discarded = inner.disk.take();
            return Step::Unregister;
        }
        Step::Again
    }

    /// Another state was found where a state was to be written.
    fn refused(&self, inner: &mut Inner, next: Back, found: State) -> Step {
        if found == State::Closing {
            let action = inner.back.step(BackEvent::ToolstackClosing);
            return match action.leads_to() {
                Some(closing) => self.enter(inner, closing),
                None => Step::None,
            };
        }
        match next {
            // The directory is gone, or is that of a new device: the bus will remove this one.
            Back::Closing | Back::Closed | Back::Gone => self.entered(inner, next),
            _ => Step::None,
        }
    }

    /// Deals with a failure: the frontend is to close, or it is tried again after a while.
    fn fail(&self, inner: &mut Inner, fault: &Fault) -> Step {
        let failure = fault.failure(|| connect::was_connected(&self.device));
        let action = inner.back.step(BackEvent::Failed(failure));
        let Some(next) = action.leads_to() else {
            if action == BackAction::Retry {
                self.try_later(inner, fault);
            }
            return Step::None;
        };
        ratelimited!(self.device.dev_error(fault.error(), fmt!("{fault}")));
        self.enter(inner, next)
    }

    /// Reports what has failed, if that is new, and looks again after a while.
    fn try_later(&self, inner: &mut Inner, fault: &Fault) {
        if inner.reported != Some(fault.error()) {
            inner.reported = Some(fault.error());
            ratelimited!(self
                .device
                .dev_error(fault.error(), fmt!("{fault}: it is tried again")));
        }
        let time = RETRY_MS
            .checked_shl(inner.failures)
            .map_or(MAX_RETRY_MS, |time| time.min(MAX_RETRY_MS));
        // No more than the longest time needs.
        inner.failures = inner.failures.saturating_add(1).min(u32::BITS / 4);
        if let Some(later) = &inner.later {
            later.set_after(msecs_to_jiffies(time));
        }
    }

    /// What has failed before works now.
    fn forget_failures(&self, inner: &mut Inner) {
        inner.failures = 0;
        if inner.reported.take().is_some() {
            dev_info!(self.device.as_ref(), "the disk is served\n");
            if let Err(error) = connect::clear_error(&self.device) {
                dev_warn!(
                    self.device.as_ref(),
                    "cannot remove the error from xenstore: {error:?}\n"
                );
            }
        }
    }

    /// Writes what a frontend may choose from.
    fn offer(&self, inner: &mut Inner) -> Result {
        inner.limits = params::limits();
        connect::write_offers(self.device.nodename(), &inner.limits)
    }

    /// Opens the disk if the hotplug script has named one, and none is open.
    fn open(&self) -> Step {
        let named = self.named.xchg(false, Relaxed);
        let disk = self.inner.lock().disk.clone();
        self.waits_for_disk.store(true, Relaxed);
        let found = connect::find_disk(&self.device, disk.as_deref());
        self.waits_for_disk.store(false, Relaxed);
        let mut inner = self.inner.lock();
        let step = self.opened(&mut inner, found);
        // If this was about the name alone, the frontend has not been looked at yet.
        match step {
            Step::None if named => Step::Again,
            step => step,
        }
    }

    /// Takes the disk that was opened, if there is one.
    fn opened(&self, inner: &mut Inner, found: Result<Option<Arc<Disk>>, Fault>) -> Step {
        match found {
            Ok(Some(disk)) if inner.back == Back::Gone => inner.discarded = Some(disk),
            Ok(Some(disk)) => inner.disk = Some(disk),
            Ok(None) => {
                self.tell_size(inner);
                return Step::None;
            }
            Err(fault) => return self.fail(inner, &fault),
        }
        Step::Again
    }

    /// Connects to the frontend: its rings are served when this returns.
    fn attach(self: &Arc<Self>, disk: &Arc<Disk>) -> Step {
        if let Err(error) = self.empty_cache(disk) {
            let fault = Fault::Own("writing back the page cache of the disk", error);
            return self.fail(&mut self.inner.lock(), &fault);
        }
        let mut inner = self.inner.lock();
        if inner.back != Back::Waiting {
            return Step::Again;
        }
        let step = match self.connect(&mut inner, disk) {
            Ok(Described::Connected) => {
                inner.back = Back::Live;
                self.forget_failures(&mut inner);
                // What the frontend does from now on is told, and the toolstack has to wait for it.
                Step::None
            }
            Ok(Described::Withdrawn) => Step::Again,
            Ok(Described::Refused(found)) => self.refused(&mut inner, Back::Live, found),
            Err(fault) => self.fail(&mut inner, &fault),
        };
        let live = inner.back == Back::Live;
        let connection = inner.connection;
        drop(inner);
        if live {
            self.serve(disk, connection);
        } else {
            // Threads that were started have taken nothing, and have to be gone before the next ones.
            self.drain(SHORT_DRAIN_MS);
        }
        step
    }

    /// Lets the threads of a connection take requests.
    fn serve(&self, disk: &Disk, connection: u64) {
        // Again, for what was written to the disk before anybody could see that it is connected.
        if let Err(error) = self.empty_cache(disk) {
            dev_err!(
                self.device.as_ref(),
                "cannot write back the page cache of the disk: {error:?}\n"
            );
        }
        self.served.store(connection, Release);
        self.ended.wake_up();
    }

    fn empty_cache(&self, disk: &Disk) -> Result {
        self.waits_for_disk.store(true, Relaxed);
        let result = disk.empty_cache();
        self.waits_for_disk.store(false, Relaxed);
        result
    }

    /// Maps the rings, starts their threads, and shows Connected.
    fn connect(self: &Arc<Self>, inner: &mut Inner, disk: &Arc<Disk>) -> Result<Described, Fault> {
        let mut connection = Connection::new(
            &self.device,
            &self.frontend,
            self.seat.domain(),
            disk.clone(),
            &inner.limits,
        )?;
        inner.connection = inner.connection.wrapping_add(1);
        let mut queues = KVec::new();
        for index in 0..connection.queues() {
            push(&mut queues, (index, connection.queue(index, &self.stats)?))?;
        }
        // If one of these does not start, those that did are dropped, and end.
        let mut serving = KVec::new();
        for (index, queue) in queues {
            push(&mut serving, self.spawn(queue, index, inner.connection)?)?;
        }
        let size_watch = serving
            .first()
            .map(|first| SizeWatch::timer(disk.clone(), first.inbox.clone()))
            .transpose()
            .map_err(|error| Fault::Own("making a timer", error))?;
        // The frontend may ask as soon as this is written: the threads take nothing before `served`
        // says so.
        let described = connection.describe_disk()?;
        if matches!(described, Described::Connected) {
            // Nothing may fail any more: the frontend has been told that it is served.
            if let Some(timer) = &size_watch {
                timer.set_after(SizeWatch::period());
            }
            inner.size_watch = size_watch;
            inner.serving = serving;
            connection.report();
        }
        Ok(described)
    }

    fn spawn(
        self: &Arc<Self>,
        queue: Queue,
        index: u32,
        connection: u64,
    ) -> Result<Serving, Fault> {
        let link = Link::new(self, index, connection);
        let name = CString::try_from_fmt(fmt!("rblkback {}", queue.name()))
            .map_err(|error| Fault::Own("naming a thread", error))?;
        let kind = Kind { freezable: true };
        let inbox = queue.inbox();
        KThread::spawn(fmt!("{}", *name), kind, move |thread| {
            // What it serves may be where memory is freed to.
            let _noio = Noio::new();
            link.wait_until_served(thread);
            queue.serve(thread, &link);
            drop(link);
        })
        .map(|_thread| Serving { _thread, inbox })
        .map_err(|error| Fault::Own("starting a thread", error))
    }

    /// Tells the frontend of a new size of the disk, if there is one.
    fn tell_size(&self, inner: &Inner) {
        let Some(disk) = inner.disk.as_ref().filter(|disk| disk.has_new_size()) else {
            return;
        };
        if inner.back != Back::Live || self.draining.load(Relaxed) {
            return;
        }
        if let Err(error) = connect::write_size(&self.device, disk) {
            ratelimited!(dev_warn!(
                self.device.as_ref(),
                "cannot tell the frontend of the new size: {error:?}\n"
            ));
        }
    }

    /// Has the threads end what they have taken from their rings. Whether there are any left.
    fn stop(&self, inner: &mut Inner) -> bool {
        inner.size_watch = None;
        inner.serving.clear();
        // A full barrier: either the last thread sees this, or its end is seen below.
        self.draining.xchg(true, Full);
        let left = self.has_threads();
        if !left {
            self.draining.store(false, Relaxed);
        }
        left
    }

    fn has_threads(&self) -> bool {
        self.threads.load(Acquire) != 0
    }

    /// Waits until all threads have ended. A thread that does not get there in time goes on alone: it
    /// owns its ring and memory.
    fn drain(&self, time_ms: u32) -> bool {
        let time = msecs_to_jiffies(time_ms);
        let drained = self.ended.wait_timeout(time, || !self.has_threads());
        if !drained {
            ratelimited!(dev_warn!(
                self.device.as_ref(),
                "{} queues still wait for the disk after {time_ms} ms: they end when it answers\n",
                self.threads.load(Relaxed)
            ));
        }
        drained
    }

    /// The driver is unbound.
    fn leave(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        let Some(later) = inner.later.take() else {
            // That is done.
            return;
        };
        inner.back = Back::Gone;
        self.stop(&mut inner);
        // There is nothing to be done after that.
        self.draining.store(false, Relaxed);
        drop(inner);
        drop(later);
        // Without its directory the device goes for good: nobody else will serve its rings.
        let gone = self.device.read_driver_state(self.device.nodename()) == State::Unknown;
        let time_ms = if gone { SHORT_DRAIN_MS } else { DRAIN_MS };
        if !self.drain(time_ms) && !gone {
            self.leave_alone();
        }
        self.close(time_ms);
    }

    /// Has the work item close the disk, and waits for that, but not for a disk that does not answer.
    fn close(self: &Arc<Self>, time_ms: u32) {
        let mut inner = self.inner.lock();
        if let Some(disk) = inner.disk.take() {
            inner.discarded = Some(disk);
            self.kick();
        }
        drop(inner);
        let time_ms = if self.waits_for_disk.load(Relaxed) {
            SHORT_DRAIN_MS
        } else {
            time_ms
        };
        let idle = || {
            self.unregistering.load(Acquire)
                || !self.queued.load(Acquire) && !self.working.load(Acquire)
        };
        if !self.ended.wait_timeout(msecs_to_jiffies(time_ms), idle) {
            ratelimited!(dev_warn!(
                self.device.as_ref(),
                "the disk is still being opened or closed after {time_ms} ms: that ends when it answers\n"
            ));
        }
    }

    /// Has the device unregistered, which is closed.
    fn unregister(&self) {
        if let Err(error) = xenbus::unregister_device(&self.device) {
            dev_warn!(
                self.device.as_ref(),
                "cannot be unregistered ({error:?}): that is done when its directory is removed\n"
            );
        }
    }

    /// The threads go on, and nobody may take over their rings meanwhile.
    fn leave_alone(&self) {
        // A full barrier: either the last thread sees this, or its end is seen below.
        self.seat.left_alone().xchg(true, Full);
        if !self.has_threads() {
            self.not_alone();
        }
    }

    /// The last thread has ended.
    fn not_alone(&self) {
        self.seat.left_alone().xchg(false, Full);
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
pub(crate) struct Link {
    vbd: Arc<Vbd>,
    index: u32,
    connection: u64,
}

impl Link {
    fn new(vbd: &Arc<Vbd>, index: u32, connection: u64) -> Self {
        vbd.threads.fetch_add(1, Relaxed);
        Self {
            vbd: vbd.clone(),
            index,
            connection,
        }
    }

    /// Waits until the thread may take requests, or is to end.
    fn wait_until_served(&self, thread: &Current) {
        let vbd = &self.vbd;
        vbd.ended
            .wait_idle(|| thread.should_stop() || vbd.served.load(Acquire) == self.connection);
    }

    /// The disk has refused what a node has offered.
    pub(crate) fn withdraw(&self, node: &str) {
        let inner = self.vbd.inner.lock();
        if inner.connection != self.connection {
            return;
        }
        let device = &self.vbd.device;
        dev_info!(device.as_ref(), "the disk has refused this: {node} = 0\n");
        if let Err(error) = connect::withdraw(device, node) {
            dev_warn!(device.as_ref(), "cannot write {node}: {error:?}\n");
        }
    }

    /// The frontend has broken the ring.
    pub(crate) fn ring_broken(&self, error: RingError) {
        let mut inner = self.vbd.inner.lock();
        if inner.connection == self.connection {
            self.vbd.fail(&mut inner, &Fault::Ring(self.index, error));
        }
        drop(inner);
        self.vbd.kick();
    }

    /// The size of the disk has changed.
    pub(crate) fn resized(&self) {
        let inner = self.vbd.inner.lock();
        if inner.connection == self.connection {
            self.vbd.tell_size(&inner);
        }
    }
}

impl Drop for Link {
    /// The thread has ended, and all that it had is gone.
    fn drop(&mut self) {
        let vbd = &self.vbd;
        if vbd.threads.fetch_sub(1, Full) == 1 {
            vbd.ended.wake_up();
            vbd.not_alone();
            if vbd.draining.load(Relaxed) {
                vbd.kick();
            }
        }
    }
}

fn push<T>(list: &mut KVec<T>, item: T) -> Result<(), Fault> {
    list.push(item, GFP_KERNEL)
        .map_err(|_| Fault::Own("making a queue", ENOMEM))
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
