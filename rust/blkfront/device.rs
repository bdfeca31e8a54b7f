// SPDX-License-Identifier: GPL-2.0-only

//! The state of a device: its connection to the backend, and its disk.
//!
//! A [`Device`] follows the state machine [`blkif::state::FrontState`]: it takes one step for each
//! state of the backend that xenbus reports. `struct blkfront_info` and `blkback_changed()` of
//! `xen-blkfront.c` have this role.
//!
//! # Reading the backend's state
//!
//! Access to xenstore wakes its daemon and takes nearly all of the time of a connect, so the
//! backend's state is not read again after a step. This is safe. Xenbus watches the state and reads
//! it after each change, in its own thread, one change after the other. It may miss a state that is
//! replaced before it is read, but never the last one: if the state changes after it was read,
//! another call follows. After a restore xenbus watches the new backend, which causes a call too.
//! And a state never requires more than one step: afterwards the device waits until the backend
//! changes.
//!
//! # Threads
//!
//! The state is changed from and to Initialising only in the `xenwatch` thread, because xenbus
//! would take such a change by another thread for a new device of the toolstack. So the `xenwatch`
//! thread takes the steps that do that. The device worker takes steps from Connected to Closed,
//! when the backend does not respond or a detach was withdrawn, and removes the disk, which may
//! wait, see [`worker`](crate::worker). There is one exception: the worker writes Closed when it
//! has ended the connection for good, which replaces Initialising if the device is not connected.
//! Xenbus may create the device again then, and the new one waits for a backend as the old one did.

use core::mem;

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
        xenbus::{
            self,
            Switched, //
        },
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
        FrontLimits,
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
    ring_channel::RingChannel,
    shortage::Shortage,
    wakeup::{
        DeviceWakeup,
        WakeReason, //
    },
    xenstore::{
        self,
        RingNodes, //
    }, //
};

/// Treatment of requests whose connection has ended.
#[derive(Clone, Copy)]
pub(crate) enum Disposition {
    /// They are requeued for the next connection.
    Requeue,
    /// The connection was closed because some of them got no response in time. They are requeued,
    /// except those that got none for the second time, which fail.
    RequeueStalled,
    /// They end with an error.
    Fail,
}

/// Reason for removing the disk of a device.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Removal {
    /// The disk is not removed.
    None,
    /// The toolstack detaches the disk, or the administrator unbinds the device. The disk is
    /// written back first, if the backend still serves it.
    Orderly,
    /// Its connection has failed.
    Failed,
}

/// A disk whose requests no longer wait for the backend, the threads that may still use it, and its
/// registration.
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

/// The connection of a device, and its disk, protected by the mutex in
/// [`DeviceWorker`](crate::worker::DeviceWorker).
///
/// Context: all methods may sleep, except those that only read fields.
pub(crate) struct Device {
    xbdev: ARef<xenbus::Device>,
    vdev: VirtualDevice,
    wakeup: Arc<DeviceWakeup>,
    state: FrontState,
    /// `true` if the state could not be written to xenstore, and has to be written again.
    state_unwritten: bool,
    /// If this is not `None`, no more steps are taken, and the device worker removes the disk.
    removal: Removal,
    /// `true` if a detach waits until the disk is no longer in use, and the toolstack was told so.
    detach_deferred: bool,
    /// Directory of the backend in xenstore. A restore changes it.
    backend: CString,
    /// The last state of the backend that xenbus has reported.
    backend_state: xenbus::OtherendState,
    /// Schedule of the attempts to connect.
    retry: Retry,
    /// The wait for grants that other devices hold.
    shortage: Shortage,
    /// The offer that was written last.
    offer: Option<FrontLimits>,
    /// `true` if the disk is not scanned for partitions.
    no_partition_scan: bool,
    /// The queues. They stay the same while there is a disk.
    queues: KVec<Arc<Queue>>,
    /// Number of queues that have a ring.
    rings: usize,
    disk: Option<Arc<GenDisk<BlkfrontOps>>>,
    registered: Option<Registered>,
    /// Logical block size of the disk, which never changes.
    block_size: u32,
    /// Number of fragments of the largest request that the disk may have in flight.
    largest: u16,
    /// The properties from which the current limits of the disk were computed.
    applied: Option<LimitInputs>,
    /// The properties from which the limits should be computed. They differ from `applied` while
    /// the limits are locked.
    desired: Option<LimitInputs>,
    /// Adds the disk, which scans it for partitions.
    scan_thread: Option<KThread>,
    /// Tells the file systems of the disk that it is dead.
    mark_dead_thread: Option<KThread>,
    /// Writes the disk back and removes it.
    remove_thread: Option<KThread>,
    /// Requests of which the backend still has pages mapped.
    still_granted: KVVec<(PendingRequest, Disposition)>,
    /// Number of the last connection.
    generation: u32,
    /// `true` if it was logged that the backend does not respond, and it still does not.
    stall_reported: bool,
    /// `true` while the connection is closed because requests got no response.
    closing_stalled: bool,
    /// `true` if the state of the backend could not be read, and has to be read again.
    backend_unread: bool,
}

