// SPDX-License-Identifier: GPL-2.0-only

//! A connection of the backend: ring, event channel, and the thread that sends responses.
//!
//! The disk reads as zeroes and drops writes.

use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        Arc, //
    }, //
};

use kernel_ext::{
    base::{
        global_mutex::GlobalMutex,
        jiffies::msecs_to_jiffies,
        kthread::{
            Current,
            KThread,
            KThreadOptions, //
        },
        page::{
            Page,
            PageSlice,
            PageSliceMut, //
        },
        wait::{
            new_wait_queue,
            WaitQueue, //
        }, //
    },
    xen::{
        events::{
            Eoi,
            EventChannel,
            Handler, //
        },
        grant::{
            copy::Copier,
            map::{
                MappedPage,
                Mapper,
                PageCache, //
            },
            ForeignRef,
            GrantAccess, //
        },
        ring::MappedRing,
        xenbus,
        xenstore::Reader, //
    },
};

use blkif::{
    request::{
        self,
        Data,
        Direct,
        DiskLimits,
        Request, //
    },
    ring::BackRing,
    wire::{
        op,
        Abi,
        Response,
        Status,
        WireRequest,
        DIRECT_SEGMENTS, //
    },
};

use crate::{
    back_params,
    misbehaviour::{
        Misbehaviour,
        HONEST, //
    },
};

/// Size of the disk in sectors.
pub(crate) const SECTORS: u64 = 2048;
/// The word of a ring with the number of responses published.
const RSP_PROD: usize = 2;
/// Number of words before the first slot.
const HEADER_WORDS: u32 = 16;
/// The word of a response with operation and status.
const STATUS_WORD: u32 = 2;
/// A status that is not in the protocol.
const NO_STATUS: u32 = 77;
/// Limit of pages that stay mapped.
const KEPT: usize = 64;
/// Number of writes whose responses are delayed: half a ring.
const LAG: usize = 16;
/// Size of a sector in bytes.
const SECTOR: usize = 512;
/// Poll interval of the thread without an event, in milliseconds.
const IDLE_MS: u32 = 1000;
/// Time limit for a thread to end, in milliseconds.
const STOP_MS: u32 = 5000;

const LIMITS: DiskLimits = DiskLimits {
    sectors: SECTORS,
    block_size: 512,
    read_only: false,
    discard: false,
    secure_discard: false,
    indirect_segments: 0,
};

/// Wakes the thread when an event arrives.
#[pin_data]
struct Wake {
    event: Atomic<bool>,
    #[pin]
    wait: WaitQueue,
}

impl Handler for Wake {
    fn handle(&self) -> Eoi {
        self.event.store(true, Release);
        self.wait.wake_up();
        Eoi::Later
    }
}

/// A connection, which ends when it is dropped.
pub(crate) struct Connection(KThread);

impl Connection {
    /// Connects to the ring and event channel of the frontend, and starts the thread.
    pub(crate) fn new(device: &ARef<xenbus::Device>, frontend: &CStr) -> Result<Self> {
        let reader = Reader::new(frontend);
        let reference = ForeignRef(reader.number("ring-ref")?);
        let port = reader.number("event-channel")?;

        let ring = MappedRing::new(device, &[reference])?;
        let ring = BackRing::attach(ring, Abi::native()).map_err(|_| EINVAL)?;
        let wake = Arc::pin_init(
            pin_init!(Wake { event: Atomic::new(true), wait <- new_wait_queue!() }),
            GFP_KERNEL,
        )?;
        let channel = EventChannel::bind_interdomain(device, port, c"hostile", wake.clone())?;
        let server = Server {
            device: device.clone(),
            wake,
            put: ring.memory().load(RSP_PROD),
            ring,
            channel,
            last_id: 0,
            copier: Copier::new(DIRECT_SEGMENTS)?,
            zeroes: Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?,
            seen: Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?,
            cache: KBox::pin_init(PageCache::new(), GFP_KERNEL)?,
            mapper: Mapper::new(DIRECT_SEGMENTS)?,
            kept: KVec::with_capacity(KEPT, GFP_KERNEL)?,
            late: KVec::with_capacity(LAG + 1, GFP_KERNEL)?,
        };
        let options = KThreadOptions::default();
        KThread::spawn(fmt!("hostile"), options, move |current| server.run(current)).map(Self)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.stop();
        if !self.0.join(msecs_to_jiffies(STOP_MS)) {
            pr_err!("the thread has not ended within {} ms\n", STOP_MS);
        }
    }
}

