// SPDX-License-Identifier: GPL-2.0-only

//! A queue: one ring, and the thread that serves it.
//!
//! The thread owns all of it, so there is no lock: it takes what waits in the ring in one pass,
//! starts the I/O of all of it under one plug, ends what the disk is done with, unmaps that together,
//! and then shows all answers at once and notifies the frontend at most once. When there is nothing
//! to do, it sleeps until an event or the end of an I/O wakes it; no timer is set for that. While it
//! sleeps, I/O that ends is answered there if nothing else is to be done: see [`inbox`](crate::inbox).
//!
//! A request that was started is answered, whatever happens: the thread ends only when nothing is in
//! flight. Requests that were not started stay in the ring for the next backend.
//!
//! A request that lacks memory or mappings waits, and so does what is behind it in the ring. It is
//! tried again when a transfer of the queue has ended, when other queues have given something back, and
//! by a timer. It never fails for that reason; the wait ends with the shortage or with the connection.

use kernel::{
    prelude::*,
    str::{
        CStr,
        CString, //
    },
    sync::Arc, //
};

use kernel_ext::{
    base::{
        jiffies::{
            self,
            msecs_to_jiffies,
            Jiffies, //
        },
        kthread::Current,
        timer::{
            IdleCpu,
            Timer, //
        },
    },
    block::bio::{
        self,
        Operation, //
    },
    ratelimited,
    xen::events::Channel, //
};

use blkif::{
    backoff::Backoff,
    request::{
        self,
        Data,
        DiskLimits,
        Request, //
    },
    ring::RingError,
    wire::{
        Response,
        Status,
        WireRequest, //
    },
};

use crate::{
    charge::Charge,
    disk::{
        Disk,
        MAX_SEGMENTS, //
    },
    domain::{
        self,
        Domain,
        Listener, //
    },
    fence::Post,
    inbox::{
        Inbox,
        Parked,
        Rest,
        Ring, //
    },
    memory::{
        can_add_copies,
        Mover,
        Problem, //
    },
    params::{
        BUFFER_SQUEEZE_DURATION_MS,
        LOG_STATS, //
    },
    stats::Counters,
    transfer::{
        has_space,
        is_copied,
        is_read_into_copy,
        new_transfer,
        reserve,
        Chain,
        Transfer,
        Work,
        WITHDRAWN_NODES, //
    },
    vbd::Link, //
};

/// How long to wait for somebody else who still uses the pages of an I/O that has ended.
const BUSY_WAIT_MS: u32 = 5;

/// Delays between the tries of a request that lacks memory or mappings, in milliseconds.
const RETRIES: Backoff = Backoff::new(10, 500);

/// How often numbers are printed, if that is wanted.
const LOG_STATS_SECONDS: u32 = 10;

/// Where a barrier is.
enum Barrier {
    /// There is none.
    None,
    /// It waits for what came before, in all queues. Nothing is taken meanwhile.
    Waiting(KBox<Transfer>),
    /// It is on its way, alone.
    Running,
}

/// What a queue is made of.
pub(crate) struct Parts {
    /// For messages: domain, device and number of the queue.
    pub(crate) name: CString,
    pub(crate) ring: Ring,
    pub(crate) channel: Channel<Inbox>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) charge: Arc<Charge>,
    pub(crate) disk: Arc<Disk>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) post: Post,
    pub(crate) domain: Arc<Domain>,
    /// The frontend uses persistent grants.
    pub(crate) persistent: bool,
}

