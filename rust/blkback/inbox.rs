// SPDX-License-Identifier: GPL-2.0

//! Where the thread of a queue finds what there is to do.

use crate::transfer::Chain;
use crate::transfer::Transfer;
use kernel::prelude::*;
use kernel::sync::atomic::Atomic;
use kernel::sync::atomic::Full;
use kernel::sync::atomic::Relaxed;
use kernel::time::Jiffies;
use kernel_ext::base::irq_spinlock::IrqSpinLock;
use kernel_ext::base::kthread::Current;
use kernel_ext::base::wait::WaitQueue;
use kernel_ext::new_irq_spinlock;
use kernel_ext::new_wait_queue;
use kernel_ext::xen::events::Eoi;
use kernel_ext::xen::events::Handler;

/// Where the thread of a queue finds what there is to do. Interrupts put it here.
#[pin_data]
pub(crate) struct Inbox {
    /// The frontend has sent an event that was not given back yet.
    event: Atomic<bool>,
    /// Memory is short, and nobody has looked yet.
    short: Atomic<bool>,
    /// Something outside of the queue has changed, and nobody has looked yet.
    nudged: Atomic<bool>,
    /// Transfers that the disk is done with.
    #[pin]
    done: IrqSpinLock<Chain>,
    #[pin]
    wait: WaitQueue,
}

impl Inbox {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            event: Atomic::new(false),
            short: Atomic::new(false),
            nudged: Atomic::new(false),
            done <- new_irq_spinlock!(Chain::new()),
            wait <- new_wait_queue!(),
        })
    }

    /// A transfer has ended. Any context.
    pub(crate) fn done(&self, transfer: KBox<Transfer>) {
        let mut done = self.done.lock();
        let first = done.is_empty();
        done.push(transfer);
        drop(done);
        if first {
            self.wait.wake_up();
        }
    }

    /// Whether there was an event since the last call.
    pub(crate) fn take_event(&self) -> bool {
        self.event.load(Relaxed) && {
            self.event.store(false, Relaxed);
            true
        }
    }

    /// Something outside of the queue has changed that it should look at. Any context.
    pub(crate) fn nudge(&self) {
        self.nudged.store(true, Relaxed);
        self.wait.wake_up();
    }

    /// What was changed until now is about to be looked at.
    pub(crate) fn forget_nudge(&self) {
        if self.nudged.load(Relaxed) {
            // A full barrier, so that what is looked at is not older than the nudge.
            self.nudged.xchg(false, Full);
        }
    }

    /// Memory is short: what is not needed is to be given back. Any context.
    pub(crate) fn memory_is_short(&self) {
        self.short.store(true, Relaxed);
        self.wait.wake_up();
    }

    /// Whether memory was short since the last call.
    pub(crate) fn take_short(&self) -> bool {
        self.short.load(Relaxed) && {
            self.short.store(false, Relaxed);
            true
        }
    }

    /// The transfers that have ended since the last call.
    pub(crate) fn take_done(&self) -> Chain {
        self.done.lock().take()
    }

    fn has_done(&self) -> bool {
        !self.done.lock().is_empty()
    }

    /// Sleeps until a transfer has ended or `wake` says so; at most for `timeout`, if there is one.
    pub(crate) fn wait(&self, thread: &Current, wake: Wake, timeout: Option<Jiffies>) {
        let condition = || {
            wake.event && self.event.load(Relaxed)
                || wake.stop && thread.should_stop()
                || self.short.load(Relaxed)
                || self.nudged.load(Relaxed)
                || self.has_done()
        };
        match timeout {
            None => self.wait.wait_idle(condition),
            Some(timeout) => {
                self.wait.wait_idle_timeout(timeout, condition);
            }
        }
    }
}

/// What wakes the thread of a queue, besides the end of a transfer.
#[derive(Clone, Copy)]
pub(crate) struct Wake {
    /// An event of the frontend.
    pub(crate) event: bool,
    /// That it should stop.
    pub(crate) stop: bool,
}

impl Handler for Inbox {
    fn handle(&self) -> Eoi {
        self.event.store(true, Relaxed);
        self.wait.wake_up();
        Eoi::Later
    }
}
