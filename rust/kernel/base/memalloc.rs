// SPDX-License-Identifier: GPL-2.0-only

//! Scopes of memory allocation flags.
//!
//! A thread that does the I/O of disks creates a [`NoioScope`] first and keeps it until it ends:
//! its allocations must not wait for I/O that the thread itself has to do.
//!
//! C header: [`include/linux/sched/mm.h`](srctree/include/linux/sched/mm.h)

use core::marker::PhantomData;

use kernel::{
    ffi::c_uint,
    types::NotThreadSafe, //
};

/// A scope in which allocations of the current thread start no I/O (`memalloc_noio_save()`),
/// whatever their flags are.
///
/// Drop nested scopes in the reverse order.
///
/// # Invariants
///
/// `flags` are the flags that the current thread had before; this is not `Send`.
#[must_use]
pub struct NoioScope {
    flags: c_uint,
    _not_send: PhantomData<NotThreadSafe>,
}

impl NoioScope {
    /// Begins a scope.
    pub fn new() -> Self {
        // INVARIANT: The call returns the flags that the thread had before.
        Self {
            // SAFETY: Changes a flag of the current thread.
            flags: unsafe { bindings_ext::memalloc_noio_save() },
            _not_send: PhantomData,
        }
    }
}

impl Default for NoioScope {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for NoioScope {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this restores the flags of the thread.
        unsafe { bindings_ext::memalloc_noio_restore(self.flags) };
    }
}
