// SPDX-License-Identifier: GPL-2.0-only

//! Mutexes in statics.
//!
//! The kernel's `global_lock!` has to be initialised once before its first use, which is an unsafe
//! operation. A [`GlobalMutex`] initialises itself at its first use.

use core::{
    marker::PhantomData,
    ops::{
        Deref,
        DerefMut, //
    },
    pin::Pin, //
};

use kernel::{
    c_str,
    static_lock_class,
    str::CStr,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        lock::mutex::MutexBackend,
        GlobalGuard,
        GlobalLock,
        GlobalLockBackend,
        LockClassKey, //
    }, //
};

/// The mutex has not been used.
const FRESH: u32 = 0;
/// It is being initialised.
const BUSY: u32 = 1;
/// It is initialised.
const READY: u32 = 2;

/// The backend of the lock. It is private, so its locks protect nothing else.
struct Backend<T>(PhantomData<T>);

impl<T: 'static> GlobalLockBackend for Backend<T> {
    const NAME: &'static CStr = c_str!("GlobalMutex");
    type Item = T;
    type Backend = MutexBackend;

    fn get_lock_class() -> Pin<&'static LockClassKey> {
        static_lock_class!()
    }
}

/// A mutex for a static.
///
/// All of them have one lock class: do not hold two.
///
/// The data is not dropped when the module is unloaded.
///
/// # Invariants
///
/// - `lock` is initialised when `state` is [`READY`], and not used before.
/// - `state` becomes [`BUSY`] once, and never [`FRESH`] again; the caller that has set it to
///   [`BUSY`] initialises `lock`.
pub struct GlobalMutex<T: 'static> {
    state: Atomic<u32>,
    lock: GlobalLock<Backend<T>>,
}

impl<T: 'static> GlobalMutex<T> {
    /// Creates a mutex that protects `data`.
    pub const fn new(data: T) -> Self {
        // INVARIANT: The lock has not been used.
        Self {
            state: Atomic::new(FRESH),
            // SAFETY: By the type invariants the lock is not used before it is initialised. All
            // mutexes of a `T` share `Backend<T>`; a type for each is wanted for the sake of
            // `GlobalLockedBy`, and there is none of this type, which is private.
            lock: unsafe { GlobalLock::new(data) },
        }
    }

    /// Takes the mutex.
    ///
    /// Context: may sleep.
    pub fn lock(&'static self) -> Guard<T> {
        while self.state.load(Acquire) != READY {
            if self.state.cmpxchg(FRESH, BUSY, Full).is_ok() {
                // SAFETY: Only one caller gets here, once, by the type invariant.
                unsafe { self.lock.init() };
                // INVARIANT: It is initialised now.
                self.state.store(READY, Release);
            } else {
                // SAFETY: `cond_resched` requires a context that may sleep, as the lock below does;
                // in other contexts it does not affect memory safety.
                unsafe { bindings_ext::cond_resched() };
            }
        }
        Guard(self.lock.lock())
    }
}

/// The guard of a mutex: gives access to the data, and releases the mutex when dropped.
#[must_use = "the mutex is released when the guard is dropped"]
pub struct Guard<T: 'static>(GlobalGuard<Backend<T>>);

impl<T> Deref for Guard<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Unpin> DerefMut for Guard<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}
