// SPDX-License-Identifier: GPL-2.0-only

//! The connection of a device, and its disk.
//!
//! It follows [`blkif::state::FrontState`]: one step for each state of the backend that xenbus tells.
//!
//! Each question to xenstore takes a wake-up of its daemon and of the thread that asks, and nearly all
//! of the time that it takes to connect. So the backend's state is not asked for again after a step.
//! Nothing is lost by that. Xenbus watches the state, and reads it when it is told that it has changed,
//! in its own thread, one change after the other. A state that comes and goes before it is read is
//! missed, but the last one never is: what changes after the state was read, while we step or before,
//! is told by a call that is still to come. After a restore xenbus watches the new backend, which makes
//! a call too. And one step is all that a state can ask for: after it there is nothing to do but wait
//! as long as the backend stays as it is.
//!
//! The own state is written by xenbus's thread as far as it has to do with Initialising: the bus
//! takes such a change by anybody else for a device that the toolstack made anew. So that thread
//! does all the steps but one. To let a disk go takes time, and is left to the device's own thread,
//! see [`worker`](crate::worker).

use kernel::{
    prelude::*,
    str::CString,
    sync::{
        aref::ARef,
        Arc, //
    },
    time::msecs_to_jiffies, //
};

use kernel_ext::{
    base::{
        kthread::{
            KThread,
            KThreadOptions, //
        },
        memalloc::NoioScope, //
    },
    block::{
        major::Minors,
        mq::{
            BlkStatus,
            GenDisk,
            GenDiskBuilder,
            QueueLimits,
            TagSet,
            TagSetParams, //
        },
    },
    ratelimited,
    xen::{
        xenbus,
        xenstore::{
            DirectoryListing,
            NoTransaction, //
        },
    },
};

use blkif::{
    negotiate::{
        self,
        negotiate,
        BackOffer,
        Features,
        Flush,
        FrontOffer,
        RingShape, //
    },
    plan::SlotLimits,
    state::{
        FrontAction,
        FrontEvent,
        FrontState,
        XenbusState, //
    },
    vdev::{
        VirtualDevice,
        MAJOR, //
    },
};

use crate::{
    disk::{
        Disk,
        LimitInputs, //
    },
    events::{
        DeviceEvents,
        Event, //
    },
    params,
    pending_request::PendingRequest,
    queue::{
        ConnectionConfig,
        PoolTrim,
        Queue, //
    },
    registry::{
        Claimed,
        Registered, //
    },
    request_data::{
        BlkfrontOps,
        InFlightRequest, //
    },
    retry::{
        self,
        Retry, //
    },
    ring_connection::RingConnection,
    shortage::Shortage,
    xenstore::{
        self,
        RingNodes, //
    }, //
};

/// What becomes of requests whose connection has ended.
#[derive(Clone, Copy)]
pub(crate) enum Disposition {
    /// They are offered to the queue again, for the next connection.
    Requeue,
    /// They end with an error.
    Fail,
}

/// How a disk ends.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Ending {
    /// It does not end.
    None,
    /// The toolstack or the administrator takes it away. It is written back first, if there is a
    /// backend to do it.
    Orderly,
    /// There is no way on for its connection.
    Failed,
}

/// A disk to be dropped, and the threads that may still use it.
pub(crate) type DeadDisk = (
    Arc<GenDisk<BlkfrontOps>>,
    [Option<KThread>; 3],
    Option<Registered>,
);

impl Claimed for GenDisk<BlkfrontOps> {
    fn is_claimed(&self) -> bool {
        self.is_claimed()
    }
}

/// The connection of a device, and its disk.
pub(crate) struct Device {
    device: ARef<xenbus::Device>,
    vdev: VirtualDevice,
    events: Arc<DeviceEvents>,
    state: FrontState,
    /// If the disk ends, no more steps are taken: the rest is done by the device's thread.
    ending: Ending,
    /// The toolstack has been told that it has to wait until the disk is not in use.
    detach_deferred: bool,
    /// The backend's directory. Another one after a restore.
    backend: CString,
    /// The state that the backend was in when xenbus told of it.
    backend_state: xenbus::OtherendState,
    /// Attempts to connect.
    retry: Retry,
    /// What is done about grants that are missing.
    shortage: Shortage,
    /// What this side can do, as of the last offer.
    offer: Option<FrontOffer>,
    /// Nobody is to look for partitions.
    no_partition_scan: bool,
    /// Those of a disk stay the same for as long as it is there.
    queues: KVec<Arc<Queue>>,
    /// How many of the queues have a ring.
    rings: usize,
    disk: Option<Arc<GenDisk<BlkfrontOps>>>,
    registered: Option<Registered>,
    /// The logical block size of the disk. Its users rely on it.
    block_size: u32,
    /// Segments of the largest request that the disk may have in flight.
    largest: u16,
    /// What the limits of the disk were made from.
    applied: Option<LimitInputs>,
    /// What they are to be made from.
    desired: Option<LimitInputs>,
    /// Looks for partitions on the disk.
    scan_thread: Option<KThread>,
    /// Tells the users of the disk that it is gone.
    mark_dead_thread: Option<KThread>,
    /// Writes the disk back and removes it.
    remove_thread: Option<KThread>,
    /// Requests of which the backend still uses pages.
    still_granted: KVVec<(PendingRequest, Disposition)>,
    /// Counts the connections.
    generation: u32,
}

