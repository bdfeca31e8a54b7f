// SPDX-License-Identifier: GPL-2.0-only

//! A queue: one ring, and the thread that serves it.
//!
//! The thread owns the queue, so there is no lock. It takes the waiting requests from the ring,
//! starts their I/O together, completes the requests whose I/O has ended, publishes all responses,
//! and notifies the frontend at most once. Then it waits for an event, a completion or the main
//! thread.
//!
//! Each request that was started gets a response: the thread ends only when nothing is in flight.
//! Requests that were not started stay in the ring for the next backend. A request for which there
//! is no memory waits, and so do those behind it in the ring.
//!
//! After a temporary error of the image the request is retried, up to [`Settings::retry_time`]
//! after it was taken; the frontend does not see the error.

use crate::barrier::GateMember;
use crate::disk::Disk;
use crate::error::Error;
use crate::inflight::Entry;
use crate::inflight::InflightQueue;
use crate::memory::piece;
use crate::memory::DataError;
use crate::memory::DataPath;
use crate::ring::RingMemory;
use crate::stats::Counter;
use crate::stats::Stats;
use crate::wakeup;
use crate::wakeup::Wakeup;
use api::OldestRequest;
use api::QueueStatus;
use api::Quota;
use blkif::backoff::Backoff;
use blkif::request;
use blkif::request::Data;
use blkif::request::DiskLimits;
use blkif::request::Extent;
use blkif::request::Request;
use blkif::ring::BackRing;
use blkif::ring::RingError;
use blkif::token_bucket::TokenBucket;
use blkif::wire::op;
use blkif::wire::Response;
use blkif::wire::Status;
use blkif::wire::WireRequest;
use blkif::wire::SECTOR_SIZE;
use engine::Buffer;
use engine::Completion;
use engine::Errno;
use engine::Operation;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::Release;
use std::sync::mpsc::Sender;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;
use std::time::Instant;
use xen_user::event::Channel;
use xen_user::grant::Copies;
use xen_user::grant::Piece;

/// Number of copies in one call.
const COPIES: usize = 256;

/// Delays between attempts to get memory for a request, in milliseconds.
const MEMORY_RETRIES: Backoff = Backoff::new(10, 500);

/// Delays between attempts after a temporary error of the image, in milliseconds.
const ERROR_RETRIES: Backoff = Backoff::new(10, 1000);

/// Messages that a frontend may cause at once, and how long each one more takes, in milliseconds.
pub(crate) const MESSAGES: u32 = 10;
pub(crate) const MESSAGE_MS: u64 = 5000;

/// Poll interval of a queue that cannot wait for events.
const BROKEN_PERIOD: Duration = Duration::from_millis(100);

/// The settings of an administrator.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Time for which a request is retried after a temporary error.
    pub retry_time: Duration,
    /// A write that the storage has no space for is retried too.
    pub wait_for_space: bool,
    /// Age at which a request in flight is reported.
    pub stuck_time: Duration,
}

impl Settings {
    /// Returns `true` if a request that has failed with an error may succeed later.
    fn is_temporary(&self, errno: Errno) -> bool {
        match errno {
            Errno::AGAIN | Errno::BUSY | Errno::INTR | Errno::NOTCONN | Errno::TIMEDOUT => true,
            Errno::NOSPC | Errno::DQUOT => self.wait_for_space,
            _ => false,
        }
    }
}

/// An event that a queue reports to the main thread.
pub(crate) enum QueueEvent {
    /// The frontend has broken the ring, or the image accepts no more requests.
    Broken(Error),
    /// The image does not support the feature of a node.
    Withdraw(&'static str),
    /// The thread ends: nothing is in flight, and it has given up the ring.
    Ended,
}

/// Sends events of queues to the main thread.
#[derive(Clone)]
pub(crate) struct EventSender {
    pub(crate) sender: Sender<(u64, QueueEvent)>,
    pub(crate) wakeup: Arc<Wakeup>,
    /// Number of the connection.
    pub(crate) connection: u64,
}

impl EventSender {
    fn send(&self, event: QueueEvent) {
        // If the main thread has ended, so will the process.
        let _ = self.sender.send((self.connection, event));
        self.wakeup.set();
    }
}

/// The requests of the main thread to a queue.
pub(crate) struct QueueControl {
    stop: AtomicBool,
    pause: AtomicBool,
    /// It is paused, and nothing is in flight.
    paused: AtomicBool,
    /// It keeps memory that it may not need.
    keeps_memory: AtomicBool,
    /// It has to give up such memory.
    purge: AtomicBool,
    report: Mutex<Report>,
    /// Pages and requests that the queue may use at a time; a single request may always be served.
    max_pages: AtomicU32,
    max_requests: AtomicU32,
    wakeup: Arc<Wakeup>,
}

/// The requests in flight when a queue last began to wait.
#[derive(Clone, Copy, Default)]
struct Report {
    in_flight: u64,
    /// The oldest one, whose age is 0 here, and when it was taken.
    oldest: Option<(OldestRequest, Instant)>,
}

impl QueueControl {
    pub(crate) fn new(wakeup: Arc<Wakeup>, quota: Quota) -> Self {
        Self {
            stop: AtomicBool::new(false),
            pause: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            keeps_memory: AtomicBool::new(false),
            purge: AtomicBool::new(false),
            report: Mutex::default(),
            max_pages: AtomicU32::new(quota.pages),
            max_requests: AtomicU32::new(quota.requests),
            wakeup,
        }
    }