/// What the thread of a queue owns.
pub(crate) struct Queue {
    name: CString,
    /// `None` while the thread sleeps and has parked it.
    ring: Option<KBox<Ring>>,
    channel: Channel<Inbox>,
    inbox: Arc<Inbox>,
    charge: Arc<Charge>,
    disk: Arc<Disk>,
    counters: Arc<Counters>,
    post: Post,
    mover: Mover,
    /// Transfers that are not used now.
    idle: Chain,
    /// A transfer with space for any request, for when memory is short.
    reserve: Option<KBox<Transfer>>,
    /// Transfers whose I/O has ended, but somebody still uses their pages.
    busy: Chain,
    /// A request that was taken from the ring, and waits for memory or mappings. It was not started.
    stalled: Option<WireRequest>,
    /// When it is tried again.
    retries: Backoff,
    barrier: Barrier,
    /// Writes whose data is to be copied before they are submitted, and their number.
    incoming: Chain,
    incoming_len: usize,
    /// Transfers that were started and not answered: incoming, submitted, busy.
    in_flight: usize,
    /// Nodes that offered what the disk has refused, and how many of them were taken back. Each is
    /// taken back once, however often the frontend asks for it.
    refused: KVec<&'static str>,
    withdrawn: usize,
    /// The frontend has broken the ring: nothing more is taken from it.
    broken: Option<RingError>,
    /// Until when memory counts as short.
    short_until: Option<Jiffies>,
    /// Tells when the domain's pages are short.
    listener: Listener,
    /// When to look for pages that were not used for long, if there may be some.
    rest_at: Option<Jiffies>,
    /// Wakes the thread then.
    alarm: Pin<KBox<Timer<Rest>>>,
    /// When numbers were last printed.
    logged: Jiffies,
}

impl Queue {
    pub(crate) fn new(parts: Parts) -> Result<Self> {
        let Parts {
            name,
            ring,
            channel,
            inbox,
            charge,
            disk,
            counters,
            post,
            domain,
            persistent,
        } = parts;
        let mover = Mover::new(&domain, persistent)?;
        let reserve = new_transfer(&inbox, MAX_SEGMENTS, GFP_KERNEL)?;
        let listener = Listener::new(&domain, &inbox)?;
        let alarm = Timer::new(IdleCpu::Wakes, Rest(inbox.clone()))?;
        Ok(Self {
            name,
            ring: Some(KBox::new(ring, GFP_KERNEL)?),
            channel,
            inbox,
            charge,
            disk,
            counters,
            post,
            mover,
            idle: Chain::new(),
            reserve: Some(reserve),
            busy: Chain::new(),
            stalled: None,
            retries: RETRIES,
            barrier: Barrier::None,
            incoming: Chain::new(),
            incoming_len: 0,
            in_flight: 0,
            refused: KVec::with_capacity(WITHDRAWN_NODES, GFP_KERNEL)?,
            withdrawn: 0,
            broken: None,
            short_until: None,
            listener,
            rest_at: None,
            alarm,
            logged: jiffies::now(),
        })
    }

    /// Domain, device and number of the queue.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    /// Where others give it work.
    pub(crate) fn inbox(&self) -> Arc<Inbox> {
        self.inbox.clone()
    }

    /// Serves the ring until the thread should stop.
    pub(crate) fn serve(mut self, thread: &Current, link: &Link) {
        let _charged = self.charge.begin(thread, &self.name);
        let mut reported = false;
        loop {
            self.inbox.forget_news();
            // An event that comes at the end is left for who opens the channel next.
            let event = !thread.should_stop() && self.inbox.take_event();
            let took = self.pass(thread);
            match self.broken {
                // The event is never given back, so that no more come.
                Some(error) if !reported => {
                    link.ring_broken(error);
                    reported = true;
                }
                None if event => self.channel.eoi(!took),
                _ => {}
            }
            while let Some(node) = self.refused.get(self.withdrawn) {
                link.withdraw(node);
                self.withdrawn = self.withdrawn.wrapping_add(1);
            }
            if self.disk.has_new_size() {
                link.resized();
            }
            self.log();
            let stopping = thread.should_stop();
            if stopping && self.is_drained() {
                // Who has answered while the thread slept may not have notified yet. That is lost once
                // the channel is closed, and who serves the ring next does not notify of old answers.
                self.channel.notify();
                return;
            }
            self.sleep(thread, stopping);
        }
    }

    /// Returns `true` if each request that was started has its answer. One that waits for memory is the
    /// last one that was taken, and comes behind the last answer: who attaches to the ring next takes
    /// it again.
    fn is_drained(&self) -> bool {
        self.in_flight == 0 && matches!(self.barrier, Barrier::None)
    }

    fn sleep(&mut self, thread: &Current, stopping: bool) {
        self.rest();
        self.park(stopping);
        let timeout = self.timeout();
        self.inbox.wait(thread, !stopping, timeout);
        self.unpark();
    }

