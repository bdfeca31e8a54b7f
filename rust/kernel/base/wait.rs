// SPDX-License-Identifier: GPL-2.0-only

//! Wait queues: sleep until a condition holds.
//!
//! The condition is data outside of the queue, in atomics or under a lock. Code that makes it true
//! calls [`WaitQueue::wake_up`] after that; a waiter checks it after adding itself to the queue, so
//! that no wakeup is lost.
//!
//! The condition is called when the task is already marked as sleeping, so it must not sleep.
//!
//! C header: [`include/linux/wait.h`](srctree/include/linux/wait.h)

use core::{
    cell::UnsafeCell,
    mem::MaybeUninit, //
};

use kernel::{
    bindings,
    ffi,
    prelude::*,
    sync::LockClassKey,
    task::MAX_SCHEDULE_TIMEOUT,
    time::Jiffies,
    types::Opaque, //
};

/// Creates a [`WaitQueue`] with a lock class of its own.
#[macro_export]
macro_rules! new_wait_queue {
    () => {
        $crate::base::wait::WaitQueue::new(
            ::kernel::optional_name!(),
            ::kernel::static_lock_class!(),
        )
    };
}
pub use new_wait_queue;

/// The way in which a task sleeps.
#[derive(Clone, Copy)]
enum Sleep {
    /// Until woken. The task counts as load, and the system cannot be suspended meanwhile.
    Uninterruptible,
    /// Until woken, for a kernel thread with nothing to do: it does not count as load, and may be
    /// frozen here if it is freezable.
    Idle,
}

impl Sleep {
    fn state(self) -> ffi::c_int {
        let state = match self {
            Sleep::Uninterruptible => bindings::TASK_UNINTERRUPTIBLE,
            Sleep::Idle => bindings::TASK_IDLE | bindings::TASK_FREEZABLE,
        };
        state as ffi::c_int
    }
}

/// A queue of tasks that wait for a condition.
///
/// # Invariants
///
/// `head` is an initialised `wait_queue_head`.
#[pin_data]
pub struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head_t>,
}

// SAFETY: A wait queue has its own lock and belongs to no thread.
unsafe impl Send for WaitQueue {}
// SAFETY: All access to the queue is under its own lock.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Creates a queue.
    ///
    /// Use [`new_wait_queue!`].
    pub fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        // INVARIANT: The initialiser initialises the head.
        pin_init!(Self {
            head <- Opaque::ffi_init(|head| {
                // SAFETY: `head` is valid memory for a head; name and key are `'static`.
                unsafe {
                    bindings::__init_waitqueue_head(head, name.as_char_ptr(), key.as_ptr())
                }
            }),
        })
    }

    /// Wakes all waiters, which then check their conditions again.
    ///
    /// It is cheap if there is no waiter.
    ///
    /// Context: any, including hard interrupts.
    #[inline]
    pub fn wake_up(&self) {
        // A waiter adds itself to the queue before it checks its condition. Either it sees the
        // caller's changes, or this sees the waiter: this has the barrier for that.
        //
        // SAFETY: By the type invariant, the head is initialised.
        if !unsafe { bindings_ext::wq_has_sleeper(self.head.get()) } {
            return;
        }
        // SAFETY: By the type invariant, the head is initialised.
        unsafe {
            bindings::__wake_up(
                self.head.get(),
                bindings::TASK_NORMAL,
                1,
                core::ptr::null_mut(),
            )
        };
    }

    /// Sleeps until `condition` holds.
    ///
    /// Context: process.
    pub fn wait(&self, condition: impl FnMut() -> bool) {
        self.sleep(Sleep::Uninterruptible, MAX_SCHEDULE_TIMEOUT, condition);
    }

    /// Sleeps until `condition` holds, for at most `timeout`.
    ///
    /// Returns `true` if the condition holds.
    ///
    /// Context: process.
    #[must_use = "the time may be over without the condition"]
    pub fn wait_timeout(&self, timeout: Jiffies, condition: impl FnMut() -> bool) -> bool {
        let timeout = isize::try_from(timeout).unwrap_or(isize::MAX);
        self.sleep(Sleep::Uninterruptible, timeout, condition)
    }

    /// Sleeps like [`WaitQueue::wait`], for a kernel thread that has nothing to do: it counts as
    /// idle, and may be frozen while it waits.
    pub fn wait_idle(&self, condition: impl FnMut() -> bool) {
        self.sleep(Sleep::Idle, MAX_SCHEDULE_TIMEOUT, condition);
    }

    /// Sleeps like [`WaitQueue::wait_idle`], for at most `timeout`.
    ///
    /// Returns `true` if the condition holds.
    pub fn wait_idle_timeout(&self, timeout: Jiffies, condition: impl FnMut() -> bool) -> bool {
        let timeout = isize::try_from(timeout).unwrap_or(isize::MAX);
        self.sleep(Sleep::Idle, timeout, condition)
    }

    fn sleep(&self, sleep: Sleep, mut timeout: isize, mut condition: impl FnMut() -> bool) -> bool {
        kernel::task::might_sleep();
        if condition() {
            return true;
        }

        let entry = UnsafeCell::new(MaybeUninit::<bindings::wait_queue_entry>::uninit());
        let entry = entry.get().cast::<bindings::wait_queue_entry>();
        // SAFETY: `entry` is memory for an entry, and stays where it is until it is off the queue.
        unsafe { bindings::init_wait_entry(entry, 0) };
        let holds = loop {
            // SAFETY: The head is initialised by the type invariant, the entry just above. The
            // entry is on no other queue.
            unsafe { bindings::prepare_to_wait_event(self.head.get(), entry, sleep.state()) };
            if condition() {
                break true;
            }
            if timeout == 0 {
                break false;
            }
            // SAFETY: The state of the current task was set above.
            timeout = unsafe { bindings::schedule_timeout(timeout) };
            if condition() {
                break true;
            }
        };
        // SAFETY: The entry was added to this queue above, if at all. After this it is on no queue,
        // so it may go out of scope.
        unsafe { bindings::finish_wait(self.head.get(), entry) };
        holds
    }
}