    /// Changes what the queue may use.
    pub(crate) fn set_quota(&self, quota: Quota) {
        self.max_pages.store(quota.pages, Relaxed);
        self.max_requests.store(quota.requests, Relaxed);
        self.wakeup.set();
    }

    /// Returns `true` if the queue may use more than these pages and requests.
    fn allows(&self, pages: usize, requests: usize) -> bool {
        let below = |value: usize, limit: &AtomicU32| {
            u32::try_from(value).is_ok_and(|value| value <= limit.load(Relaxed))
        };
        below(pages, &self.max_pages) && below(requests, &self.max_requests)
    }

    /// Makes the thread end when nothing is in flight.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Release);
        self.wakeup.set();
    }

    /// Makes the thread take no more requests, or take requests again.
    pub(crate) fn pause(&self, pause: bool) {
        self.paused.store(false, Release);
        self.pause.store(pause, Release);
        self.wakeup.set();
    }

    /// Returns `true` if the queue was paused by the last call of [`Self::pause`] and nothing is in
    /// flight.
    pub(crate) fn is_paused(&self) -> bool {
        self.pause.load(Acquire) && self.paused.load(Acquire)
    }

    /// Returns `true` if the queue keeps memory that it may not need, until the next call of
    /// [`Self::purge`].
    pub(crate) fn keeps_memory(&self) -> bool {
        self.keeps_memory.load(Relaxed)
    }

    /// Makes the queue give up memory that it has not used for a while.
    pub(crate) fn purge(&self) {
        if self.keeps_memory.swap(false, Relaxed) {
            self.purge.store(true, Release);
            self.wakeup.set();
        }
    }

    /// Returns the state of the queue for `rblk`.
    pub(crate) fn status(&self) -> QueueStatus {
        let report = *self.lock_report();
        let oldest = report.oldest.map(|(request, taken)| OldestRequest {
            age_ms: u64::try_from(taken.elapsed().as_millis()).unwrap_or(u64::MAX),
            ..request
        });
        QueueStatus {
            in_flight: report.in_flight,
            oldest,
            paused: self.is_paused(),
        }
    }

    fn lock_report(&self) -> MutexGuard<'_, Report> {
        // The report is valid at any time.
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The next step of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    Read,
    Write,
    Flush,
    /// A barrier, first step: the requests before it become durable.
    BarrierFlush,
    /// A barrier, second step: its data is written and becomes durable.
    BarrierWrite,
    Discard,
}

/// A request that was taken and has no response yet (`struct pending_req`).
struct PendingReq {
    /// The response without an error.
    response: Response,
    step: Step,
    /// The range of the image in bytes.
    offset: u64,
    length: u64,
    /// The data in the frontend's pages.
    pieces: Vec<Piece>,
    /// The memory of the data, unless the image has it.
    buffers: Vec<Buffer>,
    entry: Entry,
    taken: Instant,
    retries: Backoff,
    /// Number of tries after an error of the image that may pass.
    tries: u32,
    /// It was reported because it takes too long.
    reported: bool,
}

/// It stays in one place, so that only its address is moved.
type Pending = Box<PendingReq>;

impl PendingReq {
    fn operation(&self) -> Operation {
        match self.step {
            Step::Read => Operation::Read,
            Step::Write => Operation::Write { fua: false },
            Step::BarrierWrite => Operation::Write { fua: true },
            Step::Flush | Step::BarrierFlush => Operation::Flush,
            Step::Discard => Operation::Discard,
        }
    }

    /// Describes the request for `rblk`.
    fn describe(&self) -> OldestRequest {
        OldestRequest {
            operation: match self.step {
                Step::Read => api::Operation::Read,
                Step::Write => api::Operation::Write,
                Step::Flush => api::Operation::Flush,
                Step::BarrierFlush | Step::BarrierWrite => api::Operation::Barrier,
                Step::Discard => api::Operation::Discard,
            },
            sector: self.offset / u64::from(SECTOR_SIZE),
            sectors: self.length / u64::from(SECTOR_SIZE),
            retries: self.tries,
            age_ms: 0,
        }
    }

    /// Returns the request to the image, with the memory of its data.
    fn request(&mut self, tag: u64) -> engine::Request {
        let (offset, length, buffers) = match self.step {
            // The data of a barrier is written later.
            Step::Flush | Step::BarrierFlush => (0, 0, Vec::new()),
            _ => (self.offset, self.length, mem::take(&mut self.buffers)),
        };
        engine::Request {
            operation: self.operation(),
            offset,
            length,
            buffers,
            tag,
        }
    }

