// SPDX-License-Identifier: GPL-2.0-only

//! A connection of the frontend: ring, event channel, and the thread that sends.

use core::num::Wrapping;

use kernel::{
    fmt,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
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
        sysfs::Output, //
    },
    ratelimited,
    xen::{
        events::EventChannel,
        grant::{
            GrantAccess,
            GrantReserve,
            GrantedPage, //
        },
        ring::RingPages,
        xenbus,
        xenstore, //
    },
};

use crate::protocol::{
    message_word,
    reply_word,
    sum,
    Wake,
    Way,
    MESSAGES,
    REPLIES, //
};

/// Limit of messages without a reply.
const WINDOW: usize = 8;
/// Limit of pages that the backend still maps; then the oldest is left to the kernel's deferred
/// list.
const KEPT: usize = 16;
/// Pause between two rounds in milliseconds, which leaves CPU time to the backend.
const PAUSE_MS: u32 = 2;
/// Time limit for a thread to end, in milliseconds.
const STOP_MS: u32 = 5000;

/// Counts of a device since it was created.
pub(crate) struct Counters {
    epoch: Atomic<u32>,
    number: Atomic<u32>,
    echoed: Atomic<u64>,
    errors: Atomic<u64>,
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Atomic::new(0),
            number: Atomic::new(0),
            echoed: Atomic::new(0),
            errors: Atomic::new(0),
        }
    }

    /// Writes the number of correct replies.
    pub(crate) fn show_echoed(&self, output: &mut Output<'_>) -> fmt::Result {
        fmt::Write::write_fmt(output, fmt!("{}\n", self.echoed.load(Relaxed)))
    }

    /// Writes the number of wrong replies.
    pub(crate) fn show_errors(&self, output: &mut Output<'_>) -> fmt::Result {
        fmt::Write::write_fmt(output, fmt!("{}\n", self.errors.load(Relaxed)))
    }
}

/// A connection, which ends when it is dropped.
pub(crate) struct Connection {
    thread: KThread,
}