/// The thread and its data.
struct Server {
    device: ARef<xenbus::Device>,
    wake: Arc<Wake>,
    ring: BackRing<MappedRing>,
    channel: EventChannel<Wake>,
    /// Number of responses written.
    put: u32,
    /// Id of the last completed request.
    last_id: u64,
    copier: Copier,
    zeroes: Page,
    /// A copy of a page of the frontend.
    seen: Page,
    cache: Pin<KBox<PageCache>>,
    mapper: Mapper,
    /// Pages that stay mapped after the response.
    kept: KVec<MappedPage>,
    /// Writes whose responses are delayed.
    late: KVec<WireRequest>,
}

/// Connections that have ended, but whose pages stay mapped.
static ENDED: GlobalMutex<KVec<Server>> = GlobalMutex::new(KVec::new());

/// Unmaps the pages of connections that have ended.
pub(crate) fn release_hoard() {
    let ended = core::mem::replace(&mut *ENDED.lock(), KVec::new());
    back_params::HOARDED.set(0);
    for server in ended {
        server.unmap();
    }
}

impl Server {
    fn run(mut self, current: &Current) {
        let mut missed = false;
        while !current.should_stop() {
            let woken = || self.wake.event.load(Acquire) || current.should_stop();
            let _ = self
                .wake
                .wait
                .wait_timeout(msecs_to_jiffies(IDLE_MS), woken);
            let event = self.wake.event.xchg(false, Full);
            if self.misses(event, &mut missed) {
                continue;
            }
            if !event {
                self.catch_up(0);
            }
            while self.serve() {}
            self.channel.eoi(false);
        }
        if back_params::HOARD.get() {
            self.hoard();
        } else {
            self.unmap();
        }
    }

    /// Returns `true` if the requests in the ring are ignored, as if an event had been missed.
    ///
    /// The next event makes up for it.
    fn misses(&self, event: bool, missed: &mut bool) -> bool {
        if Misbehaviour::from_number(back_params::MISBEHAVIOUR.get()) != Misbehaviour::MissEvent {
            *missed = false;
            return false;
        }
        if event && *missed {
            back_params::MISBEHAVIOUR.set(HONEST);
            return false;
        }
        if event {
            *missed = true;
            self.channel.eoi(false);
        }
        true
    }

    fn hoard(self) {
        let mut ended = ENDED.lock();
        if ended.push(self, GFP_KERNEL).is_ok() {
            back_params::HOARDED.set(ended.len() as u32);
        }
    }

    fn unmap(mut self) {
        self.mapper.unmap(&self.cache, &mut self.kept);
    }

    /// Completes delayed writes except the last `left`.
    fn catch_up(&mut self, left: usize) {
        while self.late.len() > left {
            let Ok(request) = self.late.remove(0) else {
                return;
            };
            self.respond(&request, Misbehaviour::Honest);
        }
    }

    /// Completes all requests in the ring.
    ///
    /// Returns `true` if there may be more.
    fn serve(&mut self) -> bool {
        let misbehaviour = Misbehaviour::from_number(back_params::MISBEHAVIOUR.get());
        let mut claim = None;
        while let Ok(Some(request)) = self.ring.take_request() {
            let suits = misbehaviour.suits(&request);
            match misbehaviour {
                Misbehaviour::Silence if suits => {
                    back_params::IGNORED.set(back_params::IGNORED.get().wrapping_add(1));
                    continue;
                }
                Misbehaviour::Lag if suits && self.late.push_within_capacity(request).is_ok() => {
                    self.catch_up(LAG);
                    continue;
                }
                Misbehaviour::Ahead if suits => claim = Some(self.put.wrapping_add(33)),
                Misbehaviour::Back if suits => claim = Some(self.put.wrapping_sub(1)),
                _ => {}
            }
            self.respond(
                &request,
                if suits {
                    misbehaviour
                } else {
                    Misbehaviour::Honest
                },
            );
        }
        match claim {
            Some(claim) => {
                self.ring.memory().store(RSP_PROD, claim);
                self.channel.notify();
                false
            }
            None => {
                if self.ring.publish() && misbehaviour != Misbehaviour::LoseEvent {
                    self.channel.notify();
                }
                self.ring.final_check()
            }
        }
    }

