// SPDX-License-Identifier: GPL-2.0-only

//! A connection of the backend: ring, event channel, and the thread that sends replies.

use core::num::Wrapping;

use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        aref::ARef,
        Arc, //
    },
    time::msecs_to_jiffies, //
};

use kernel_ext::{
    base::{
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
    },
    ratelimited,
    xen::{
        events::EventChannel,
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
        ring::{
            MappedRing,
            MAX_PAGES, //
        },
        xenbus,
        xenstore::Reader, //
    },
};

use crate::protocol::{
    message_word,
    reply_word,
    sum,
    Wake,
    Way,
    MESSAGES,
    REPLIES,
    SLOTS, //
};

/// Number of pages that stay mapped after the reply.
const KEPT: usize = 4;
/// Poll interval of the thread without an event, in milliseconds.
const IDLE_MS: u32 = 1000;
/// Time limit for a thread to end, in milliseconds.
const STOP_MS: u32 = 5000;

/// A connection, which ends when it is dropped.
pub(crate) struct Connection {
    epoch: u32,
    thread: KThread,
}

impl Connection {
    /// Connects to the ring and event channel of the frontend, and starts the thread.
    pub(crate) fn new(device: &ARef<xenbus::Device>, otherend: &CStr, epoch: u32) -> Result<Self> {
        let reader = Reader::new(otherend);
        let order = reader.number("ring-page-order")?;
        let port = reader.number("event-channel")?;
        let pages = 1usize
            .checked_shl(order)
            .filter(|pages| *pages <= MAX_PAGES)
            .ok_or(EINVAL)?;
        let mut references = KVec::with_capacity(pages, GFP_KERNEL)?;
        for index in 0..pages {
            references.push(
                ForeignRef(reader.number_at(fmt!("ring-ref{index}"), "ring-ref")?),
                GFP_KERNEL,
            )?;
        }

        let ring = MappedRing::new(device, &references)?;
        let wake = Wake::new()?;
        let channel = EventChannel::bind_interdomain(device, port, c"recho-backend", wake.clone())?;
        // Continues after the previous backend, which has replied to all messages that it took.
        let replied = Wrapping(ring.load(REPLIES));
        let responder = Responder {
            device: device.clone(),
            wake,
            ring,
            channel,
            replied,
            cache: KBox::pin_init(PageCache::new(), GFP_KERNEL)?,
            mapper: Mapper::new(KEPT)?,
            copier: Copier::new(1)?,
            mapped: KVec::with_capacity(1, GFP_KERNEL)?,
            kept: KVec::with_capacity(KEPT, GFP_KERNEL)?,
            buffer: Page::alloc_page(GFP_KERNEL)?,
        };
        let options = KThreadOptions { freezable: false };
        let thread = KThread::spawn(fmt!("recho-backend"), options, move |current| {
            responder.run(current)
        })?;
        Ok(Self { epoch, thread })
    }

    /// Returns the number of the frontend's connection.
    pub(crate) fn epoch(&self) -> u32 {
        self.epoch
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.thread.stop();
        if !self.thread.join(msecs_to_jiffies(STOP_MS)) {
            pr_err!("the thread has not ended within {} ms\n", STOP_MS);
        }
    }
}

/// A message, copied from the ring.
struct Message {
    number: u32,
    reference: ForeignRef,
    way: u32,
}

/// The thread and its data.
struct Responder {
    device: ARef<xenbus::Device>,
    wake: Arc<Wake>,
    ring: MappedRing,
    channel: EventChannel<Wake>,
    /// Number of messages read, and of replies written.
    replied: Wrapping<u32>,
    cache: Pin<KBox<PageCache>>,
    mapper: Mapper,
    copier: Copier,
    /// The page of the current message.
    mapped: KVec<MappedPage>,
    /// Pages that stay mapped for a while.
    kept: KVec<MappedPage>,
    buffer: Page,
}

