// SPDX-License-Identifier: GPL-2.0-only

//! Formatting of values of crates that do not use the kernel.
//!
//! The kernel's formatting macros require [`kernel::fmt::Display`], which such crates cannot
//! implement.

use kernel::fmt;

/// A value that the kernel formats as [`core::fmt::Display`] does.
pub struct AsKernelDisplay<T>(pub T);

impl<T: core::fmt::Display> fmt::Display for AsKernelDisplay<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        core::fmt::Display::fmt(&self.0, f)
    }
}