    /// Returns the response after an error of the image.
    fn failed(&self, errno: Errno) -> Response {
        let optional = !matches!(self.step, Step::Read | Step::Write);
        let status = if optional && errno == Errno::OPNOTSUPP {
            Status::NotSupported
        } else {
            Status::Error
        };
        Response {
            status,
            ..self.response
        }
    }

    /// Returns the node of the feature that the image does not support, if that is the error.
    fn refused_node(&self, errno: Errno) -> Option<&'static str> {
        match (self.step, self.response.operation) {
            _ if errno != Errno::OPNOTSUPP => None,
            (Step::Read | Step::Write, _) => None,
            (Step::Discard, _) => Some("feature-discard"),
            (_, op::WRITE_BARRIER) => Some("feature-barrier"),
            _ => Some("feature-flush-cache"),
        }
    }
}

/// Requests that were submitted to the image; their tags are their places.
#[derive(Default)]
struct Requests {
    pending: Vec<Option<Pending>>,
    /// Places without a request.
    free: Vec<usize>,
}

impl Requests {
    /// Adds a request, and returns the request to the image.
    fn insert(&mut self, mut pending: Pending) -> engine::Request {
        let place = self.free.pop().unwrap_or(self.pending.len());
        let request = pending.request(place as u64);
        match self.pending.get_mut(place) {
            Some(free) => *free = Some(pending),
            None => self.pending.push(Some(pending)),
        }
        request
    }

    /// Removes the request of a completion, which has the memory of its data.
    fn remove(&mut self, tag: u64, buffers: Vec<Buffer>) -> Option<Pending> {
        let place = usize::try_from(tag).ok()?;
        let mut pending = self.pending.get_mut(place)?.take()?;
        self.free.push(place);
        if !buffers.is_empty() {
            pending.buffers = buffers;
        }
        Some(pending)
    }
}

/// The state of a queue's barrier.
enum Barrier {
    None,
    /// It waits for the requests before it, in all queues. No request is taken meanwhile.
    Waiting(Pending),
    /// It is being executed, alone.
    Running,
}

/// The parts of a queue.
pub(crate) struct QueueConfig {
    /// For messages: domain, device and number of the queue.
    pub(crate) name: String,
    pub(crate) index: u32,
    pub(crate) ring: BackRing<RingMemory>,
    pub(crate) channel: Box<dyn Channel>,
    pub(crate) image: Box<dyn engine::Queue>,
    pub(crate) data: DataPath,
    pub(crate) domain: u16,
    pub(crate) disk: Arc<Disk>,
    pub(crate) gate: GateMember,
    pub(crate) stats: Arc<Stats>,
    pub(crate) control: Arc<QueueControl>,
    pub(crate) events: EventSender,
    pub(crate) inflight: InflightQueue,
    /// Index of the next request, and of the next response.
    pub(crate) consumer: u32,
    pub(crate) responses: u32,
    /// Requests that a predecessor had taken.
    pub(crate) adopted: Vec<(Entry, WireRequest)>,
    pub(crate) settings: Settings,
}

/// A queue, owned by its thread.
pub(crate) struct Queue {
    config: QueueConfig,
    requests: Requests,
    /// Requests that were taken from the ring, and not started.
    backlog: VecDeque<(Entry, WireRequest)>,
    memory_retries: Backoff,
    barrier: Barrier,
    /// Writes whose data Xen has to copy before they are submitted, and the number of their
    /// pieces.
    incoming: Vec<Pending>,
    incoming_pieces: usize,
    /// Reads whose data Xen has to copy.
    outgoing: Vec<Pending>,
    /// Requests that are retried, with their times.
    delayed: Vec<(Instant, Pending)>,
    /// Requests that have ended, whose memory is used again.
    spare: Vec<Pending>,
    completions: Vec<Completion>,
    /// The descriptor of the image was readable.
    image_ready: bool,
    /// Entries of the in-flight table whose responses are not published.
    answered: Vec<Entry>,
    /// Requests that were started and have no response, and their pages.
    in_flight: usize,
    pages: usize,
    /// Some requests were submitted and not started.
    submitted: bool,
    /// No request is taken from the ring any more.
    broken: bool,
    /// Nodes that were withdrawn.
    withdrawn: Vec<&'static str>,
    /// When a request in flight has to be reported, if none completes before.
    stuck_at: Option<Instant>,
    /// The main thread knows that nothing is in flight.
    reported_idle: bool,
    messages: TokenBucket,
    started: Instant,
    now: Instant,
}

impl Queue {
    pub(crate) fn new(mut config: QueueConfig) -> Self {
        let backlog = mem::take(&mut config.adopted).into();
        Self {
            config,
            requests: Requests::default(),
            backlog,
            memory_retries: MEMORY_RETRIES,
            barrier: Barrier::None,
            incoming: Vec::new(),
            incoming_pieces: 0,
            outgoing: Vec::new(),
            delayed: Vec::new(),
            spare: Vec::new(),
            completions: Vec::new(),
            image_ready: false,
            answered: Vec::new(),
            in_flight: 0,
            pages: 0,
            submitted: false,
            broken: false,
            withdrawn: Vec::new(),
            stuck_at: None,
            reported_idle: false,
            messages: TokenBucket::new(MESSAGES, MESSAGE_MS, 0),
            started: Instant::now(),
            now: Instant::now(),
        }
    }

