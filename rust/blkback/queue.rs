// SPDX-License-Identifier: GPL-2.0-only

//! A queue: one ring, and the thread that serves it.
//!
//! The thread owns all of it, so there is no lock: it takes what waits in the ring in one pass,
//! starts the I/O of all of it under one plug, ends what the disk is done with, unmaps that together,
//! and then shows all answers at once and notifies the frontend at most once. When there is nothing
//! to do, it sleeps until an event or the end of an I/O wakes it; no timer is set for that. While it
//! sleeps, I/O that ends is answered there if nothing else is to be done: see [`events`](crate::inbox).
//!
//! A request that was started is answered, whatever happens: the thread ends only when nothing is in
//! flight. Requests that were not started stay in the ring for the next backend.
//!
//! A request that lacks memory or mappings waits, and so does what is behind it in the ring. It is
//! tried again when a request of the queue has ended, when other queues have given something back, and
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
            Timer,
            TimerFlags, //
        },
    },
    block::bio::{
        self,
        Operation, //
    },
    ratelimited,
    xen::events::EventChannel, //
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
    barrier::GateMember,
    data_path::{
        fits_in_copy_batch,
        DataError,
        DataPath, //
    },
    device::DeviceHandle,
    disk::{
        Disk,
        MAX_SEGMENTS, //
    },
    domain::{
        self,
        Domain,
        ShortageSubscriber, //
    },
    events::{
        LentRing,
        PurgeTimer,
        QueueEvents,
        Ring, //
    },
    io_accounting::IoAccounting,
    params::{
        BUFFER_SQUEEZE_DURATION_MS,
        LOG_STATS, //
    },
    pending_req::{
        has_capacity,
        is_grant_copied,
        needs_copy_out,
        new_pending_req,
        reserve_segments,
        PendingReq,
        ReqList,
        ReqOp,
        REJECTABLE_FEATURES, //
    },
    stats::Counters, //
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
    Waiting(KBox<PendingReq>),
    /// It is on its way, alone.
    Running,
}

/// What a queue is made of.
pub(crate) struct QueueConfig {
    /// For messages: domain, device and number of the queue.
    pub(crate) name: CString,
    pub(crate) ring: Ring,
    pub(crate) channel: EventChannel<QueueEvents>,
    pub(crate) events: Arc<QueueEvents>,
    pub(crate) io_accounting: Arc<IoAccounting>,
    pub(crate) disk: Arc<Disk>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) gate: GateMember,
    pub(crate) domain: Arc<Domain>,
    /// The frontend uses persistent grants.
    pub(crate) persistent: bool,
}

/// What the thread of a queue owns.
pub(crate) struct Queue {
    name: CString,
    /// `None` while the thread sleeps and has parked it.
    ring: Option<KBox<Ring>>,
    channel: EventChannel<QueueEvents>,
    events: Arc<QueueEvents>,
    io_accounting: Arc<IoAccounting>,
    disk: Arc<Disk>,
    counters: Arc<Counters>,
    gate: GateMember,
    data_path: DataPath,
    /// Transfers that are not used now.
    idle: ReqList,
    /// A request with space for any request, for when memory is short.
    reserve: Option<KBox<PendingReq>>,
    /// Transfers whose I/O has ended, but somebody still uses their pages.
    busy: ReqList,
    /// A request that was taken from the ring, and waits for memory or mappings. It was not started.
    stalled: Option<WireRequest>,
    /// When it is tried again.
    retries: Backoff,
    barrier: Barrier,
    /// Writes whose data is to be copied before they are submitted, and their number.
    writes: ReqList,
    writes_len: usize,
    /// Transfers that were started and not answered: incoming, submitted, busy.
    in_flight: usize,
    /// Nodes that offered what the disk has refused, and how many of them were taken back. Each is
    /// taken back once, however often the frontend asks for it.
    rejected_features: KVec<&'static str>,
    withdrawn_count: usize,
    /// The frontend has broken the ring: nothing more is taken from it.
    broken: Option<RingError>,
    /// Until when memory counts as short.
    short_until: Option<Jiffies>,
    /// Tells when the domain's pages are short.
    shortage: ShortageSubscriber,
    /// When to look for pages that were not used for long, if there may be some.
    purge_at: Option<Jiffies>,
    /// Wakes the thread then.
    purge_timer: Pin<KBox<Timer<PurgeTimer>>>,
    /// When numbers were last printed.
    logged: Jiffies,
}

