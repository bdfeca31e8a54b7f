// SPDX-License-Identifier: GPL-2.0-only

//! I/O accounting of kernel threads: cgroup and priority.
//!
//! A kernel thread that does I/O for others can charge it to a cgroup ([`BlkcgCss`],
//! [`Current::charge`]) and set its priority ([`Current::set_io_priority`]). The block layer reads
//! both when the thread creates or submits a bio.
//!
//! C headers: [`include/linux/cgroup.h`](srctree/include/linux/cgroup.h),
//! [`include/linux/kthread.h`](srctree/include/linux/kthread.h),
//! [`include/linux/ioprio.h`](srctree/include/linux/ioprio.h)

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

use kernel::{
    bindings,
    error::{
        from_err_ptr,
        to_result, //
    },
    ffi::c_void,
    prelude::*,
    str::CStr,
    types::NotThreadSafe, //
};

use super::kthread::Current;

/// A cgroup to which I/O can be charged: a cgroup of version 2, or its nearest ancestor that
/// controls I/O.
///
/// # Invariants
///
/// Points to the state of the I/O controller in a cgroup, and owns a reference to it.
pub struct BlkcgCss(NonNull<c_void>);

// SAFETY: A cgroup belongs to no thread.
unsafe impl Send for BlkcgCss {}
// SAFETY: Nothing can be changed through it.
unsafe impl Sync for BlkcgCss {}

impl BlkcgCss {
    /// Finds a cgroup by its path below the root of the hierarchy, such as `/guests/web`.
    ///
    /// Fails with `ENOENT` if there is no such cgroup, and with `EOPNOTSUPP` if the kernel does not
    /// control I/O by cgroup.
    ///
    /// Context: may sleep.
    pub fn find(path: &CStr) -> Result<Self> {
        // SAFETY: The path is a string.
        let css = from_err_ptr(unsafe { bindings_ext::io_css_get_from_path(path.as_char_ptr()) })?;
        // INVARIANT: A result that is not an error comes with a reference.
        NonNull::new(css).map(Self).ok_or(ENODEV)
    }
}

impl Drop for BlkcgCss {
    fn drop(&mut self) {
        // SAFETY: The reference is ours by the type invariant.
        unsafe { bindings_ext::io_css_put(self.0.as_ptr()) };
    }
}

/// A scope in which the I/O of the current thread is charged to a cgroup.
///
/// # Invariants
///
/// The current task is the kernel thread whose I/O is charged; this is not `Send`.
#[must_use]
pub struct BlkcgGuard<'a> {
    _thread: &'a Current,
    _not_send: PhantomData<NotThreadSafe>,
}

impl Drop for BlkcgGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the current task is a kernel thread. NULL ends the charge.
        unsafe { bindings_ext::kthread_associate_io_css(core::ptr::null_mut()) };
    }
}

/// The priority of I/O, as set by `ionice`. Some I/O schedulers use it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IoPriority {
    /// Before all other I/O: level 0 to 7, of which 0 is the most urgent.
    RealTime(u8),
    /// The default: level 0 to 7.
    BestEffort(u8),
    /// Only when there is no other I/O.
    Idle,
}

impl IoPriority {
    /// The least urgent level.
    const MAX_LEVEL: u8 = 7;

    fn to_raw(self) -> i32 {
        let (class, level) = match self {
            IoPriority::RealTime(level) => (bindings::IOPRIO_CLASS_RT, level),
            IoPriority::BestEffort(level) => (bindings::IOPRIO_CLASS_BE, level),
            IoPriority::Idle => (bindings::IOPRIO_CLASS_IDLE, 0),
        };
        ((class << bindings::IOPRIO_CLASS_SHIFT) as i32) | i32::from(level.min(Self::MAX_LEVEL))
    }
}

impl Current {
    /// Charges the I/O of this thread to `group` until the result is dropped
    /// (`kthread_associate_blkcg()`).
    ///
    /// A later call replaces an earlier one.
    pub fn charge(&self, group: &BlkcgCss) -> BlkcgGuard<'_> {
        // SAFETY: The current task is a kernel thread, by the invariant of `Current`; the cgroup is
        // valid, by that of `BlkcgCss`. The kernel takes a reference of its own, which `BlkcgGuard`
        // puts.
        unsafe { bindings_ext::kthread_associate_io_css(group.0.as_ptr()) };
        // INVARIANT: The I/O of the current thread is charged from now on.
        BlkcgGuard {
            _thread: self,
            _not_send: PhantomData,
        }
    }

    /// Sets the priority of all further I/O of this thread.
    pub fn set_io_priority(&self, priority: IoPriority) -> Result {
        // SAFETY: Any number may be given; the current task is valid.
        to_result(unsafe { bindings_ext::set_current_ioprio(priority.to_raw()) })
    }
}
