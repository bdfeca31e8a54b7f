// SPDX-License-Identifier: GPL-2.0-only

//! A spinlock that disables interrupts on the local CPU while it is held.
//!
//! It is for data that an interrupt handler uses too. [`kernel::sync::SpinLock`] could deadlock,
//! because the handler can interrupt the holder on the same CPU.

use kernel::{
    bindings,
    ffi::c_ulong,
    sync::lock::{
        Backend,
        Guard,
        Lock, //
    }, //
};

/// Creates a [`SpinLockIrqSave`] initialiser with a lock class of its own.
///
/// The name is the argument, or the place in the source if there is none.
#[macro_export]
macro_rules! new_spinlock_irqsave {
    ($inner:expr $(, $name:literal)? $(,)?) => {
        $crate::base::spinlock_irqsave::SpinLockIrqSave::new(
            $inner, ::kernel::optional_name!($($name)?), ::kernel::static_lock_class!())
    };
}
pub use new_spinlock_irqsave;

/// A spinlock that disables interrupts on the local CPU while it is held.
///
/// The guard restores the previous interrupt state, so drop guards of several such locks in the
/// reverse order.
///
/// Context: any.
pub type SpinLockIrqSave<T> = Lock<T, SpinLockIrqSaveBackend>;

/// The guard of a [`SpinLockIrqSave`].
pub type SpinLockIrqSaveGuard<'a, T> = Guard<'a, T, SpinLockIrqSaveBackend>;

/// A kernel `spinlock_t` with `spin_lock_irqsave()`.
pub struct SpinLockIrqSaveBackend;

// SAFETY: `spinlock_t` gives mutual exclusion. `relock` is the default, which locks as `lock` does.
unsafe impl Backend for SpinLockIrqSaveBackend {
    type State = bindings::spinlock_t;
    type GuardState = c_ulong;

    #[inline]
    unsafe fn init(
        ptr: *mut Self::State,
        name: *const kernel::ffi::c_char,
        key: *mut bindings::lock_class_key,
    ) {
        // SAFETY: `ptr` is valid for writes, `name` and `key` are `'static`, as the caller
        // promises.
        unsafe { bindings::__spin_lock_init(ptr, name, key) }
    }

    #[inline]
    unsafe fn lock(ptr: *mut Self::State) -> Self::GuardState {
        // SAFETY: The lock was initialised, as the caller promises.
        unsafe { bindings_ext::spin_lock_irqsave(ptr) }
    }

    #[inline]
    unsafe fn try_lock(ptr: *mut Self::State) -> Option<Self::GuardState> {
        let mut flags = 0;
        // SAFETY: The lock was initialised, as the caller promises.
        unsafe { bindings_ext::spin_trylock_irqsave(ptr, &mut flags) }.then_some(flags)
    }

    #[inline]
    unsafe fn unlock(ptr: *mut Self::State, flags: &Self::GuardState) {
        // SAFETY: The caller owns the lock, and took it with these flags.
        unsafe { bindings_ext::spin_unlock_irqrestore(ptr, *flags) }
    }

    #[inline]
    unsafe fn assert_is_held(ptr: *mut Self::State) {
        // Without lockdep the call has no effect.
        if cfg!(CONFIG_LOCKDEP) {
            // SAFETY: The lock was initialised, as the caller promises.
            unsafe { bindings::spin_assert_is_held(ptr) }
        }
    }
}
