// SPDX-License-Identifier: GPL-2.0-only

//! A queue: a ring, its slots, and the way of a request to the backend.
//!
//! A request is prepared without the lock: pages are found, data is copied. Then it is started, and
//! put into the ring under the lock. The backend sees it when its batch is published, and is
//! notified once for the batch, without the lock. Small requests of a plug go through this together.

use kernel::{
    cpu::CpuId,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};

use kernel_ext::{
    base::spinlock_irqsave::{
        new_spinlock_irqsave,
        SpinLockIrqSave,
        SpinLockIrqSaveGuard, //
    },
    block::mq::{
        self,
        BlkStatus,
        InFlight,
        Op,
        Queued,
        Rejected,
        Request,
        RequestList, //
    },
    ratelimited,
    xen::{
        events::Notifier,
        grant::{
            GrantAccess,
            GrantReserve,
            Granted,
            GrantedPage, //
        },
        ring::RingPages,
        DomId, //
    },
};

use blkif::{
    negotiate::{
        DiscardLimits,
        Flush, //
    },
    plan::{
        self,
        Direction,
        Plan,
        SegmentPlacement,
        SlotLimits, //
    },
    resources::{
        is_small,
        Resources, //
    },
    vdev::DiskName,
    wire::{
        op,
        Encode,
        Status,
        DIRECT_SEGMENTS, //
    },
};

use crate::{
    disk::Disk,
    events::{
        DeviceEvents,
        Event, //
    },
    pool::{
        self,
        Pool, //
    },
    request_data::{
        InFlightRequest,
        IssuedRequest,
        RequestData,
        RequestSegments, //
    },
    ring_connection::RingConnection,
    shortage,
    slots::{
        PendingRequest,
        Slots, //
    }, //
};

/// What a connection allows. Changes only while no request is being queued.
#[derive(Clone, Copy)]
pub(crate) struct ConnectionConfig {
    /// Who may use our pages.
    pub(crate) domain: DomId,
    /// How much a slot can carry.
    pub(crate) limits: SlotLimits,
    /// Whether data is bounced.
    pub(crate) bounce: bool,
    /// Fragments of the largest request that the disk may have in flight. More than `limits` if an
    /// earlier backend took more.
    pub(crate) largest: u16,
    /// How a flush is asked for.
    pub(crate) flush: Flush,
    /// Each write is flushed before it is reported done.
    pub(crate) write_through: bool,
    /// What can be discarded.
    pub(crate) discard: Option<DiscardLimits>,
    /// Counts the connections.
    pub(crate) generation: u32,
}

impl ConnectionConfig {
    /// Returns what a request of so many fragments takes.
    #[inline]
    fn resources(&self, fragments: u32) -> Resources {
        Resources::new(self.limits, self.bounce, fragments)
    }

    /// The end of a request with which the backend has nothing to do. Such a request was made for an
    /// earlier connection, to a backend that could do more.
    fn complete_locally(&self, kind: RequestKind) -> Option<BlkStatus> {
        match kind {
            RequestKind::Transfer(_) => None,
            RequestKind::Flush => match self.flush {
                // A disk that never had a cache has nothing to flush.
                Flush::None => Some(BlkStatus::OK),
                Flush::Unavailable => Some(BlkStatus::IOERR),
                Flush::Cache | Flush::Barrier => None,
            },
            RequestKind::Discard { secure } => match self.discard {
                Some(discard) if discard.secure || !secure => None,
                // A backend might take a secure discard for an ordinary one.
                _ => Some(BlkStatus::NOTSUPP),
            },
        }
    }
}

/// What a queue is good for.
#[derive(Clone, Copy)]
pub(crate) enum QueueState {
    /// There is no connection, but one may come. The block layer is quiesced.
    Disconnected,
    /// Requests are served.
    Live(ConnectionConfig),
    /// There will never be a connection: requests fail.
    Dead,
}

