// SPDX-License-Identifier: GPL-2.0

//! What wakes the thread of a device.

use kernel::prelude::*;
use kernel::sync::atomic::Atomic;
use kernel::sync::atomic::Full;
use kernel::sync::atomic::Relaxed;
use kernel::sync::Arc;
use kernel::time::Jiffies;
use kernel_ext::base::wait::WaitQueue;
use kernel_ext::new_wait_queue;

/// Something that the thread has to look at.
#[derive(Clone, Copy)]
pub(crate) enum Cause {
    /// The backend may have changed: it may be away, or back.
    Backend,
    /// The disk is to be let go.
    Close,
    /// A backend broke the rules of a ring, or the disk could not be added: there is no way on.
    Failed,
    /// A pool of pages has grown: it is to be looked after until it is small again.
    Grown,
    /// The limits of the disk were to be changed, and somebody else was changing them.
    Limits,
    /// The backend has said that it cannot discard.
    NoDiscard,
    /// The device is being unbound.
    Remove,
}

const CAUSES: usize = 7;

/// Wakes the thread of a device. Any context.
#[pin_data]
pub(crate) struct Signal {
    raised: [Atomic<i32>; CAUSES],
    settled: Atomic<i32>,
    #[pin]
    wait: WaitQueue,
}

impl Signal {
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                raised: [const { Atomic::new(0) }; CAUSES],
                settled: Atomic::new(0),
                wait <- new_wait_queue!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Wakes the thread for this.
    pub(crate) fn raise(&self, cause: Cause) {
        if let Some(flag) = self.raised.get(cause as usize) {
            flag.xchg(1, Full);
        }
        self.wait.wake_up();
    }

    /// Whether this was raised since the last time.
    pub(crate) fn take(&self, cause: Cause) -> bool {
        self.raised
            .get(cause as usize)
            .is_some_and(|flag| flag.xchg(0, Full) != 0)
    }

    /// Whether the device is being unbound. Stays so.
    pub(crate) fn removed(&self) -> bool {
        self.is_raised(Cause::Remove)
    }

    /// The disk can be used, or never will: nobody need wait for it any more.
    pub(crate) fn settle(&self) {
        self.settled.store(1, Relaxed);
    }

    /// Whether nobody need wait for the disk any more.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Relaxed) != 0
    }

    fn is_raised(&self, cause: Cause) -> bool {
        self.raised
            .get(cause as usize)
            .is_some_and(|flag| flag.load(Relaxed) != 0)
    }

    /// Sleeps until something is raised, or the time is over.
    pub(crate) fn wait(&self, timeout: Option<Jiffies>) {
        let any = || self.raised.iter().any(|flag| flag.load(Relaxed) != 0);
        match timeout {
            // What there is to do is found out by looking.
            Some(timeout) => {
                let _ = self.wait.wait_timeout(timeout, any);
            }
            None => self.wait.wait_idle(any),
        }
    }
}
