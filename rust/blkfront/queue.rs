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
    carry::{
        Carry,
        Held,
        Lists,
        Started, //
    },
    disk::Disk,
    link::Link,
    pool::{
        self,
        Pool, //
    },
    shortage,
    signal::{
        Cause,
        Signal, //
    },
    slots::{
        Slots,
        Waiting, //
    }, //
};

/// What a connection allows. Changes only while no request is being queued.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
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

impl Terms {
    /// Returns what a request of so many fragments takes.
    #[inline]
    fn resources(&self, fragments: u32) -> Resources {
        Resources::new(self.limits, self.bounce, fragments)
    }

    /// The end of a request with which the backend has nothing to do. Such a request was made for an
    /// earlier connection, to a backend that could do more.
    fn own_answer(&self, order: Order) -> Option<BlkStatus> {
        match order {
            Order::Transfer(_) => None,
            Order::Flush => match self.flush {
                // A disk that never had a cache has nothing to flush.
                Flush::None => Some(BlkStatus::OK),
                Flush::Unavailable => Some(BlkStatus::IOERR),
                Flush::Cache | Flush::Barrier => None,
            },
            Order::Discard { secure } => match self.discard {
                Some(discard) if discard.secure || !secure => None,
                // A backend might take a secure discard for an ordinary one.
                _ => Some(BlkStatus::NOTSUPP),
            },
        }
    }
}

/// What a queue is good for.
#[derive(Clone, Copy)]
pub(crate) enum State {
    /// There is no connection, but one may come. The block layer is quiesced.
    Away,
    /// Requests are served.
    Live(Terms),
    /// There will never be a connection: requests fail.
    Dead,
}

/// What a request asks the backend for.
#[derive(Clone, Copy)]
pub(crate) enum Order {
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
    pub(crate) state: State,
    pub(crate) link: Option<Link>,
    pub(crate) slots: Slots,
    /// Requests that are answered, but of which the backend still uses pages.
    pub(crate) answered: KVVec<Waiting>,
    pub(crate) pool: Pool,
    /// The backend broke the rules: its answers are not looked at any more.
    pub(crate) broken: bool,
    /// Flushes of what was written were put into the ring, and not published.
    flushes: bool,
    /// Of the last connection, until the backend has let go of it.
    remains: Option<Remains>,
}

/// What a backend may have mapped of a connection that has ended: the ring, and the pages of the pool
/// and of the requests that were in flight.
///
/// A page that is given up while it is mapped over there is freed later by the kernel, which looks
/// after ten such pages a second. A backend that never unmaps could have the memory of one connection
/// after the other. So a queue has the remains of one connection at most, and there is no other one
/// before they are free.
struct Remains {
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
    pub(crate) signal: Arc<Signal>,
    #[pin]
    pub(crate) inner: SpinLockIrqSave<Inner>,
}

/// What a look for spare pages has found.
#[derive(Clone, Copy, Default)]
pub(crate) struct Spare {
    /// Some were given back.
    pub(crate) freed: bool,
    /// There are still more than at the start.
    pub(crate) grown: bool,
}

impl Spare {
    /// What was found in two places.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            freed: self.freed || other.freed,
            grown: self.grown || other.grown,
        }
    }
}

