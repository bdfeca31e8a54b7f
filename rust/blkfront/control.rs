// SPDX-License-Identifier: GPL-2.0

//! The thread of a device: connects, closes, waits.
//!
//! It follows [`blkif::state::Front`]: whenever something happens it looks at the state of the
//! backend as it is then, and does what is to be done until there is nothing to do but wait. It owns
//! the disk, and is the only one that makes and ends connections.
//!
//! # What waits for whom
//!
//! - The device is not served: after [`OUTAGE_MS`] the disk is given up, and what was in flight ends
//!   with an error.
//! - A disk goes while requests are in flight: after [`DRAIN_MS`] they end with an error, once their
//!   pages are ours again.
//! - A backend still uses pages of a request: the request *lingers*. To end it would be to give its
//!   pages to somebody else. It ends when the backend lets go, at the latest when its domain ends.
//! - The partitions of a new disk are looked for by another thread: that reads from the disk, and a
//!   backend that does not answer must not keep this one from closing it.

use blkif::negotiate;
use blkif::negotiate::negotiate;
use blkif::negotiate::Features;
use blkif::negotiate::Flush;
use blkif::negotiate::FrontOffer;
use blkif::negotiate::RingShape;
use blkif::plan::SlotLimits;
use blkif::state::Front;
use blkif::state::FrontAction;
use blkif::state::FrontEvent;
use blkif::state::XenbusState;
use blkif::vdev::VirtualDevice;
use blkif::vdev::MAJOR;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::aref::ARef;
use kernel::sync::Arc;
use kernel::time::delay::fsleep;
use kernel::time::msecs_to_jiffies;
use kernel::time::Delta;
use kernel::time::Instant;
use kernel::time::Jiffies;
use kernel::time::Monotonic;
use kernel_ext::base::kthread::KThread;
use kernel_ext::base::kthread::Kind;
use kernel_ext::block::major::Minors;
use kernel_ext::block::mq::BlkStatus;
use kernel_ext::block::mq::Feature;
use kernel_ext::block::mq::GenDisk;
use kernel_ext::block::mq::GenDiskBuilder;
use kernel_ext::block::mq::QueueLimits;
use kernel_ext::block::mq::TagSet;
use kernel_ext::block::mq::TagSetParams;
use kernel_ext::xen::xenbus;

use crate::disk;
use crate::disk::Disk;
use crate::link::Link;
use crate::nodes;
use crate::nodes::RingNodes;
use crate::queue::Queue;
use crate::queue::Terms;
use crate::signal::Cause;
use crate::signal::Signal;
use crate::slots::Waiting;

/// How long a disk waits for a backend that is away.
const OUTAGE_MS: i64 = 300_000;
/// How long a disk that goes waits for the answers to its last requests.
const DRAIN_MS: i64 = 5_000;
/// How often is looked whether a drain is over.
const DRAIN_STEP_MS: i64 = 5;
/// How often is looked whether the backend has let go of pages.
const LINGER_STEP_MS: u32 = 100;
/// How often is looked whether a backend is away for too long.
const OUTAGE_STEP_MS: u32 = 10_000;

/// What becomes of requests whose connection has ended.
#[derive(Clone, Copy)]
enum Fate {
    /// They are offered to the queue again, for the next connection.
    Again,
    /// They end with an error.
    Fail,
}

/// A device: what its thread owns.
pub(crate) struct Control {
    device: ARef<xenbus::Device>,
    vdev: VirtualDevice,
    signal: Arc<Signal>,
    own: Front,
    /// The backend's directory.
    backend: CString,
    /// What this side can do, as of the last offer.
    offer: Option<FrontOffer>,
    /// Those of a disk stay the same for as long as it is there.
    queues: KVec<Arc<Queue>>,
    /// How many of the queues have a ring.
    rings: usize,
    disk: Option<Arc<GenDisk<Disk>>>,
    /// Looks for partitions on the disk.
    adder: Option<KThread>,
    /// Requests of which the backend still uses pages.
    lingering: KVVec<(Waiting, Fate)>,
    /// Counts the connections.
    generation: u32,
    /// Since when requests are not being served.
    away: Option<Instant<Monotonic>>,
}