    /// Returns after which time something has to be tried again.
    fn timeout(&mut self) -> Option<Jiffies> {
        if !self.busy.is_empty() {
            return Some(msecs_to_jiffies(BUSY_WAIT_MS));
        }
        self.stalled.as_ref()?;
        Some(msecs_to_jiffies(self.retries.next_delay()))
    }

    /// Gives back what is not needed now, and what others need.
    fn rest(&mut self) {
        if self.inbox.take_short() {
            let time = msecs_to_jiffies(BUFFER_SQUEEZE_DURATION_MS.get());
            self.short_until = Some(jiffies::now().wrapping_add(time));
        }
        let short = self.short_until.is_some_and(|end| !jiffies::is_past(end));
        if short {
            drop(self.idle.take());
        } else {
            self.short_until = None;
        }
        if self.rest_at.is_some_and(jiffies::is_past) {
            self.rest_at = None;
            self.mover.forget_unused();
        }
        self.mover.rest(short);
        if self.rest_at.is_none() {
            if let Some(time) = self.mover.unused_after(self.in_flight) {
                self.rest_at = Some(jiffies::now().wrapping_add(time));
                self.alarm.set_after(time);
            }
        }
    }

    /// Leaves the ring where I/O ends, if nothing else is to be done there than to answer.
    fn park(&mut self, stopping: bool) {
        if self.in_flight == 0 || self.is_awaited(stopping) {
            return;
        }
        let Some(doorbell) = self.channel.doorbell() else {
            return;
        };
        if let Some(ring) = self.ring.take() {
            let parked = Parked {
                ring,
                doorbell,
                pages_stay: self.mover.keeps_pages(),
            };
            self.ring = self.inbox.park(parked).map(|parked| parked.ring);
        }
    }

    /// Whether somebody waits for what the thread does at the end of an I/O.
    fn is_awaited(&self, stopping: bool) -> bool {
        stopping
            || self.broken.is_some()
            || self.holds_back()
            || !self.busy.is_empty()
            || self.short_until.is_some()
            || self.listener.is_short()
    }

    /// Takes the ring back, and the transfers that were answered meanwhile.
    fn unpark(&mut self) {
        if self.ring.is_some() {
            return;
        }
        let (parked, mut answered) = self.inbox.unpark();
        self.ring = parked.map(|parked| parked.ring);
        while let Some(transfer) = answered.pop() {
            self.settle(transfer);
        }
    }

    /// Prints what was done so far, if that is wanted.
    fn log(&mut self) {
        let seconds = LOG_STATS_SECONDS;
        if LOG_STATS.get() != 0 && jiffies::since(self.logged) >= msecs_to_jiffies(seconds * 1000) {
            self.logged = jiffies::now();
            pr_info!("{}: {}\n", *self.name, *self.counters);
        }
    }

    /// Does all that there is to do now. Whether a request was taken from the ring, or could not be
    /// taken yet.
    fn pass(&mut self, thread: &Current) -> bool {
        let mut took_any = self.is_held();
        loop {
            let stopping = thread.should_stop();
            let took = self.take(stopping);
            let ended = self.end_all();
            self.publish();
            took_any |= took;
            // What is held back may go on, now that something has ended or memory was freed for it.
            let go_on = (took || ended) && self.holds_back();
            if !go_on && !self.more(stopping) {
                return took_any;
            }
            if self.listener.is_short() {
                self.mover.share_with_others();
            }
            thread.cond_resched();
        }
    }

    /// Whether something has to happen here or in another queue before more is taken from the ring.
    fn holds_back(&self) -> bool {
        self.stalled.is_some() || self.is_held()
    }

    /// Whether requests have come since the ring was found empty. If not, the next one will send an
    /// event.
    fn more(&mut self, stopping: bool) -> bool {
        self.listens(stopping) && self.ring.as_mut().is_some_and(|ring| ring.final_check())
    }

    /// Starts all requests that can be started now. Whether there were any.
    fn take(&mut self, stopping: bool) -> bool {
        let limits = self.disk.limits();
        let took = bio::with_plug(|| {
            let took = self.take_all(stopping, &limits);
            self.copy_incoming();
            took
        });
        self.attend_fence();
        took
    }

