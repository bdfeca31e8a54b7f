// SPDX-License-Identifier: GPL-2.0-only

//! Queues: one ring and the kernel thread that serves it (`struct xen_blkif_ring`,
//! `xen_blkif_schedule()`).
//!
//! The thread owns the [`Queue`], so its fields need no lock. It repeats these steps, see
//! [`Queue::run`], until there is nothing to do, or other work is due:
//!
//! 1. `submit` takes all requests from the ring and starts their I/O under one plug.
//! 2. `completion` completes the requests whose I/O has completed.
//! 3. The pages of these are unmapped together, all responses are published at once, and the
//!    frontend is notified at most once.
//!
//! When there is nothing to do, the thread sleeps until an event or the completion of an I/O wakes
//! it; it does not poll the ring. While it sleeps, it lends the ring to I/O completion, see
//! [`handoff`](crate::handoff).
//!
//! Each request that was started gets a response: the thread ends only when none is in flight.
//! Requests that were not started stay in the ring for the next backend.
//!
//! A request that lacks memory or mappings is deferred, and the requests behind it stay in the
//! ring. It is retried when a request of the queue has completed, whenever the thread wakes up for
//! another reason, and by a timer. It never fails for lack of them; it waits until the shortage or
//! the connection ends.

use core::mem;

use kernel::{
    prelude::*,
    str::{
        CStr,
        CString, //
    },
    sync::{
        aref::ARef,
        Arc, //
    },
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
    xen::{
        events::EventChannel,
        xenbus, //
    },
};

use blkif::{
    backoff::Backoff,
    wire::WireRequest, //
};

use crate::{
    barrier::GateMember,
    data_path::{
        CopyBatch,
        DataPath, //
    },
    disk::{
        Disk,
        MAX_REQUEST_SEGMENTS, //
    },
    domain::{
        Domain,
        ShortageSubscriber, //
    },
    handoff::{
        Handoff,
        LentRing,
        Ring, //
    },
    io_accounting::IoAccounting,
    params::{
        BUFFER_SQUEEZE_DURATION_MS,
        LOG_STATS, //
    },
    pending_req::{
        PendingReq,
        ReqList,
        ReqPool,
        REJECTABLE_FEATURES, //
    },
    reports::{
        self,
        QueueReports,
        RejectedFeatures,
        RingStatus, //
    },
    ring_channel::RingChannel,
    stats::Counters,
    wakeup::{
        PurgeTimer,
        QueueWakeup, //
    }, //
};

/// Poll interval while pages of a completed request are still in use elsewhere, in milliseconds.
const BUSY_POLL_MS: u32 = 5;

/// Largest number of passes over the ring before the thread does its other work.
const MAX_PASSES: usize = 64;

/// Delays between attempts to start a deferred request, in milliseconds.
const RETRIES: Backoff = Backoff::new(10, 500);

/// Interval of the statistics in the log, in seconds.
const LOG_STATS_SECONDS: u32 = 10;

/// State of a queue's barrier.
pub(crate) enum BarrierState {
    /// The queue has no barrier.
    None,
    /// The barrier waits for earlier requests in all queues. No request is taken meanwhile.
    Waiting(KBox<PendingReq>),
    /// The barrier is in flight, alone.
    Running,
}

/// The parts of a queue.
pub(crate) struct QueueConfig {
    pub(crate) xbdev: ARef<xenbus::Device>,
    /// Domain, device and index of the queue.
    pub(crate) name: CString,
    pub(crate) ring_channel: RingChannel,
    pub(crate) io_accounting: Arc<IoAccounting>,
    pub(crate) disk: Arc<Disk>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) gate: GateMember,
    pub(crate) domain: Arc<Domain>,
    /// `true` if the frontend uses persistent grants.
    pub(crate) persistent: bool,
}