/// What a request asks the backend for.
#[derive(Clone, Copy)]
pub(crate) enum RequestKind {
    /// Move the data.
    Transfer(Direction),
    /// Flush.
    Flush,
    /// Forget the content of the sectors.
    Discard {
        /// And make sure that nobody can read it any more.
        secure: bool,
    },
}

/// What the lock of a queue protects.
pub(crate) struct Inner {
    pub(crate) state: QueueState,
    pub(crate) connection: Option<RingConnection>,
    pub(crate) slots: Slots,
    /// Completed requests of which the backend still uses pages.
    pub(crate) still_granted: KVVec<PendingRequest>,
    pub(crate) pool: Pool,
    /// The backend broke the rules: its answers are not looked at any more.
    pub(crate) broken: bool,
    /// Flushes of what was written were put into the ring, and not published.
    flushes: bool,
    /// Of the last connection, until the backend has let go of it.
    stale: Option<StaleGrants>,
}

/// What a backend may have mapped of a connection that has ended: the ring, and the pages of the pool
/// and of the requests that were in flight.
///
/// A page that is given up while it is mapped over there is freed later by the kernel, which looks
/// after ten such pages a second. A backend that never unmaps could have the memory of one connection
/// after the other. So a queue has the remains of one connection at most, and there is no other one
/// before they are free.
struct StaleGrants {
    ring: RingPages,
    pool: Pool,
}

/// A ring with its slots.
#[pin_data]
pub(crate) struct Queue {
    /// Of the disk.
    pub(crate) name: DiskName,
    index: u16,
    /// The number of the device, which every request repeats.
    handle: u16,
    pub(crate) events: Arc<DeviceEvents>,
    #[pin]
    pub(crate) inner: SpinLockIrqSave<Inner>,
}

/// What a look for spare pages has found.
#[derive(Clone, Copy, Default)]
pub(crate) struct PoolTrim {
    /// Some were given back.
    pub(crate) freed: bool,
    /// There are still more than at the start.
    pub(crate) grown: bool,
}

impl PoolTrim {
    /// What was found in two places.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            freed: self.freed || other.freed,
            grown: self.grown || other.grown,
        }
    }
}

/// Returns `true` if data is written.
fn is_write(kind: RequestKind) -> bool {
    matches!(kind, RequestKind::Transfer(Direction::Write))
}

/// What a request asks for, if it moves data.
#[inline]
fn direction<S: mq::State>(rq: &Request<Disk, S>) -> Option<Direction> {
    match rq.op() {
        Op::Read => Some(Direction::Read),
        Op::Write => Some(Direction::Write),
        Op::Flush | Op::Discard | Op::SecureErase | Op::WriteZeroes | Op::Other(_) => None,
    }
}

/// What becomes of a request that wants to be put into the ring.
enum Reservation {
    /// There are slots for it.
    Reserved(ConnectionConfig, Resources),
    /// There are no slots now.
    Busy,
    /// The request ends like this.
    Ended(BlkStatus),
}

impl Inner {
    /// Shows the backend what was put into the ring. What is to be rung, without the lock, if it
    /// wants to know.
    fn publish(&mut self) -> Option<Notifier> {
        let connection = self.connection.as_mut()?;
        connection.ring.publish().then_some(connection.notifier)
    }

    /// Shows the backend flushes that were put while answers were taken. Returns what
    /// [`Self::publish`] returns.
    pub(crate) fn publish_flushes(&mut self) -> Option<Notifier> {
        if !core::mem::take(&mut self.flushes) {
            return None;
        }
        self.publish()
    }

    /// Promises slots, and takes pages out of the pool as far as there are any. `false`: there are no
    /// slots now.
    #[inline(always)]
    fn reserve(
        &mut self,
        config: &ConnectionConfig,
        data: &mut RequestData,
        resources: &Resources,
    ) -> bool {
        if !self.slots.reserve(resources.slots) {
            return false;
        }
        if data.generation != config.generation {
            // Pages of a request that was kept when its connection ended: they are granted to that
            // connection's backend, and after a restore to nobody.
            data.bounce_pages.clear();
            data.indirect_pages.clear();
            data.generation = config.generation;
        }
        self.pool.fill(&mut data.bounce_pages, resources.data);
        self.pool.fill(&mut data.indirect_pages, resources.indirect);
        true
    }

