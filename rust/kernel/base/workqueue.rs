// SPDX-License-Identifier: GPL-2.0-only

//! Workqueues that end with their owner.
//!
//! Work on the kernel's shared workqueues can run after its module was unloaded. An [`OwnedQueue`]
//! waits for its work when it is dropped. It holds no reference to the module, because the module
//! owns it and could never be unloaded otherwise: the module drops it at its exit, and does not
//! store it in a static.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use core::ptr::NonNull;

use kernel::{
    bindings,
    prelude::*,
    str::CStrExt,
    workqueue::{
        Queue,
        RawWorkItem, //
    }, //
};

/// A workqueue that waits for its work when it is dropped.
///
/// Its own work must not drop it, because that would wait for itself.
///
/// # Invariants
///
/// The pointer is to a workqueue that this owns.
pub struct OwnedQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue belongs to no thread.
unsafe impl Send for OwnedQueue {}

// SAFETY: All functions of a workqueue can be called from several threads at once.
unsafe impl Sync for OwnedQueue {}

impl OwnedQueue {
    /// Creates a workqueue whose work may run on any CPU, and may sleep without delaying other
    /// work.
    ///
    /// When memory is short, its work may be delayed: memory reclaim must not depend on it.
    pub fn new(name: &CStr) -> Result<Self> {
        let flags = bindings::wq_flags_WQ_UNBOUND;
        // SAFETY: The format takes one string, which the function copies.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(c"%s".as_char_ptr(), flags, 0, name.as_char_ptr())
        };
        // INVARIANT: The queue is new, and ours.
        NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }

    /// Schedules `work`, or returns it in `Err` if it is already scheduled.
    pub fn enqueue<W, const ID: u64>(&self, work: W) -> W::EnqueueOutput
    where
        W: RawWorkItem<ID> + Send + 'static,
    {
        // SAFETY: By the type invariant the queue is valid.
        unsafe { Queue::from_raw(self.0.as_ptr()) }.enqueue(work)
    }

    /// Waits for all work that was enqueued before.
    ///
    /// Context: sleeps.
    pub fn flush(&self) {
        // SAFETY: By the type invariant the queue is valid.
        unsafe { bindings::__flush_workqueue(self.0.as_ptr()) };
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the queue is ours. It has no delayed work, which could be
        // queued later, because all work is added by `enqueue`.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}
