// SPDX-License-Identifier: GPL-2.0-only

//! Timers.
//!
//! A [`Timer`] calls its [`TimerCallback`] when it expires. [`TimerFlags`] tell whether it wakes an
//! idle CPU then.
//!
//! C header: [`include/linux/timer.h`](srctree/include/linux/timer.h)

use kernel::{
    bindings,
    optional_name,
    prelude::*,
    static_lock_class,
    types::Opaque, //
};

use super::{
    jiffies::{
        self,
        Jiffies, //
    },
    module_ref::ModuleRef, //
};

/// Flags of a timer: the behaviour of a CPU that is idle when the timer expires.
pub enum TimerFlags {
    /// The CPU wakes up, and the callback is called in time.
    Default,
    /// The CPU stays idle, and the callback is called when the CPU wakes up for another reason
    /// (`TIMER_DEFERRABLE`).
    Deferrable,
}

/// The callback of a [`Timer`].
pub trait TimerCallback: Send + Sync + 'static {
    /// Called when the timer has expired.
    ///
    /// Returns the time after which to call again, if any.
    ///
    /// Context: softirq, must not sleep.
    fn expired(&self) -> Option<Jiffies>;
}

/// A timer, which is not set at first.
///
/// Dropping it waits for a running callback. So do not drop it while holding a lock that the
/// callback takes, nor in an interrupt.
///
/// # Invariants
///
/// `timer` is initialised with `callback`, and does not move.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub struct Timer<T: TimerCallback> {
    /// The first field, so that the callback finds the others at the pointer that it gets.
    #[pin]
    timer: Opaque<bindings::timer_list>,
    target: T,
    _module: ModuleRef,
}

// SAFETY: A timer may be set and shut down from any thread; the target is `Send`.
unsafe impl<T: TimerCallback> Send for Timer<T> {}
// SAFETY: A timer may be set by several at once; the target is `Sync`.
unsafe impl<T: TimerCallback> Sync for Timer<T> {}

impl<T: TimerCallback> Timer<T> {
    /// Creates a timer that is not set.
    pub fn new(flags: TimerFlags, target: T) -> Result<Pin<KBox<Self>>> {
        let module = ModuleRef::new()?;
        let flags = match flags {
            TimerFlags::Default => 0,
            TimerFlags::Deferrable => bindings::TIMER_DEFERRABLE,
        };
        KBox::pin_init(
            pin_init!(Self {
                // INVARIANT: Initialised here, and pinned.
                timer <- Opaque::ffi_init(|timer| {
                    // SAFETY: `timer` is memory for a timer; name and key are `'static`.
                    unsafe {
                        bindings::timer_init_key(
                            timer,
                            Some(Self::callback),
                            flags,
                            optional_name!().as_char_ptr(),
                            static_lock_class!().as_ptr(),
                        )
                    }
                }),
                target,
                _module: module,
            }),
            GFP_KERNEL,
        )
    }

    /// Sets the timer to expire after this time, instead of the time that was set before
    /// (`mod_timer()`).
    ///
    /// Context: any.
    pub fn mod_timer_after(&self, time: Jiffies) {
        let then = jiffies::now().wrapping_add(time);
        // SAFETY: The timer is initialised, by the type invariant. Does nothing once it is shut
        // down.
        unsafe { bindings::mod_timer(self.timer.get(), then) };
    }

    /// # Safety
    ///
    /// For the kernel's timers: `timer` is that of a `Timer<T>`, which waits for this function
    /// before it is freed.
    unsafe extern "C" fn callback(timer: *mut bindings::timer_list) {
        // SAFETY: By the requirements of this function; the timer is the first field.
        let this = unsafe { &*timer.cast::<Self>() };
        if let Some(time) = this.target.expired() {
            this.mod_timer_after(time);
        }
    }
}

#[pinned_drop]
impl<T: TimerCallback> PinnedDrop for Timer<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant. After this the callback does not run, and never will.
        unsafe { bindings::timer_shutdown_sync(self.timer.get()) };
    }
}