impl Device {
    /// Creates the state of a device without a connection.
    pub(crate) fn new(
        xbdev: ARef<xenbus::Device>,
        vdev: VirtualDevice,
        wakeup: Arc<DeviceWakeup>,
        backend: CString,
    ) -> Self {
        Self {
            xbdev,
            vdev,
            wakeup,
            state: FrontState::Waiting,
            state_unwritten: false,
            removal: Removal::None,
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
            stall_reported: false,
            closing_stalled: false,
            backend_unread: false,
        }
    }

    /// Returns the name of the disk.
    pub(crate) fn name(&self) -> &str {
        self.vdev.name.as_str()
    }

    /// Returns the `struct device`, for log messages.
    pub(crate) fn dev(&self) -> &kernel::device::Device {
        self.xbdev.as_ref()
    }

    /// Handles a state of the backend.
    ///
    /// Called at least once after the device was bound. A device that is being removed takes no
    /// step, but records the state.
    pub(crate) fn backend_changed(&mut self, state: xenbus::OtherendState) {
        let Some(state) = self.confirm_state(state) else {
            return;
        };
        if matches!(self.state, FrontState::Waiting | FrontState::Removed) {
            // The node may be out of date: an earlier unbind has left Closed in it, and a restore
            // has set the device to Initialising, even if its disk is dead.
            self.write_state();
        }
        let was_connected = self.is_connected();
        self.backend_state = state;
        if self.is_connected() && !was_connected {
            self.queues.iter().for_each(|queue| queue.reset_timeouts());
            self.close_stalled();
        }
        match xenstore::backend_event(&self.backend, state, self.disk.is_some()) {
            Ok(event) => self.handle_event(event),
            Err(error) => {
                self.backend_unread = true;
                self.schedule_retry(error, "cannot read whether the backend is online");
            }
        }
    }

    /// Returns the state of the backend, or `None` if it cannot be read now.
    ///
    /// A read of the state that has failed is reported as Unknown by xenbus.
    fn confirm_state(&mut self, state: xenbus::OtherendState) -> Option<xenbus::OtherendState> {
        let read = match state {
            Ok(XenbusState::Unknown) => self.xbdev.read_driver_state(&self.backend),
            known => Ok(known),
        };
        self.backend_unread = read.is_err();
        if let Err(error) = read {
            self.schedule_retry(error, "cannot read the state of the backend");
        }
        read.ok()
    }

    /// Tries again to connect, to read the state of the backend, or to write that of the device.
    ///
    /// Context: the `xenwatch` thread.
    pub(crate) fn retry(&mut self) {
        if self.backend_unread {
            self.backend_changed(Ok(XenbusState::Unknown));
        } else if self.state == FrontState::Waiting {
            self.backend_changed(self.backend_state);
        }
        if self.state_unwritten {
            self.write_state();
        }
    }

    /// Returns the time until the next attempt to connect, in milliseconds, if one is scheduled.
    pub(crate) fn retry_wait_ms(&self) -> Option<u64> {
        self.retry.wait_ms()
    }

    /// Returns `true` once when the next attempt to connect is due.
    pub(crate) fn take_retry(&mut self) -> bool {
        self.retry.take_due()
    }

    /// Schedules the next attempt to connect, after a due one could not be started.
    pub(crate) fn postpone_retry(&mut self, error: Error) {
        self.retry.postpone(error);
    }

    /// Returns the time until the shortage of this device ends, in milliseconds, if there is one.
    pub(crate) fn shortage_wait_ms(&self) -> Option<u64> {
        self.shortage.wait_ms()
    }

    /// Ends the shortage of this device if its time is over.
    pub(crate) fn check_shortage(&mut self) {
        self.shortage.check();
    }

    /// Handles a restore of the domain.
    ///
    /// `backend` is the directory of the new backend.
    pub(crate) fn resume(&mut self, backend: &CStr) -> Result {
        self.backend_state = Ok(XenbusState::Unknown);
        // The toolstack has created a new backend, which it does not detach.
        self.detach_deferred = false;
        self.handle_event(FrontEvent::Resume);
        self.backend = xenstore::path(backend)?;
        Ok(())
    }

    /// Takes the step of the state machine for an event.
    pub(crate) fn handle_event(&mut self, event: FrontEvent) {
        if self.removal != Removal::None {
            return;
        }
        let action = self.state.step(event);
        if action == FrontAction::Remove {
            if self.must_defer_detach(event) {
                return;
            }
            self.removal = match event {
                FrontEvent::Backend { .. } => Removal::Orderly,
                FrontEvent::BadState
                | FrontEvent::Failed
                | FrontEvent::ConnectionFailed
                | FrontEvent::Deadline { .. }
                | FrontEvent::Resume => Removal::Failed,
            };
            self.wakeup.set(WakeReason::Close);
            return;
        }
        match self.run_action(action) {
            Ok(()) => {
                if let Some(next) = action.next_state() {
                    self.state = next;
                    self.write_state();
                }
            }
            Err(error) if retry::is_temporary(error) => {
                self.postpone(error, action);
                self.handle_event(FrontEvent::ConnectionFailed);
            }
            Err(error) => {
                self.xbdev
                    .dev_fatal(error, fmt!("{}: removing the disk", describe(action)));
                // This removes the disk.
                self.handle_event(FrontEvent::Failed);
            }
        }
    }