impl Control {
    pub(crate) fn new(
        device: ARef<xenbus::Device>,
        vdev: VirtualDevice,
        signal: Arc<Signal>,
    ) -> Result<Self> {
        let backend = nodes::backend(&device)?;
        signal.raise(Cause::Backend);
        Ok(Self {
            device,
            vdev,
            signal,
            own: Front::Waiting,
            backend,
            offer: None,
            queues: KVec::new(),
            rings: 0,
            disk: None,
            adder: None,
            lingering: KVVec::new(),
            generation: 0,
            away: None,
        })
    }

    /// The life of the device.
    pub(crate) fn run(mut self) {
        self.show();
        while !self.signal.removed() {
            self.look();
            self.release();
            if self.own == Front::Dead && self.lingering.is_empty() {
                self.remove_disk();
            }
            self.signal.wait(self.patience());
        }

        if self.own != Front::Dead {
            self.detach();
            self.own = Front::Dead;
            self.show();
        }
        while !self.lingering.is_empty() {
            fsleep(Delta::from_millis(LINGER_STEP_MS.into()));
            self.release();
        }
        self.remove_disk();
    }

    /// The name of the disk.
    fn name(&self) -> &str {
        self.vdev.name.as_str()
    }

    /// How long to sleep if nothing happens.
    fn patience(&self) -> Option<Jiffies> {
        if !self.lingering.is_empty() {
            Some(msecs_to_jiffies(LINGER_STEP_MS))
        } else if self.away.is_some() {
            Some(msecs_to_jiffies(OUTAGE_STEP_MS))
        } else {
            None
        }
    }

    /// Deals with all that has happened.
    fn look(&mut self) {
        if self.signal.take(Cause::Resume) {
            self.follow(FrontEvent::Resume);
        }
        if self.signal.take(Cause::Failed) {
            self.follow(FrontEvent::Failed);
        }
        if self.signal.take(Cause::NoFlush) {
            self.withdraw("flush", |limits| {
                limits.set_feature(Feature::WriteCache, false);
            });
        }
        if self.signal.take(Cause::NoDiscard) {
            self.withdraw("discard", |limits| {
                limits
                    .set_max_discard_sectors(0)
                    .set_max_secure_erase_sectors(0);
            });
        }
        self.signal.take(Cause::Backend);
        let event = self.backend_event();
        self.follow(event);
        self.check_outage();
    }

    /// The backend as it is now. Its directory can be another one after a restore.
    fn backend_event(&mut self) -> FrontEvent {
        if let Ok(backend) = nodes::backend(&self.device) {
            self.backend = backend;
        }
        nodes::backend_event(&self.device, &self.backend)
    }

    /// Does what is to be done, until that is nothing.
    fn follow(&mut self, mut event: FrontEvent) {
        while !self.signal.removed() {
            let action = self.own.step(event);
            event = match self.carry_out(action) {
                Ok(()) => {
                    let Some(next) = action.leads_to() else {
                        return;
                    };
                    self.own = next;
                    self.show();
                    self.backend_event()
                }
                Err(error) => {
                    self.device.dev_fatal(error, fmt!("{}", purpose(action)));
                    FrontEvent::Failed
                }
            };
        }
    }

    fn carry_out(&mut self, action: FrontAction) -> Result {
        match action {
            FrontAction::Wait => Ok(()),
            FrontAction::Report => {
                pr_warn!("{}: still waiting for {}\n", self.name(), &*self.backend);
                Ok(())
            }
            FrontAction::Offer => self.offer(),
            FrontAction::Connect => self.connect(),
            FrontAction::Refresh => self.refresh(),
            FrontAction::Reset | FrontAction::Restart => {
                self.stop_sharing(Fate::Again);
                Ok(())
            }
            FrontAction::Detach => {
                self.detach();
                Ok(())
            }
        }
    }

