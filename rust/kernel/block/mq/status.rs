// SPDX-License-Identifier: GPL-2.0-only

//! The status of a request.
//!
//! C header: [`include/linux/blk_types.h`](srctree/include/linux/blk_types.h)

use kernel::{
    bindings,
    error::Error, //
};

/// The status of a request that has ended: `blk_status_t`.
///
/// The values that mean "try again later" are missing. They can only be given by
/// [`Request::reject`](super::Request::reject), for a request that was not started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct BlkStatus(bindings::blk_status_t);

impl BlkStatus {
    /// The whole request was done.
    pub const OK: Self = Self(0);
    /// The device does not know this operation.
    pub const NOTSUPP: Self = Self(1);
    /// The device did not answer in time.
    pub const TIMEOUT: Self = Self(2);
    /// There is no space left.
    pub const NOSPC: Self = Self(3);
    /// The way to the device is broken.
    pub const TRANSPORT: Self = Self(4);
    /// The device failed.
    pub const TARGET: Self = Self(5);
    /// The medium failed.
    pub const MEDIUM: Self = Self(7);
    /// There was no memory.
    pub const RESOURCE: Self = Self(9);
    /// Any other error.
    pub const IOERR: Self = Self(10);
    /// The device is gone.
    pub const OFFLINE: Self = Self(16);

    /// Returns `true` if the request was done.
    pub fn is_ok(self) -> bool {
        self == Self::OK
    }

    pub(super) fn as_raw(self) -> bindings::blk_status_t {
        self.0
    }
}

impl From<Error> for BlkStatus {
    fn from(error: Error) -> Self {
        // SAFETY: The function has no preconditions.
        Self(unsafe { bindings::errno_to_blk_status(error.to_errno()) })
    }
}
