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
/// It has no values for "try again later": [`Request::reject`](super::Request::reject) does that,
/// for a request that was not started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct BlkStatus(bindings::blk_status_t);

impl BlkStatus {
    /// The whole request has succeeded.
    pub const OK: Self = Self(0);
    /// The device does not support this operation.
    pub const NOTSUPP: Self = Self(1);
    /// The device did not respond in time.
    pub const TIMEOUT: Self = Self(2);
    /// There is no space left.
    pub const NOSPC: Self = Self(3);
    /// The transport to the device has failed.
    pub const TRANSPORT: Self = Self(4);
    /// The device has failed.
    pub const TARGET: Self = Self(5);
    /// The medium has failed.
    pub const MEDIUM: Self = Self(7);
    /// There was no memory.
    pub const RESOURCE: Self = Self(9);
    /// Any other error.
    pub const IOERR: Self = Self(10);
    /// The device was removed.
    pub const OFFLINE: Self = Self(16);

    /// Returns `true` if the request has succeeded.
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