    /// Writes the own state to xenstore.
    fn show(&self) {
        match self.own.xenbus() {
            XenbusState::Initialised => self.device.switch_state(xenbus::State::Initialised),
            XenbusState::Connected => self.device.switch_state(xenbus::State::Connected),
            XenbusState::Closed => self.device.frontend_closed(),
            XenbusState::Unknown
            | XenbusState::Initialising
            | XenbusState::InitWait
            | XenbusState::Closing
            | XenbusState::Reconfiguring
            | XenbusState::Reconfigured => self.device.switch_state(xenbus::State::Initialising),
        }
        if self.own == Front::Dead {
            self.signal.settle();
        }
    }

    /// Gives up a disk that is not served for too long.
    fn check_outage(&mut self) {
        let state = match nodes::backend_event(&self.device, &self.backend) {
            FrontEvent::Backend { state, .. } => state,
            _ => XenbusState::Unknown,
        };
        if self.own == Front::Dead || self.own.whole(state) {
            self.away = None;
            return;
        }
        let since = *self.away.get_or_insert_with(Instant::now);
        if since.elapsed().as_millis() >= OUTAGE_MS {
            self.away = Some(Instant::now());
            if self.disk.is_some() {
                pr_err!("{}: the backend is away for too long\n", self.name());
            }
            self.follow(FrontEvent::Deadline {
                disk: self.disk.is_some(),
            });
        }
    }

    /// Shares rings with the backend.
    fn offer(&mut self) -> Result {
        let front = nodes::front_offer(&self.device)?;
        let back = nodes::back_offer(&self.backend)?;
        let shape = RingShape::choose(&front, &back);
        if self.disk.is_none() {
            self.make_queues(shape.queues)?;
        }

        self.rings = self.queues.len().min(shape.queues as usize);
        let mut rings = KVec::new();
        let mut slots = 0usize;
        for queue in self.queues.iter().take(self.rings) {
            let link = Link::new(&self.device, shape.page_order, queue)?;
            slots = slots.saturating_add(link.ring.capacity() as usize);
            rings.push(RingNodes::new(&link)?, GFP_KERNEL)?;
            queue.attach(link)?;
        }
        // So that there is room for all requests, should the backend keep their pages.
        self.lingering.reserve(slots, GFP_KERNEL)?;
        self.offer = Some(front);
        nodes::publish(&self.device, &rings, shape.page_order, front.persistent)
    }

    fn make_queues(&mut self, count: u32) -> Result {
        self.queues = KVec::new();
        let handle = self.device.handle().unwrap_or(0) as u16;
        for index in 0..count {
            let queue = Queue::new(index as u16, handle, self.signal.clone())?;
            self.queues.push(queue, GFP_KERNEL)?;
        }
        Ok(())
    }

    /// Serves requests: makes the disk, or goes on with the one that there is.
    fn connect(&mut self) -> Result {
        let nodes = nodes::disk(&self.backend)?;
        let back = nodes::back_offer(&self.backend)?;
        let front = self.offer.ok_or(EINVAL)?;
        let features = negotiate(&front, &back);
        let limits = SlotLimits::new(features.indirect_segments);

        self.generation = self.generation.wrapping_add(1);
        let terms = Terms {
            domain: self.device.otherend_id(),
            limits,
            bounce: features.bounce,
            flush: features.flush,
            generation: self.generation,
        };
        for queue in self.queues.iter().take(self.rings) {
            queue.serve(terms)?;
        }
        match &self.disk {
            None => self.make_disk(&nodes, &features, limits)?,
            Some(disk) => self.resume_disk(disk, &nodes, &features, limits)?,
        }
        self.report(&features);
        Ok(())
    }