    /// Returns `true` if there is a connection, and the domain was not restored since it was made.
    pub(crate) fn is_open(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(RingConnection::is_open)
    }

    /// Takes out a request that waits for answers, or for its pages. Pages that its connection's
    /// backend may have mapped stay here.
    fn take_pending(&mut self) -> Option<PendingRequest> {
        let mut pending = self
            .still_granted
            .pop()
            .or_else(|| self.slots.take_pending())?;
        self.return_stale(&mut pending.issued.data_mut().indirect_pages);
        if let IssuedRequest::Bounced(rq) = &mut pending.issued {
            self.return_stale(&mut rq.data_mut().bounce_pages);
        }
        Some(pending)
    }

    /// Takes back pages of a connection that has ended.
    pub(crate) fn return_stale(&mut self, pages: &mut KVec<GrantedPage>) {
        match &mut self.stale {
            Some(stale) => stale.pool.put(pages),
            None => pages.clear(),
        }
    }
}

impl Queue {
    pub(crate) fn new(
        name: DiskName,
        index: u16,
        handle: u16,
        events: Arc<DeviceEvents>,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                name,
                index,
                handle,
                events,
                inner <- new_spinlock_irqsave!(Inner {
                    state: QueueState::Disconnected,
                    connection: None,
                    slots: Slots::empty(),
                    still_granted: KVVec::new(),
                    pool: Pool::empty(),
                    broken: false,
                    flushes: false,
                    stale: None,
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Has a ring from now on, which nobody serves yet. The queue has no requests. Sleeps.
    pub(crate) fn attach(&self, connection: RingConnection) -> Result {
        let epoch = self.inner.lock().slots.epoch();
        let capacity = connection.ring.capacity();
        let slots = Slots::new(capacity as u16, epoch)?;
        let still_granted = KVVec::with_capacity(capacity as usize, GFP_KERNEL)?;

        // What was there before is freed without the lock.
        let _old = {
            let mut inner = self.inner.lock();
            inner.broken = false;
            (
                core::mem::replace(&mut inner.slots, slots),
                core::mem::replace(&mut inner.still_granted, still_granted),
                inner.connection.replace(connection),
            )
        };
        Ok(())
    }

    /// Serves requests from now on. Sleeps.
    pub(crate) fn serve(&self, config: ConnectionConfig) -> Result {
        let largest = config.resources(config.largest.into());
        let first = largest.pages();
        let capacity = self.inner.lock().slots.capacity();
        let pool = Pool::new(config.domain, first, first.saturating_mul(capacity))?;

        let _old = {
            let mut inner = self.inner.lock();
            inner.state = QueueState::Live(config);
            core::mem::replace(&mut inner.pool, pool)
        };
        Ok(())
    }

    /// Serves no requests from now on, for a while or for ever. No request is being queued.
    ///
    /// Ends the event channel, and what waits for answers goes to `dispose`. The ring and the pages of
    /// the pool stay granted until [`Self::free_stale_grants`]. Sleeps.
    pub(crate) fn detach(&self, dead: bool, mut dispose: impl FnMut(PendingRequest)) {
        let connection = {
            let mut inner = self.inner.lock();
            inner.state = if dead {
                QueueState::Dead
            } else {
                QueueState::Disconnected
            };
            inner.connection.take()
        };
        if let Some(connection) = connection {
            // Waits for the event handler, which finds no ring any more.
            self.stash_stale(connection.disconnect());
        }
        loop {
            // On its own, so that the lock is not issued while the request ends.
            let Some(pending) = self.inner.lock().take_pending() else {
                break;
            };
            dispose(pending);
        }
    }

    /// Keeps what the backend has mapped of a connection.
    fn stash_stale(&self, ring: RingPages) {
        let _old = {
            let mut inner = self.inner.lock();
            let pool = core::mem::replace(&mut inner.pool, Pool::empty());
            inner.stale.replace(StaleGrants { ring, pool })
        };
    }

    /// Frees what the backend does not use any more of the last connection. Returns `true` if nothing
    /// is left. Sleeps.
    pub(crate) fn end_stale_grants(&self) -> bool {
        self.end_stale_pages() && self.end_stale_ring()
    }

    /// Frees the pages of the pool, up to those that the backend uses.
    fn end_stale_pages(&self) -> bool {
        loop {
            let pages = match &mut self.inner.lock().stale {
                Some(stale) => stale.pool.take_batch(),
                None => return true,
            };
            let (mut freed, mut used) = (false, false);
            for page in pages.into_iter().flatten() {
                match page.try_end() {
                    Ok(_page) => freed = true,
                    Err(page) => {
                        used = true;
                        if let Some(stale) = &mut self.inner.lock().stale {
                            stale.pool.put_back(page);
                        }
                    }
                }
            }
            if used || !freed {
                return !used;
            }
        }
    }

    fn end_stale_ring(&self) -> bool {
        let ended = {
            let mut inner = self.inner.lock();
            let mut stale = inner.stale.as_mut();
            if stale.as_mut().is_some_and(|stale| !stale.ring.try_end()) {
                return false;
            }
            inner.stale.take()
        };
        drop(ended);
        true
    }

    /// Gives up what the backend has had mapped of the last connection. The kernel frees it when the
    /// backend does not use it any more. Sleeps.
    pub(crate) fn free_stale_grants(&self) {
        let stale = self.inner.lock().stale.take();
        drop(stale);
    }

    /// Whether the backend may have mapped something of a connection that has ended.
    pub(crate) fn has_stale_grants(&self) -> bool {
        self.inner.lock().stale.is_some()
    }

    /// Gives back pages that nobody has needed since the last time, as far as the backend does not
    /// have them mapped.
    pub(crate) fn trim_pool(&self) -> PoolTrim {
        let mut freed = false;
        loop {
            let pages = self.inner.lock().pool.take_idle();
            let mut some = false;
            for page in pages.into_iter().flatten() {
                match page.try_end() {
                    Ok(_page) => some = true,
                    Err(page) => self.inner.lock().pool.put_back(page),
                }
            }
            freed |= some;
            if !some {
                break;
            }
        }
        let grown = self.inner.lock().pool.restart_watermark();
        PoolTrim { freed, grown }
    }

    /// Gives back pages that no request uses at the moment, as far as the backend does not have them
    /// mapped.
    pub(crate) fn trim_unused(&self) {
        self.inner.lock().pool.restart_watermark();
        self.trim_pool();
    }

    /// Has the backend's events come to one CPU, if that is possible. Sleeps.
    pub(crate) fn set_event_cpu(&self, cpu: CpuId) {
        let channel =
            (self.inner.lock().connection.as_ref()).map(|connection| connection.channel.clone());
        if let Some(channel) = channel {
            let _ = channel.set_affinity(cpu);
        }
    }

    /// How many slots the ring has.
    pub(crate) fn capacity(&self) -> usize {
        self.inner.lock().slots.capacity()
    }

    /// Whether no request waits for an answer.
    pub(crate) fn is_idle(&self) -> bool {
        self.inner.lock().slots.is_idle()
    }

    /// Returns how many slots the backend has answered. Wraps around.
    pub(crate) fn responses(&self) -> u32 {
        self.inner.lock().slots.responses()
    }

    /// Whether the backend broke the rules.
    pub(crate) fn is_broken(&self) -> bool {
        self.inner.lock().broken
    }

    /// Takes a request: puts it into the ring, ends it, or has it offered again later.
    pub(crate) fn submit<'q>(
        &self,
        rq: Request<Disk, Queued<'q>>,
        kind: RequestKind,
        last: bool,
    ) -> Result<(), Rejected<'q, Disk>> {
        let result = self.accept(rq, kind, last);
        // What was put into the ring was shown at once, with all before it.
        if last && !matches!(result, Ok(true)) {
            self.commit();
        }
        result.map(|_put| ())
    }

    /// Takes requests of a plug together, and shows them to the backend at once. Gives back those that
    /// are to be taken one by one: all that are not small and bounced, or cannot be taken now.
    pub(crate) fn submit_all<'q>(
        &self,
        mut requests: RequestList<Disk, Queued<'q>>,
    ) -> RequestList<Disk, Queued<'q>> {
        let mut left = RequestList::new();
        let mut small = RequestList::new();
        while let Some(mut rq) = requests.pop() {
            if collect_small(&mut rq) {
                small.push(rq);
            } else {
                left.push(rq);
            }
        }
        let Some((config, reserved)) = self.reserve_all(small, &mut left) else {
            return left;
        };
        let started = self.start_all(&config, reserved, &mut left);
        self.put_all(&config, started);
        left
    }

    /// Promises what the requests need, with one look at the lock.
    fn reserve_all<'q>(
        &self,
        mut requests: RequestList<Disk, Queued<'q>>,
        left: &mut RequestList<Disk, Queued<'q>>,
    ) -> Option<(ConnectionConfig, RequestList<Disk, Queued<'q>>)> {
        let mut reserved = RequestList::new();
        let mut inner = self.inner.lock();
        let config = match inner.state {
            QueueState::Live(config) if config.bounce => config,
            _ => {
                left.append(requests);
                return None;
            }
        };
        while let Some(mut rq) = requests.pop() {
            let data = rq.data_mut();
            let resources = config.resources(data.fragments.len() as u32);
            if inner.reserve(&config, data, &resources) {
                reserved.push(rq);
            } else {
                left.push(rq);
            }
        }
        Some((config, reserved))
    }

    /// Prepares and starts requests.
    fn start_all<'q>(
        &self,
        config: &ConnectionConfig,
        mut requests: RequestList<Disk, Queued<'q>>,
        left: &mut RequestList<Disk, Queued<'q>>,
    ) -> RequestList<Disk, InFlight> {
        let mut started = RequestList::new();
        while let Some(mut rq) = requests.pop() {
            let resources = config.resources(rq.data().fragments.len() as u32);
            if self.prepare_pages(&mut rq, config, resources).is_ok() {
                started.push(rq.start());
            } else {
                self.cancel_reservation(rq.data_mut(), resources);
                left.push(rq);
            }
        }
        started
    }

    /// Puts requests into the slots that were promised to them, and shows them to the backend.
    fn put_all(&self, config: &ConnectionConfig, mut requests: RequestList<Disk, InFlight>) {
        if requests.is_empty() {
            return;
        }
        let mut inner = self.inner.lock();
        while let Some(rq) = requests.pop() {
            let resources = config.resources(rq.data().fragments.len() as u32);
            let Some(direction) = direction(&rq) else {
                // Others are not small.
                continue;
            };
            let kind = RequestKind::Transfer(direction);
            if let Err(pending) = self.write_to_ring(
                &mut inner,
                IssuedRequest::Bounced(rq),
                kind,
                config,
                resources,
            ) {
                self.mark_broken(inner, pending);
                return;
            }
        }
        let notifier = inner.publish();
        drop(inner);
        if let Some(notifier) = notifier {
            notifier.notify();
        }
    }

    /// Shows the backend what was put into the ring, and notifies it if it wants that.
    pub(crate) fn commit(&self) {
        let notifier = self.inner.lock().publish();
        if let Some(notifier) = notifier {
            notifier.notify();
        }
    }

    /// Takes a request; the last one of a batch is shown to the backend with the batch. Whether it
    /// was put into the ring.
    fn accept<'q>(
        &self,
        mut rq: Request<Disk, Queued<'q>>,
        kind: RequestKind,
        last: bool,
    ) -> Result<bool, Rejected<'q, Disk>> {
        let (segments, data) = rq.segments_and_data();
        let Some(fragments) = data.collect_fragments(segments) else {
            ratelimited!(pr_err!(
                "a request is not made of whole sectors, or too large\n"
            ));
            rq.end(BlkStatus::IOERR);
            return Ok(false);
        };

        let (config, resources) = match self.reserve(rq.data_mut(), kind, fragments) {
            Reservation::Reserved(config, resources) => (config, resources),
            Reservation::Busy => return Err(rq.reject()),
            Reservation::Ended(status) => {
                rq.end(status);
                return Ok(false);
            }
        };
        let Ok(reserve) = self.prepare(&mut rq, &config, resources) else {
            self.cancel_reservation(rq.data_mut(), resources);
            return Err(rq.reject());
        };

        match grant_request(rq.start(), &config, resources, reserve) {
            Ok(issued) => {
                RequestSegments::new(&issued).fill(fragments, config.limits);
                self.put(issued, kind, &config, resources, last);
                Ok(true)
            }
            Err(mut rq) => {
                self.cancel_reservation(rq.data_mut(), resources);
                rq.end(BlkStatus::RESOURCE);
                Ok(false)
            }
        }
    }

    /// Gets what the pool did not have, reserves grants, and copies the data of a write that is
    /// bounced.
    fn prepare<S: mq::State>(
        &self,
        rq: &mut Request<Disk, S>,
        config: &ConnectionConfig,
        resources: Resources,
    ) -> Result<GrantReserve> {
        if resources.grants != 0 && shortage::is_active() && self.has_requests() {
            return Err(ENOSPC);
        }
        let reserve = GrantReserve::new(resources.grants)?;
        self.prepare_pages(rq, config, resources)?;
        Ok(reserve)
    }

    /// Returns `true` if the backend has requests to answer.
    #[cold]
    fn has_requests(&self) -> bool {
        let inner = self.inner.lock();
        (inner.connection.as_ref()).is_some_and(|connection| connection.ring.in_flight() != 0)
    }

    /// Gets pages that the pool did not have, and copies the data of a write that is bounced.
    #[inline(always)]
    fn prepare_pages<S: mq::State>(
        &self,
        rq: &mut Request<Disk, S>,
        config: &ConnectionConfig,
        resources: Resources,
    ) -> Result {
        let data = rq.data_mut();
        if data.bounce_pages.len() < resources.data
            || data.indirect_pages.len() < resources.indirect
        {
            self.events.set(Event::PoolGrown);
            pool::grow(config.domain, &mut data.bounce_pages, resources.data)?;
            pool::grow(config.domain, &mut data.indirect_pages, resources.indirect)?;
        }
        if config.bounce && rq.op() == Op::Write {
            for (segment, page) in rq.segments().zip(&rq.data().bounce_pages) {
                if let Some(copy) = page.slice_mut(segment.offset(), segment.len()) {
                    copy.copy_from(segment);
                }
            }
        }
        Ok(())
    }

    /// Promises slots, and takes pages out of the pool as far as there are any.
    fn reserve(&self, data: &mut RequestData, kind: RequestKind, fragments: u32) -> Reservation {
        let mut inner = self.inner.lock();
        let config = match inner.state {
            QueueState::Live(config) => config,
            QueueState::Disconnected => return Reservation::Busy,
            // There is no backend, and there will be none.
            QueueState::Dead => return Reservation::Ended(BlkStatus::IOERR),
        };
        if let Some(status) = config.complete_locally(kind) {
            return Reservation::Ended(status);
        }
        let resources = config.resources(fragments);
        if inner.reserve(&config, data, &resources) {
            return Reservation::Reserved(config, resources);
        }
        if resources.slots <= inner.slots.capacity() {
            return Reservation::Busy;
        }
        ratelimited!(pr_err!(
            "{}: a request of {} slots does not fit into a ring of {}\n",
            self.name.as_str(),
            resources.slots,
            inner.slots.capacity()
        ));
        Reservation::Ended(BlkStatus::IOERR)
    }

    /// Takes back what was promised to a request that is not put into the ring.
    fn cancel_reservation(&self, data: &mut RequestData, resources: Resources) {
        let mut inner = self.inner.lock();
        inner.slots.unreserve(resources.slots);
        inner.pool.put(&mut data.bounce_pages);
        inner.pool.put(&mut data.indirect_pages);
    }

    /// Puts a request into the slots that were promised to it, and shows it to the backend if it is
    /// the last one of a batch.
    fn put(
        &self,
        issued: IssuedRequest,
        kind: RequestKind,
        config: &ConnectionConfig,
        resources: Resources,
        last: bool,
    ) {
        let mut inner = self.inner.lock();
        if let Err(pending) = self.write_to_ring(&mut inner, issued, kind, config, resources) {
            self.mark_broken(inner, pending);
            return;
        }
        let notifier = if last { inner.publish() } else { None };
        drop(inner);
        if let Some(notifier) = notifier {
            notifier.notify();
        }
    }

    /// Puts a request into the slots that were promised to it, and keeps it there.
    ///
    /// Inlined, so that only those parts of `issued` are moved that there are.
    #[inline(always)]
    fn write_to_ring(
        &self,
        inner: &mut Inner,
        issued: IssuedRequest,
        kind: RequestKind,
        config: &ConnectionConfig,
        resources: Resources,
    ) -> Result<(), PendingRequest> {
        inner.slots.unreserve(resources.slots);
        let lists = RequestSegments::new(&issued);
        let (first, parts) = match kind {
            RequestKind::Transfer(direction) if is_small(resources.fragments) => self
                .put_single(inner, |id| {
                    plan::direct(direction, self.handle, id, lists.sector(), lists.all())
                }),
            _ => self.put_other(inner, &lists, kind, config, resources),
        };
        let mut pending = PendingRequest::new(issued, parts);
        if config.write_through {
            pending.flush = is_write(kind).then_some(config.flush);
        }
        inner.slots.store(first, pending)
    }

    /// Puts a request that is no small transfer; gives the first slot and how many there are.
    #[inline(never)]
    fn put_other(
        &self,
        inner: &mut Inner,
        lists: &RequestSegments<'_>,
        kind: RequestKind,
        config: &ConnectionConfig,
        resources: Resources,
    ) -> (Option<u16>, u16) {
        match kind {
            RequestKind::Transfer(direction) => {
                self.put_parts(inner, lists, direction, config, resources)
            }
            RequestKind::Flush => self.put_flush(inner, config.flush),
            RequestKind::Discard { secure } => self.put_single(inner, |id| {
                plan::discard(self.handle, id, lists.sector(), lists.sectors(), secure)
            }),
        }
    }

    /// Puts a flush.
    fn put_flush(&self, inner: &mut Inner, flush: Flush) -> (Option<u16>, u16) {
        let operation = flush.operation().unwrap_or(op::FLUSH_DISKCACHE);
        self.put_single(inner, |id| plan::flush(operation, self.handle, id))
    }

    /// Flushes what a request has written, which ends when that is answered. It comes back if there
    /// is nothing to flush.
    #[cold]
    pub(crate) fn flush_written(
        &self,
        inner: &mut Inner,
        mut pending: PendingRequest,
    ) -> Option<PendingRequest> {
        let flush = pending.flush.take()?;
        if pending.status != Status::Okay {
            return Some(pending);
        }
        let (first, parts) = self.put_flush(inner, flush);
        pending.missing = parts;
        inner.flushes = true;
        // The slots of the write have just become free.
        inner
            .slots
            .store(first, pending)
            .err()
            .map(PendingRequest::failed)
    }

    /// Something is in the ring of which we know nothing, though slots were reserved, so that this
    /// cannot be: gives the ring up.
    fn mark_broken(&self, mut inner: SpinLockIrqSaveGuard<'_, Inner>, pending: PendingRequest) {
        inner.broken = true;
        drop(inner);
        self.events.set(Event::Failed);
        drop(pending);
    }

    /// Puts the parts of a transfer; gives the first slot and how many there are.
    fn put_parts(
        &self,
        inner: &mut Inner,
        lists: &RequestSegments<'_>,
        direction: Direction,
        config: &ConnectionConfig,
        resources: Resources,
    ) -> (Option<u16>, u16) {
        let sector = lists.sector();
        let Some(plan) = Plan::new(
            sector,
            lists.fragments(),
            resources.fragments,
            config.limits,
        ) else {
            return (None, 0);
        };
        let mut first = None;
        let mut parts = 0u16;
        for part in plan {
            let number = match part.placement {
                SegmentPlacement::Direct => self.put_slot(inner, first, part.index, |id| {
                    part.direct(direction, self.handle, id, lists.segments(&part))
                }),
                SegmentPlacement::Indirect(_) => self.put_slot(inner, first, part.index, |id| {
                    part.indirect(
                        direction,
                        self.handle,
                        id,
                        lists.pages(&part, config.limits),
                    )
                }),
            };
            if number.is_none() {
                return (None, 0);
            }
            first = first.or(number);
            parts = parts.wrapping_add(1);
        }
        (first, parts)
    }

    /// Puts a request of one slot.
    #[inline(always)]
    fn put_single<R: Encode>(
        &self,
        inner: &mut Inner,
        make: impl FnOnce(u64) -> R,
    ) -> (Option<u16>, u16) {
        (self.put_slot(inner, None, 0, make), 1)
    }

    /// Puts one slot, and gives its number.
    #[inline(always)]
    fn put_slot<R: Encode>(
        &self,
        inner: &mut Inner,
        first: Option<u16>,
        part: u16,
        make: impl FnOnce(u64) -> R,
    ) -> Option<u16> {
        let ring = &mut inner.connection.as_mut()?.ring;
        let slot_id = inner.slots.alloc_slot(first, self.index, part)?;
        let request = make(slot_id.id.to_wire());
        let operation = request.response_operation();
        ring.put(request).ok()?;
        inner.slots.expect_response(&slot_id, operation);
        Some(slot_id.number)
    }
}

