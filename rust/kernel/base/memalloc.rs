// SPDX-License-Identifier: GPL-2.0-only

//! Code that memory is freed by: it must not wait for memory that is freed by it. A thread that disks
//! depend on makes a [`NoioScope`] first and keeps it to its end.
//!
//! C header: [`include/linux/sched/mm.h`](srctree/include/linux/sched/mm.h)

use core::marker::PhantomData;

use kernel::{
    ffi::c_uint,
    types::NotThreadSafe, //
};

/// While this lives, the current thread gets no memory by having data written to disks, whatever
/// the flags of the allocation say.
///
/// Several are to be dropped in the reverse order.
///
/// # Invariants
///
/// `flags` is what the current thread had before: this cannot leave it.
#[must_use]
pub struct NoioScope {
    flags: c_uint,
    _not_send: PhantomData<NotThreadSafe>,
}

impl NoioScope {
    /// From now on.
    pub fn new() -> Self {
        // INVARIANT: The call returns what the thread had before.
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
        // SAFETY: By the type invariant this gives the thread what it had.
        unsafe { bindings_ext::memalloc_noio_restore(self.flags) };
    }
}
