// SPDX-License-Identifier: GPL-2.0-only

//! Wait queues: sleep until a condition holds.
//!
//! The condition lives outside of the queue, in atomics or behind a lock. Whoever makes it true
//! calls [`WaitQueue::wake_up`] after that; whoever waits checks it after it was put on the queue,
//! so that no wake-up is lost.
//!
//! The condition is called with the task marked as sleeping already: it must not sleep itself.
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

/// Makes a [`WaitQueue`] with a lock class of its own.
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
    /// Until woken. Counts as load, and the system can't be suspended meanwhile.
    Uninterruptible,
    /// Until woken, for a kernel thread with nothing to do: no load, and if the thread is
    /// freezable, it may be frozen here.
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

/// A queue of tasks that wait for something.
///
/// # Invariants
///
/// `head` is an initialised `wait_queue_head`.
#[pin_data]
pub struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head_t>,
}

// SAFETY: A wait queue has its own lock and no ties to a thread.
unsafe impl Send for WaitQueue {}
// SAFETY: All access to the queue is under its own lock.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Makes a queue. Use [`new_wait_queue!`].
    pub fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        // INVARIANT: The initialiser makes the head.
        pin_init!(Self {
            head <- Opaque::ffi_init(|head| {
                // SAFETY: `head` is valid memory for a head; name and key are `'static`.
                unsafe {
                    bindings::__init_waitqueue_head(head, name.as_char_ptr(), key.as_ptr())
                }
            }),
        })
    }

    /// Wakes all waiters, which then check their conditions again. Costs little if there is none.
    ///
    /// Context: any, including hard interrupts.
    #[inline]
    pub fn wake_up(&self) {
        // A waiter puts itself into the queue before it looks at its condition. What the caller has
        // changed is seen there, or the waiter is seen here: this has the barrier for that.
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

    /// Sleeps until `condition` holds. Process context.
    pub fn wait(&self, condition: impl FnMut() -> bool) {
        self.sleep(Sleep::Uninterruptible, MAX_SCHEDULE_TIMEOUT, condition);
    }

    /// Sleeps until `condition` holds or the time is over, and says whether it holds. Process
    /// context.
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

    /// Sleeps like [`WaitQueue::wait_idle`], for at most `timeout`. Returns `true` if the condition
    /// holds.
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
        // SAFETY: The entry was queued above, if at all, on this queue. After this it is on none,
        // so that it may go out of scope.
        unsafe { bindings::finish_wait(self.head.get(), entry) };
        holds
    }
}