    fn make_disk(
        &mut self,
        nodes: &negotiate::Disk,
        features: &Features,
        slot: SlotLimits,
    ) -> Result {
        let minors =
            Minors::reserve(MAJOR, self.vdev.minor, self.vdev.minors).inspect_err(|_| {
                pr_err!(
                    "{}: another disk has minor {}\n",
                    self.name(),
                    self.vdev.minor
                );
            })?;
        let mut queues = KVec::new();
        for queue in &self.queues {
            queues.push(queue.clone(), GFP_KERNEL)?;
        }
        let tag_set = Arc::pin_init(
            TagSet::new(TagSetParams {
                nr_hw_queues: queues.len() as u32,
                queue_depth: queue_depth(&self.queues),
                timeout: 0,
                no_scheduler: false,
            }),
            GFP_KERNEL,
        )?;
        let mut limits = QueueLimits::new();
        disk::set_limits(&mut limits, nodes, features, slot);

        let disk = GenDiskBuilder::new(limits)
            .device_numbers(minors)
            .capacity(nodes.sectors)
            .read_only(nodes.read_only())
            .removable(nodes.removable())
            .build(
                fmt!("{}", self.name()),
                tag_set,
                Arc::new(Disk::new(queues, nodes.cdrom()), GFP_KERNEL)?,
            )?;
        let disk = Arc::new(disk, GFP_KERNEL)?;
        self.disk = Some(disk.clone());
        self.add_disk(disk)
    }

    /// Shows the disk to the system, in a thread that may wait for the backend.
    fn add_disk(&mut self, disk: Arc<GenDisk<Disk>>) -> Result {
        let device = self.device.clone();
        let signal = self.signal.clone();
        let name = self.vdev.name;
        let kind = Kind::default();
        let adder = KThread::spawn(fmt!("rblkfront/{}+", name.as_str()), kind, move |_| {
            let parent: &xenbus::Device = &device;
            if let Err(error) = disk.add(Some(parent.as_ref())) {
                device.dev_fatal(error, fmt!("adding disk {}", name.as_str()));
                signal.raise(Cause::Failed);
            }
            signal.settle();
        })?;
        self.adder = Some(adder);
        Ok(())
    }

    /// Goes on with a disk after an outage.
    fn resume_disk(
        &self,
        disk: &GenDisk<Disk>,
        nodes: &negotiate::Disk,
        features: &Features,
        slot: SlotLimits,
    ) -> Result {
        disk.queue_data().set_rings(self.rings as u32);
        disk.update_limits(|limits| disk::set_limits(limits, nodes, features, slot))?;
        disk.set_capacity_and_notify(nodes.sectors)?;
        disk.kick_requeue_list();
        disk.unquiesce();
        Ok(())
    }

    fn report(&self, features: &Features) {
        let flush = match features.flush {
            Flush::Cache => "flush diskcache: enabled;",
            Flush::Barrier => "barrier: enabled;",
            Flush::None => "barrier or flush: disabled;",
        };
        let enabled = |on: bool| if on { "enabled" } else { "disabled" };
        pr_info!(
            "{}: {} persistent grants: {}; indirect descriptors: {}; bounce buffer: {}\n",
            self.name(),
            flush,
            enabled(features.persistent),
            enabled(features.indirect_segments > 0),
            enabled(features.bounce)
        );
    }

    /// The disk may have another size.
    fn refresh(&self) -> Result {
        if let Some(disk) = &self.disk {
            disk.set_capacity_and_notify(nodes::sectors(&self.backend)?)?;
        }
        Ok(())
    }

    /// The backend cannot do something, though it had said so.
    fn withdraw(&self, what: &str, change: impl FnOnce(&mut QueueLimits)) {
        let Some(disk) = &self.disk else { return };
        pr_warn!("{}: the backend cannot {}, it is off\n", self.name(), what);
        if self.own != Front::Live {
            return;
        }
        disk.quiesce();
        if let Err(error) = disk.update_limits(change) {
            pr_err!(
                "{}: {} cannot be turned off: {:?}\n",
                self.name(),
                what,
                error
            );
        }
        disk.unquiesce();
    }