impl Device {
    pub(crate) fn new(
        device: ARef<xenbus::Device>,
        vdev: VirtualDevice,
        events: Arc<DeviceEvents>,
        backend: CString,
    ) -> Self {
        Self {
            device,
            vdev,
            events,
            state: FrontState::Waiting,
            ending: Ending::None,
            detach_deferred: false,
            backend,
            backend_state: Ok(XenbusState::Unknown),
            retry: Retry::new(),
            shortage: Shortage::default(),
            offer: None,
            no_partition_scan: false,
            queues: KVec::new(),
            rings: 0,
            disk: None,
            registered: None,
            block_size: 0,
            largest: 0,
            applied: None,
            desired: None,
            scan_thread: None,
            mark_dead_thread: None,
            remove_thread: None,
            still_granted: KVVec::new(),
            generation: 0,
        }
    }

    /// The name of the disk.
    pub(crate) fn name(&self) -> &str {
        self.vdev.name.as_str()
    }

    /// The backend has this state. Called once at least, after the device was bound.
    pub(crate) fn backend_changed(&mut self, state: xenbus::OtherendState) {
        if matches!(self.state, FrontState::Waiting | FrontState::Dead) {
            // What stands there may be of an earlier life: a device that was bound before is Closed,
            // and one that was restored is Initialising, also if its disk is dead.
            self.write_state();
        }
        let was_connected = self.is_connected();
        self.backend_state = state;
        if self.is_connected() && !was_connected {
            self.queues.iter().for_each(|queue| queue.reset_timeouts());
        }
        self.handle_event(xenstore::backend_event(
            &self.backend,
            state,
            self.disk.is_some(),
        ));
    }

    /// Tries again to connect. Only in xenbus's thread, as all that has to do with Initialising.
    pub(crate) fn retry(&mut self) {
        if self.state == FrontState::Waiting {
            self.backend_changed(self.backend_state);
        }
    }

    /// Returns the time until the next attempt to connect, in milliseconds, if there is to be one.
    pub(crate) fn retry_wait_ms(&self) -> Option<u64> {
        self.retry.wait_ms()
    }

    /// Returns `true` once when the next attempt to connect is due.
    pub(crate) fn take_retry(&mut self) -> bool {
        self.retry.take_due()
    }

    /// The attempt to connect could not be made.
    pub(crate) fn postpone_retry(&mut self, error: Error) {
        self.retry.postpone(error);
    }

    /// The domain was restored, and this is the directory of its new backend.
    pub(crate) fn resume(&mut self, backend: &CStr) -> Result {
        self.backend_state = Ok(XenbusState::Unknown);
        self.handle_event(FrontEvent::Resume);
        self.backend = xenstore::path(backend)?;
        Ok(())
    }

    /// Does what an event asks for.
    pub(crate) fn handle_event(&mut self, event: FrontEvent) {
        if self.ending != Ending::None {
            return;
        }
        let action = self.state.step(event);
        if action == FrontAction::Detach {
            if self.must_defer_detach(event) {
                return;
            }
            self.ending = match event {
                FrontEvent::Backend { .. } => Ending::Orderly,
                FrontEvent::BadState
                | FrontEvent::Failed
                | FrontEvent::Unusable
                | FrontEvent::Deadline { .. }
                | FrontEvent::Resume => Ending::Failed,
            };
            self.events.set(Event::Close);
            return;
        }
        match self.run_action(action) {
            Ok(()) => {
                if let Some(next) = action.next_state() {
                    self.state = next;
                    self.write_state();
                }
            }
            Err(error) if retry::is_transient(error) => {
                self.postpone(error, action);
                self.handle_event(FrontEvent::Unusable);
            }
            Err(error) => {
                self.device.dev_fatal(error, fmt!("{}", describe(action)));
                // That leads to the end of the disk.
                self.handle_event(FrontEvent::Failed);
            }
        }
    }