    fn respond(&mut self, request: &WireRequest, misbehaviour: Misbehaviour) {
        let honest = request.response(self.work(request, misbehaviour));
        let last_id = core::mem::replace(&mut self.last_id, request.id());
        let response = match misbehaviour {
            Misbehaviour::UnsupportedWrite | Misbehaviour::UnsupportedFlush => Response {
                status: Status::NotSupported,
                ..honest
            },
            Misbehaviour::UnknownId => Response {
                id: !honest.id,
                ..honest
            },
            Misbehaviour::IdTwice => Response {
                id: last_id,
                ..honest
            },
            Misbehaviour::WrongOperation => Response {
                operation: op::READ,
                ..honest
            },
            _ => honest,
        };
        if self.ring.put(&response).is_err() {
            return;
        }
        if misbehaviour == Misbehaviour::UnknownStatus {
            let operation = u32::from(response.operation);
            let word = self.status_word();
            self.ring.memory().store(word, operation | NO_STATUS << 16);
        }
        self.put = self.put.wrapping_add(1);
    }

    /// Returns the word with the status of the last response.
    fn status_word(&self) -> usize {
        let slot = self.put & self.ring.capacity().wrapping_sub(1);
        let first = slot.wrapping_mul(Abi::native().slot_words());
        first.wrapping_add(HEADER_WORDS + STATUS_WORD) as usize
    }

    /// Executes a request.
    fn work(&mut self, request: &WireRequest, misbehaviour: Misbehaviour) -> Status {
        let result = match request::check(request, &LIMITS) {
            Ok(Request::Read(Data::Direct(data))) => self.read(&data),
            Ok(Request::Write(Data::Direct(data))) if misbehaviour == Misbehaviour::Keep => {
                self.keep(&data)
            }
            Ok(Request::Write(Data::Direct(data))) if misbehaviour == Misbehaviour::Peek => {
                self.peek(&data)
            }
            Ok(_) => Ok(()),
            Err(refusal) => return refusal.status(),
        };
        match result {
            Ok(()) => Status::Okay,
            Err(_) => Status::Error,
        }
    }

    /// Fills the pages of a read with zeroes.
    fn read(&mut self, data: &Direct<'_>) -> Result {
        let mut batch = self.copier.batch();
        for segment in data.segments() {
            let (offset, len) = (usize::from(segment.offset()), usize::from(segment.len()));
            let from = PageSlice::new(&self.zeroes, offset, len).ok_or(EINVAL)?;
            let reference = ForeignRef(segment.gref());
            batch.write(self.device.otherend_id(), reference, offset, from)?;
        }
        Ok(batch.run()?)
    }

    /// Checks that the sectors around the data in the pages of a write are zero.
    fn peek(&mut self, data: &Direct<'_>) -> Result {
        for segment in data.segments() {
            let whole = PageSliceMut::new(&self.seen, 0, PAGE_SIZE).ok_or(EINVAL)?;
            let mut batch = self.copier.batch();
            let reference = ForeignRef(segment.gref());
            batch.read(self.device.otherend_id(), reference, 0, whole)?;
            batch.run()?;
            let first = usize::from(segment.offset());
            let data = first..first.wrapping_add(usize::from(segment.len()));
            let mut around = (0..PAGE_SIZE)
                .step_by(SECTOR)
                .filter(|offset| !data.contains(offset));
            if around.any(|offset| !is_zero(&self.seen, offset)) {
                return Err(EACCES);
            }
        }
        Ok(())
    }

    /// Maps the pages of a write and keeps them mapped, up to a limit.
    fn keep(&mut self, data: &Direct<'_>) -> Result {
        for segment in data.segments() {
            self.mapper.map(
                &self.cache,
                self.device.otherend_id(),
                &[ForeignRef(segment.gref())],
                GrantAccess::ReadOnly,
                &mut self.kept,
            )?;
        }
        Ok(())
    }
}

/// Returns `true` if a sector of a page is all zeroes.
fn is_zero(page: &Page, offset: usize) -> bool {
    let mut bytes = [0; SECTOR];
    let len = PageSlice::new(page, offset, SECTOR).map_or(0, |sector| sector.read(&mut bytes));
    len == SECTOR && bytes == [0; SECTOR]
}