    /// Ends rings, event channels and grants.
    fn stop_sharing(&mut self, fate: Fate) {
        if let Some(disk) = &self.disk {
            disk.quiesce();
        }
        let lingering = &mut self.lingering;
        for queue in &self.queues {
            queue.detach(matches!(fate, Fate::Fail), |waiting| {
                settle(lingering, waiting, fate);
            });
        }
        self.rings = 0;
    }

    /// Ends everything but the disk itself, which is dead from now on.
    fn detach(&mut self) {
        if let Some(disk) = &self.disk {
            disk.mark_dead();
            self.drain();
        }
        self.stop_sharing(Fate::Fail);
        for (_, fate) in self.lingering.iter_mut() {
            *fate = Fate::Fail;
        }
        if let Some(disk) = &self.disk {
            disk.kick_requeue_list();
            disk.unquiesce();
        }
    }

    /// Waits for the answers to the last requests, for a while.
    fn drain(&self) {
        if self.own != Front::Live {
            return;
        }
        let start = Instant::<Monotonic>::now();
        while start.elapsed().as_millis() < DRAIN_MS {
            let wait = |queue: &Arc<Queue>| !queue.is_idle() && !queue.is_broken();
            if !self.queues.iter().any(wait) {
                return;
            }
            fsleep(Delta::from_millis(DRAIN_STEP_MS));
        }
        pr_warn!(
            "{}: the backend does not answer, requests fail\n",
            self.name()
        );
    }

    /// Ends requests of which the backend has let go.
    fn release(&mut self) {
        let count = self.lingering.len();
        for _ in 0..count {
            // Those that linger on go to the end.
            let Some((waiting, fate)) = take_first(&mut self.lingering) else {
                return;
            };
            settle(&mut self.lingering, waiting, fate);
        }
        if count != self.lingering.len() {
            if let Some(disk) = &self.disk {
                disk.kick_requeue_list();
            }
        }
    }

    /// Removes a disk that is dead. All its requests have ended.
    fn remove_disk(&mut self) {
        self.disk = None;
        let Some(adder) = self.adder.take() else {
            return;
        };
        // Everything that it reads fails.
        while !adder.join(msecs_to_jiffies(OUTAGE_STEP_MS)) {
            pr_warn!("{}: still looking for partitions\n", self.name());
        }
    }
}

/// What a step was for, in an error message.
fn purpose(action: FrontAction) -> &'static str {
    match action {
        FrontAction::Wait | FrontAction::Report => "waiting for the backend",
        FrontAction::Offer => "offering rings",
        FrontAction::Connect => "connecting",
        FrontAction::Refresh => "reading the size of the disk",
        FrontAction::Reset | FrontAction::Restart => "closing the connection",
        FrontAction::Detach => "closing the device",
    }
}

/// Requests that can be in flight in each hardware queue: as many as the smallest ring has slots.
fn queue_depth(queues: &[Arc<Queue>]) -> u32 {
    let depths = queues.iter().map(|queue| queue.capacity());
    depths.min().unwrap_or(0) as u32
}

/// Ends or requeues a request whose connection has ended, or keeps it while the backend uses its
/// pages.
fn settle(lingering: &mut KVVec<(Waiting, Fate)>, waiting: Waiting, fate: Fate) {
    let answer = waiting.answer();
    match (waiting.release(), answer, fate) {
        (Ok(rq), Some(status), _) => rq.end(status),
        (Ok(rq), None, Fate::Again) => rq.requeue(),
        (Ok(rq), None, Fate::Fail) => rq.end(BlkStatus::IOERR),
        (Err(waiting), _, _) => {
            // There is room. If not, the pages are never used again.
            let _ = lingering.push_within_capacity((waiting, fate));
        }
    }
}

/// Takes out any element; which one does not matter as long as all have their turn.
fn take_first<T>(list: &mut KVVec<T>) -> Option<T> {
    list.remove(0).ok()
}