    /// Serves the ring until the queue is stopped.
    pub(crate) fn serve(mut self) {
        let adopted = self.backlog.len();
        self.config.stats.add(Counter::Adopted, adopted as u64);
        // Notifications of a predecessor may be lost.
        self.notify();
        loop {
            self.run_once();
            if self.is_stopping() && self.is_drained() {
                break;
            }
            self.report_pause();
            if let Err(error) = self.sleep() {
                self.break_down(Error::Own("waiting for events", error));
                thread::sleep(BROKEN_PERIOD);
            }
        }
        let events = self.config.events.clone();
        // Unmaps the ring and all pages, and unbinds the event channel.
        drop(self);
        events.send(QueueEvent::Ended);
    }

    fn is_stopping(&self) -> bool {
        self.config.control.stop.load(Acquire)
    }

    fn is_pausing(&self) -> bool {
        self.config.control.pause.load(Acquire)
    }

    /// Returns `true` if each request that was started has its response.
    fn is_drained(&self) -> bool {
        self.in_flight == 0 && matches!(self.barrier, Barrier::None)
    }

    fn report_pause(&self) {
        let paused = self.is_pausing() && self.is_drained();
        self.config.control.paused.store(paused, Release);
    }

    /// Reports that the ring or the image is unusable, once, and takes no more requests.
    fn break_down(&mut self, error: Error) {
        if !mem::replace(&mut self.broken, true) {
            self.config.events.send(QueueEvent::Broken(error));
        }
    }

    /// Does all pending work.
    fn run_once(&mut self) {
        loop {
            let took = self.take();
            let ended = self.complete_all();
            self.publish();
            let has_more = (took || ended) && self.is_blocked() || self.has_more_requests();
            if !has_more {
                return;
            }
        }
    }

    /// Returns `true` if requests wait, for memory or for a barrier of this or another queue.
    fn is_blocked(&self) -> bool {
        !self.backlog.is_empty() || self.is_gated()
    }

    fn is_gated(&self) -> bool {
        !matches!(self.barrier, Barrier::None) || self.config.gate.is_closed()
    }

    /// Returns `true` if requests are taken from the ring.
    fn accepts_requests(&self) -> bool {
        !self.is_stopping() && !self.is_pausing() && !self.broken && !self.is_blocked()
    }

    /// Returns `true` if requests have come since the ring was found empty. If not, the next one
    /// will send an event.
    fn has_more_requests(&mut self) -> bool {
        self.accepts_requests() && self.config.ring.final_check()
    }

    /// Starts all requests that can be started now. Returns `true` if there were any.
    fn take(&mut self) -> bool {
        let limits = self.config.disk.limits();
        let took = self.take_all(&limits);
        self.resubmit_delayed();
        self.copy_incoming();
        self.run_barrier();
        self.kick();
        took
    }

    fn take_all(&mut self, limits: &DiskLimits) -> bool {
        let mut took = false;
        while !self.is_gated() && !self.is_pausing() {
            let Some((entry, wire)) = self.backlog.pop_front() else {
                break;
            };
            if !self.begin(entry, &wire, limits) {
                self.backlog.push_front((entry, wire));
                return took;
            }
            self.memory_retries.reset();
            took = true;
        }
        let mut wire = WireRequest::EMPTY;
        while self.accepts_requests() {
            match self.config.ring.take_request_to(&mut wire) {
                Ok(true) => {
                    took = true;
                    self.taken(&wire, limits);
                }
                Ok(false) => break,
                Err(error) => {
                    let error = Error::Ring(self.config.index, error);
                    self.break_down(error);
                }
            }
        }
        took
    }

    /// Records a request that was taken from the ring, and starts it.
    fn taken(&mut self, wire: &WireRequest, limits: &DiskLimits) {
        let index = self.config.consumer;
        self.config.consumer = index.wrapping_add(1);
        let Some(entry) = self.config.inflight.take(index, wire) else {
            // The ring does not give more requests than it has slots.
            let error = RingError::Requests {
                req_prod: index,
                req_cons: index,
            };
            let error = Error::Ring(self.config.index, error);
            return self.break_down(error);
        };
        if !self.begin(entry, wire, limits) {
            self.config.stats.add(Counter::Waited, 1);
            self.backlog.push_back((entry, *wire));
        }
    }

    /// Checks a request and starts it. Returns `false` if it has to wait for memory.
    fn begin(&mut self, entry: Entry, wire: &WireRequest, limits: &DiskLimits) -> bool {
        match request::check(wire, limits) {
            Ok(request) => self.start(entry, wire, request, limits),
            Err(invalid) => {
                self.refuse(entry, wire.response(invalid.status()), &invalid);
                true
            }
        }
    }

    /// Prints a message that the frontend can cause, rate-limited.
    fn warn(&mut self, message: fmt::Arguments<'_>) {
        let time = self.now.saturating_duration_since(self.started);
        let time = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        if self.messages.take(time).is_ok() {
            api::message!("{}: {message}", self.config.name);
        }
    }

