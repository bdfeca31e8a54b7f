// SPDX-License-Identifier: GPL-2.0-only

//! References to the module that this crate is linked into.

use core::marker::PhantomData;

use kernel::{
    bindings,
    prelude::*, //
};

use super::this_module::this_module;

/// A reference to this module, which stays loaded while the reference lives.
///
/// Each object with callbacks from the kernel holds one: a disk, a thread, a sysfs attribute, an
/// interrupt, a watch, a timer. If such an object is leaked, the module can no longer be unloaded;
/// otherwise the kernel would call freed code.
///
/// If `init` fails, the kernel frees the module regardless of its reference count: so `init`
/// creates objects with callbacks last, and cannot fail after that.
///
/// # Invariants
///
/// One count of the module's reference counter is owned.
pub struct ModuleRef(PhantomData<()>);

impl ModuleRef {
    /// Takes a reference.
    ///
    /// Fails with `ENODEV` while the module is being unloaded.
    pub fn new() -> Result<Self> {
        // SAFETY: The pointer is that of the module that runs this code.
        if unsafe { bindings::try_module_get(this_module().as_ptr()) } {
            // INVARIANT: The call above took the count.
            Ok(Self(PhantomData))
        } else {
            Err(ENODEV)
        }
    }

    /// Ends the current kernel thread and puts the reference once no more code of the module runs.
    ///
    /// # Safety
    ///
    /// The current task is a kernel thread, and nothing on its stack needs to be dropped.
    // Inlined, because objtool only treats the called function as one that does not return.
    #[inline(always)]
    pub(super) unsafe fn put_and_exit_thread(self) -> ! {
        core::mem::forget(self);
        // SAFETY: A count is owned by the type invariant and was not put; the rest is the caller's
        // promise.
        unsafe { bindings::__module_put_and_kthread_exit(this_module().as_ptr(), 0) }
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, a count is owned, and it ends here.
        unsafe { bindings::module_put(this_module().as_ptr()) };
    }
}