/// A queue, owned by its thread.
///
/// No request is in flight when it is dropped. The fields are dropped in the order of their
/// declaration: the ring is unmapped and the channel closed before the pages are unmapped.
pub(crate) struct Queue {
    pub(crate) xbdev: ARef<xenbus::Device>,
    pub(crate) name: CString,
    /// `None` while it is lent.
    pub(crate) ring: Option<KBox<Ring>>,
    pub(crate) channel: EventChannel<QueueWakeup>,
    wakeup: Arc<QueueWakeup>,
    pub(crate) handoff: Arc<Handoff<PendingReq>>,
    io_accounting: Arc<IoAccounting>,
    pub(crate) disk: Arc<Disk>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) gate: GateMember,
    pub(crate) data_path: DataPath,
    pub(crate) pool: ReqPool,
    /// Requests whose I/O has completed, and whose pages are still in use elsewhere.
    pub(crate) busy: ReqList,
    /// A request that was taken from the ring and lacks memory or mappings. It was not started.
    pub(crate) deferred: Option<WireRequest>,
    /// Delay until the deferred request is tried again.
    pub(crate) retries: Backoff,
    pub(crate) barrier: BarrierState,
    /// Writes whose data has to be copied before they are submitted.
    pub(crate) writes: CopyBatch,
    /// Number of requests that were started and that the thread has not completed, including those
    /// that I/O completion has responded to.
    pub(crate) in_flight: usize,
    pub(crate) rejected: RejectedFeatures,
    pub(crate) ring_status: RingStatus,
    /// `true` if there was work for an event since the last event was ended.
    had_work: bool,
    /// Time until which the queue keeps no unused memory, after memory was short.
    short_until: Option<Jiffies>,
    shortage: ShortageSubscriber,
    /// Time of the next purge of persistent grants, if there may be any.
    purge_at: Option<Jiffies>,
    /// Wakes the thread at that time.
    purge_timer: Pin<KBox<Timer<PurgeTimer>>>,
    /// Time of the last statistics in the log.
    logged: Jiffies,
}

impl Queue {
    /// Creates the queue of a ring that is mapped.
    pub(crate) fn new(config: QueueConfig) -> Result<Self> {
        let QueueConfig {
            xbdev,
            name,
            ring_channel,
            io_accounting,
            disk,
            counters,
            gate,
            domain,
            persistent,
        } = config;
        let RingChannel {
            ring,
            channel,
            wakeup,
        } = ring_channel;
        let handoff = Arc::pin_init(Handoff::new(wakeup.clone()), GFP_KERNEL)?;
        let data_path = DataPath::new(&xbdev, &domain, persistent)?;
        let pool = ReqPool::new(&handoff, MAX_REQUEST_SEGMENTS)?;
        let shortage = ShortageSubscriber::new(&domain, &wakeup)?;
        let purge_timer = Timer::new(TimerFlags::Default, PurgeTimer(wakeup.clone()))?;
        Ok(Self {
            xbdev,
            name,
            ring: Some(KBox::new(ring, GFP_KERNEL)?),
            channel,
            wakeup,
            handoff,
            io_accounting,
            disk,
            counters,
            gate,
            data_path,
            pool,
            busy: ReqList::new(),
            deferred: None,
            retries: RETRIES,
            barrier: BarrierState::None,
            writes: CopyBatch::new(),
            in_flight: 0,
            rejected: RejectedFeatures::new(REJECTABLE_FEATURES)?,
            ring_status: RingStatus::Usable,
            had_work: false,
            short_until: None,
            shortage,
            purge_at: None,
            purge_timer,
            logged: jiffies::now(),
        })
    }

    /// Returns domain, device and index of the queue.
    pub(crate) fn name(&self) -> &CStr {
        &self.name
    }

    /// Returns the wakeup flags of the thread.
    pub(crate) fn wakeup(&self) -> Arc<QueueWakeup> {
        self.wakeup.clone()
    }

    /// Serves the ring until the thread has to stop and no request is in flight.
    ///
    /// Context: the queue thread.
    pub(crate) fn serve(mut self, thread: &Current, reports: &impl QueueReports) {
        let _accounted = self.io_accounting.apply(thread, &self.xbdev, &self.name);
        loop {
            self.wakeup.clear_pending();
            // An event that arrives while the thread stops is not ended; no event is lost by that,
            // because the next backend checks the ring when it binds the channel.
            let event = !thread.should_stop() && self.wakeup.take_event();
            // A completion may have started the run that took the request of this event.
            self.had_work |= self.run(thread);
            // The event of a broken ring is never ended, so that no other event arrives.
            if event && self.ring_status.is_usable() {
                let had_work = mem::replace(&mut self.had_work, false);
                self.channel.eoi(!had_work);
            }
            let size_changed = self.disk.size_changed();
            reports::report(
                reports,
                &mut self.ring_status,
                &mut self.rejected,
                size_changed,
            );
            self.log_stats();
            let stopping = thread.should_stop();
            if stopping && self.all_completed() {
                // I/O completion may have published a response and not notified yet. Its
                // notification is lost once the channel is closed, and the next backend does not
                // notify of old responses.
                self.channel.notify();
                return;
            }
            self.sleep(thread, stopping);
        }
    }

    /// Returns `true` if each request that was started has its response.
    ///
    /// A deferred request is the last one that was taken, behind the last response: the next
    /// backend takes it again.
    fn all_completed(&self) -> bool {
        self.in_flight == 0 && matches!(self.barrier, BarrierState::None)
    }