    fn take_all(&mut self, stopping: bool, limits: &DiskLimits) -> bool {
        let mut took = false;
        if let Some(wire) = self.stalled.take() {
            if !self.begin(&wire, limits) {
                return false;
            }
            self.retries.reset();
            took = true;
        }
        // Each is looked at where it stands, for it is large.
        let mut wire = WireRequest::NONE;
        while self.listens(stopping) {
            let Some(ring) = self.ring.as_mut() else {
                break;
            };
            match ring.take_request_to(&mut wire) {
                Ok(true) => {
                    took = true;
                    if !self.begin(&wire, limits) {
                        break;
                    }
                }
                Ok(false) => break,
                Err(error) => self.broken = Some(error),
            }
        }
        took
    }

    /// Nothing is taken from the ring, because of a barrier of this or another queue.
    fn is_held(&self) -> bool {
        !matches!(self.barrier, Barrier::None) || self.post.is_raised()
    }

    /// Whether requests are taken from the ring.
    #[inline]
    fn listens(&self, stopping: bool) -> bool {
        !stopping && self.broken.is_none() && !self.holds_back()
    }

    /// Checks a request and starts it. `false`: it has to wait for memory.
    fn begin(&mut self, wire: &WireRequest, limits: &DiskLimits) -> bool {
        match request::check(wire, limits) {
            Ok(request) => self.start(wire, request, limits),
            Err(refusal) => {
                ratelimited!(pr_warn!(
                    "{}: refused a request: {}\n",
                    *self.name,
                    format_args!("{refusal}")
                ));
                self.answer(wire.response(refusal.status()));
                true
            }
        }
    }

    fn start(&mut self, wire: &WireRequest, request: Request<'_>, limits: &DiskLimits) -> bool {
        let Some(mut transfer) = self.idle_transfer(request.segments()) else {
            return self.stall(wire);
        };
        let mut filled = self.fill(&mut transfer, wire, request, limits);
        if filled
            .as_ref()
            .is_err_and(|problem| self.make_room(problem))
        {
            filled = self.fill(&mut transfer, wire, request, limits);
        }
        match filled {
            Ok(()) => self.dispatch(transfer),
            Err(problem) if problem.is_shortage() => {
                self.recycle(transfer);
                self.report_shortage(&problem);
                return self.stall(wire);
            }
            Err(problem) => {
                ratelimited!(pr_warn!("{}: failed a request: {}\n", *self.name, problem));
                self.recycle(transfer);
                self.answer(wire.response(problem.status()));
            }
        }
        true
    }

    /// Gives up what a request lacks, as far as it is in pages that are kept mapped and not used now.
    /// Returns `true` if it may be tried again at once.
    fn make_room(&mut self, problem: &Problem) -> bool {
        if problem.lacks_mappings() {
            domain::share_mappings();
        } else if self.in_flight != 0 || !problem.is_shortage() {
            return false;
        }
        self.mover.forget_all()
    }

    /// Says why a request waits, unless it is for a transfer of this queue.
    fn report_shortage(&self, problem: &Problem) {
        if self.in_flight == 0 || problem.lacks_mappings() {
            ratelimited!(pr_warn!("{}: a request waits: {}\n", *self.name, problem));
        }
    }

    /// Keeps a request until there may be what it lacks.
    fn stall(&mut self, wire: &WireRequest) -> bool {
        self.counters.out_of_memory.add(1);
        self.stalled = Some(*wire);
        false
    }

    /// A transfer with space for so many segments. If there is none, then others are in flight.
    fn idle_transfer(&mut self, segments: usize) -> Option<KBox<Transfer>> {
        let transfer = match self.idle.pop() {
            Some(transfer) => Ok(transfer),
            None => new_transfer(&self.inbox, segments, GFP_NOWAIT),
        };
        if let Ok(mut transfer) = transfer {
            if has_space(&transfer, segments)
                || reserve(&mut transfer, segments, GFP_NOWAIT).is_ok()
            {
                return Some(transfer);
            }
            self.idle.push(transfer);
        }
        self.reserve.take()
    }

