// SPDX-License-Identifier: GPL-2.0-only

//! Connections to the server of an image.

use crate::error::Result;
use std::os::fd::OwnedFd;

/// The protocol of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// NBD, which any number of clients can use at the same time.
    Nbd,
    /// vhost-user-blk, for one client: a new connection replaces one that was lost.
    VhostUser,
}

/// Makes connections to the server of an image.
pub trait Connect: Send + Sync {
    /// Returns a new connection to the server. One that belongs to the image and does not run is
    /// started for [`Protocol::VhostUser`].
    ///
    /// `is_dirty`: there are completed writes that were not flushed. The error is `ENOTRECOVERABLE`
    /// if the server has lost them.
    ///
    /// If there was a connection for [`Protocol::VhostUser`] before, its requests have ended when
    /// this returns, with or without an error: nothing accesses their memory any more.
    fn connect(&self, protocol: Protocol, is_dirty: bool) -> Result<OwnedFd>;

    /// Enlarges an image that the server has open.
    fn resize(&self, size: u64) -> Result<()>;

    /// Ends a server that belongs to the image, and waits until it has written its caches.
    fn stop(&self) -> Result<()>;
}