    /// Returns `true` if the toolstack has to wait, as the disk is in use by something that would lose
    /// what it has there, and could not be told. The backend serves the disk meanwhile.
    fn must_defer_detach(&mut self, event: FrontEvent) -> bool {
        let (Some(disk), FrontEvent::Backend { .. }) = (&self.disk, event) else {
            return false;
        };
        if !disk.has_unaware_holder() || !self.is_served() {
            return false;
        }
        disk.queue_data().notify_release();
        if !self.detach_deferred {
            self.detach_deferred = true;
            self.device.dev_error(
                EBUSY,
                fmt!("swap space or part of another device: it is detached when that has ended"),
            );
        }
        true
    }

    /// Detaches the disk if it had to wait and need not any more.
    pub(crate) fn retry_detach(&mut self) {
        if self.is_detach_deferred() {
            let state = self.device.read_driver_state(&self.backend);
            self.handle_event(xenstore::backend_event(
                &self.backend,
                state,
                self.disk.is_some(),
            ));
        }
    }

    /// A step has failed for now: it is tried again until the deadline of the outage.
    fn postpone(&mut self, error: Error, action: FrontAction) {
        // What was shared for it was not offered.
        self.stop_sharing(Disposition::Requeue);
        if error == ENOSPC {
            self.shortage.ask();
        }
        if self.retry.postpone(error) {
            ratelimited!(self
                .device
                .dev_error(error, fmt!("{}: trying again", describe(action))));
        }
        // The device's thread keeps the time.
        self.events.set(Event::Backend);
    }

    fn run_action(&mut self, action: FrontAction) -> Result {
        match action {
            FrontAction::Wait | FrontAction::Detach => Ok(()),
            FrontAction::Report => {
                ratelimited!(pr_warn!(
                    "{}: still waiting for {}\n",
                    self.name(),
                    &*self.backend
                ));
                Ok(())
            }
            FrontAction::Offer => self.offer(),
            FrontAction::Connect => self.connect(),
            FrontAction::Refresh => {
                self.refresh();
                Ok(())
            }
            FrontAction::Reset | FrontAction::Restart => {
                self.stop_sharing(Disposition::Requeue);
                self.end_stale_grants();
                Ok(())
            }
        }
    }

    /// Writes the own state to xenstore.
    fn write_state(&self) {
        match self.state.xenbus() {
            // A shutdown waits for the first call of this, which is to be that of the end.
            XenbusState::Closed if self.state == FrontState::Dead => self.device.frontend_closed(),
            state => {
                self.device.switch_state(state);
            }
        }
    }

    /// Shares rings with the backend. `EBUSY`: it still uses memory of the last connection.
    fn offer(&mut self) -> Result {
        if !self.end_stale_grants() {
            return Err(EBUSY);
        }
        self.retry.try_offer()?;
        let own = DirectoryListing::new(&NoTransaction, self.device.nodename());
        let front = xenstore::front_offer(&self.device, &own)?;
        self.no_partition_scan = xenstore::no_partition_scan(&self.device, &own)?;
        let back = xenstore::back_offer(&self.backend, &BackOffer::RING_NODES)?;
        let shape = RingShape::choose(&front, &back);
        if self.disk.is_none() {
            self.make_queues(shape.queues)?;
        }

        self.rings = self.queues.len().min(shape.queues as usize);
        let (order, rings) = self.make_rings(shape.page_order)?;
        self.offer = Some(front);
        xenstore::publish(&self.device, &own, &rings, order, front.persistent)
    }

    /// Makes the rings, of `1 << page_order` pages or, if there is not so much memory in a row, of
    /// fewer: the backend takes any up to its offer. Returns the order and the nodes of the rings.
    fn make_rings(&mut self, page_order: u32) -> Result<(u32, KVec<RingNodes>)> {
        let mut order = page_order;
        loop {
            match self.attach_rings(order) {
                Err(error) if order > 0 && [ENOMEM, ENOSPC].contains(&error) => {
                    order = order.saturating_sub(1);
                }
                result => return result.map(|rings| (order, rings)),
            }
        }
    }