impl Queue {
    pub(crate) fn new(config: QueueConfig) -> Result<Self> {
        let QueueConfig {
            name,
            ring,
            channel,
            events,
            io_accounting,
            disk,
            counters,
            gate,
            domain,
            persistent,
        } = config;
        let data_path = DataPath::new(&domain, persistent)?;
        let reserve = new_pending_req(&events, MAX_SEGMENTS, GFP_KERNEL)?;
        let shortage = ShortageSubscriber::new(&domain, &events)?;
        let purge_timer = Timer::new(TimerFlags::Default, PurgeTimer(events.clone()))?;
        Ok(Self {
            name,
            ring: Some(KBox::new(ring, GFP_KERNEL)?),
            channel,
            events,
            io_accounting,
            disk,
            counters,
            gate,
            data_path,
            idle: ReqList::new(),
            reserve: Some(reserve),
            busy: ReqList::new(),
            stalled: None,
            retries: RETRIES,
            barrier: Barrier::None,
            writes: ReqList::new(),
            writes_len: 0,
            in_flight: 0,
            rejected_features: KVec::with_capacity(REJECTABLE_FEATURES, GFP_KERNEL)?,
            withdrawn_count: 0,
            broken: None,
            short_until: None,
            shortage,
            purge_at: None,
            purge_timer,
            logged: jiffies::now(),
        })
    }

    /// Domain, device and number of the queue.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    /// Where others give it work.
    pub(crate) fn events(&self) -> Arc<QueueEvents> {
        self.events.clone()
    }

