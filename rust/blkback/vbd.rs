// SPDX-License-Identifier: GPL-2.0

//! The driver of the virtual block device: its life from probe to removal.
//!
//! What is to be done when is decided by [`blkif::state`]; this carries it out. The device hears of
//! two things, both in the `xenwatch` thread: the frontend's state has changed, or the hotplug script
//! has written `physical-device`. Either may come first.
//!
//! To stop using a disk takes as long as the disk takes to answer, which may be for ever. So what is
//! to be done then is done by the last thread of the device, if the one that began it has waited for
//! long enough.
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
//! - The watch, the timer and the files in sysfs are dropped by whoever unbinds the driver, and each
//!   waits for a call of its own that is running. None of them is dropped with a lock that its call
//!   takes.
//! - A thread holds the module. So neither an unbind nor the loss of the device's directory has to
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

use crate::connect;
use crate::connect::Connection;
use crate::connect::Fault;
use crate::disk::Disk;
use crate::disk::SizeWatch;
use crate::domain;
use crate::domain::Seated;
use crate::inbox::Inbox;
use crate::params;
use crate::queue::Queue;
use crate::stats;
use crate::stats::Stats;
use blkif::negotiate::BackLimits;
use blkif::pace::Pace;
use blkif::ring::RingError;
use blkif::state::Back;
use blkif::state::BackAction;
use blkif::state::BackEvent;
use blkif::state::XenbusState;
use core::fmt::Write;
use kernel::device::Core;
use kernel::fmt;
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::str::CStr;
use kernel::str::CString;
use kernel::sync::aref::ARef;
use kernel::sync::atomic::Acquire;
use kernel::sync::atomic::Atomic;
use kernel::sync::atomic::Full;
use kernel::sync::atomic::Relaxed;
use kernel::sync::Arc;
use kernel::sync::Mutex;
use kernel_ext::base::jiffies;
use kernel_ext::base::jiffies::msecs_to_jiffies;
use kernel_ext::base::jiffies::Jiffies;
use kernel_ext::base::kthread::KThread;
use kernel_ext::base::kthread::Kind;
use kernel_ext::base::noio::Noio;
use kernel_ext::base::sysfs;
use kernel_ext::base::sysfs::Output;
use kernel_ext::base::timer::Timer;
use kernel_ext::base::wait::WaitQueue;
use kernel_ext::new_wait_queue;
use kernel_ext::ratelimited;
use kernel_ext::xen::xenbus::After;
use kernel_ext::xen::xenbus::Device;
use kernel_ext::xen::xenbus::DeviceId;
use kernel_ext::xen::xenbus::Driver;
use kernel_ext::xen::xenbus::IdArray;
use kernel_ext::xen::xenbus::IdTable;
use kernel_ext::xen::xenbus::Side;
use kernel_ext::xen::xenbus::State;
use kernel_ext::xen::xenstore::Watch;
use kernel_ext::xen::xenstore::WatchHandler;

/// How long a driver that is unbound waits for what is in flight, before its queues are left to
/// themselves.
const DRAIN_MS: u32 = 30_000;

/// The same for the `xenwatch` thread, in which all other devices wait too. What takes longer goes on
/// when the last queue has ended.
const XENWATCH_MS: u32 = 500;

/// Connections that a frontend may make at once, and how long each one more takes. A connection is
/// much work for the `xenwatch` thread, in which all other devices wait too.
const CONNECTIONS: u32 = 16;
const CONNECTION_MS: u32 = 500;

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"vbd")]);

/// A bound device.
pub(crate) struct VbdDriver {
    vbd: Arc<Vbd>,
    /// Until the device is being unbound.
    watch: Pin<KBox<Mutex<Option<Watch<PhysicalDevice>>>>>,
}

/// Hears of the node `physical-device`.
struct PhysicalDevice(Arc<Vbd>);

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
    /// One for each ring that is served.
    serving: KVec<Serving>,
    size_watch: Option<Pin<KBox<Timer<SizeWatch>>>>,
    pace: Pace,
    /// Looks again, when the frontend may make the next connection.
    later: Option<KThread>,
    /// When the device was connected last, its node was as we had left it. Otherwise the toolstack has
    /// written there, which nobody tells.
    undisturbed: bool,
    /// Counts the connections, so that a thread of an old one does no harm to a new one.
    connection: u64,
}