    /// Gives each queue a ring of `1 << page_order` pages.
    fn attach_rings(&mut self, page_order: u32) -> Result<KVec<RingNodes>> {
        let mut connections = KVec::new();
        let mut rings = KVec::new();
        let mut slots = 0usize;
        for queue in self.queues.iter().take(self.rings) {
            let connection = RingConnection::new(&self.device, page_order, queue)?;
            slots = slots.saturating_add(connection.ring.capacity() as usize);
            rings.push(RingNodes::new(&connection)?, GFP_KERNEL)?;
            connections.push(connection, GFP_KERNEL)?;
        }
        // So that there is room for all requests, should the backend keep their pages.
        self.still_granted.reserve(slots, GFP_KERNEL)?;
        for (queue, connection) in self.queues.iter().zip(connections) {
            queue.attach(connection)?;
        }
        Ok(rings)
    }

    fn make_queues(&mut self, count: u32) -> Result {
        self.queues = KVec::new();
        let handle = self.device.handle().unwrap_or(0) as u16;
        for index in 0..count {
            let queue = Queue::new(self.vdev.name, index as u16, handle, self.events.clone())?;
            self.queues.push(queue, GFP_KERNEL)?;
        }
        Ok(())
    }

    /// Serves requests: makes the disk, or goes on with the one that there is.
    fn connect(&mut self) -> Result {
        let nodes = xenstore::disk(&self.backend)?;
        let back = xenstore::back_offer(&self.backend, &BackOffer::NODES)?;
        let front = self.offer.ok_or(EINVAL)?;
        let features = negotiate(&front, &back);
        let features = match self.desired {
            Some(inputs) if self.disk.is_some() => features.for_disk(inputs.write_cache()),
            _ => features,
        };
        let limits = self.slot_limits(&nodes, &features)?;
        let largest = self.largest.max(limits.segments());

        self.generation = self.generation.wrapping_add(1);
        let config = ConnectionConfig {
            domain: self.device.otherend_id(),
            limits,
            bounce: features.bounce,
            largest,
            flush: features.flush,
            write_through: features.write_through,
            discard: features.discard,
            generation: self.generation,
        };
        for queue in self.queues.iter().take(self.rings) {
            queue.serve(config)?;
        }
        match self.disk.clone() {
            None => self.make_disk(&nodes, &features, limits)?,
            Some(disk) => self.resume_disk(&disk, &nodes, &features, limits)?,
        }
        self.largest = largest;
        self.set_event_affinity();
        self.log_features(&features);
        self.retry.finish();
        self.shortage.finish();
        Ok(())
    }

    /// Returns how much a slot can carry. The logical block is that of the disk, if there is one.
    fn slot_limits(
        &self,
        nodes: &negotiate::DiskProperties,
        features: &Features,
    ) -> Result<SlotLimits> {
        let block_size = match self.disk {
            Some(_) => self.block_size,
            None => nodes.block_size,
        };
        SlotLimits::new(features.indirect_segments, block_size).ok_or_else(|| {
            pr_err!(
                "{}: a block of {} bytes does not fit into a request of the backend\n",
                self.name(),
                block_size
            );
            EINVAL
        })
    }

    fn make_disk(
        &mut self,
        nodes: &negotiate::DiskProperties,
        features: &Features,
        slot: SlotLimits,
    ) -> Result {
        let minors = self.reserve_minors()?;
        let mut queues = KVec::new();
        for queue in &self.queues {
            queues.push(queue.clone(), GFP_KERNEL)?;
        }
        let tag_set = Arc::pin_init(
            TagSet::new(TagSetParams {
                nr_hw_queues: queues.len() as u32,
                queue_depth: queue_depth(&self.queues),
                timeout: msecs_to_jiffies(params::io_timeout_ms()),
                // The backend's domain schedules for the device; doing it twice only costs.
                no_scheduler: true,
            }),
            GFP_KERNEL,
        )?;
        let inputs = LimitInputs::new(nodes.block_size, nodes, features, slot);
        let mut limits = QueueLimits::new();
        inputs.apply(&mut limits);

        let mut builder = GenDiskBuilder::new(limits)
            .capacity(nodes.sectors)
            .read_only(nodes.read_only())
            .removable(nodes.removable());
        if self.no_partition_scan {
            builder = builder.no_partition_scan();
        }
        if let Some(minors) = minors {
            builder = builder.device_numbers(minors);
        }
        let data = Disk::new(queues, nodes.cdrom(), self.vdev.name, self.events.clone());
        let serial = data.serial();
        let disk = builder.build(
            fmt!("{}", self.name()),
            tag_set,
            Arc::new(data, GFP_KERNEL)?,
        )?;
        let disk = Arc::new(disk, GFP_KERNEL)?;
        let registered = Registered::new(self.vdev.name, serial, disk.clone())?;
        self.block_size = nodes.block_size;
        self.applied = Some(inputs);
        self.desired = Some(inputs);
        self.add_disk(disk.clone())?;
        self.disk = Some(disk);
        self.registered = Some(registered);
        Ok(())
    }

