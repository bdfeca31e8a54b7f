// SPDX-License-Identifier: GPL-2.0

//! Timers that wake nobody.
//!
//! A [`LazyTimer`] calls its target again and again, in about the same intervals as long as there is
//! something else to do. A CPU that is idle sleeps on, and the call comes once something wakes it.
//!
//! C header: [`include/linux/timer.h`](srctree/include/linux/timer.h)

use super::jiffies;
use super::jiffies::Jiffies;
use super::module_ref::ModuleRef;
use kernel::bindings;
use kernel::optional_name;
use kernel::prelude::*;
use kernel::static_lock_class;
use kernel::types::Opaque;

/// What a [`LazyTimer`] or an [`Alarm`](super::alarm::Alarm) calls.
pub trait Target: Send + Sync + 'static {
    /// The time is over once more.
    ///
    /// Runs in a soft interrupt: it must not sleep.
    fn expired(&self);
}

/// A timer that runs until it is dropped. Dropping it waits for a call that is running, so not to be
/// done with a lock that the target takes, nor in an interrupt.
///
/// # Invariants
///
/// `timer` is initialised with `callback`, and does not move.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub struct LazyTimer<T: Target> {
    /// First, so that the callback finds the rest behind the pointer that it gets.
    #[pin]
    timer: Opaque<bindings::timer_list>,
    period: Jiffies,
    target: T,
    _module: ModuleRef,
}

// SAFETY: A timer may be set and shut down from any thread; the target is `Send`.
unsafe impl<T: Target> Send for LazyTimer<T> {}
// SAFETY: There is nothing to do with a shared reference.
unsafe impl<T: Target> Sync for LazyTimer<T> {}

impl<T: Target> LazyTimer<T> {
    /// Starts a timer with this period, at least one jiffy.
    pub fn new(period: Jiffies, target: T) -> Result<Pin<KBox<Self>>> {
        let period = period.max(1);
        let module = ModuleRef::new()?;
        let this = KBox::pin_init(
            pin_init!(Self {
                // INVARIANT: Initialised here, and pinned.
                timer <- Opaque::ffi_init(|timer| {
                    // SAFETY: `timer` is memory for a timer; name and key live for ever.
                    unsafe {
                        bindings::timer_init_key(
                            timer,
                            Some(Self::callback),
                            bindings::TIMER_DEFERRABLE,
                            optional_name!().as_char_ptr(),
                            static_lock_class!().as_ptr(),
                        )
                    }
                }),
                period,
                target,
                _module: module,
            }),
            GFP_KERNEL,
        )?;
        this.arm();
        Ok(this)
    }

    fn arm(&self) {
        let then = jiffies::now().wrapping_add(self.period);
        // SAFETY: The timer is initialised, by the type invariant. Does nothing once it is shut down.
        unsafe { bindings::mod_timer(self.timer.get(), then) };
    }

    /// # Safety
    ///
    /// Only for a timer in a `LazyTimer<T>`, which waits for this before it is freed.
    unsafe extern "C" fn callback(timer: *mut bindings::timer_list) {
        // SAFETY: The timer is the first field.
        let this = unsafe { &*timer.cast::<Self>() };
        this.target.expired();
        this.arm();
    }
}

#[pinned_drop]
impl<T: Target> PinnedDrop for LazyTimer<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant. After this the callback does not run, and never will.
        unsafe { bindings::timer_shutdown_sync(self.timer.get()) };
    }
}