impl Inner {
    /// Whether the device is connected, and the toolstack had not asked for anything until then. There
    /// is no need to look again: what the frontend has done meanwhile is told.
    fn is_connected(&self) -> bool {
        self.back == Back::Live && self.undisturbed
    }
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
            Self::new(device)
                .inspect_err(|error| device.dev_fatal(*error, fmt!("making a disk to offer")))
        })
    }

    fn otherend_changed(self: Pin<&Self>, _device: &Device<Core<'_>>, _state: State) -> After {
        match self.vbd.advance() {
            Back::Gone => After::Unregister,
            Back::Waiting | Back::Live | Back::Closing | Back::Detached | Back::Closed => {
                After::Keep
            }
        }
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
        let in_use = device.read_driver_state(device.otherend()?) == State::Connected;
        if in_use && domain::is_left_alone(device.nodename()) {
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
        vbd.offer(&mut vbd.inner.lock())?;
        sysfs::register(device.as_ref(), None, &stats::DEVICE, vbd.clone())?;
        let stats = vbd.stats.clone();
        sysfs::register(
            device.as_ref(),
            Some(c"statistics"),
            &stats::STATISTICS,
            stats,
        )?;
        device.switch_state(State::InitWait);
        let handler = Arc::new(PhysicalDevice(vbd.clone()), GFP_KERNEL)?;
        let watch = Watch::new(device.nodename(), fmt!("physical-device"), handler)?;
        let watch = KBox::pin_init(new_mutex!(Some(watch)), GFP_KERNEL)?;
        Ok(Self { vbd, watch })
    }
}

impl WatchHandler for PhysicalDevice {
    fn changed(&self) {
        self.0.find_disk();
    }
}