    /// Writes the response to an invalid request.
    fn refuse(&mut self, entry: Entry, response: Response, why: &dyn fmt::Display) {
        self.config.stats.add(Counter::Refused, 1);
        self.warn(format_args!("refused a request: {why}"));
        self.answer(entry, response);
    }

    fn start(
        &mut self,
        entry: Entry,
        wire: &WireRequest,
        request: Request<'_>,
        limits: &DiskLimits,
    ) -> bool {
        let pages = self.pages.saturating_add(request.segments());
        let requests = self.in_flight.saturating_add(1);
        if self.in_flight != 0 && !self.config.control.allows(pages, requests) {
            return false;
        }
        let mut pending = self.spare.pop().unwrap_or_else(|| {
            Box::new(PendingReq {
                response: wire.response(Status::Okay),
                step: Step::Flush,
                offset: 0,
                length: 0,
                pieces: Vec::new(),
                buffers: Vec::new(),
                entry,
                taken: self.now,
                retries: ERROR_RETRIES,
                tries: 0,
                reported: false,
            })
        });
        let error = match self.prepare(&mut pending, entry, wire, request, limits) {
            Ok(()) => {
                self.dispatch(pending);
                return true;
            }
            Err(error) => error,
        };
        self.recycle(pending);
        match error {
            DataError::Refused(invalid) => {
                self.refuse(entry, wire.response(invalid.status()), &invalid);
            }
            DataError::Call(error)
                if error.kind() == io::ErrorKind::OutOfMemory && self.in_flight != 0 =>
            {
                return false;
            }
            // Other queues of the image have the memory.
            DataError::Call(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            error => {
                self.warn(format_args!("failed a request: {error}"));
                self.config.stats.add(Counter::Errors, 1);
                self.answer(entry, wire.response(error.status()));
            }
        }
        true
    }

    /// Sets up the pending request of a valid request, with its memory.
    fn prepare(
        &mut self,
        pending: &mut PendingReq,
        entry: Entry,
        wire: &WireRequest,
        request: Request<'_>,
        limits: &DiskLimits,
    ) -> Result<(), DataError> {
        let (step, data, range) = match request {
            Request::Read(data) => (Step::Read, Some(data), None),
            Request::Write(data) => (Step::Write, Some(data), None),
            Request::Flush => (Step::Flush, None, None),
            Request::Barrier(data) => (Step::BarrierFlush, data.map(Data::Direct), None),
            Request::Discard { extent, .. } => (Step::Discard, None, Some(extent)),
        };
        let (data_path, pieces) = (&mut self.config.data, &mut pending.pieces);
        let extent = match data {
            None => range,
            Some(Data::Direct(direct)) => {
                pieces.extend(direct.segments().map(|segment| piece(&segment)));
                Some(direct.extent())
            }
            Some(Data::Indirect(unfetched)) => {
                Some(data_path.fetch_segments(&unfetched, limits, pieces, self.now)?)
            }
        };
        let (offset, length) = extent.map_or((0, 0), bytes);
        if !pieces.is_empty() {
            let len = usize::try_from(length).unwrap_or(usize::MAX);
            let buffer = data_path.allocate(&mut *self.config.image, len)?;
            pending.buffers.push(buffer);
        }
        pending.response = wire.response(Status::Okay);
        pending.step = step;
        pending.offset = offset;
        pending.length = length;
        pending.entry = entry;
        pending.taken = self.now;
        pending.retries = ERROR_RETRIES;
        pending.tries = 0;
        pending.reported = false;
        Ok(())
    }

    /// Keeps the memory of a request that has ended for another one.
    fn recycle(&mut self, mut pending: Pending) {
        for buffer in pending.buffers.drain(..) {
            self.config.data.free(&mut *self.config.image, buffer);
        }
        pending.pieces.clear();
        self.spare.push(pending);
    }

    fn dispatch(&mut self, mut pending: Pending) {
        self.count(&pending);
        self.pages = self.pages.saturating_add(pending.pieces.len());
        if pending.step == Step::BarrierFlush {
            return self.dispatch_barrier(pending);
        }
        self.in_flight = self.in_flight.saturating_add(1);
        if pending.step != Step::Write || self.read_mapped(&mut pending) {
            return self.submit(pending);
        }
        self.incoming_pieces = self.incoming_pieces.saturating_add(pending.pieces.len());
        self.incoming.push(pending);
        if self.incoming_pieces >= COPIES {
            self.copy_incoming();
        }
    }

    /// Copies the data of a write from pages that are mapped. Returns `false` if some are not.
    fn read_mapped(&mut self, pending: &mut PendingReq) -> bool {
        let (data, pieces) = (&mut self.config.data, &pending.pieces);
        let buffer = pending.buffers.first_mut();
        buffer.is_some_and(|buffer| data.read_mapped(buffer, pieces, self.now))
    }

    fn dispatch_barrier(&mut self, mut pending: Pending) {
        let result = if self.read_mapped(&mut pending) {
            Ok(())
        } else {
            self.copy_from(&mut pending)
        };
        if let Err(error) = result {
            self.in_flight = self.in_flight.saturating_add(1);
            pending.step = Step::Write;
            return self.fail(pending, &error);
        }
        self.barrier = Barrier::Waiting(pending);
        self.config.gate.may_run(false);
    }

    /// Has Xen copy the data of a single request from the frontend's pages.
    fn copy_from(&self, pending: &mut PendingReq) -> Result<(), DataError> {
        match pending.buffers.first_mut() {
            Some(buffer) => self.config.data.copy_from(buffer, &pending.pieces),
            None => Ok(()),
        }
    }

    /// Has Xen copy the data of a single request to the frontend's pages.
    fn copy_to(&self, pending: &PendingReq) -> Result<(), DataError> {
        match pending.buffers.first() {
            Some(buffer) => self.config.data.copy_to(buffer, &pending.pieces),
            None => Ok(()),
        }
    }

    fn count(&self, pending: &PendingReq) {
        let (stats, sectors) = (&self.config.stats, pending.length / u64::from(SECTOR_SIZE));
        match pending.step {
            Step::Read => {
                stats.add(Counter::ReadsStarted, 1);
                stats.add(Counter::SectorsRead, sectors);
            }
            Step::Write => {
                stats.add(Counter::WritesStarted, 1);
                stats.add(Counter::SectorsWritten, sectors);
            }
            Step::Flush | Step::BarrierFlush | Step::BarrierWrite => {
                stats.add(Counter::Flushes, 1);
                stats.add(Counter::SectorsWritten, sectors);
            }
            Step::Discard => stats.add(Counter::Discards, 1),
        }
    }

    /// Copies the data of writes, and submits them.
    fn copy_incoming(&mut self) {
        let mut incoming = mem::take(&mut self.incoming);
        let pieces = mem::take(&mut self.incoming_pieces);
        if incoming.is_empty() {
            return;
        }
        let mut copies = Copies::new(self.config.domain, pieces);
        let ranges: Vec<_> = incoming
            .iter_mut()
            .map(|pending| {
                let pieces = pending.pieces.iter().copied();
                copies.fetch(pending.buffers.first_mut()?, pieces)
            })
            .collect();
        let statuses = self.copy(&mut copies, ranges);
        for (mut pending, copied) in incoming.drain(..).zip(statuses) {
            let result = if copied {
                Ok(())
            } else {
                // Copies it by itself, because its pages may have been paged out.
                self.copy_from(&mut pending)
            };
            match result {
                Ok(()) => self.submit(pending),
                Err(error) => self.fail(pending, &error),
            }
        }
        self.incoming = incoming;
    }

    /// Makes copies, and returns for each request, by its range, `true` if they were made.
    fn copy(&self, copies: &mut Copies<'_>, ranges: Vec<Option<Range<usize>>>) -> Vec<bool> {
        let copied = self.config.data.copy(copies).is_ok();
        let ranges = ranges.into_iter();
        ranges
            .map(|range| copied && range.is_some_and(|range| copies.status(range).is_okay()))
            .collect()
    }

    /// Starts a barrier if everything that came before has completed, or lets that of another queue
    /// start.
    fn run_barrier(&mut self) {
        // The requests in the backlog were taken after the barrier if it is of this queue, and were
        // not started before it if it is of another queue.
        let idle = self.in_flight == 0;
        match mem::replace(&mut self.barrier, Barrier::None) {
            Barrier::None if idle && self.config.gate.is_closed() => self.config.gate.set_drained(),
            Barrier::Waiting(pending) if self.config.gate.may_run(idle) => {
                self.barrier = Barrier::Running;
                self.in_flight = self.in_flight.saturating_add(1);
                self.submit(pending);
            }
            other => self.barrier = other,
        }
    }

    /// Submits a request to the image.
    fn submit(&mut self, pending: Pending) {
        let request = self.requests.insert(pending);
        self.config.image.submit(request);
        self.submitted = true;
    }

    /// Submits the requests whose retry is due.
    fn resubmit_delayed(&mut self) {
        if self.delayed.is_empty() {
            return;
        }
        let now = self.now;
        let delayed = mem::take(&mut self.delayed);
        for (time, pending) in delayed {
            if time <= now {
                self.submit(pending);
            } else {
                self.delayed.push((time, pending));
            }
        }
    }

    fn kick(&mut self) {
        if !mem::take(&mut self.submitted) {
            return;
        }
        if let Err(error) = self.config.image.kick() {
            self.break_down(Error::Image(error));
        }
    }

    /// Completes all requests whose I/O has ended. Returns `true` if there were any.
    fn complete_all(&mut self) -> bool {
        // The image may have something to do without requests: it has lost its server.
        if !mem::take(&mut self.image_ready) && self.config.image.in_flight() == 0 {
            return false;
        }
        let mut completions = mem::take(&mut self.completions);
        if let Err(error) = self.config.image.completions(&mut completions) {
            self.break_down(Error::Image(error));
        }
        let ended = !completions.is_empty();
        if ended {
            self.now = Instant::now();
        }
        for completion in completions.drain(..) {
            let pending = self.requests.remove(completion.tag, completion.buffers);
            match (pending, completion.result) {
                (Some(pending), Ok(())) => self.succeed(pending),
                (Some(pending), Err(error)) => self.image_failed(pending, &error),
                (None, _) => {}
            }
        }
        self.completions = completions;
        self.copy_outgoing();
        self.kick();
        ended
    }

    fn succeed(&mut self, mut pending: Pending) {
        match pending.step {
            Step::Read if !self.write_mapped(&pending) => self.outgoing.push(pending),
            Step::BarrierFlush if !pending.pieces.is_empty() => {
                pending.step = Step::BarrierWrite;
                self.submit(pending);
            }
            _ => {
                let response = pending.response;
                self.finish(pending, response);
            }
        }
    }

    /// Copies the data of a read to pages that are mapped. Returns `false` if some are not.
    fn write_mapped(&mut self, pending: &PendingReq) -> bool {
        let data = &mut self.config.data;
        let buffer = pending.buffers.first();
        buffer.is_some_and(|buffer| data.write_mapped(buffer, &pending.pieces, self.now))
    }

    /// Schedules a retry of a request, or writes its response with an error.
    fn image_failed(&mut self, mut pending: Pending, error: &engine::Error) {
        let settings = self.config.settings;
        let deadline = pending.taken + settings.retry_time;
        if settings.is_temporary(error.errno()) && self.now < deadline {
            self.config.stats.add(Counter::Retries, 1);
            pending.tries = pending.tries.saturating_add(1);
            let delay = Duration::from_millis(pending.retries.next_delay().into());
            let time = (self.now + delay).min(deadline);
            return self.delayed.push((time, pending));
        }
        self.warn(format_args!("{:?} fails: {error}", pending.step));
        if let Some(node) = pending.refused_node(error.errno()) {
            self.withdraw(node);
        }
        self.config.stats.add(Counter::Errors, 1);
        let response = pending.failed(error.errno());
        self.finish(pending, response);
    }

    /// Makes the main thread withdraw a feature that the image does not support, once.
    fn withdraw(&mut self, node: &'static str) {
        if !self.withdrawn.contains(&node) {
            self.withdrawn.push(node);
            self.config.events.send(QueueEvent::Withdraw(node));
        }
    }

    /// Has Xen copy the data of reads to the frontend, and writes their responses.
    fn copy_outgoing(&mut self) {
        if self.outgoing.is_empty() {
            return;
        }
        let mut outgoing = mem::take(&mut self.outgoing);
        let pieces = outgoing.iter().map(|pending| pending.pieces.len());
        let mut copies = Copies::new(self.config.domain, pieces.sum());
        let ranges: Vec<_> = outgoing
            .iter()
            .map(|pending| {
                let pieces = pending.pieces.iter().copied();
                copies.store(pending.buffers.first()?, pieces)
            })
            .collect();
        let statuses = self.copy(&mut copies, ranges);
        drop(copies);
        for (pending, copied) in outgoing.drain(..).zip(statuses) {
            let result = if copied {
                Ok(())
            } else {
                self.copy_to(&pending)
            };
            match result {
                Ok(()) => {
                    let response = pending.response;
                    self.finish(pending, response);
                }
                Err(error) => self.fail(pending, &error),
            }
        }
        self.outgoing = outgoing;
    }

    /// Writes the response to a request whose data cannot be moved.
    fn fail(&mut self, pending: Pending, error: &DataError) {
        self.warn(format_args!("failed a request: {error}"));
        self.config.stats.add(Counter::Errors, 1);
        let response = Response {
            status: error.status(),
            ..pending.response
        };
        self.finish(pending, response);
    }

    /// Writes the response to a request, and releases its memory.
    fn finish(&mut self, pending: Pending, response: Response) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.pages = self.pages.saturating_sub(pending.pieces.len());
        let (entry, taken) = (pending.entry, pending.taken);
        match pending.step {
            Step::Read => self.count_end(taken, Counter::Reads, Counter::ReadTime),
            Step::Write => self.count_end(taken, Counter::Writes, Counter::WriteTime),
            Step::BarrierFlush | Step::BarrierWrite => {
                self.barrier = Barrier::None;
                self.config.gate.open();
            }
            Step::Flush | Step::Discard => {}
        }
        self.recycle(pending);
        self.answer(entry, response);
    }