    /// Returns `true` if a detach has to wait because the disk is in use as swap space or by
    /// another device.
    ///
    /// Such a user would lose data, and cannot be told to stop. The backend serves the disk
    /// meanwhile.
    fn must_defer_detach(&mut self, event: FrontEvent) -> bool {
        let (Some(disk), FrontEvent::Backend { .. }) = (&self.disk, event) else {
            return false;
        };
        if !disk.has_unaware_holder() || !self.is_served() {
            return false;
        }
        // The device worker checks again after this, so it does not miss a use that has just ended.
        disk.queue_data().notify_release();
        if !self.detach_deferred {
            self.detach_deferred = true;
            self.xbdev.dev_error(
                EBUSY,
                fmt!("the disk is used as swap space or by another device: detaching it when that use ends"),
            );
        }
        true
    }

    /// Detaches the disk if the detach was deferred and is possible now.
    ///
    /// Forgets the detach if the toolstack has withdrawn it.
    pub(crate) fn retry_detach(&mut self) {
        if !self.is_detach_deferred() {
            return;
        }
        match xenstore::is_online(&self.backend) {
            Ok(true) => {
                self.detach_deferred = false;
                self.reconnect_after_detach();
            }
            // A detach does not depend on the state of the backend.
            Ok(false) => self.handle_event(FrontEvent::Backend {
                state: XenbusState::Closing,
                online: false,
                disk: self.disk.is_some(),
            }),
            // The device worker calls this again.
            Err(_) => {}
        }
    }

    /// Ends the connection of a detach that was withdrawn: the backend is Closing, and the device
    /// connects again when it has closed.
    ///
    /// That step leads from Connected to Closed, so the device worker may take it.
    fn reconnect_after_detach(&mut self) {
        if self.state == FrontState::Connected && self.backend_state == Ok(XenbusState::Closing) {
            self.handle_event(FrontEvent::Backend {
                state: XenbusState::Closing,
                online: true,
                disk: self.disk.is_some(),
            });
        }
    }

    /// Schedules another attempt at a step that has failed temporarily.
    fn postpone(&mut self, error: Error, action: FrontAction) {
        // No request was sent on this connection. A backend that is Connected may have mapped the
        // rings, so they become stale grants.
        self.stop_sharing(Disposition::Requeue);
        // If event channels or xenstore nodes are exhausted, the error is ENOSPC too. Throttling
        // the other disks does not help then, and ends after a limited time.
        if error == ENOSPC {
            self.shortage.ask();
        }
        self.schedule_retry(error, describe(action));
    }

    /// Schedules a retry, and reports `what` has failed.
    fn schedule_retry(&mut self, error: Error, what: &str) {
        if self.retry.postpone(error) {
            ratelimited!(self.xbdev.dev_error(error, fmt!("{what}: trying again")));
        }
        // The device worker has to compute its sleep time again.
        self.wakeup.set(WakeReason::Backend);
    }

