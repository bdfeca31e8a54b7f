// SPDX-License-Identifier: GPL-2.0-only

//! What wakes the thread of a device.

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        Arc, //
    },
    time::Jiffies, //
};

use kernel_ext::{
    base::wait::WaitQueue,
    new_wait_queue, //
};

/// Something that the thread has to look at.
#[derive(Clone, Copy)]
pub(crate) enum Event {
    /// The backend may have changed: it may be away, or back.
    Backend,
    /// The disk is to be let go.
    Close,
    /// A backend broke the rules of a ring, or the disk could not be added: there is no way on.
    Failed,
    /// A pool of pages has grown: it is to be looked after until it is small again.
    PoolGrown,
    /// The limits of the disk were to be changed, and somebody else was changing them.
    Limits,
    /// The backend has said that it cannot discard.
    NoDiscard,
    /// An opener of the disk has closed it.
    Released,
    /// The device is being unbound.
    Remove,
    /// A device of the guest cannot connect for want of grants.
    Shortage,
    /// A request was not answered in time.
    TimedOut,
}

const EVENTS: usize = 10;

/// Wakes the thread of a device. Any context.
#[pin_data]
pub(crate) struct DeviceEvents {
    set: [Atomic<i32>; EVENTS],
    ready: Atomic<i32>,
    /// One of the constants `WORKING`, `SYNCING`, `DONE`.
    progress: Atomic<i32>,
    #[pin]
    wait: WaitQueue,
}

/// The thread does what takes a known time at most.
const WORKING: i32 = 0;
/// The thread waits until the disk is written back.
const SYNCING: i32 = 1;
/// The thread needs the device no more.
const DONE: i32 = 2;

impl DeviceEvents {
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                set: [const { Atomic::new(0) }; EVENTS],
                ready: Atomic::new(0),
                progress: Atomic::new(WORKING),
                wait <- new_wait_queue!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Wakes the thread for this.
    pub(crate) fn set(&self, event: Event) {
        if let Some(flag) = self.set.get(event as usize) {
            flag.xchg(1, Full);
        }
        self.wait.wake_up();
    }

    /// Whether this was set since the last time.
    pub(crate) fn take(&self, event: Event) -> bool {
        self.set
            .get(event as usize)
            .is_some_and(|flag| flag.xchg(0, Full) != 0)
    }

    /// Whether the device is being unbound. Stays so.
    pub(crate) fn is_removing(&self) -> bool {
        self.is_set(Event::Remove)
    }

    /// The disk can be used, or never will: nobody need wait for it any more.
    pub(crate) fn mark_ready(&self) {
        self.ready.store(1, Relaxed);
    }

    /// Whether nobody need wait for the disk any more.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Relaxed) != 0
    }

    /// Notes whether the thread waits until the disk is written back.
    pub(crate) fn set_syncing(&self, syncing: bool) {
        let progress = if syncing { SYNCING } else { WORKING };
        self.progress.store(progress, Relaxed);
    }

    /// Returns `true` if the thread waits until the disk is written back.
    pub(crate) fn is_syncing(&self) -> bool {
        self.progress.load(Relaxed) == SYNCING
    }

    /// Notes that the thread needs the device no more.
    pub(crate) fn finish(&self) {
        self.progress.store(DONE, Release);
        self.wait.wake_up();
    }

    /// Waits until the thread needs the device no more. Returns `false` after the timeout.
    ///
    /// Context: sleeps.
    #[must_use = "the thread may still need the device"]
    pub(crate) fn await_finish(&self, timeout: Jiffies) -> bool {
        self.wait
            .wait_timeout(timeout, || self.progress.load(Acquire) == DONE)
    }

    /// Sleeps until `event` is set, and takes it.
    pub(crate) fn wait_for(&self, event: Event) {
        self.wait.wait_idle(|| self.is_set(event));
        self.take(event);
    }

    fn is_set(&self, event: Event) -> bool {
        self.set
            .get(event as usize)
            .is_some_and(|flag| flag.load(Relaxed) != 0)
    }

    /// Sleeps until something is set, or the time is over.
    pub(crate) fn wait(&self, timeout: Option<Jiffies>) {
        let any = || self.set.iter().any(|flag| flag.load(Relaxed) != 0);
        match timeout {
            // What there is to do is found out by looking.
            Some(timeout) => {
                let _ = self.wait.wait_timeout(timeout, any);
            }
            None => self.wait.wait_idle(any),
        }
    }
}