    /// Puts a transfer aside that is not used now.
    fn recycle(&mut self, mut transfer: KBox<Transfer>) {
        transfer.context.segments.clear();
        if self.reserve.is_none() && has_space(&transfer, MAX_SEGMENTS) {
            self.reserve = Some(transfer);
        } else {
            self.idle.push(transfer);
        }
    }

    /// Makes a transfer of a request, with its memory.
    fn fill(
        &mut self,
        transfer: &mut Transfer,
        wire: &WireRequest,
        request: Request<'_>,
        limits: &DiskLimits,
    ) -> Result<(), Problem> {
        let job = &mut transfer.context;
        job.answer = wire.response(Status::Okay);
        job.result = Ok(());
        job.answered = false;
        job.segments.clear();
        let (work, data) = match request {
            Request::Read(data) => (Work::Read, Some(data)),
            Request::Write(data) => (Work::Write, Some(data)),
            Request::Flush => (Work::Flush, None),
            Request::Barrier(data) => (Work::Barrier, data.map(Data::Direct)),
            Request::Discard { extent, secure } => {
                let (sector, left) = (extent.sector(), extent.sectors());
                (
                    Work::Discard {
                        sector,
                        left,
                        secure,
                    },
                    None,
                )
            }
        };
        job.work = work;
        let extent = match data {
            None => None,
            Some(Data::Direct(direct)) => {
                for segment in direct.segments() {
                    job.segments
                        .push_within_capacity(segment)
                        .map_err(|_| ENOMEM)?;
                }
                Some(direct.extent())
            }
            Some(Data::Indirect(unfetched)) => {
                Some(self.mover.fetch(&unfetched, limits, &mut job.segments)?)
            }
        };
        (job.sector, job.sectors) =
            extent.map_or((0, 0), |extent| (extent.sector(), extent.sectors()));
        self.mover.bring(transfer)
    }

    fn dispatch(&mut self, transfer: KBox<Transfer>) {
        self.count(&transfer);
        if transfer.context.work == Work::Barrier {
            self.barrier = Barrier::Waiting(transfer);
            self.post.may_run(false);
            return;
        }
        self.in_flight = self.in_flight.wrapping_add(1);
        if transfer.context.work == Work::Write && is_copied(&transfer) {
            self.incoming.push(transfer);
            self.incoming_len = self.incoming_len.wrapping_add(1);
            if !can_add_copies(self.incoming_len) {
                self.copy_incoming();
            }
        } else {
            self.submit(transfer);
        }
    }

    /// Copies the data of writes, and submits them.
    fn copy_incoming(&mut self) {
        if self.incoming.is_empty() {
            return;
        }
        self.incoming_len = 0;
        let mut incoming = self.incoming.take();
        self.mover.copy(&mut incoming);
        while let Some(transfer) = incoming.pop() {
            if transfer.context.result.is_ok() {
                self.submit(transfer);
            } else {
                self.inbox.done(transfer);
            }
        }
    }

    fn count(&self, transfer: &Transfer) {
        let counters = &self.counters;
        let sectors = transfer.context.sectors;
        match transfer.context.work {
            Work::Read => {
                counters.reads.add(1);
                counters.sectors_read.add(sectors);
            }
            Work::Write => {
                counters.writes.add(1);
                counters.sectors_written.add(sectors);
            }
            Work::Flush | Work::Barrier => {
                counters.flushes.add(1);
                counters.sectors_written.add(sectors);
            }
            Work::Discard { .. } => counters.discards.add(1),
        }
    }

    /// Starts a barrier if everything that came before has ended, or lets that of another queue
    /// start.
    fn attend_fence(&mut self) {
        let idle = self.in_flight == 0 && self.stalled.is_none();
        match core::mem::replace(&mut self.barrier, Barrier::None) {
            Barrier::None if idle && self.post.is_raised() => self.post.arrive(),
            Barrier::Waiting(transfer) if self.post.may_run(idle) => {
                self.barrier = Barrier::Running;
                self.in_flight = self.in_flight.wrapping_add(1);
                self.submit(transfer);
            }
            other => self.barrier = other,
        }
    }

