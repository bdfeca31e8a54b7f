// SPDX-License-Identifier: GPL-2.0-only

//! What the two halves of the echo pair agree on.
//!
//! The frontend grants a page full of bytes and puts a *message* on the ring; the backend answers
//! with the sum of the bytes, and leaves the sum in the first word of the page too. Both keep
//! *counts* of what they have sent, which run freely; a message and its answer have the same place.
//!
//! The ring, in words of 32 bits:
//!
//! | words | what |
//! |---|---|
//! | 0 | messages that the frontend has sent |
//! | 1 | answers that the backend has sent |
//! | 16 + 4 i | message `i`: number, reference of the page, [`Way`] |
//! | 272 + 4 i | answer `i`: number, sum, 0 or an errno |
//!
//! The frontend's directory has `ring-page-order`, `ring-ref0` and on, `event-channel`, and `epoch`,
//! which is another one for each connection.

use core::num::Wrapping;

use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        Arc, //
    },
    time::Jiffies, //
};

use kernel_ext::{
    base::{
        kthread::Current,
        page::PageSlice,
        wait::{
            new_wait_queue,
            WaitQueue, //
        }, //
    },
    xen::events::{
        Eoi,
        Handler, //
    },
};

/// Places on the ring.
pub(crate) const SLOTS: u32 = 64;
/// The word with the count of messages.
pub(crate) const MESSAGES: usize = 0;
/// The word with the count of answers.
pub(crate) const ANSWERS: usize = 1;

/// The first word of the message with this count.
pub(crate) fn message_word(count: Wrapping<u32>) -> usize {
    16 + 4 * (count.0 % SLOTS) as usize
}

/// The first word of the answer with this count.
pub(crate) fn answer_word(count: Wrapping<u32>) -> usize {
    272 + 4 * (count.0 % SLOTS) as usize
}

/// How the backend gets at the page of a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Map it, and unmap it before the answer.
    Map,
    /// Let Xen copy.
    Copy,
    /// Map it, and keep it mapped for a while after the answer: a backend that does not let go.
    Keep,
}

impl Way {
    /// As it stands on the ring.
    pub(crate) fn number(self) -> u32 {
        self as u32
    }
}

/// The sum of the bytes of a page from the second word on (FNV-1a).
pub(crate) fn sum(page: PageSlice<'_>) -> u32 {
    let mut sum: u32 = 0x811c_9dc5;
    let mut chunk = [0; 128];
    let mut offset = 4;
    while let Some(part) = page.get(offset, chunk.len().min(PAGE_SIZE.saturating_sub(offset))) {
        let len = part.read(&mut chunk);
        for byte in chunk.iter().take(len) {
            sum = (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
        offset = offset.saturating_add(len);
        if offset >= PAGE_SIZE {
            break;
        }
    }
    sum
}

/// Wakes the thread of a connection when an event arrives.
#[pin_data]
pub(crate) struct Wake {
    event: Atomic<bool>,
    #[pin]
    wait: WaitQueue,
}

impl Wake {
    /// As if an event had arrived, so that the thread looks at the ring first of all.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self { event: Atomic::new(true), wait <- new_wait_queue!() }),
            GFP_KERNEL,
        )
    }

    /// Waits for an event or the end of the thread, or the time. Whether there was an event.
    pub(crate) fn wait(&self, current: &Current, timeout: Jiffies) -> bool {
        let woken = || self.event.load(Acquire) || current.should_stop();
        self.wait.wait_timeout(timeout, woken) && self.event.load(Relaxed)
    }

    /// Takes note of the event; the next one is a new one.
    pub(crate) fn clear(&self) {
        self.event.store(false, Release);
    }
}

impl Handler for Wake {
    fn handle(&self) -> Eoi {
        self.event.store(true, Release);
        self.wait.wake_up();
        Eoi::Later
    }
}