impl Connection {
    /// Creates ring and event channel, publishes them, and starts the thread.
    pub(crate) fn new(device: &ARef<xenbus::Device>, counters: &Arc<Counters>) -> Result<Self> {
        let epoch = counters.epoch.fetch_add(1, Relaxed);
        let order = epoch % 3;
        let wake = Wake::new()?;
        let ring = RingPages::new(device, order)?;
        let channel = EventChannel::alloc_unbound(device, c"recho", wake.clone())?;
        publish(device, &ring, &channel, order, epoch)?;

        let sender = Sender {
            device: device.clone(),
            counters: counters.clone(),
            wake,
            ring,
            channel,
            reserve: GrantReserve::empty(),
            sent: Wrapping(0),
            replied: Wrapping(0),
            waiting: KVec::with_capacity(WINDOW, GFP_KERNEL)?,
            kept: KVec::with_capacity(KEPT, GFP_KERNEL)?,
        };
        let options = KThreadOptions { freezable: false };
        let thread = KThread::spawn(fmt!("recho"), options, move |current| sender.run(current))?;
        Ok(Self { thread })
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

/// Writes the nodes of the frontend.
fn publish(
    device: &xenbus::Device,
    ring: &RingPages,
    channel: &EventChannel<Wake>,
    order: u32,
    epoch: u32,
) -> Result {
    let port = channel.port().ok_or(EINVAL)?;
    let dir = device.nodename();
    xenstore::transaction(|transaction| {
        for (index, reference) in ring.references().enumerate() {
            let value = reference.value();
            xenstore::write(
                transaction,
                dir,
                fmt!("ring-ref{}", index),
                fmt!("{}", value),
            )?;
        }
        xenstore::write(transaction, dir, fmt!("ring-page-order"), fmt!("{}", order))?;
        xenstore::write(transaction, dir, fmt!("event-channel"), fmt!("{}", port))?;
        xenstore::write(transaction, dir, fmt!("epoch"), fmt!("{}", epoch))
    })
}

/// A message without a reply.
struct Waiting {
    number: u32,
    sum: u32,
    page: GrantedPage,
}

/// The thread and its data.
struct Sender {
    device: ARef<xenbus::Device>,
    counters: Arc<Counters>,
    wake: Arc<Wake>,
    ring: RingPages,
    channel: EventChannel<Wake>,
    reserve: GrantReserve,
    /// Number of messages sent.
    sent: Wrapping<u32>,
    /// Number of replies read.
    replied: Wrapping<u32>,
    /// Messages without a reply, in the order of the ring.
    waiting: KVec<Waiting>,
    /// Pages that the backend still maps after its reply.
    kept: KVec<GrantedPage>,
}

impl Sender {
    fn run(mut self, current: &Current) {
        while !current.should_stop() {
            let event = self.wake.wait(current, msecs_to_jiffies(PAUSE_MS));
            self.wake.clear();
            let taken = match self.take_replies() {
                Ok(taken) => taken,
                Err(error) => return self.give_up(error),
            };
            if event {
                self.channel.eoi(taken == 0);
            }
            self.end_kept();
            if let Err(error) = self.send() {
                ratelimited!(pr_warn!(
                    "{}: cannot send: {:?}\n",
                    self.device.nodename(),
                    error
                ));
            }
        }
    }

    /// Stops the connection, because the backend has broken the protocol.
    fn give_up(&self, error: Error) {
        self.counters.errors.fetch_add(1, Relaxed);
        self.device.dev_fatal(
            error,
            fmt!("the backend has published replies to messages that were not sent"),
        );
    }

    /// Reads all replies in the ring, and returns their number.
    fn take_replies(&mut self) -> Result<u32> {
        let there = Wrapping(self.ring.load(REPLIES)) - self.replied;
        if there > self.sent - self.replied {
            return Err(EINVAL);
        }
        self.ring.read_fence();
        for _ in 0..there.0 {
            self.take_reply();
        }
        Ok(there.0)
    }

    fn take_reply(&mut self) {
        let word = reply_word(self.replied);
        let [number, sum, status] = [0, 1, 2].map(|field| self.ring.load(word + field));
        self.replied += 1;
        let Ok(message) = self.waiting.remove(0) else {
            return;
        };

        let mut first = [0; 4];
        if let Some(slice) = message.page.slice(0, first.len()) {
            slice.read(&mut first);
        }
        let right = number == message.number
            && sum == message.sum
            && u32::from_le_bytes(first) == message.sum
            && status == 0;
        let counter = if right {
            &self.counters.echoed
        } else {
            &self.counters.errors
        };
        counter.fetch_add(1, Relaxed);
        if !right {
            ratelimited!(pr_err!(
                "{}: message {} with sum {:#x}: reply {} with sum {:#x}, page {:?}, status {}\n",
                self.device.nodename(),
                message.number,
                message.sum,
                number,
                sum,
                first,
                status
            ));
        }
        self.end(message.page);
    }

    /// Ends a grant, or keeps the page while the backend maps it.
    fn end(&mut self, page: GrantedPage) {
        let Err(page) = page.try_end() else { return };
        if self.kept.len() == KEPT {
            // Dropping it puts it on the kernel's deferred list.
            drop(self.kept.remove(0));
        }
        // There is a place, see above.
        let _ = self.kept.push_within_capacity(page);
    }

    /// Ends the grants of kept pages that the backend has unmapped.
    fn end_kept(&mut self) {
        for _ in 0..self.kept.len() {
            if let Ok(page) = self.kept.remove(0) {
                self.end(page);
            }
        }
    }

    /// Sends messages up to the limit.
    fn send(&mut self) -> Result {
        let before = self.sent;
        let result = self.fill_window();
        if self.sent != before {
            self.ring.write_fence();
            self.ring.store(MESSAGES, self.sent.0);
            self.channel.notify();
        }
        result
    }

    fn fill_window(&mut self) -> Result {
        self.reserve.fill(WINDOW as u16)?;
        while self.waiting.len() < WINDOW {
            let number = self.counters.number.fetch_add(1, Relaxed);
            let page = Page::alloc_page(GFP_KERNEL)?;
            let sum = fill(&page, number);
            let domain = self.device.otherend_id();
            let page = GrantedPage::new(&mut self.reserve, domain, page, GrantAccess::ReadWrite)?;

            let word = message_word(self.sent);
            self.ring.store(word, number);
            self.ring.store(word + 1, page.reference().value());
            self.ring.store(word + 2, way_of(number).number());
            self.waiting
                .push(Waiting { number, sum, page }, GFP_KERNEL)?;
            self.sent += 1;
        }
        Ok(())
    }
}

/// Fills the page of a message, and returns the sum of its bytes.
fn fill(page: &Page, number: u32) -> u32 {
    let mut chunk = [0; 128];
    for offset in (0..PAGE_SIZE).step_by(chunk.len()) {
        for (index, byte) in chunk.iter_mut().enumerate() {
            *byte = (number as usize)
                .wrapping_mul(31)
                .wrapping_add(offset ^ index) as u8;
        }
        if let Some(slice) = PageSliceMut::new(page, offset, chunk.len()) {
            slice.write(&chunk);
        }
    }
    PageSlice::new(page, 0, PAGE_SIZE).map_or(0, sum)
}

/// Returns the way of the message with this number.
fn way_of(number: u32) -> Way {
    match number % 8 {
        7 => Way::Keep,
        1 | 3 | 5 => Way::Copy,
        _ => Way::Map,
    }
}
