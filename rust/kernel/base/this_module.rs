// SPDX-License-Identifier: GPL-2.0-only

//! The module that this crate is linked into.

use kernel::{
    bindings,
    ThisModule, //
};

/// Returns `THIS_MODULE` of the module that this crate is linked into.
///
/// Each module links a `kernel_ext` of its own, so the module need not be passed as an argument.
pub const fn this_module() -> ThisModule {
    // SAFETY: The kernel makes `__this_module` when it loads the module, and keeps it until the
    // module, and this code with it, is unloaded.
    unsafe { ThisModule::from_ptr(&raw mut bindings::__this_module) }
}