    /// Reserves the minors of the virtual device number. `None`: a disk that was removed and is still
    /// open has some of them, and the block layer chooses other numbers for the new disk. It would
    /// be taken for the old one else.
    fn reserve_minors(&self) -> Result<Option<Minors>> {
        match Minors::reserve(MAJOR, self.vdev.minor, self.vdev.minors) {
            Ok(minors) => Ok(Some(minors)),
            Err(EOPENSTALE) => {
                pr_warn!(
                    "{}: the disk that had this name before is still open and keeps its device number\n",
                    self.name()
                );
                Ok(None)
            }
            Err(error) => {
                pr_err!(
                    "{}: another disk has minor {}\n",
                    self.name(),
                    self.vdev.minor
                );
                Err(error)
            }
        }
    }

    /// Shows the disk to the system, in a thread that may wait for the backend.
    fn add_disk(&mut self, disk: Arc<GenDisk<BlkfrontOps>>) -> Result {
        let device = self.device.clone();
        let events = self.events.clone();
        let name = self.vdev.name;
        let kind = KThreadOptions::default();
        let scan_thread =
            KThread::spawn(fmt!("rblkfront-scan/{}", name.as_str()), kind, move |_| {
                let parent: &xenbus::Device = &device;
                if let Err(error) = disk.add(Some(parent.as_ref())) {
                    device.dev_fatal(error, fmt!("adding disk {}", name.as_str()));
                    events.set(Event::Failed);
                }
                events.mark_ready();
            })?;
        self.scan_thread = Some(scan_thread);
        Ok(())
    }

    /// Goes on with a disk after an outage.
    fn resume_disk(
        &mut self,
        disk: &GenDisk<BlkfrontOps>,
        nodes: &negotiate::DiskProperties,
        features: &Features,
        slot: SlotLimits,
    ) -> Result {
        if nodes.block_size > self.block_size {
            pr_err!(
                "{}: sector-size = {} instead of {}: the users of the disk cannot follow\n",
                self.name(),
                nodes.block_size,
                self.block_size
            );
            return Err(EINVAL);
        }
        disk.queue_data().set_rings(self.rings as u32);
        // Whole blocks of the old size are whole blocks of a smaller one.
        self.desired = Some(LimitInputs::new(self.block_size, nodes, features, slot));
        self.apply_limits()?;
        self.update_disk(disk, nodes)?;
        disk.kick_requeue_list();
        disk.unquiesce();
        Ok(())
    }

    /// Makes the limits of the disk from what they are to be made from.
    ///
    /// Whoever changes limits through sysfs has them locked, and waits for requests, which wait for
    /// the backend. So that lock is not waited for: the thread of the device tries again. Requests
    /// within the old limits are served under the new ones too, and whether there is a write cache
    /// never changes.
    fn apply_limits(&mut self) -> Result {
        let (Some(disk), Some(desired)) = (&self.disk, self.desired) else {
            return Ok(());
        };
        // Most backends come back as they were.
        if self.applied == Some(desired) {
            return Ok(());
        }
        match disk.try_update_limits(|limits| desired.apply(limits)) {
            Ok(()) => self.applied = Some(desired),
            Err(error) if error != EBUSY => return Err(error),
            Err(_) => self.events.set(Event::Limits),
        }
        Ok(())
    }

    /// Tries again to make the limits of the disk from what they are to be made from.
    pub(crate) fn retry_limits(&mut self) {
        if self.state != FrontState::Live {
            // The next connection wants its own.
            return;
        }
        if let Err(error) = self.apply_limits() {
            ratelimited!(pr_err!(
                "{}: the limits of the disk stay: {:?}\n",
                self.name(),
                error
            ));
        }
    }