/// Returns `true` if data is written.
fn is_write(order: Order) -> bool {
    matches!(order, Order::Transfer(Direction::Write))
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
enum Promise {
    /// There are slots for it.
    Given(Terms, Resources),
    /// There are no slots now.
    Later,
    /// The request ends like this.
    Ended(BlkStatus),
}

impl Inner {
    /// Shows the backend what was put into the ring. What is to be rung, without the lock, if it
    /// wants to know.
    fn publish(&mut self) -> Option<Notifier> {
        let link = self.link.as_mut()?;
        link.ring.publish().then_some(link.notifier)
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
    fn promise(&mut self, terms: &Terms, carry: &mut Carry, needs: &Resources) -> bool {
        if !self.slots.promise(needs.slots) {
            return false;
        }
        if carry.generation != terms.generation {
            // Pages of a request that was kept when its connection ended: they are granted to that
            // connection's backend, and after a restore to nobody.
            carry.data.clear();
            carry.indirect.clear();
            carry.generation = terms.generation;
        }
        self.pool.take(&mut carry.data, needs.data);
        self.pool.take(&mut carry.indirect, needs.indirect);
        true
    }

    /// Returns `true` if there is a connection, and the domain was not restored since it was made.
    pub(crate) fn is_open(&self) -> bool {
        self.link.as_ref().is_some_and(Link::is_open)
    }

    /// Takes out a request that waits for answers, or for its pages. Pages that its connection's
    /// backend may have mapped stay here.
    fn evict(&mut self) -> Option<Waiting> {
        let mut waiting = self.answered.pop().or_else(|| self.slots.evict())?;
        self.give_back_late(&mut waiting.held.carry_mut().indirect);
        if let Held::Bounced(rq) = &mut waiting.held {
            self.give_back_late(&mut rq.data_mut().data);
        }
        Some(waiting)
    }

    /// Takes back pages of a connection that has ended.
    pub(crate) fn give_back_late(&mut self, pages: &mut KVec<GrantedPage>) {
        match &mut self.remains {
            Some(remains) => remains.pool.give(pages),
            None => pages.clear(),
        }
    }
}

impl Queue {
    pub(crate) fn new(
        name: DiskName,
        index: u16,
        handle: u16,
        signal: Arc<Signal>,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                name,
                index,
                handle,
                signal,
                inner <- new_spinlock_irqsave!(Inner {
                    state: State::Away,
                    link: None,
                    slots: Slots::empty(),
                    answered: KVVec::new(),
                    pool: Pool::empty(),
                    broken: false,
                    flushes: false,
                    remains: None,
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Has a ring from now on, which nobody serves yet. The queue has no requests. Sleeps.
    pub(crate) fn attach(&self, link: Link) -> Result {
        let epoch = self.inner.lock().slots.epoch();
        let capacity = link.ring.capacity();
        let slots = Slots::new(capacity as u16, epoch)?;
        let answered = KVVec::with_capacity(capacity as usize, GFP_KERNEL)?;

        // What was there before is freed without the lock.
        let _old = {
            let mut inner = self.inner.lock();
            inner.broken = false;
            (
                core::mem::replace(&mut inner.slots, slots),
                core::mem::replace(&mut inner.answered, answered),
                inner.link.replace(link),
            )
        };
        Ok(())
    }

    /// Serves requests from now on. Sleeps.
    pub(crate) fn serve(&self, terms: Terms) -> Result {
        let largest = terms.resources(terms.largest.into());
        let first = largest.pages();
        let capacity = self.inner.lock().slots.capacity();
        let pool = Pool::new(terms.domain, first, first.saturating_mul(capacity))?;

        let _old = {
            let mut inner = self.inner.lock();
            inner.state = State::Live(terms);
            core::mem::replace(&mut inner.pool, pool)
        };
        Ok(())
    }

    /// Serves no requests from now on, for a while or for ever. No request is being queued.
    ///
    /// Ends the event channel, and what waits for answers goes to `evicted`. The ring and the pages of
    /// the pool stay granted until [`Self::bury`]. Sleeps.
    pub(crate) fn detach(&self, dead: bool, mut evicted: impl FnMut(Waiting)) {
        let link = {
            let mut inner = self.inner.lock();
            inner.state = if dead { State::Dead } else { State::Away };
            inner.link.take()
        };
        if let Some(link) = link {
            // Waits for the event handler, which finds no ring any more.
            self.keep_remains(link.disconnect());
        }
        loop {
            // On its own, so that the lock is not held while the request ends.
            let Some(waiting) = self.inner.lock().evict() else {
                break;
            };
            evicted(waiting);
        }
    }

    /// Keeps what the backend has mapped of a connection.
    fn keep_remains(&self, ring: RingPages) {
        let _old = {
            let mut inner = self.inner.lock();
            let pool = core::mem::replace(&mut inner.pool, Pool::empty());
            inner.remains.replace(Remains { ring, pool })
        };
    }

    /// Frees what the backend does not use any more of the last connection. Returns `true` if nothing
    /// is left. Sleeps.
    pub(crate) fn reclaim(&self) -> bool {
        self.reclaim_pages() && self.reclaim_ring()
    }

    /// Frees the pages of the pool, up to those that the backend uses.
    fn reclaim_pages(&self) -> bool {
        loop {
            let pages = match &mut self.inner.lock().remains {
                Some(remains) => remains.pool.take_some(),
                None => return true,
            };
            let (mut freed, mut used) = (false, false);
            for page in pages.into_iter().flatten() {
                match page.try_end() {
                    Ok(_page) => freed = true,
                    Err(page) => {
                        used = true;
                        if let Some(remains) = &mut self.inner.lock().remains {
                            remains.pool.keep(page);
                        }
                    }
                }
            }
            if used || !freed {
                return !used;
            }
        }
    }

    fn reclaim_ring(&self) -> bool {
        let ended = {
            let mut inner = self.inner.lock();
            let mut remains = inner.remains.as_mut();
            if remains
                .as_mut()
                .is_some_and(|remains| !remains.ring.try_end())
            {
                return false;
            }
            inner.remains.take()
        };
        drop(ended);
        true
    }

    /// Gives up what the backend has had mapped of the last connection. The kernel frees it when the
    /// backend does not use it any more. Sleeps.
    pub(crate) fn bury(&self) {
        let remains = self.inner.lock().remains.take();
        drop(remains);
    }

    /// Whether the backend may have mapped something of a connection that has ended.
    pub(crate) fn has_remains(&self) -> bool {
        self.inner.lock().remains.is_some()
    }

    /// Gives back pages that nobody has needed since the last time, as far as the backend does not
    /// have them mapped.
    pub(crate) fn give_back_spare(&self) -> Spare {
        let mut freed = false;
        loop {
            let pages = self.inner.lock().pool.take_spare();
            let mut some = false;
            for page in pages.into_iter().flatten() {
                match page.try_end() {
                    Ok(_page) => some = true,
                    Err(page) => self.inner.lock().pool.keep(page),
                }
            }
            freed |= some;
            if !some {
                break;
            }
        }
        let grown = self.inner.lock().pool.watch();
        Spare { freed, grown }
    }

    /// Gives back pages that no request uses at the moment, as far as the backend does not have them
    /// mapped.
    pub(crate) fn give_back_unused(&self) {
        self.inner.lock().pool.watch();
        self.give_back_spare();
    }

    /// Has the backend's events come to one CPU, if that is possible. Sleeps.
    pub(crate) fn set_event_cpu(&self, cpu: CpuId) {
        let channel = (self.inner.lock().link.as_ref()).map(|link| link.channel.clone());
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
    pub(crate) fn answered(&self) -> u32 {
        self.inner.lock().slots.answered()
    }

    /// Whether the backend broke the rules.
    pub(crate) fn is_broken(&self) -> bool {
        self.inner.lock().broken
    }

    /// Takes a request: puts it into the ring, ends it, or has it offered again later.
    pub(crate) fn submit<'q>(
        &self,
        rq: Request<Disk, Queued<'q>>,
        order: Order,
        last: bool,
    ) -> Result<(), Rejected<'q, Disk>> {
        let result = self.accept(rq, order, last);
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
            if note_small(&mut rq) {
                small.push(rq);
            } else {
                left.push(rq);
            }
        }
        let Some((terms, promised)) = self.promise_all(small, &mut left) else {
            return left;
        };
        let started = self.start_all(&terms, promised, &mut left);
        self.put_all(&terms, started);
        left
    }

    /// Promises what the requests need, with one look at the lock.
    fn promise_all<'q>(
        &self,
        mut requests: RequestList<Disk, Queued<'q>>,
        left: &mut RequestList<Disk, Queued<'q>>,
    ) -> Option<(Terms, RequestList<Disk, Queued<'q>>)> {
        let mut promised = RequestList::new();
        let mut inner = self.inner.lock();
        let terms = match inner.state {
            State::Live(terms) if terms.bounce => terms,
            _ => {
                left.append(requests);
                return None;
            }
        };
        while let Some(mut rq) = requests.pop() {
            let carry = rq.data_mut();
            let needs = terms.resources(carry.fragments.len() as u32);
            if inner.promise(&terms, carry, &needs) {
                promised.push(rq);
            } else {
                left.push(rq);
            }
        }
        Some((terms, promised))
    }

    /// Prepares and starts requests.
    fn start_all<'q>(
        &self,
        terms: &Terms,
        mut requests: RequestList<Disk, Queued<'q>>,
        left: &mut RequestList<Disk, Queued<'q>>,
    ) -> RequestList<Disk, InFlight> {
        let mut started = RequestList::new();
        while let Some(mut rq) = requests.pop() {
            let needs = terms.resources(rq.data().fragments.len() as u32);
            if self.bring_pages(&mut rq, terms, needs).is_ok() {
                started.push(rq.start());
            } else {
                self.break_promise(rq.data_mut(), needs);
                left.push(rq);
            }
        }
        started
    }

    /// Puts requests into the slots that were promised to them, and shows them to the backend.
    fn put_all(&self, terms: &Terms, mut requests: RequestList<Disk, InFlight>) {
        if requests.is_empty() {
            return;
        }
        let mut inner = self.inner.lock();
        while let Some(rq) = requests.pop() {
            let needs = terms.resources(rq.data().fragments.len() as u32);
            let Some(direction) = direction(&rq) else {
                // Others are not small.
                continue;
            };
            let order = Order::Transfer(direction);
            if let Err(waiting) = self.keep(&mut inner, Held::Bounced(rq), order, terms, needs) {
                self.give_up(inner, waiting);
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
        order: Order,
        last: bool,
    ) -> Result<bool, Rejected<'q, Disk>> {
        let (segments, carry) = rq.segments_and_data();
        let Some(fragments) = carry.note_pieces(segments) else {
            ratelimited!(pr_err!(
                "a request is not made of whole sectors, or too large\n"
            ));
            rq.end(BlkStatus::IOERR);
            return Ok(false);
        };

        let (terms, needs) = match self.promise(rq.data_mut(), order, fragments) {
            Promise::Given(terms, needs) => (terms, needs),
            Promise::Later => return Err(rq.reject()),
            Promise::Ended(status) => {
                rq.end(status);
                return Ok(false);
            }
        };
        let Ok(reserve) = self.prepare(&mut rq, &terms, needs) else {
            self.break_promise(rq.data_mut(), needs);
            return Err(rq.reject());
        };

        match hold(rq.start(), &terms, needs, reserve) {
            Ok(held) => {
                Lists::new(&held).fill(fragments, terms.limits);
                self.put(held, order, &terms, needs, last);
                Ok(true)
            }
            Err(mut rq) => {
                self.break_promise(rq.data_mut(), needs);
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
        terms: &Terms,
        needs: Resources,
    ) -> Result<GrantReserve> {
        if needs.grants != 0 && shortage::is_claimed() && self.has_requests() {
            return Err(ENOSPC);
        }
        let reserve = GrantReserve::new(needs.grants)?;
        self.bring_pages(rq, terms, needs)?;
        Ok(reserve)
    }

    /// Returns `true` if the backend has requests to answer.
    #[cold]
    fn has_requests(&self) -> bool {
        let inner = self.inner.lock();
        (inner.link.as_ref()).is_some_and(|link| link.ring.in_flight() != 0)
    }

    /// Gets pages that the pool did not have, and copies the data of a write that is bounced.
    #[inline(always)]
    fn bring_pages<S: mq::State>(
        &self,
        rq: &mut Request<Disk, S>,
        terms: &Terms,
        needs: Resources,
    ) -> Result {
        let carry = rq.data_mut();
        if carry.data.len() < needs.data || carry.indirect.len() < needs.indirect {
            self.signal.raise(Cause::Grown);
            pool::grow(terms.domain, &mut carry.data, needs.data)?;
            pool::grow(terms.domain, &mut carry.indirect, needs.indirect)?;
        }
        if terms.bounce && rq.op() == Op::Write {
            for (segment, page) in rq.segments().zip(&rq.data().data) {
                if let Some(copy) = page.slice_mut(segment.offset(), segment.len()) {
                    copy.copy_from(segment);
                }
            }
        }
        Ok(())
    }

    /// Promises slots, and takes pages out of the pool as far as there are any.
    fn promise(&self, carry: &mut Carry, order: Order, fragments: u32) -> Promise {
        let mut inner = self.inner.lock();
        let terms = match inner.state {
            State::Live(terms) => terms,
            State::Away => return Promise::Later,
            // There is no backend, and there will be none.
            State::Dead => return Promise::Ended(BlkStatus::IOERR),
        };
        if let Some(status) = terms.own_answer(order) {
            return Promise::Ended(status);
        }
        let needs = terms.resources(fragments);
        if inner.promise(&terms, carry, &needs) {
            return Promise::Given(terms, needs);
        }
        if needs.slots <= inner.slots.capacity() {
            return Promise::Later;
        }
        ratelimited!(pr_err!(
            "{}: a request of {} slots does not fit into a ring of {}\n",
            self.name.as_str(),
            needs.slots,
            inner.slots.capacity()
        ));
        Promise::Ended(BlkStatus::IOERR)
    }

    /// Takes back what was promised to a request that is not put into the ring.
    fn break_promise(&self, carry: &mut Carry, needs: Resources) {
        let mut inner = self.inner.lock();
        inner.slots.unpromise(needs.slots);
        inner.pool.give(&mut carry.data);
        inner.pool.give(&mut carry.indirect);
    }

    /// Puts a request into the slots that were promised to it, and shows it to the backend if it is
    /// the last one of a batch.
    fn put(&self, held: Held, order: Order, terms: &Terms, needs: Resources, last: bool) {
        let mut inner = self.inner.lock();
        if let Err(waiting) = self.keep(&mut inner, held, order, terms, needs) {
            self.give_up(inner, waiting);
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
    /// Inlined, so that only those parts of `held` are moved that there are.
    #[inline(always)]
    fn keep(
        &self,
        inner: &mut Inner,
        held: Held,
        order: Order,
        terms: &Terms,
        needs: Resources,
    ) -> Result<(), Waiting> {
        inner.slots.unpromise(needs.slots);
        let lists = Lists::new(&held);
        let (first, parts) = match order {
            Order::Transfer(direction) if is_small(needs.fragments) => self
                .put_single(inner, |id| {
                    plan::direct(direction, self.handle, id, lists.sector(), lists.all())
                }),
            _ => self.put_other(inner, &lists, order, terms, needs),
        };
        let mut waiting = Waiting::new(held, parts);
        if terms.write_through {
            waiting.flush = is_write(order).then_some(terms.flush);
        }
        inner.slots.keep(first, waiting)
    }

    /// Puts a request that is no small transfer; gives the first slot and how many there are.
    #[inline(never)]
    fn put_other(
        &self,
        inner: &mut Inner,
        lists: &Lists<'_>,
        order: Order,
        terms: &Terms,
        needs: Resources,
    ) -> (Option<u16>, u16) {
        match order {
            Order::Transfer(direction) => self.put_parts(inner, lists, direction, terms, needs),
            Order::Flush => self.put_flush(inner, terms.flush),
            Order::Discard { secure } => self.put_single(inner, |id| {
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
    pub(crate) fn flush_written(&self, inner: &mut Inner, mut waiting: Waiting) -> Option<Waiting> {
        let flush = waiting.flush.take()?;
        if waiting.status != Status::Okay {
            return Some(waiting);
        }
        let (first, parts) = self.put_flush(inner, flush);
        waiting.missing = parts;
        inner.flushes = true;
        // The slots of the write have just become free.
        inner.slots.keep(first, waiting).err().map(Waiting::failed)
    }

    /// Something is in the ring of which we know nothing, though slots were promised, so that this
    /// cannot be: gives the ring up.
    fn give_up(&self, mut inner: SpinLockIrqSaveGuard<'_, Inner>, waiting: Waiting) {
        inner.broken = true;
        drop(inner);
        self.signal.raise(Cause::Failed);
        drop(waiting);
    }

    /// Puts the parts of a transfer; gives the first slot and how many there are.
    fn put_parts(
        &self,
        inner: &mut Inner,
        lists: &Lists<'_>,
        direction: Direction,
        terms: &Terms,
        needs: Resources,
    ) -> (Option<u16>, u16) {
        let sector = lists.sector();
        let Some(plan) = Plan::new(sector, lists.fragments(), needs.fragments, terms.limits) else {
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
                    part.indirect(direction, self.handle, id, lists.pages(&part, terms.limits))
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
        let ring = &mut inner.link.as_mut()?.ring;
        let claim = inner.slots.claim(first, self.index, part)?;
        let request = make(claim.id.to_wire());
        let operation = request.response_operation();
        ring.put(request).ok()?;
        inner.slots.await_answer(&claim, operation);
        Some(claim.number)
    }
}

/// Notes the data of a request, if it has some and is small.
#[inline]
fn note_small(rq: &mut Request<Disk, Queued<'_>>) -> bool {
    // A fragment is a page at most, so this needs no walk over the data.
    if rq.bytes() as usize > DIRECT_SEGMENTS * PAGE_SIZE {
        return false;
    }
    let (segments, carry) = rq.segments_and_data();
    let fragments = carry.note_pieces(segments);
    // What has no data has no fragments.
    fragments.is_some_and(|fragments| fragments != 0 && is_small(fragments))
}

/// Lets the backend use the data of a request that was started.
fn hold(
    mut rq: Started,
    terms: &Terms,
    needs: Resources,
    mut reserve: GrantReserve,
) -> Result<Held, Started> {
    if needs.grants == 0 {
        return Ok(Held::Bounced(rq));
    }
    let carry = rq.data_mut();
    let references = core::mem::take(&mut carry.references);
    // What the backend may only read is read-only all the same.
    match Granted::new(
        rq,
        GrantAccess::ReadWrite,
        terms.domain,
        &mut reserve,
        references,
    ) {
        Ok(granted) => Ok(Held::Direct(granted)),
        Err((_, mut rq, references)) => {
            rq.data_mut().references = references;
            Err(rq)
        }
    }
}