    /// Executes the action of a step.
    fn run_action(&mut self, action: FrontAction) -> Result {
        match action {
            FrontAction::Wait | FrontAction::Remove => Ok(()),
            FrontAction::Report => {
                let (name, backend) = (self.name(), &*self.backend);
                ratelimited!(dev_warn!(
                    self.dev(),
                    "{name}: still waiting for {backend}\n"
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
                self.stop_sharing(self.requeue());
                self.end_stale_grants();
                Ok(())
            }
        }
    }

    /// Writes the state of the device to xenstore.
    ///
    /// If that fails, [`Self::retry`] writes it: the backend may wait for it.
    fn write_state(&mut self) {
        let switched = match self.state.xenbus() {
            // `frontend_closed` completes `dev->down`, for which a shutdown waits: a call before
            // the final Closed would end that wait at once.
            XenbusState::Closed if self.state == FrontState::Removed => {
                self.xbdev.frontend_closed()
            }
            state => self.xbdev.switch_state(state),
        };
        self.state_unwritten = matches!(switched, Switched::Failed(_));
        if let Switched::Failed(error) = switched {
            self.schedule_retry(error, "cannot write the state");
        }
    }

    /// Writes the final state if that has failed. Called while the device is being unbound.
    pub(crate) fn retry_final_state(&mut self) {
        if self.state_unwritten && self.state == FrontState::Removed {
            self.write_state();
        }
    }

    /// Creates rings and offers them to the backend.
    ///
    /// Fails with `EBUSY` while the backend still uses memory of the last connection, and with
    /// `EAGAIN` if there were too many offers.
    fn offer(&mut self) -> Result {
        if !self.end_stale_grants() {
            return Err(EBUSY);
        }
        self.retry.try_offer()?;
        let own = DirectoryListing::new(&NoTransaction, self.xbdev.nodename());
        let front = xenstore::front_limits(&self.xbdev, &own)?;
        self.no_partition_scan = xenstore::no_partition_scan(&self.xbdev, &own)?;
        let back = xenstore::back_offer(&self.backend, &BackOffer::RING_NODES)?;
        let shape = RingShape::choose(&front, &back);
        if self.disk.is_none() {
            self.create_queues(shape.queues)?;
        }

        self.rings = self.queues.len().min(shape.queues as usize);
        let (order, rings) = self.create_rings(shape.page_order)?;
        self.offer = Some(front);
        xenstore::write_offer(&self.xbdev, &own, &rings, order, front.persistent)
    }

    /// Creates rings of `1 << page_order` pages, or smaller ones if there is not enough contiguous
    /// memory or too few grants: the backend accepts any size up to its offer.
    ///
    /// Returns the page order and the nodes of the rings.
    fn create_rings(&mut self, page_order: u32) -> Result<(u32, KVec<RingNodes>)> {
        let mut order = page_order;
        loop {
            match self.try_create_rings(order) {
                Err(error) if order > 0 && [ENOMEM, ENOSPC].contains(&error) => {
                    order = order.saturating_sub(1);
                }
                result => return result.map(|rings| (order, rings)),
            }
        }
    }

    /// Gives each queue a ring of `1 << page_order` pages.
    fn try_create_rings(&mut self, page_order: u32) -> Result<KVec<RingNodes>> {
        let mut ring_channels = KVec::new();
        let mut rings = KVec::new();
        let mut slots = 0usize;
        for queue in self.queues.iter().take(self.rings) {
            let ring_channel = RingChannel::new(&self.xbdev, page_order, queue)?;
            slots = slots.saturating_add(ring_channel.ring.capacity() as usize);
            rings.push(RingNodes::new(&ring_channel)?, GFP_KERNEL)?;
            ring_channels.push(ring_channel, GFP_KERNEL)?;
        }
        // The backend may keep the pages of all requests mapped.
        self.still_granted.reserve(slots, GFP_KERNEL)?;
        for (queue, ring_channel) in self.queues.iter().zip(ring_channels) {
            queue.set_ring(ring_channel)?;
        }
        Ok(rings)
    }

    /// Creates the queues.
    fn create_queues(&mut self, count: u32) -> Result {
        self.queues = KVec::new();
        let handle = self.xbdev.handle().unwrap_or(0) as u16;
        for index in 0..count {
            let queue = Queue::new(self.vdev.name, index as u16, handle, self.wakeup.clone())?;
            self.queues.push(queue, GFP_KERNEL)?;
        }
        Ok(())
    }

    /// Connects to the backend: creates the disk, or resumes the existing one.
    fn connect(&mut self) -> Result {
        let properties = xenstore::disk_properties(&self.backend)?;
        let back = xenstore::back_offer(&self.backend, &BackOffer::NODES)?;
        let front = self.offer.ok_or(EINVAL)?;
        let features = negotiate(&front, &back);
        let features = match self.desired {
            Some(inputs) if self.disk.is_some() => features.for_disk(inputs.write_cache()),
            _ => features,
        };
        let slot_limits = self.slot_limits(&properties, &features)?;
        let largest = self.largest.max(slot_limits.segments());

        self.generation = self.generation.wrapping_add(1);
        let config = ConnectionConfig {
            domain: self.xbdev.otherend_id(),
            slot_limits,
            bounce: features.bounce,
            largest,
            flush: features.flush,
            write_through: features.write_through,
            discard: features.discard,
            generation: self.generation,
        };
        for queue in self.queues.iter().take(self.rings) {
            queue.accept_requests(config)?;
        }
        match self.disk.clone() {
            None => self.create_disk(&properties, &features, slot_limits)?,
            Some(disk) => self.resume_disk(&disk, &properties, &features, slot_limits)?,
        }
        self.largest = largest;
        self.set_event_affinity();
        self.log_features(&features);
        self.retry.finish();
        self.shortage.finish();
        Ok(())
    }

    /// Returns the amount of data that a slot can carry, with the block size of the disk if there
    /// is one.
    fn slot_limits(
        &self,
        properties: &negotiate::DiskProperties,
        features: &Features,
    ) -> Result<SlotLimits> {
        let block_size = match self.disk {
            Some(_) => self.block_size,
            None => properties.block_size,
        };
        SlotLimits::new(features.indirect_segments, block_size).ok_or_else(|| {
            let name = self.name();
            dev_err!(
                self.dev(),
                "{name}: a block of {block_size} bytes does not fit into a request of the backend: refusing the disk\n"
            );
            EINVAL
        })
    }

    /// Creates the disk, and starts the thread that adds it.
    fn create_disk(
        &mut self,
        properties: &negotiate::DiskProperties,
        features: &Features,
        slot_limits: SlotLimits,
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
                // The backend's domain has an I/O scheduler; a second one would only cost time.
                no_scheduler: true,
            }),
            GFP_KERNEL,
        )?;
        let inputs = LimitInputs::new(properties.block_size, properties, features, slot_limits);
        let mut limits = QueueLimits::new();
        inputs.apply(&mut limits);

