// SPDX-License-Identifier: GPL-2.0-only

//! Timers.
//!
//! A [`Timer`] calls its [`TimerCallback`] when the time that was set is over. It costs nothing
//! while none is set. Whether it wakes a CPU that is idle then is said by [`TimerFlags`].
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

/// Flags of a timer: the behaviour of a CPU that is idle when the time is over.
pub enum TimerFlags {
    /// The CPU wakes, and the call comes in time.
    Default,
    /// The CPU stays idle, and the call comes once something else wakes it (`TIMER_DEFERRABLE`).
    Deferrable,
}

/// The callback of a [`Timer`].
pub trait TimerCallback: Send + Sync + 'static {
    /// Called when the time is over. Returns the time after which to call again, if any.
    ///
    /// Context: soft interrupt, must not sleep.
    fn expired(&self) -> Option<Jiffies>;
}

/// A timer, not set at first. Dropping it waits for a call that is running, so not to be done with
/// a lock that the target takes, nor in an interrupt.
///
/// # Invariants
///
/// `timer` is initialised with `callback`, and does not move.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub struct Timer<T: TimerCallback> {
    /// First, so that the callback finds the rest behind the pointer that it gets.
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

    /// Sets the timer to call after this time, and not at the time that was set before
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
    /// For the kernel's timers: `timer` is that of a `Timer<T>`, which waits for this before it is
    /// freed.
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