    fn log_features(&self, features: &Features) {
        let flush = match features.flush {
            Flush::Cache => "flush diskcache: enabled;",
            Flush::Barrier => "barrier: enabled;",
            Flush::None => "barrier or flush: disabled;",
            Flush::Unavailable => "flush: fails;",
        };
        let enabled = |on: bool| if on { "enabled" } else { "disabled" };
        ratelimited!(pr_info!(
            "{}: {} persistent grants: {}; indirect descriptors: {}; bounce buffer: {}\n",
            self.name(),
            flush,
            enabled(features.persistent),
            enabled(features.indirect_segments > 0),
            enabled(features.bounce)
        ));
        if features.flush == Flush::Unavailable {
            ratelimited!(pr_warn!(
                "{}: the backend offers no flush, but an earlier one had a write cache: flushes fail until the disk is attached again\n",
                self.name()
            ));
        }
        if features.write_through {
            ratelimited!(pr_warn!(
                "{}: the backend has a write cache, and the first one had none: each write is flushed until the disk is attached again\n",
                self.name()
            ));
        }
    }

    /// Has the events of each ring come to a CPU that uses it, so that a request ends where it was
    /// made. Where that does not work, events come to any CPU.
    fn set_event_affinity(&self) {
        let Some(disk) = &self.disk else { return };
        let rings = self.queues.iter().take(self.rings);
        for (number, queue) in rings.enumerate() {
            if let Some(cpu) = disk.tag_set().cpu_of(number as u32) {
                queue.set_event_cpu(cpu);
            }
        }
    }

    /// The disk may have another size, or refuse writes from now on. Nonsense changes nothing: the
    /// disk is in use.
    fn refresh(&self) {
        let Some(disk) = &self.disk else { return };
        let Ok(nodes) = xenstore::disk(&self.backend) else {
            return;
        };
        if nodes.block_size != self.block_size {
            ratelimited!(pr_warn!(
                "{}: sector-size = {} instead of {}: ignored until the disk is attached anew\n",
                self.name(),
                nodes.block_size,
                self.block_size
            ));
        }
        // What was read is in range.
        let _ = self.update_disk(disk, &nodes);
    }

    /// Takes over what may change while a disk is in use. Who is told of the new size finds the
    /// write protection as it is to be with that.
    fn update_disk(
        &self,
        disk: &GenDisk<BlkfrontOps>,
        nodes: &negotiate::DiskProperties,
    ) -> Result {
        disk.set_read_only(nodes.read_only());
        if disk.capacity() != nodes.sectors {
            ratelimited!(pr_info!(
                "{}: Setting capacity to {}\n",
                self.name(),
                nodes.sectors
            ));
            disk.set_capacity_and_notify(nodes.sectors)?;
        }
        Ok(())
    }

    /// The backend cannot discard, though it had said so: nobody is to ask for it any more.
    pub(crate) fn withdraw_discard(&mut self) {
        if self.disk.is_none() {
            return;
        }
        ratelimited!(pr_warn!(
            "{}: the backend cannot discard, it is off\n",
            self.name()
        ));
        self.desired = self.desired.map(LimitInputs::without_discard);
        self.retry_limits();
    }

    /// Returns the queue of a ring.
    pub(crate) fn ring(&self, number: usize) -> Option<Arc<Queue>> {
        let mut rings = self.queues.iter().take(self.rings);
        rings.nth(number).cloned()
    }

    /// Gives up a connection whose backend does not answer. One that is away has its own deadline.
    pub(crate) fn drop_stalled(&mut self) {
        let stalled = || self.queues.iter().any(|queue| queue.has_stalled());
        if !params::gives_up() || !self.is_connected() || !stalled() {
            return;
        }
        ratelimited!(self.device.dev_error(
            ETIMEDOUT,
            fmt!("the backend does not answer: closing the connection, requests wait for another one"),
        ));
        self.handle_event(FrontEvent::Unusable);
    }

    /// Returns `true` if the disk is served, as far as xenbus has told.
    fn is_connected(&self) -> bool {
        self.state
            .is_connected(self.backend_state.unwrap_or(XenbusState::Unknown))
    }

    /// Ends event channels and requests. The backend may keep what it has mapped of the rings and
    /// pools until [`Self::reclaim`] or [`Self::free_stale_grants`].
    fn stop_sharing(&mut self, disposition: Disposition) {
        if let Some(disk) = &self.disk {
            disk.quiesce();
        }
        let still_granted = &mut self.still_granted;
        for queue in &self.queues {
            queue.detach(matches!(disposition, Disposition::Fail), |pending| {
                complete_or_requeue(still_granted, pending, disposition);
            });
        }
        self.rings = 0;
    }

    /// Frees what the backend does not use any more of the last connection. Returns `true` if nothing
    /// is left.
    fn end_stale_grants(&self) -> bool {
        let mut all = true;
        for queue in &self.queues {
            all &= queue.end_stale_grants();
        }
        all
    }

