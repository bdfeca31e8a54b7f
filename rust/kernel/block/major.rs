// SPDX-License-Identifier: GPL-2.0

//! Ownership of a block major number.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    str::CStrExt, //
};

/// A registered block major number, released when dropped.
///
/// # Invariants
///
/// `major` is registered under `name` by us.
pub struct Major {
    major: u32,
    name: &'static CStr,
}

impl Major {
    /// Registers `major`, which must not be 0, under the name that `/proc/devices` shows.
    ///
    /// `EBUSY`: another driver has it.
    pub fn register(major: u32, name: &'static CStr) -> Result<Self> {
        if major == 0 {
            return Err(EINVAL);
        }
        // SAFETY: `name` lives for ever; there is no probe function.
        to_result(unsafe { bindings::__register_blkdev(major, name.as_char_ptr(), None) })?;
        // INVARIANT: Registered above.
        Ok(Self { major, name })
    }

    /// The number.
    pub fn number(&self) -> u32 {
        self.major
    }
}

impl Drop for Major {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this undoes our registration.
        unsafe { bindings::unregister_blkdev(self.major, self.name.as_char_ptr()) };
    }
}