    fn count_end(&self, taken: Instant, requests: Counter, time: Counter) {
        let elapsed = self.now.saturating_duration_since(taken).as_micros();
        let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.config.stats.add(requests, 1);
        self.config.stats.add(time, elapsed);
    }

    /// Writes a response, which the frontend sees after [`Queue::publish`].
    fn answer(&mut self, entry: Entry, response: Response) {
        self.config.inflight.answer(entry, self.config.responses);
        self.config.responses = self.config.responses.wrapping_add(1);
        self.answered.push(entry);
        // Each request that was taken gets one response, so there is a slot.
        let _ = self.config.ring.put(&response);
    }

    /// Publishes all responses.
    fn publish(&mut self) {
        if self.answered.is_empty() {
            return;
        }
        if self.config.ring.publish() {
            self.notify();
        }
        for entry in self.answered.drain(..) {
            self.config.inflight.release(entry);
        }
    }

    fn notify(&mut self) {
        if let Err(error) = self.config.channel.notify() {
            self.break_down(Error::Own("notifying the frontend", error));
        }
    }

    /// Waits until there is something to do.
    fn sleep(&mut self) -> io::Result<()> {
        self.report_requests();
        self.report_memory();
        let timeout = self.timeout();
        let fds = [
            self.config.channel.fd(),
            self.config.image.as_fd(),
            self.config.control.wakeup.as_fd(),
        ];
        let [event, image_ready, woken] = wakeup::wait(fds, timeout)?;
        self.now = Instant::now();
        self.image_ready = image_ready;
        if woken {
            self.config.control.wakeup.clear();
            self.purge();
        }
        if event {
            self.config.channel.take()?;
        }
        self.report_stuck();
        Ok(())
    }