    /// Gives back pages of the pools that no request uses at the moment.
    pub(crate) fn trim_unused(&self) {
        for queue in &self.queues {
            queue.trim_unused();
        }
    }

    /// Gives up what the backend has had mapped of rings and pools.
    pub(crate) fn free_stale_grants(&self) {
        for queue in &self.queues {
            queue.free_stale_grants();
        }
    }

    /// Whether the backend still has to let go of rings and pools: it says by its state when it has.
    /// Xenbus does not tell that of a device that is being unbound, so that is asked for.
    pub(crate) fn is_mapped(&self) -> bool {
        if !self.queues.iter().any(|queue| queue.has_stale_grants()) {
            return false;
        }
        let backend = self.device.read_driver_state(&self.backend);
        matches!(backend, Ok(XenbusState::Connected | XenbusState::Closing))
    }

    /// Returns `true` if the backend serves the rings.
    ///
    /// Xenbus does not tell the state of the backend of a device that is being unbound, so that is
    /// asked for. The toolstack writes Closing itself, and the backend goes on until it hears Closed.
    pub(crate) fn is_served(&self) -> bool {
        let backend = self.device.read_driver_state(&self.backend);
        self.state == FrontState::Live
            && matches!(backend, Ok(XenbusState::Connected | XenbusState::Closing))
    }

    /// Takes no more steps. If the disk is to be written back before it goes, starts a thread that does
    /// so and removes it: it waits for the backend.
    pub(crate) fn begin_remove(&mut self) -> Option<KThread> {
        if self.ending == Ending::None {
            self.ending = Ending::Orderly;
        }
        let disk = self.disk.clone()?;
        if self.ending != Ending::Orderly || !self.is_served() {
            return None;
        }
        let name = self.vdev.name;
        let remove_thread = KThread::spawn(
            fmt!("rblkfront-remove/{}", name.as_str()),
            KThreadOptions::default(),
            move |_| {
                let _noio = NoioScope::new();
                disk.remove();
            },
        );
        remove_thread
            .inspect_err(|error| {
                pr_err!(
                    "{}: the disk is not written back: {:?}\n",
                    self.name(),
                    error
                );
            })
            .ok()
    }

    /// Returns `true` if the disk is to be detached when it is not in use any more.
    pub(crate) fn is_detach_deferred(&self) -> bool {
        self.detach_deferred && self.ending == Ending::None
    }

    /// Keeps the thread that removes the disk until the disk is dropped.
    pub(crate) fn store_remove_thread(&mut self, remove_thread: KThread) {
        self.remove_thread = Some(remove_thread);
    }

    /// Returns how many slots the backend has answered in all. Wraps around.
    pub(crate) fn responses(&self) -> u32 {
        let queues = self.queues.iter();
        queues.fold(0, |sum, queue| sum.wrapping_add(queue.responses()))
    }

    /// Has new requests fail. Returns `true` if there is a disk.
    pub(crate) fn begin_close(&mut self) -> bool {
        let Some(disk) = &self.disk else { return false };
        if disk.is_removed() {
            return true;
        }
        if self.mark_dead_thread.is_some() {
            return true;
        }
        // Another thread tells the file systems, for that waits for I/O: a mount or an unmount that is
        // under way has the super block locked until its I/O ends. It may be in flight for ever, and
        // fails only when this thread goes on.
        let dead = disk.clone();
        let name = self.vdev.name;
        let mark_dead_thread = KThread::spawn(
            fmt!("rblkfront-dead/{}", name.as_str()),
            KThreadOptions::default(),
            move |_| {
                let _noio = NoioScope::new();
                dead.mark_dead();
            },
        );
        match mark_dead_thread {
            Ok(mark_dead_thread) => self.mark_dead_thread = Some(mark_dead_thread),
            // Its requests fail all the same, one by one.
            Err(error) => pr_err!(
                "{}: the users of the disk cannot be told that it goes: {:?}\n",
                self.name(),
                error
            ),
        }
        true
    }

    /// Ends everything but the disk itself, whose requests fail from now on.
    pub(crate) fn finish_close(&mut self) {
        self.stop_sharing(Disposition::Fail);
        for (_, disposition) in self.still_granted.iter_mut() {
            *disposition = Disposition::Fail;
        }
        if let Some(disk) = &self.disk {
            disk.kick_requeue_list();
            disk.unquiesce();
        }
        let connected = self.state != FrontState::Waiting;
        self.state = FrontState::Dead;
        self.retry.finish();
        self.shortage.finish();
        // To be unbound without ever having offered anything is nothing to tell: the device can be
        // bound again. And the bus, which looks at Initialising in xenbus's thread, must not find
        // that it has become something else in another.
        if connected || !self.events.is_removing() {
            self.write_state();
        }
    }

