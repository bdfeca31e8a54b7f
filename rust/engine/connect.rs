// SPDX-License-Identifier: GPL-2.0-only

//! Connections to the server of an image.

use crate::error::Result;
use std::os::fd::OwnedFd;

/// Makes connections to the server of an image.
pub trait Connect: Send + Sync {
    /// Returns a new connection to the server, which is started if it belongs to the image and does
    /// not run.
    ///
    /// `is_dirty`: there are completed writes that were not flushed. The error is `ENOTRECOVERABLE`
    /// if the server has lost them.
    fn connect(&self, is_dirty: bool) -> Result<OwnedFd>;

    /// Ends a server that belongs to the image, and waits until it has written its caches.
    fn stop(&self) -> Result<()>;
}