    /// Returns all requests in flight.
    fn pending(&self) -> impl Iterator<Item = &PendingReq> {
        let delayed = self.delayed.iter().map(|(_, pending)| pending);
        let barrier = match &self.barrier {
            Barrier::Waiting(pending) => Some(pending),
            Barrier::None | Barrier::Running => None,
        };
        let submitted = self.requests.pending.iter().flatten();
        let all = submitted.chain(delayed).chain(barrier);
        all.map(|pending| &**pending)
    }

    /// Tells the main thread what is in flight, and finds out when to report a request.
    fn report_requests(&mut self) {
        let idle = self.is_drained();
        if idle && mem::replace(&mut self.reported_idle, idle) {
            return;
        }
        self.reported_idle = idle;
        let oldest = self.pending().min_by_key(|pending| pending.taken);
        let unreported = self.pending().filter(|pending| !pending.reported);
        let unreported = unreported.map(|pending| pending.taken).min();
        let limit = self.config.settings.stuck_time;
        *self.config.control.lock_report() = Report {
            in_flight: self.in_flight as u64,
            oldest: oldest.map(|pending| (pending.describe(), pending.taken)),
        };
        self.stuck_at = unreported.and_then(|taken| taken.checked_add(limit));
    }

    /// Reports each request that takes too long, once.
    fn report_stuck(&mut self) {
        let now = self.now;
        if self.stuck_at.is_none_or(|time| time > now) {
            return;
        }
        let limit = self.config.settings.stuck_time;
        let is_stuck = |pending: &PendingReq| {
            !pending.reported && now.saturating_duration_since(pending.taken) >= limit
        };
        let mut reports = Vec::new();
        let mut report = |pending: &mut PendingReq| {
            if is_stuck(pending) {
                pending.reported = true;
                reports.push(pending.describe());
            }
        };
        let submitted = self.requests.pending.iter_mut().flatten();
        let delayed = self.delayed.iter_mut().map(|(_, pending)| pending);
        submitted.chain(delayed).for_each(|pending| report(pending));
        if let Barrier::Waiting(pending) = &mut self.barrier {
            report(pending);
        }
        for request in reports {
            self.config.stats.add(Counter::Stuck, 1);
            let (seconds, tries) = (limit.as_secs(), request.retries);
            self.warn(format_args!(
                "{} of sectors {}+{} has not completed in {seconds} seconds, {tries} retries; \
                 check the storage of the image",
                request.operation, request.sector, request.sectors
            ));
        }
    }