    /// Gives a transfer, or its next piece, to the disk.
    fn submit(&mut self, mut transfer: KBox<Transfer>) {
        let (operation, sector) = next_step(&self.disk, &mut transfer);
        if let Err((error, mut transfer)) =
            bio::submit(&self.disk.device, operation, sector, transfer)
        {
            transfer.context.result = Err(error);
            self.inbox.done(transfer);
        }
    }

    /// Ends all transfers that the disk is done with. Whether there were any.
    fn end_all(&mut self) -> bool {
        let mut ended = false;
        let mut busy = self.busy.take();
        while let Some(transfer) = busy.pop() {
            ended |= self.settle(transfer);
        }
        let mut done = self.inbox.take_done();
        let mut outgoing = Chain::new();
        let mut len = 0usize;
        while let Some(transfer) = done.pop() {
            if transfer.context.has_more() {
                self.submit(transfer);
            } else if is_read_into_copy(&transfer) {
                outgoing.push(transfer);
                len = len.wrapping_add(1);
                if !can_add_copies(len) {
                    len = 0;
                    ended |= self.copy_outgoing(outgoing.take());
                }
            } else {
                ended |= self.settle(transfer);
            }
        }
        self.copy_outgoing(outgoing) || ended
    }

    /// Copies what reads have brought to the frontend, and answers them. Whether there were any.
    fn copy_outgoing(&mut self, mut outgoing: Chain) -> bool {
        if outgoing.is_empty() {
            return false;
        }
        self.mover.copy(&mut outgoing);
        while let Some(transfer) = outgoing.pop() {
            self.settle(transfer);
        }
        true
    }

    /// Gives up the memory of a transfer, and answers it. `false`: its pages are busy.
    fn settle(&mut self, mut transfer: KBox<Transfer>) -> bool {
        if !self.mover.release(&mut transfer) {
            self.busy.push(transfer);
            return false;
        }
        self.in_flight = self.in_flight.wrapping_sub(1);
        if transfer.context.answered {
            self.recycle(transfer);
            return true;
        }
        if transfer.context.work == Work::Barrier {
            self.barrier = Barrier::None;
            self.post.lower();
        }
        if let Some(node) = transfer.context.withdrawn() {
            self.refuse(node);
        }
        self.answer(transfer.context.final_answer());
        self.recycle(transfer);
        true
    }

    /// Has an offer taken back that the disk has refused, once.
    fn refuse(&mut self, node: &'static str) {
        if !self.refused.contains(&node) {
            // There is space: there are no other nodes.
            let _ = self.refused.push_within_capacity(node);
        }
    }

    /// Writes an answer, which the frontend sees after [`Queue::publish`].
    fn answer(&mut self, answer: Response) {
        // Each request that was taken is answered once, so there is a slot.
        let _ = self.ring.as_mut().map(|ring| ring.put(&answer));
    }

    /// Unmaps the pages of transfers that have ended, and shows the frontend their answers.
    fn publish(&mut self) {
        self.mover.flush();
        if self.ring.as_mut().is_some_and(|ring| ring.publish()) {
            self.channel.notify();
        }
    }
}

/// What the disk is asked for next, and where.
fn next_step(disk: &Disk, transfer: &mut Transfer) -> (Operation, u64) {
    let job = &mut transfer.context;
    match job.work {
        Work::Read => (Operation::Read, job.sector),
        Work::Write => (Operation::Write, job.sector),
        Work::Flush => (Operation::Flush, 0),
        Work::Barrier if job.segments.is_empty() => (Operation::Flush, 0),
        Work::Barrier => (Operation::FlushWrite, job.sector),
        Work::Discard {
            sector,
            left,
            secure,
        } => {
            let piece = disk.discard_piece(sector, left);
            job.work = Work::Discard {
                sector: sector.wrapping_add(piece),
                left: left.wrapping_sub(piece),
                secure,
            };
            // What does not fit is refused.
            let sectors = u32::try_from(piece).unwrap_or(u32::MAX);
            let operation = if secure {
                Operation::SecureErase(sectors)
            } else {
                Operation::Discard(sectors)
            };
            (operation, sector)
        }
    }
}
