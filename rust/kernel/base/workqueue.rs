// SPDX-License-Identifier: GPL-2.0-only

//! Work queues of one's own, which end with their owner.
//!
//! Work on the kernel's shared queues can run after the module that it belongs to is gone. A queue
//! of one's own waits for its work when it is dropped. It holds no reference to the module, which
//! owns it and could never be unloaded then: whoever creates a queue drops it before the module's
//! end, and does not leave it in a static.
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

/// A work queue, which waits for its work when it is dropped.
///
/// Not to be dropped by its own work: that would wait for itself.
///
/// # Invariants
///
/// The pointer is to a work queue that we own.
pub struct OwnedQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A work queue belongs to no thread.
unsafe impl Send for OwnedQueue {}

// SAFETY: All functions of a work queue can be called from several threads at once.
unsafe impl Sync for OwnedQueue {}

impl OwnedQueue {
    /// Creates a queue whose work may run on any CPU, and may sleep without keeping other work
    /// waiting. When memory is short it may have to wait: nothing that memory is freed by may wait
    /// for it.
    pub fn new(name: &CStr) -> Result<Self> {
        let flags = bindings::wq_flags_WQ_UNBOUND;
        // SAFETY: The format takes one string, which the function copies.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(c"%s".as_char_ptr(), flags, 0, name.as_char_ptr())
        };
        // INVARIANT: The queue is new, and ours.
        NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }

    /// Has `work` run soon. It comes back in `Err` if it waits to be run already.
    pub fn enqueue<W, const ID: u64>(&self, work: W) -> W::EnqueueOutput
    where
        W: RawWorkItem<ID> + Send + 'static,
    {
        // SAFETY: By the type invariant the queue is valid.
        unsafe { Queue::from_raw(self.0.as_ptr()) }.enqueue(work)
    }

    /// Waits for all work that was enqueued before. Sleeps.
    pub fn flush(&self) {
        // SAFETY: By the type invariant the queue is valid.
        unsafe { bindings::__flush_workqueue(self.0.as_ptr()) };
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the queue is ours. It holds no delayed work, which could
        // come later: `enqueue` is the only way into it.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}