    /// Serves the ring until the thread should stop.
    pub(crate) fn serve(mut self, thread: &Current, handle: &DeviceHandle) {
        let _charged = self.io_accounting.apply(thread, &self.name);
        let mut reported = false;
        loop {
            self.events.clear_pending();
            // An event that comes at the end is left for who opens the channel next.
            let event = !thread.should_stop() && self.events.take_event();
            let took = self.run_once(thread);
            match self.broken {
                // The event is never given back, so that no more come.
                Some(error) if !reported => {
                    handle.ring_broken(error);
                    reported = true;
                }
                None if event => self.channel.eoi(!took),
                _ => {}
            }
            while let Some(node) = self.rejected_features.get(self.withdrawn_count) {
                handle.withdraw_feature(node);
                self.withdrawn_count = self.withdrawn_count.wrapping_add(1);
            }
            if self.disk.size_changed() {
                handle.resized();
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
        self.trim();
        self.lend_ring(stopping);
        let timeout = self.timeout();
        self.events.wait(thread, !stopping, timeout);
        self.reclaim_ring();
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
    fn trim(&mut self) {
        if self.events.take_memory_pressure() {
            let time = msecs_to_jiffies(BUFFER_SQUEEZE_DURATION_MS.get());
            self.short_until = Some(jiffies::now().wrapping_add(time));
        }
        let short = self.short_until.is_some_and(|end| !jiffies::is_past(end));
        if short {
            drop(self.idle.take());
        } else {
            self.short_until = None;
        }
        if self.purge_at.is_some_and(jiffies::is_past) {
            self.purge_at = None;
            self.data_path.purge_unused();
        }
        self.data_path.trim(short);
        if self.purge_at.is_none() {
            if let Some(time) = self.data_path.purge_delay(self.in_flight) {
                self.purge_at = Some(jiffies::now().wrapping_add(time));
                self.purge_timer.mod_timer_after(time);
            }
        }
    }

    /// Leaves the ring where I/O ends, if nothing else is to be done there than to answer.
    fn lend_ring(&mut self, stopping: bool) {
        if self.in_flight == 0 || self.needs_thread(stopping) {
            return;
        }
        let Some(notifier) = self.channel.notifier() else {
            return;
        };
        if let Some(ring) = self.ring.take() {
            let lent = LentRing {
                ring,
                notifier,
                persistent: self.data_path.uses_persistent_grants(),
            };
            self.ring = self.events.lend_ring(lent).map(|lent| lent.ring);
        }
    }

    /// Whether somebody waits for what the thread does at the end of an I/O.
    fn needs_thread(&self, stopping: bool) -> bool {
        stopping
            || self.broken.is_some()
            || self.is_blocked()
            || !self.busy.is_empty()
            || self.short_until.is_some()
            || self.shortage.is_short()
    }

    /// Takes the ring back, and the requests that were answered meanwhile.
    fn reclaim_ring(&mut self) {
        if self.ring.is_some() {
            return;
        }
        let (lent, mut responded) = self.events.reclaim_ring();
        self.ring = lent.map(|lent| lent.ring);
        while let Some(req) = responded.pop() {
            self.complete(req);
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
    fn run_once(&mut self, thread: &Current) -> bool {
        let mut took_any = self.is_gated();
        loop {
            let stopping = thread.should_stop();
            let took = self.start_requests(stopping);
            let ended = self.complete_all();
            self.push_responses();
            took_any |= took;
            // What is held back may go on, now that something has ended or memory was freed for it.
            let unblocked = (took || ended) && self.is_blocked();
            if !unblocked && !self.has_more_requests(stopping) {
                return took_any;
            }
            if self.shortage.is_short() {
                self.data_path.return_excess();
            }
            thread.cond_resched();
        }
    }

    /// Whether something has to happen here or in another queue before more is taken from the ring.
    fn is_blocked(&self) -> bool {
        self.stalled.is_some() || self.is_gated()
    }

    /// Whether requests have come since the ring was found empty. If not, the next one will send an
    /// event.
    fn has_more_requests(&mut self, stopping: bool) -> bool {
        self.accepts_requests(stopping) && self.ring.as_mut().is_some_and(|ring| ring.final_check())
    }

    /// Starts all requests that can be started now. Whether there were any.
    fn start_requests(&mut self, stopping: bool) -> bool {
        let limits = self.disk.limits();
        let took = bio::with_plug(|| {
            let took = self.take_requests(stopping, &limits);
            self.copy_writes();
            took
        });
        self.advance_barrier();
        took
    }

    fn take_requests(&mut self, stopping: bool, limits: &DiskLimits) -> bool {
        let mut took = false;
        if let Some(wire) = self.stalled.take() {
            if !self.handle_request(&wire, limits) {
                return false;
            }
            self.retries.reset();
            took = true;
        }
        // Each is looked at where it stands, for it is large.
        let mut wire = WireRequest::EMPTY;
        while self.accepts_requests(stopping) {
            let Some(ring) = self.ring.as_mut() else {
                break;
            };
            match ring.take_request_to(&mut wire) {
                Ok(true) => {
                    took = true;
                    if !self.handle_request(&wire, limits) {
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
    fn is_gated(&self) -> bool {
        !matches!(self.barrier, Barrier::None) || self.gate.is_closed()
    }

    /// Whether requests are taken from the ring.
    #[inline]
    fn accepts_requests(&self, stopping: bool) -> bool {
        !stopping && self.broken.is_none() && !self.is_blocked()
    }

    /// Checks a request and starts it. `false`: it has to wait for memory.
    fn handle_request(&mut self, wire: &WireRequest, limits: &DiskLimits) -> bool {
        match request::check(wire, limits) {
            Ok(request) => self.dispatch(wire, request, limits),
            Err(refusal) => {
                ratelimited!(pr_warn!(
                    "{}: refused a request: {}\n",
                    *self.name,
                    format_args!("{refusal}")
                ));
                self.make_response(wire.response(refusal.status()));
                true
            }
        }
    }

    fn dispatch(&mut self, wire: &WireRequest, request: Request<'_>, limits: &DiskLimits) -> bool {
        let Some(mut req) = self.alloc_req(request.segments()) else {
            return self.stall(wire);
        };
        let mut prepared = self.prepare(&mut req, wire, request, limits);
        if prepared
            .as_ref()
            .is_err_and(|error| self.reclaim_pages(error))
        {
            prepared = self.prepare(&mut req, wire, request, limits);
        }
        match prepared {
            Ok(()) => self.issue(req),
            Err(error) if error.is_shortage() => {
                self.free_req(req);
                self.report_shortage(&error);
                return self.stall(wire);
            }
            Err(error) => {
                ratelimited!(pr_warn!("{}: failed a request: {}\n", *self.name, error));
                self.free_req(req);
                self.make_response(wire.response(error.status()));
            }
        }
        true
    }

    /// Gives up what a request lacks, as far as it is in pages that are kept mapped and not used now.
    /// Returns `true` if it may be tried again at once.
    fn reclaim_pages(&mut self, error: &DataError) -> bool {
        if error.lacks_mappings() {
            domain::reclaim_mappings();
        } else if self.in_flight != 0 || !error.is_shortage() {
            return false;
        }
        self.data_path.unmap_all_cached()
    }

    /// Says why a request waits, unless it is for a request of this queue.
    fn report_shortage(&self, error: &DataError) {
        if self.in_flight == 0 || error.lacks_mappings() {
            ratelimited!(pr_warn!("{}: a request waits: {}\n", *self.name, error));
        }
    }

    /// Keeps a request until there may be what it lacks.
    fn stall(&mut self, wire: &WireRequest) -> bool {
        self.counters.out_of_memory.add(1);
        self.stalled = Some(*wire);
        false
    }

    /// A request with space for so many segments. If there is none, then others are in flight.
    fn alloc_req(&mut self, segments: usize) -> Option<KBox<PendingReq>> {
        let req = match self.idle.pop() {
            Some(req) => Ok(req),
            None => new_pending_req(&self.events, segments, GFP_NOWAIT),
        };
        if let Ok(mut req) = req {
            if has_capacity(&req, segments)
                || reserve_segments(&mut req, segments, GFP_NOWAIT).is_ok()
            {
                return Some(req);
            }
            self.idle.push(req);
        }
        self.reserve.take()
    }

    /// Puts a request aside that is not used now.
    fn free_req(&mut self, mut req: KBox<PendingReq>) {
        req.context.segments.clear();
        if self.reserve.is_none() && has_capacity(&req, MAX_SEGMENTS) {
            self.reserve = Some(req);
        } else {
            self.idle.push(req);
        }
    }

    /// Makes a request of a request, with its memory.
    fn prepare(
        &mut self,
        req: &mut PendingReq,
        wire: &WireRequest,
        request: Request<'_>,
        limits: &DiskLimits,
    ) -> Result<(), DataError> {
        let ctx = &mut req.context;
        ctx.response = wire.response(Status::Okay);
        ctx.result = Ok(());
        ctx.responded = false;
        ctx.segments.clear();
        let (op, data) = match request {
            Request::Read(data) => (ReqOp::Read, Some(data)),
            Request::Write(data) => (ReqOp::Write, Some(data)),
            Request::Flush => (ReqOp::Flush, None),
            Request::Barrier(data) => (ReqOp::Barrier, data.map(Data::Direct)),
            Request::Discard { extent, secure } => {
                let (sector, left) = (extent.sector(), extent.sectors());
                (
                    ReqOp::Discard {
                        sector,
                        left,
                        secure,
                    },
                    None,
                )
            }
        };
        ctx.op = op;
        let extent = match data {
            None => None,
            Some(Data::Direct(direct)) => {
                for segment in direct.segments() {
                    ctx.segments
                        .push_within_capacity(segment)
                        .map_err(|_| ENOMEM)?;
                }
                Some(direct.extent())
            }
            Some(Data::Indirect(unfetched)) => Some(self.data_path.fetch(
                &unfetched,
                limits,
                &mut ctx.segments,
            )?),
        };
        (ctx.sector, ctx.sectors) =
            extent.map_or((0, 0), |extent| (extent.sector(), extent.sectors()));
        self.data_path.attach_pages(req)
    }

    fn issue(&mut self, req: KBox<PendingReq>) {
        self.count(&req);
        if req.context.op == ReqOp::Barrier {
            self.barrier = Barrier::Waiting(req);
            self.gate.may_run(false);
            return;
        }
        self.in_flight = self.in_flight.wrapping_add(1);
        if req.context.op == ReqOp::Write && is_grant_copied(&req) {
            self.writes.push(req);
            self.writes_len = self.writes_len.wrapping_add(1);
            if !fits_in_copy_batch(self.writes_len) {
                self.copy_writes();
            }
        } else {
            self.submit(req);
        }
    }

    /// Copies the data of writes, and submits them.
    fn copy_writes(&mut self) {
        if self.writes.is_empty() {
            return;
        }
        self.writes_len = 0;
        let mut writes = self.writes.take();
        self.data_path.copy(&mut writes);
        while let Some(req) = writes.pop() {
            if req.context.result.is_ok() {
                self.submit(req);
            } else {
                self.events.complete(req);
            }
        }
    }

    fn count(&self, req: &PendingReq) {
        let counters = &self.counters;
        let sectors = req.context.sectors;
        match req.context.op {
            ReqOp::Read => {
                counters.reads.add(1);
                counters.sectors_read.add(sectors);
            }
            ReqOp::Write => {
                counters.writes.add(1);
                counters.sectors_written.add(sectors);
            }
            ReqOp::Flush | ReqOp::Barrier => {
                counters.flushes.add(1);
                counters.sectors_written.add(sectors);
            }
            ReqOp::Discard { .. } => counters.discards.add(1),
        }
    }

    /// Starts a barrier if everything that came before has ended, or lets that of another queue
    /// start.
    fn advance_barrier(&mut self) {
        let idle = self.in_flight == 0 && self.stalled.is_none();
        match core::mem::replace(&mut self.barrier, Barrier::None) {
            Barrier::None if idle && self.gate.is_closed() => self.gate.set_quiesced(),
            Barrier::Waiting(req) if self.gate.may_run(idle) => {
                self.barrier = Barrier::Running;
                self.in_flight = self.in_flight.wrapping_add(1);
                self.submit(req);
            }
            other => self.barrier = other,
        }
    }

    /// Gives a request, or its next piece, to the disk.
    fn submit(&mut self, mut req: KBox<PendingReq>) {
        let (operation, sector) = next_bio(&self.disk, &mut req);
        if let Err((error, mut req)) = bio::submit(&self.disk.bdev, operation, sector, req) {
            req.context.result = Err(error);
            self.events.complete(req);
        }
    }

    /// Ends all requests that the disk is done with. Whether there were any.
    fn complete_all(&mut self) -> bool {
        let mut ended = false;
        let mut busy = self.busy.take();
        while let Some(req) = busy.pop() {
            ended |= self.complete(req);
        }
        let mut completed = self.events.take_completed();
        let mut reads = ReqList::new();
        let mut len = 0usize;
        while let Some(req) = completed.pop() {
            if req.context.has_more() {
                self.submit(req);
            } else if needs_copy_out(&req) {
                reads.push(req);
                len = len.wrapping_add(1);
                if !fits_in_copy_batch(len) {
                    len = 0;
                    ended |= self.copy_reads(reads.take());
                }
            } else {
                ended |= self.complete(req);
            }
        }
        self.copy_reads(reads) || ended
    }

    /// Copies what reads have brought to the frontend, and answers them. Whether there were any.
    fn copy_reads(&mut self, mut reads: ReqList) -> bool {
        if reads.is_empty() {
            return false;
        }
        self.data_path.copy(&mut reads);
        while let Some(req) = reads.pop() {
            self.complete(req);
        }
        true
    }

    /// Gives up the memory of a request, and answers it. `false`: its pages are busy.
    fn complete(&mut self, mut req: KBox<PendingReq>) -> bool {
        if !self.data_path.release(&mut req) {
            self.busy.push(req);
            return false;
        }
        self.in_flight = self.in_flight.wrapping_sub(1);
        if req.context.responded {
            self.free_req(req);
            return true;
        }
        if req.context.op == ReqOp::Barrier {
            self.barrier = Barrier::None;
            self.gate.open();
        }
        if let Some(node) = req.context.rejected_feature() {
            self.note_rejected(node);
        }
        self.make_response(req.context.final_response());
        self.free_req(req);
        true
    }

    /// Has an offer taken back that the disk has refused, once.
    fn note_rejected(&mut self, node: &'static str) {
        if !self.rejected_features.contains(&node) {
            // There is space: there are no other nodes.
            let _ = self.rejected_features.push_within_capacity(node);
        }
    }

    /// Writes an answer, which the frontend sees after [`Queue::push_responses`].
    fn make_response(&mut self, response: Response) {
        // Each request that was taken is answered once, so there is a slot.
        let _ = self.ring.as_mut().map(|ring| ring.put(&response));
    }

    /// Unmaps the pages of requests that have ended, and shows the frontend their answers.
    fn push_responses(&mut self) {
        self.data_path.unmap_released();
        if self.ring.as_mut().is_some_and(|ring| ring.publish()) {
            self.channel.notify();
        }
    }
}

/// What the disk is asked for next, and where.
fn next_bio(disk: &Disk, req: &mut PendingReq) -> (Operation, u64) {
    let ctx = &mut req.context;
    match ctx.op {
        ReqOp::Read => (Operation::Read, ctx.sector),
        ReqOp::Write => (Operation::Write, ctx.sector),
        ReqOp::Flush => (Operation::Flush, 0),
        ReqOp::Barrier if ctx.segments.is_empty() => (Operation::Flush, 0),
        ReqOp::Barrier => (Operation::FlushWrite, ctx.sector),
        ReqOp::Discard {
            sector,
            left,
            secure,
        } => {
            let piece = disk.discard_piece(sector, left);
            ctx.op = ReqOp::Discard {
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