    /// Returns the time until the next work that no event announces.
    fn timeout(&mut self) -> Option<Duration> {
        let delayed = self.delayed.iter().map(|(time, _)| *time);
        let mut next = delayed.chain(self.stuck_at).min();
        if self.in_flight == 0 && !self.backlog.is_empty() && !self.is_pausing() {
            let delay = self.memory_retries.next_delay();
            let time = self.now + Duration::from_millis(delay.into());
            next = Some(next.map_or(time, |next| next.min(time)));
        }
        next.map(|time| time.saturating_duration_since(Instant::now()))
    }

    /// Tells the main thread that memory is kept, which then calls [`QueueControl::purge`] after a
    /// while. A timeout of this thread would have to be set each time that it waits.
    fn report_memory(&self) {
        let control = &self.config.control;
        if self.config.data.keeps_memory() && !control.keeps_memory() {
            control.keeps_memory.store(true, Relaxed);
            self.config.events.wakeup.set();
        }
    }

    /// Frees memory that has not been used for a while, if the main thread has asked for it.
    fn purge(&mut self) {
        if self.config.control.purge.swap(false, Acquire) {
            self.spare = Vec::new();
            self.config.data.purge(&mut *self.config.image, self.now);
        }
    }
}

/// Returns a range of the disk in bytes.
fn bytes(extent: Extent) -> (u64, u64) {
    let bytes = |sectors: u64| sectors.saturating_mul(SECTOR_SIZE.into());
    (bytes(extent.sector()), bytes(extent.sectors()))
}