impl Vbd {
    fn new(device: &Device<Core<'_>>) -> Result<Arc<Self>> {
        let frontend = CString::try_from_fmt(fmt!("{}", device.otherend()?))?;
        let stats = Arc::pin_init(Stats::new(), GFP_KERNEL)?;
        let inner = Inner {
            back: Back::Waiting,
            limits: params::limits(),
            disk: None,
            serving: KVec::new(),
            size_watch: None,
            pace: Pace::new(
                CONNECTIONS,
                msecs_to_jiffies(CONNECTION_MS) as u64,
                jiffies::now() as u64,
            ),
            later: None,
            undisturbed: false,
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
            seat,
            ended <- new_wait_queue!(),
            inner <- new_mutex!(inner),
        });
        Arc::pin_init(vbd, GFP_KERNEL)
    }

    /// Does what the frontend's state asks for, until there is nothing more to do. The state after
    /// that.
    fn advance(self: &Arc<Self>) -> Back {
        let mut inner = self.inner.lock();
        loop {
            let event = self.look(&inner);
            let action = if !self.draining.load(Relaxed) {
                inner.back.step(event)
            } else if self.has_threads() {
                return inner.back;
            } else {
                BackAction::Drain
            };
            if action == BackAction::Drain && self.stop(&mut inner) {
                // The threads may need the lock to report an error.
                drop(inner);
                if !self.drain(XENWATCH_MS) {
                    return Back::Closing;
                }
                inner = self.inner.lock();
                continue;
            }
            let opens = matches!(action, BackAction::Open | BackAction::Attach);
            if opens && self.must_wait(&mut inner) {
                return inner.back;
            }
            if !self.carry_out(&mut inner, action) || inner.is_connected() {
                return inner.back;
            }
        }
    }

    /// Whether the frontend connects more often than it may. It is looked at again in time.
    fn must_wait(self: &Arc<Self>, inner: &mut Inner) -> bool {
        let Err(ticks) = inner.pace.take(jiffies::now() as u64) else {
            return false;
        };
        if inner.later.is_none() {
            ratelimited!(dev_warn!(
                self.device.as_ref(),
                "the frontend connects too often: it has to wait\n"
            ));
            inner.later = self.look_later(ticks as Jiffies).ok();
        }
        // Without memory for a thread there is nobody to come back.
        inner.later.is_some()
    }

    /// Starts a thread that looks at the frontend after a while.
    fn look_later(self: &Arc<Self>, time: Jiffies) -> Result<KThread> {
        let vbd = self.clone();
        let kind = Kind { freezable: true };
        KThread::spawn(fmt!("rblkback wait"), kind, move |thread| {
            if !vbd.ended.wait_idle_timeout(time, || thread.should_stop()) {
                vbd.inner.lock().later = None;
                vbd.advance();
            }
        })
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
                online: self.device.is_online(),
                ready: inner.disk.is_some(),
            },
        }
    }

    /// Carries out an action, and enters the state that it leads to. Whether there is more to do.
    fn carry_out(self: &Arc<Self>, inner: &mut Inner, action: BackAction) -> bool {
        let result = match action {
            BackAction::Open => match self.open(inner) {
                Ok(opened) => return opened,
                Err(fault) => Err(fault),
            },
            BackAction::Attach => self.attach(inner),
            BackAction::Restart => self
                .offer(inner)
                .map_err(|error| Fault::Own("offering", error)),
            BackAction::Fail => Err(connect::wrong_state(&self.frontend)),
            BackAction::Wait
            | BackAction::Drain
            | BackAction::Close
            | BackAction::Finish
            | BackAction::Forget => Ok(()),
        };
        match (result, action.leads_to()) {
            (Err(fault), _) => self.fail(inner, &fault),
            (Ok(()), Some(next)) => {
                self.enter(inner, next);
                true
            }
            (Ok(()), None) => false,
        }
    }

    /// Takes over a state, and shows it.
    fn enter(&self, inner: &mut Inner, next: Back) {
        inner.back = next;
        if let Some(state) = next.xenbus() {
            self.device.switch_state(shown(state));
        }
    }

    /// Writes what is wrong to xenstore, and wants the frontend to close. Whether that is new.
    fn fail(&self, inner: &mut Inner, fault: &Fault) -> bool {
        let action = inner.back.step(BackEvent::Failed);
        let Some(next) = action.leads_to() else {
            return false;
        };
        ratelimited!(self.device.dev_fatal(fault.error(), fmt!("{fault}")));
        self.enter(inner, next);
        true
    }

    /// Writes what a frontend may choose from.
    fn offer(&self, inner: &mut Inner) -> Result {
        inner.limits = params::limits();
        connect::write_offers(self.device.nodename(), &inner.limits)
    }

    /// Opens the disk if the hotplug script has named one. Whether it was not open before.
    fn open(&self, inner: &mut Inner) -> Result<bool, Fault> {
        let found = connect::find_disk(&self.device, inner.disk.as_deref())?;
        let opened = found.is_some();
        if opened {
            inner.disk = found;
        }
        Ok(opened)
    }

    /// Opens the disk as soon as the hotplug script has named it, and connects if the frontend
    /// waits for that.
    fn find_disk(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        if inner.back == Back::Gone || self.draining.load(Relaxed) {
            return;
        }
        match self.open(&mut inner) {
            Ok(true) => {}
            Ok(false) => {
                self.tell_size(&inner);
                return;
            }
            Err(fault) => {
                self.fail(&mut inner, &fault);
                return;
            }
        }
        let action = inner.back.step(self.look(&inner));
        if action == BackAction::Attach {
            self.carry_out(&mut inner, action);
        }
    }

    /// Connects to the frontend: its rings are served when this returns.
    fn attach(self: &Arc<Self>, inner: &mut Inner) -> Result<(), Fault> {
        let disk = inner.disk.clone().ok_or(Fault::Own("no disk", ENODEV))?;
        let connection = Connection::new(
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
            .map(|first| SizeWatch::timer(disk, first.inbox.clone()))
            .transpose()
            .map_err(|error| Fault::Own("making a timer", error))?;
        // The frontend may ask as soon as this is written: the threads wait for it. Nor does one of
        // them that finds an error get ahead of us, for the lock is held.
        inner.undisturbed = connection.describe_disk()?;
        // Nothing may fail any more: the frontend has been told that it is served.
        if let Some(timer) = &size_watch {
            timer.set_after(SizeWatch::period());
        }
        inner.size_watch = size_watch;
        inner.serving = serving;
        connection.report();
        Ok(())
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
        if inner.back != Back::Live {
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
    fn leave(&self) {
        let mut inner = self.inner.lock();
        inner.back = Back::Gone;
        inner.later = None;
        self.stop(&mut inner);
        // There is nothing to be done after that.
        self.draining.store(false, Relaxed);
        drop(inner);
        // Without its directory the device goes for good: nobody else will serve its rings.
        let gone = self.device.read_driver_state(self.device.nodename()) == State::Unknown;
        if !self.drain(if gone { XENWATCH_MS } else { DRAIN_MS }) && !gone {
            self.leave_alone();
        }
        self.inner.lock().disk = None;
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
                // What has to be unregistered now is so when the toolstack sees that it is closed.
                vbd.advance();
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