    /// Serves the ring until it is empty, in at most [`MAX_PASSES`] passes, because the thread has
    /// other work too. After the last one `pending` is set.
    ///
    /// Returns `true` if a request was taken from the ring, or if a deferred request or a barrier
    /// holds requests back: then the event was not spurious.
    fn run(&mut self, thread: &Current) -> bool {
        let mut took_any = self.is_blocked();
        for _ in 0..MAX_PASSES {
            let stopping = thread.should_stop();
            let took = self.start_requests(stopping);
            let completed = self.complete_all();
            self.push_responses();
            took_any |= took;
            // A deferred request or a barrier may continue after a completion, or with memory that
            // was freed for it.
            let unblocked = (took || completed) && self.is_blocked();
            if !unblocked && !self.has_more_requests(stopping) {
                return took_any;
            }
            if self.shortage.is_short() {
                self.data_path.unmap_excess();
            }
            thread.cond_resched();
        }
        self.wakeup.set_pending();
        thread.try_to_freeze();
        took_any
    }

    /// Returns `true` if no request may be taken because of a barrier of this or another queue.
    pub(crate) fn is_gated(&self) -> bool {
        !matches!(self.barrier, BarrierState::None) || self.gate.is_closed()
    }

    /// Returns `true` if a deferred request, or a barrier of this or another queue, holds back the
    /// requests in the ring.
    pub(crate) fn is_blocked(&self) -> bool {
        self.deferred.is_some() || self.is_gated()
    }

    /// Returns `true` if requests are taken from the ring.
    #[inline]
    pub(crate) fn accepts_requests(&self, stopping: bool) -> bool {
        !stopping && self.ring_status.is_usable() && !self.is_blocked()
    }

    /// Returns `true` if requests have arrived since the ring was found empty.
    ///
    /// Otherwise the frontend sends an event with the next one.
    fn has_more_requests(&mut self, stopping: bool) -> bool {
        self.accepts_requests(stopping) && self.ring.as_mut().is_some_and(|ring| ring.final_check())
    }

    /// Sleeps until there is work.
    fn sleep(&mut self, thread: &Current, stopping: bool) {
        self.trim();
        self.lend_ring(stopping);
        let timeout = self.timeout();
        self.wakeup.wait(thread, !stopping, timeout);
        self.reclaim_ring();
    }

    /// Returns the time until the next retry or check.
    fn timeout(&mut self) -> Option<Jiffies> {
        if !self.busy.is_empty() {
            return Some(msecs_to_jiffies(BUSY_POLL_MS));
        }
        self.deferred.as_ref()?;
        Some(msecs_to_jiffies(self.retries.next_delay()))
    }

    /// Frees memory that is not needed now, and unmaps pages that other queues need.
    fn trim(&mut self) {
        if self.wakeup.take_memory_pressure() {
            let time = msecs_to_jiffies(BUFFER_SQUEEZE_DURATION_MS.get());
            self.short_until = Some(jiffies::now().wrapping_add(time));
        }
        let short = self.short_until.is_some_and(|end| !jiffies::is_past(end));
        if short {
            self.pool.shrink();
        } else {
            self.short_until = None;
        }
        if self.purge_at.is_some_and(jiffies::is_past) {
            self.purge_at = None;
            self.data_path.purge_unused();
        }
        self.data_path.trim(short);
        if self.purge_at.is_none() {
            // Pages of requests in flight are not cached now, but will be.
            if let Some(time) = self.data_path.purge_delay(self.in_flight) {
                self.purge_at = Some(jiffies::now().wrapping_add(time));
                self.purge_timer.mod_timer_after(time);
            }
        }
    }

    /// Lends the ring to I/O completion, if requests are in flight and none of them needs the
    /// thread.
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
            self.ring = self.handoff.lend(lent).err().map(|lent| lent.ring);
        }
    }

    /// Returns `true` if the thread has to run when an I/O completes, because other work waits for
    /// that.
    fn needs_thread(&self, stopping: bool) -> bool {
        stopping
            || !self.ring_status.is_usable()
            || self.is_blocked()
            || !self.busy.is_empty()
            || self.short_until.is_some()
            || self.shortage.is_short()
    }

    /// Takes the ring back, if it is lent, and completes the requests that were responded to
    /// meanwhile.
    fn reclaim_ring(&mut self) {
        if self.ring.is_some() {
            return;
        }
        let mut reclaimed = self.handoff.reclaim();
        self.ring = reclaimed.ring;
        while let Some(req) = reclaimed.responded.pop() {
            self.complete(req);
        }
    }

    /// Logs the counters, if the module parameter asks for it.
    fn log_stats(&mut self) {
        let seconds = LOG_STATS_SECONDS;
        if LOG_STATS.get() != 0 && jiffies::since(self.logged) >= msecs_to_jiffies(seconds * 1000) {
            self.logged = jiffies::now();
            let (name, counters) = (&*self.name, &*self.counters);
            dev_info!(self.xbdev.as_ref(), "{name}: {counters}\n");
        }
    }
}
