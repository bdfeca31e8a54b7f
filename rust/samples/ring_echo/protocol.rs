// SPDX-License-Identifier: GPL-2.0-only

//! The protocol of the echo pair.
//!
//! The frontend grants a page full of bytes and puts a *message* on the ring; the backend replies
//! with the sum of the bytes, and leaves the sum in the first word of the page too. Both keep
//! free-running *counts* of what they have sent; a message and its reply have the same index.
//!
//! The ring, in words of 32 bits:
//!
//! | words | what |
//! |---|---|
//! | 0 | messages that the frontend has sent |
//! | 1 | replies that the backend has sent |
//! | 16 + 4 i | message `i`: number, reference of the page, [`Way`] |
//! | 272 + 4 i | reply `i`: number, sum, 0 or an errno |
//!
//! The frontend's directory has `ring-page-order`, `ring-ref0` and on, `event-channel`, and
//! `epoch`, which differs for each connection.

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

/// Number of slots of the ring.
pub(crate) const SLOTS: u32 = 64;
/// The word with the count of messages.
pub(crate) const MESSAGES: usize = 0;
/// The word with the count of replies.
pub(crate) const REPLIES: usize = 1;

/// Returns the first word of the message with this count.
pub(crate) fn message_word(count: Wrapping<u32>) -> usize {
    16 + 4 * (count.0 % SLOTS) as usize
}

/// Returns the first word of the reply with this count.
pub(crate) fn reply_word(count: Wrapping<u32>) -> usize {
    272 + 4 * (count.0 % SLOTS) as usize
}

/// The backend's access to the page of a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Map it, and unmap it before the reply.
    Map,
    /// Copy it by grant copy.
    Copy,
    /// Map it, and unmap it some time after the reply.
    Keep,
}

impl Way {
    /// Returns its number on the ring.
    pub(crate) fn number(self) -> u32 {
        self as u32
    }
}

/// Returns the sum of the bytes of a page from the second word on (FNV-1a).
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
    /// Creates it as if an event had arrived, so that the thread reads the ring first.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self { event: Atomic::new(true), wait <- new_wait_queue!() }),
            GFP_KERNEL,
        )
    }

    /// Waits for an event, the end of the thread or the timeout.
    ///
    /// Returns `true` after an event.
    pub(crate) fn wait(&self, current: &Current, timeout: Jiffies) -> bool {
        let woken = || self.event.load(Acquire) || current.should_stop();
        self.wait.wait_timeout(timeout, woken) && self.event.load(Relaxed)
    }

    /// Clears the event.
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
