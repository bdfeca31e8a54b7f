// SPDX-License-Identifier: GPL-2.0-only

//! The reasons to wake the device worker.

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

/// A reason to wake the device worker.
#[derive(Clone, Copy)]
pub(crate) enum WakeReason {
    /// The backend may have disconnected or reconnected, or a retry was scheduled.
    Backend,
    /// The disk has to be removed.
    Close,
    /// The backend violated the protocol, or the disk could not be added: the device cannot
    /// recover.
    Failed,
    /// A pool has grown, and has to be trimmed until it has its minimum size.
    PoolGrown,
    /// The limits of the disk could not be changed, because they were locked.
    Limits,
    /// The backend has rejected a discard.
    NoDiscard,
    /// An opener has closed the disk, and
    /// [`Disk::notify_release`](crate::disk::Disk::notify_release) was called before.
    Released,
    /// The device is being unbound.
    Remove,
    /// A device of the guest cannot connect because grants are short.
    Shortage,
    /// A request has timed out.
    TimedOut,
}

const REASONS: usize = 10;

/// The pending wake reasons of a device, and the wait queue of its worker.
///
/// Context: any, unless a method says otherwise.
#[pin_data]
pub(crate) struct DeviceWakeup {
    set: [Atomic<i32>; REASONS],
    ready: Atomic<i32>,
    /// [`WORKING`], [`SYNCING`] or [`DONE`].
    progress: Atomic<i32>,
    #[pin]
    wait: WaitQueue,
}

/// The thread does not wait for the disk to be written back; an unbind waits for the thread for a
/// limited time.
const WORKING: i32 = 0;
/// The thread waits until the disk is written back.
const SYNCING: i32 = 1;
/// The thread no longer needs the device.
const DONE: i32 = 2;

impl DeviceWakeup {
    /// Creates a wakeup without reasons.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                set: [const { Atomic::new(0) }; REASONS],
                ready: Atomic::new(0),
                progress: Atomic::new(WORKING),
                wait <- new_wait_queue!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Sets a reason and wakes the thread.
    pub(crate) fn set(&self, reason: WakeReason) {
        if let Some(flag) = self.set.get(reason as usize) {
            flag.xchg(1, Full);
        }
        self.wait.wake_up();
    }

    /// Clears a reason.
    ///
    /// Returns `true` if it was set.
    pub(crate) fn take(&self, reason: WakeReason) -> bool {
        self.set
            .get(reason as usize)
            .is_some_and(|flag| flag.xchg(0, Full) != 0)
    }

    /// Returns `true` if the device is being unbound; this never becomes `false` again.
    pub(crate) fn is_removing(&self) -> bool {
        self.is_set(WakeReason::Remove)
    }

    /// Marks the device as ready: the disk can be used, or there will be none.
    pub(crate) fn mark_ready(&self) {
        self.ready.store(1, Relaxed);
    }

    /// Returns `true` if the device is ready, so that xenbus need not wait for it at boot.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Relaxed) != 0
    }

    /// Sets whether the thread waits until the disk is written back.
    pub(crate) fn set_syncing(&self, syncing: bool) {
        let progress = if syncing { SYNCING } else { WORKING };
        self.progress.store(progress, Relaxed);
    }

    /// Returns `true` if the thread waits until the disk is written back.
    pub(crate) fn is_syncing(&self) -> bool {
        self.progress.load(Relaxed) == SYNCING
    }

    /// Marks the device as no longer needed by the thread.
    pub(crate) fn finish(&self) {
        self.progress.store(DONE, Release);
        self.wait.wake_up();
    }

    /// Waits until the thread no longer needs the device.
    ///
    /// Returns `false` after the timeout.
    ///
    /// Context: sleeps.
    #[must_use = "the thread may still need the device"]
    pub(crate) fn await_finish(&self, timeout: Jiffies) -> bool {
        self.wait
            .wait_timeout(timeout, || self.progress.load(Acquire) == DONE)
    }

    /// Waits until a reason is set, and clears it.
    ///
    /// Context: sleeps.
    pub(crate) fn wait_for(&self, reason: WakeReason) {
        self.wait.wait_idle(|| self.is_set(reason));
        self.take(reason);
    }

    fn is_set(&self, reason: WakeReason) -> bool {
        self.set
            .get(reason as usize)
            .is_some_and(|flag| flag.load(Relaxed) != 0)
    }

    /// Waits until any reason is set, or until the timeout.
    ///
    /// Context: sleeps.
    pub(crate) fn wait(&self, timeout: Option<Jiffies>) {
        let any = || self.set.iter().any(|flag| flag.load(Relaxed) != 0);
        match timeout {
            // The caller checks the reasons after a timeout, too.
            Some(timeout) => {
                self.wait.wait_idle_timeout(timeout, any);
            }
            None => self.wait.wait_idle(any),
        }
    }
}