impl Responder {
    fn run(mut self, current: &Current) {
        while !current.should_stop() {
            let event = self.wake.wait(current, msecs_to_jiffies(IDLE_MS));
            self.wake.clear();
            match self.reply_to_all(current) {
                Ok(replied) if event => self.channel.eoi(replied == 0),
                Ok(_) => {}
                Err(error) => {
                    self.device.dev_fatal(
                        error,
                        fmt!("the frontend has published more messages than slots"),
                    );
                    break;
                }
            }
        }
        self.mapper.unmap(&self.cache, &mut self.kept);
    }

    /// Replies to all messages in the ring, and returns their number.
    fn reply_to_all(&mut self, current: &Current) -> Result<u32> {
        let there = Wrapping(self.ring.load(MESSAGES)) - self.replied;
        if there.0 > SLOTS {
            return Err(EINVAL);
        }
        self.ring.read_fence();
        for done in 0..there.0 {
            if current.should_stop() {
                return Ok(done);
            }
            self.reply_to_one();
        }
        if there.0 > 0 {
            self.channel.notify();
        }
        Ok(there.0)
    }

    fn reply_to_one(&mut self) {
        let word = message_word(self.replied);
        let message = Message {
            number: self.ring.load(word),
            reference: ForeignRef(self.ring.load(word + 1)),
            way: self.ring.load(word + 2),
        };
        let (sum, status) = match self.work(&message) {
            Ok(sum) => (sum, 0),
            Err(error) => {
                ratelimited!(pr_warn!(
                    "{}: message {} with grant {}: {:?}\n",
                    self.device.nodename(),
                    message.number,
                    message.reference.0,
                    error
                ));
                (0, error.to_errno().unsigned_abs())
            }
        };
        let word = reply_word(self.replied);
        self.ring.store(word, message.number);
        self.ring.store(word + 1, sum);
        self.ring.store(word + 2, status);
        self.replied += 1;
        self.ring.write_fence();
        self.ring.store(REPLIES, self.replied.0);
    }

    /// Computes the sum of the page of a message, and stores it there.
    fn work(&mut self, message: &Message) -> Result<u32> {
        match way(message.way)? {
            Way::Copy => self.by_copy(message.reference),
            Way::Map => {
                let sum = self.by_map(message.reference);
                self.mapper.unmap(&self.cache, &mut self.mapped);
                sum
            }
            Way::Keep => {
                let sum = self.by_map(message.reference);
                if self.kept.len() == KEPT {
                    self.mapper.unmap(&self.cache, &mut self.kept);
                }
                if let Some(page) = self.mapped.pop() {
                    self.kept.push_within_capacity(page).map_err(|_| ENOSPC)?;
                }
                sum
            }
        }
    }

    fn by_map(&mut self, reference: ForeignRef) -> Result<u32> {
        let domain = self.device.otherend_id();
        self.mapper.map(
            &self.cache,
            domain,
            &[reference],
            GrantAccess::ReadWrite,
            &mut self.mapped,
        )?;
        let page = self.mapped.last().ok_or(EINVAL)?;
        let sum = page.slice(0, PAGE_SIZE).map_or(0, sum);
        page.slice_mut(0, 4)
            .ok_or(EINVAL)?
            .write(&sum.to_le_bytes());
        Ok(sum)
    }

    fn by_copy(&mut self, reference: ForeignRef) -> Result<u32> {
        let domain = self.device.otherend_id();
        let mut batch = self.copier.batch();
        let whole = PageSliceMut::new(&self.buffer, 0, PAGE_SIZE).ok_or(EINVAL)?;
        batch.read(domain, reference, 0, whole)?;
        batch.run()?;

        let sum = sum(whole.as_slice());
        whole.write(&sum.to_le_bytes());
        let mut batch = self.copier.batch();
        let first = PageSlice::new(&self.buffer, 0, 4).ok_or(EINVAL)?;
        batch.write(domain, reference, 0, first)?;
        batch.run()?;
        Ok(sum)
    }
}

/// Returns the way that a message asks for.
fn way(number: u32) -> Result<Way> {
    let mut ways = [Way::Map, Way::Copy, Way::Keep].into_iter();
    ways.find(|way| way.number() == number).ok_or(EINVAL)
}