    /// Whether the disk is to be let go, and that was not done yet.
    pub(crate) fn must_close(&self) -> bool {
        self.ending != Ending::None && self.state != FrontState::Dead
    }

    /// Whether no request waits for an answer that may still come.
    pub(crate) fn is_drained(&self) -> bool {
        let waits = |queue: &Arc<Queue>| !queue.is_idle() && !queue.is_broken();
        self.state != FrontState::Live || !self.queues.iter().any(waits)
    }

    /// Whether requests are being served, or never will be again.
    pub(crate) fn is_connected_or_dead(&self) -> bool {
        self.state == FrontState::Dead || self.is_connected()
    }

    /// Gives back pages of the pools that nobody has needed since the last time.
    pub(crate) fn trim_pool(&self) -> PoolTrim {
        self.queues
            .iter()
            .fold(PoolTrim::default(), |sum, queue| sum.and(queue.trim_pool()))
    }

    /// Whether nothing will ever be served again.
    pub(crate) fn is_dead(&self) -> bool {
        self.state == FrontState::Dead
    }

    /// Whether there is a disk.
    pub(crate) fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Whether the backend still uses pages of requests.
    pub(crate) fn has_granted_requests(&self) -> bool {
        !self.still_granted.is_empty()
    }

    /// Ends requests of which the backend has let go.
    pub(crate) fn end_released(&mut self) {
        let count = self.still_granted.len();
        for index in (0..count).rev() {
            let Ok((pending, disposition)) = self.still_granted.remove(index) else {
                continue;
            };
            complete_or_requeue(&mut self.still_granted, pending, disposition);
        }
        if count != self.still_granted.len() {
            if let Some(disk) = &self.disk {
                disk.kick_requeue_list();
            }
        }
    }

    /// Takes a dead disk whose requests have all ended.
    ///
    /// To be dropped without the lock: that waits.
    pub(crate) fn take_disk(&mut self) -> Option<DeadDisk> {
        if self.state != FrontState::Dead || !self.still_granted.is_empty() {
            return None;
        }
        let threads = [
            self.scan_thread.take(),
            self.mark_dead_thread.take(),
            self.remove_thread.take(),
        ];
        Some((self.disk.take()?, threads, self.registered.take()))
    }
}

/// What a step was for, in an error message.
fn describe(action: FrontAction) -> &'static str {
    match action {
        FrontAction::Wait | FrontAction::Report => "waiting for the backend",
        FrontAction::Offer => "offering rings",
        FrontAction::Connect => "connecting",
        FrontAction::Refresh => "reading the size of the disk",
        FrontAction::Reset | FrontAction::Restart => "closing the connection",
        FrontAction::Detach => "letting the disk go",
    }
}

/// Requests that can be in flight in each hardware queue: as many as the smallest ring has slots.
fn queue_depth(queues: &[Arc<Queue>]) -> u32 {
    let depths = queues.iter().map(|queue| queue.capacity());
    depths.min().unwrap_or(0) as u32
}

/// Ends or requeues a request whose connection has ended, or keeps it while the backend uses its
/// pages.
fn complete_or_requeue(
    still_granted: &mut KVVec<(PendingRequest, Disposition)>,
    pending: PendingRequest,
    disposition: Disposition,
) {
    let answer = pending.final_status();
    let stalled = pending.has_stalled();
    match (pending.end_grants(), answer, disposition) {
        (Ok(rq), Some(status), _) => end(rq, status),
        (Ok(rq), None, Disposition::Requeue) if !(stalled && rq.data().stalled) => {
            requeue(rq, stalled);
        }
        (Ok(rq), None, _) => end(rq, BlkStatus::IOERR),
        (Err(pending), _, _) => {
            // There is room. If not, the pages are never used again.
            let _ = still_granted.push_within_capacity((pending, disposition));
        }
    }
}

/// Has a request offered to the queue again. `stalled`: its connection was given up because of it.
fn requeue(mut rq: InFlightRequest, stalled: bool) {
    rq.data_mut().stalled |= stalled;
    rq.requeue();
}

fn end(mut rq: InFlightRequest, status: BlkStatus) {
    rq.data_mut().stalled = false;
    rq.end(status);
}