/// Notes the data of a request, if it has some and is small.
#[inline]
fn collect_small(rq: &mut Request<Disk, Queued<'_>>) -> bool {
    // A fragment is a page at most, so this needs no walk over the data.
    if rq.bytes() as usize > DIRECT_SEGMENTS * PAGE_SIZE {
        return false;
    }
    let (segments, data) = rq.segments_and_data();
    let fragments = data.collect_fragments(segments);
    // What has no data has no fragments.
    fragments.is_some_and(|fragments| fragments != 0 && is_small(fragments))
}

/// Lets the backend use the data of a request that was started.
fn grant_request(
    mut rq: InFlightRequest,
    config: &ConnectionConfig,
    resources: Resources,
    mut reserve: GrantReserve,
) -> Result<IssuedRequest, InFlightRequest> {
    if resources.grants == 0 {
        return Ok(IssuedRequest::Bounced(rq));
    }
    let data = rq.data_mut();
    let references = core::mem::take(&mut data.references);
    // What the backend may only read is read-only all the same.
    match Granted::new(
        rq,
        GrantAccess::ReadWrite,
        config.domain,
        &mut reserve,
        references,
    ) {
        Ok(granted) => Ok(IssuedRequest::Direct(granted)),
        Err((_, mut rq, references)) => {
            rq.data_mut().references = references;
            Err(rq)
        }
    }
}