        let mut builder = GenDiskBuilder::new(limits)
            .capacity(properties.sectors)
            .read_only(properties.read_only())
            .removable(properties.removable());
        if self.no_partition_scan {
            builder = builder.no_partition_scan();
        }
        if let Some(minors) = minors {
            builder = builder.device_numbers(minors);
        }
        let data = Disk::new(
            queues,
            properties.cdrom(),
            self.vdev.name,
            self.wakeup.clone(),
        );
        let serial = data.serial();
        let disk = builder.build(
            fmt!("{}", self.name()),
            tag_set,
            Arc::new(data, GFP_KERNEL)?,
        )?;
        let disk = Arc::new(disk, GFP_KERNEL)?;
        let registered = Registered::new(self.vdev.name, serial, disk.clone())?;
        self.block_size = properties.block_size;
        self.applied = Some(inputs);
        self.desired = Some(inputs);
        self.add_disk(disk.clone())?;
        self.disk = Some(disk);
        self.registered = Some(registered);
        Ok(())
    }

    /// Reserves the minors of the virtual device number.
    ///
    /// Returns `None` if a removed disk that is still open has some of them. Then the block layer
    /// chooses other device numbers, so that the new disk is not mistaken for the old one.
    fn reserve_minors(&self) -> Result<Option<Minors>> {
        match Minors::reserve(MAJOR, self.vdev.minor, self.vdev.minors) {
            Ok(minors) => Ok(Some(minors)),
            Err(EOPENSTALE) => {
                let name = self.name();
                ratelimited!(dev_warn!(
                    self.dev(),
                    "{name}: the disk that had this name before is still open and keeps its device number: using another one\n"
                ));
                Ok(None)
            }
            Err(error) => {
                if error == EBUSY {
                    let (name, minor) = (self.name(), self.vdev.minor);
                    ratelimited!(dev_warn!(
                        self.dev(),
                        "{name}: another disk has minor {minor}: trying again until it is removed\n"
                    ));
                }
                Err(error)
            }
        }
    }

    /// Starts a thread that adds the disk, which reads from it and so waits for the backend.
    fn add_disk(&mut self, disk: Arc<GenDisk<BlkfrontOps>>) -> Result {
        let xbdev = self.xbdev.clone();
        let wakeup = self.wakeup.clone();
        let name = self.vdev.name;
        let options = KThreadOptions::default();
        let scan_thread = KThread::spawn(
            fmt!("rblkfront-scan/{}", name.as_str()),
            options,
            move |_| {
                let parent: &xenbus::Device = &xbdev;
                if let Err(error) = disk.add(Some(parent.as_ref())) {
                    xbdev.dev_fatal(error, fmt!("adding disk {}", name.as_str()));
                    wakeup.set(WakeReason::Failed);
                }
                wakeup.mark_ready();
            },
        )?;
        self.scan_thread = Some(scan_thread);
        Ok(())
    }

    /// Resumes a disk with a new connection.
    fn resume_disk(
        &mut self,
        disk: &GenDisk<BlkfrontOps>,
        properties: &negotiate::DiskProperties,
        features: &Features,
        slot_limits: SlotLimits,
    ) -> Result {
        if properties.block_size > self.block_size {
            let (name, new, old) = (self.name(), properties.block_size, self.block_size);
            dev_err!(
                self.dev(),
                "{name}: cannot change the logical block size from {old} to {new}: removing the disk\n"
            );
            return Err(EINVAL);
        }
        disk.queue_data().set_rings(self.rings as u32);
        // The new size may be smaller: a block of the old size consists of whole blocks of the new
        // size.
        self.desired = Some(LimitInputs::new(
            self.block_size,
            properties,
            features,
            slot_limits,
        ));
        self.apply_limits()?;
        self.update_disk(disk, properties)?;
        disk.kick_requeue_list();
        disk.unquiesce();
        Ok(())
    }

    /// Sets the desired limits of the disk.
    ///
    /// A writer to the limits in sysfs locks them and waits for requests, which wait for the
    /// backend. So this does not wait for the lock: the device worker tries again. The queue is in
    /// use and not frozen meanwhile, so requests within the old limits may still come. They are
    /// served under the new ones too, and the write cache never changes.
    fn apply_limits(&mut self) -> Result {
        let (Some(disk), Some(desired)) = (&self.disk, self.desired) else {
            return Ok(());
        };
        // Most backends offer the same as before.
        if self.applied == Some(desired) {
            return Ok(());
        }
        match disk.try_update_limits(|limits| desired.apply(limits)) {
            Ok(()) => self.applied = Some(desired),
            Err(error) if error != EBUSY => return Err(error),
            Err(_) => self.wakeup.set(WakeReason::Limits),
        }
        Ok(())
    }

    /// Tries again to set the desired limits of the disk.
    pub(crate) fn retry_limits(&mut self) {
        if self.state != FrontState::Connected {
            // The next connection sets limits of its own.
            return;
        }
        if let Err(error) = self.apply_limits() {
            let name = self.name();
            ratelimited!(dev_err!(
                self.dev(),
                "{name}: cannot change the limits of the disk: {error:?}: keeping the old ones\n"
            ));
        }
    }

    /// Logs the features of the connection, in the format of `xen-blkfront.c`.
    fn log_features(&self, features: &Features) {
        let flush = match features.flush {
            Flush::Cache => "flush diskcache: enabled;",
            Flush::Barrier => "barrier: enabled;",
            Flush::None => "barrier or flush: disabled;",
            Flush::Unavailable => "flush: fails;",
        };
        let enabled = |on: bool| if on { "enabled" } else { "disabled" };
        let name = self.name();
        let persistent = enabled(features.persistent);
        let indirect = enabled(features.indirect_segments > 0);
        let bounce = enabled(features.bounce);
        ratelimited!(dev_info!(
            self.dev(),
            "{name}: {flush} persistent grants: {persistent}; indirect descriptors: {indirect}; bounce buffer: {bounce}\n"
        ));
        if features.flush == Flush::Unavailable {
            ratelimited!(dev_warn!(
                self.dev(),
                "{name}: the backend offers no flush, but an earlier one had a write cache: flushes fail until a backend offers a flush or the disk is attached again\n"
            ));
        }
        if features.write_through {
            ratelimited!(dev_warn!(
                self.dev(),
                "{name}: the backend has a write cache, and the first one had none: each write is flushed until the disk is attached again\n"
            ));
        }
    }

    /// Binds the event channel of each ring to a CPU that submits to it, so that a request
    /// completes where it was submitted.
    ///
    /// If that fails, events arrive on any CPU.
    fn set_event_affinity(&self) {
        let Some(disk) = &self.disk else { return };
        let rings = self.queues.iter().take(self.rings);
        for (number, queue) in rings.enumerate() {
            if let Some(cpu) = disk.tag_set().cpu_of(number as u32) {
                queue.set_event_cpu(cpu);
            }
        }
    }

    /// Reads the size and the write protection of the disk again.
    ///
    /// Invalid nodes change nothing, because the disk is in use.
    fn refresh(&self) {
        let Some(disk) = &self.disk else { return };
        let Ok(properties) = xenstore::disk_properties(&self.backend) else {
            return;
        };
        if properties.block_size != self.block_size {
            let (name, new, old) = (self.name(), properties.block_size, self.block_size);
            ratelimited!(dev_warn!(
                self.dev(),
                "{name}: sector-size = {new} instead of {old}: ignored while the disk is connected\n"
            ));
        }
        // Cannot fail: the size was checked when it was read.
        let _ = self.update_disk(disk, &properties);
    }

    /// Sets the properties that may change while a disk is in use.
    ///
    /// The write protection is set before users are notified of a new size.
    fn update_disk(
        &self,
        disk: &GenDisk<BlkfrontOps>,
        properties: &negotiate::DiskProperties,
    ) -> Result {
        disk.set_read_only(properties.read_only());
        if disk.capacity() != properties.sectors {
            let (name, sectors) = (self.name(), properties.sectors);
            ratelimited!(dev_info!(
                self.dev(),
                "{name}: Setting capacity to {sectors}\n"
            ));
            disk.set_capacity_and_notify(properties.sectors)?;
        }
        Ok(())
    }

    /// Disables discard after the backend has rejected one.
    pub(crate) fn withdraw_discard(&mut self) {
        if self.disk.is_none() {
            return;
        }
        let name = self.name();
        ratelimited!(dev_warn!(
            self.dev(),
            "{name}: the backend has rejected a discard: disabling discard\n"
        ));
        self.desired = self.desired.map(LimitInputs::without_discard);
        self.retry_limits();
    }

    /// Returns the queue of ring `number`, if there is one.
    pub(crate) fn ring(&self, number: usize) -> Option<Arc<Queue>> {
        let mut rings = self.queues.iter().take(self.rings);
        rings.nth(number).cloned()
    }

    /// Closes a connection whose backend does not respond.
    ///
    /// With `io_timeout` = 0 the connection stays, and a message reports the backend, once for each
    /// time that it stops responding.
    ///
    /// A disconnected backend has another deadline, `reconnect_timeout`, and so have the waits of a
    /// removal.
    pub(crate) fn close_stalled(&mut self) {
        if self.removal != Removal::None {
            return;
        }
        let stalled = self.has_serving_backend() && self.has_stalled();
        let reported = mem::replace(&mut self.stall_reported, stalled);
        if !stalled {
            return;
        }
        if !params::gives_up() {
            if !reported {
                self.report_stall();
            }
            return;
        }
        let outcome = if self.is_detach_deferred() {
            "detaching the disk"
        } else {
            "requests wait for the next one"
        };
        ratelimited!(self.xbdev.dev_error(
            ETIMEDOUT,
            fmt!("the backend does not respond: closing the connection, {outcome}"),
        ));
        self.closing_stalled = true;
        self.handle_event(FrontEvent::ConnectionFailed);
        self.closing_stalled = false;
    }

    /// Logs that requests wait for a backend that does not respond.
    fn report_stall(&self) {
        let name = self.name();
        ratelimited!(dev_warn!(
            self.dev(),
            "{name}: the backend does not respond: requests wait for it, because io_timeout is 0\n"
        ));
    }

    /// Returns `true` if both sides are connected, according to the state that xenbus has reported.
    fn is_connected(&self) -> bool {
        self.state
            .is_connected(self.backend_state.unwrap_or(XenbusState::Unknown))
    }

    /// Returns `true` if the backend serves the rings, according to the state that xenbus has
    /// reported.
    ///
    /// While a detach is deferred, the toolstack has written Closing, and the backend serves.
    pub(crate) fn has_serving_backend(&self) -> bool {
        let closing = self.backend_state == Ok(XenbusState::Closing);
        let deferred = self.is_detach_deferred() && self.state == FrontState::Connected && closing;
        deferred || self.is_connected()
    }

    /// Returns `true` if a request has timed out too often.
    pub(crate) fn has_stalled(&self) -> bool {
        self.queues.iter().any(|queue| queue.has_stalled())
    }

    /// Returns the treatment of requests whose connection ends and may be followed by another one.
    fn requeue(&self) -> Disposition {
        if self.closing_stalled {
            Disposition::RequeueStalled
        } else {
            Disposition::Requeue
        }
    }

    /// Closes event channels, and ends or requeues requests.
    ///
    /// The rings and pools stay granted until [`Self::end_stale_grants`] or
    /// [`Self::free_stale_grants`].
    fn stop_sharing(&mut self, disposition: Disposition) {
        if let Some(disk) = &self.disk {
            disk.quiesce();
        }
        let still_granted = &mut self.still_granted;
        for queue in &self.queues {
            queue.disconnect(matches!(disposition, Disposition::Fail), |pending| {
                complete_or_requeue(still_granted, pending, disposition);
            });
        }
        self.rings = 0;
    }

    /// Ends the grants of the last connection whose pages the backend has unmapped.
    ///
    /// Returns `true` if none is left.
    fn end_stale_grants(&self) -> bool {
        let mut all = true;
        for queue in &self.queues {
            all &= queue.end_stale_grants();
        }
        all
    }

    /// Frees the pages of the pools beyond their minimum, idle or not.
    pub(crate) fn trim_unused(&self) {
        for queue in &self.queues {
            queue.trim_unused();
        }
    }

    /// Drops the stale grants of rings and pools.
    ///
    /// The kernel frees each page when it is unmapped.
    pub(crate) fn free_stale_grants(&self) {
        for queue in &self.queues {
            queue.free_stale_grants();
        }
    }

    /// Returns `true` if the backend may still have rings and pools mapped, according to its state.
    ///
    /// Xenbus reports no states to a device that is being unbound, so the state is read. A backend
    /// whose state cannot be read may have them mapped.
    pub(crate) fn is_mapped(&self) -> bool {
        if !self.queues.iter().any(|queue| queue.has_stale_grants()) {
            return false;
        }
        self.may_be_served()
    }

    /// Returns `true` if the backend serves the rings.
    ///
    /// Xenbus reports no states to a device that is being unbound, so the state is read. The
    /// toolstack writes Closing itself, and the backend serves the disk until the frontend is
    /// Closed. A failed read of the state does not end that: data would be lost.
    pub(crate) fn is_served(&self) -> bool {
        self.state == FrontState::Connected && self.may_be_served()
    }

    /// Returns `true` if the backend is Connected or Closing, or its state cannot be read.
    fn may_be_served(&self) -> bool {
        match self.xbdev.read_driver_state(&self.backend) {
            Ok(state) => matches!(state, Ok(XenbusState::Connected | XenbusState::Closing)),
            Err(_) => true,
        }
    }

    /// Begins the removal of the disk; no more steps are taken.
    ///
    /// If the disk can be written back, starts a thread that writes it back and removes it, because
    /// writing back waits for the backend. Returns that thread, or `None` if nothing can be written
    /// back.
    pub(crate) fn begin_remove(&mut self) -> Option<KThread> {
        if self.removal == Removal::None {
            self.removal = Removal::Orderly;
        }
        let disk = self.disk.clone()?;
        if self.removal != Removal::Orderly || !self.is_served() {
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
                let name = self.name();
                dev_err!(
                    self.dev(),
                    "{name}: cannot start the thread that writes the disk back: {error:?}: data may be lost\n"
                );
            })
            .ok()
    }

    /// Returns `true` if a detach waits until the disk is no longer in use.
    pub(crate) fn is_detach_deferred(&self) -> bool {
        self.detach_deferred && self.removal == Removal::None
    }

    /// Stores the thread that removes the disk; it is joined before the disk is dropped.
    pub(crate) fn store_remove_thread(&mut self, remove_thread: KThread) {
        self.remove_thread = Some(remove_thread);
    }

    /// Returns the sum of [`Queue::responses`], modulo 2^32.
    pub(crate) fn responses(&self) -> u32 {
        let queues = self.queues.iter();
        queues.fold(0, |sum, queue| sum.wrapping_add(queue.responses()))
    }

    /// Makes new requests fail.
    ///
    /// Returns `true` if there is a disk.
    pub(crate) fn begin_close(&mut self) -> bool {
        let Some(disk) = &self.disk else { return false };
        if disk.is_removed() {
            return true;
        }
        if self.mark_dead_thread.is_some() {
            return true;
        }
        // Another thread marks the disk dead, because that calls the file systems and may wait for
        // I/O: a mount or an unmount in progress has the super block locked until its I/O ends.
        // The device worker has to fail that I/O.
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
            // The requests fail all the same, each when it is submitted.
            Err(error) => {
                let name = self.name();
                dev_err!(
                    self.dev(),
                    "{name}: cannot start the thread that marks the disk dead: {error:?}: its file systems are not told, but its requests fail\n"
                );
            }
        }
        true
    }

    /// Ends the connection permanently.
    ///
    /// The disk stays, and its requests fail.
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
        self.state = FrontState::Removed;
        self.retry.finish();
        self.shortage.finish();
        // A device that is unbound while it waits for a backend stays Initialising: it can be bound
        // again, and only the `xenwatch` thread may change Initialising.
        if connected || !self.wakeup.is_removing() {
            self.write_state();
        }
    }

    /// Returns `true` if the connection has to be ended.
    pub(crate) fn must_close(&self) -> bool {
        self.removal != Removal::None && self.state != FrontState::Removed
    }

    /// Returns `true` if no request waits for a response or is being prepared.
    ///
    /// A queue without a ring has none. Its shadow table is that of an earlier connection.
    pub(crate) fn is_idle(&self) -> bool {
        let mut queues = self.queues.iter().take(self.rings);
        queues.all(|queue| queue.is_idle())
    }

    /// Returns `true` if no request waits for a response that may still arrive.
    pub(crate) fn is_drained(&self) -> bool {
        let waits = |queue: &Arc<Queue>| !queue.is_idle() && !queue.is_broken();
        let mut queues = self.queues.iter().take(self.rings);
        self.state != FrontState::Connected || !queues.any(waits)
    }

    /// Frees pages of the pools that have been idle since the last call.
    pub(crate) fn trim_pool(&self) -> PoolTrim {
        self.queues.iter().fold(PoolTrim::default(), |sum, queue| {
            sum.combine(queue.trim_pool())
        })
    }

    /// Returns `true` if the connection has ended permanently.
    pub(crate) fn is_dead(&self) -> bool {
        self.state == FrontState::Removed
    }

    /// Returns `true` if there is a disk.
    pub(crate) fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Returns `true` if the backend still has pages of requests mapped.
    pub(crate) fn has_granted_requests(&self) -> bool {
        !self.still_granted.is_empty()
    }

    /// Ends requests whose pages the backend has unmapped.
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

    /// Takes a dead disk whose requests no longer wait for the backend.
    ///
    /// The caller drops it without the lock, because the drop waits.
    pub(crate) fn take_disk(&mut self) -> Option<DeadDisk> {
        if self.state != FrontState::Removed || !self.still_granted.is_empty() {
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

/// Returns the text of an error message for a step that has failed.
fn describe(action: FrontAction) -> &'static str {
    match action {
        FrontAction::Wait | FrontAction::Report => "cannot wait for the backend",
        FrontAction::Offer => "cannot offer rings",
        FrontAction::Connect => "cannot connect",
        FrontAction::Refresh => "cannot read the size of the disk",
        FrontAction::Reset | FrontAction::Restart => "cannot close the connection",
        FrontAction::Remove => "cannot remove the disk",
    }
}

/// Returns the number of requests that can be in flight in each hardware queue: the number of slots
/// of the smallest ring.
fn queue_depth(queues: &[Arc<Queue>]) -> u32 {
    let depths = queues.iter().map(|queue| queue.capacity());
    depths.min().unwrap_or(0) as u32
}

/// Ends or requeues a request whose connection has ended, or stores it while the backend has its
/// pages mapped.
fn complete_or_requeue(
    still_granted: &mut KVVec<(PendingRequest, Disposition)>,
    pending: PendingRequest,
    disposition: Disposition,
) {
    let status = pending.final_status();
    let stalled = matches!(disposition, Disposition::RequeueStalled) && pending.has_stalled();
    match (pending.end_grants(), status, disposition) {
        (Ok(rq), Some(status), _) => end(rq, status),
        (Ok(rq), None, Disposition::Requeue | Disposition::RequeueStalled)
            if !(stalled && rq.data().stalled) =>
        {
            requeue(rq, stalled);
        }
        (Ok(rq), None, _) => end(rq, BlkStatus::IOERR),
        (Err(pending), _, _) => {
            // There is space for it. Without space, the request would never end, and its pages
            // would never be reused.
            let _ = still_granted.push_within_capacity((pending, disposition));
        }
    }
}

/// Requeues a request.
///
/// `stalled` is `true` if its connection was closed because of this request.
fn requeue(mut rq: InFlightRequest, stalled: bool) {
    rq.data_mut().stalled |= stalled;
    rq.requeue();
}

/// Ends a request.
fn end(mut rq: InFlightRequest, status: BlkStatus) {
    rq.data_mut().stalled = false;
    rq.end(status);
}
