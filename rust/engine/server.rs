// SPDX-License-Identifier: GPL-2.0-only

//! The server of an image that is not opened in this process.
//!
//! A process that is confined cannot connect to a server or start one. Another process has the
//! [`Server`] then, and passes connections on: the confined one implements [`Connect`] by asking
//! it.

use crate::connect::{Connect, Protocol};
use crate::error::{Error, Result};
use crate::nbd;
use crate::options::Options;
use crate::qsd::process::Daemon;
use crate::uri::{Format, NbdExport, Uri};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// The server of an image.
///
/// Dropping it ends a server that belongs to the image.
pub struct Server {
    export: NbdExport,
    /// The server, if it belongs to the image.
    daemon: Option<Daemon>,
}

impl Server {
    /// Starts the server of an image. Returns [`None`] if the image has none.
    pub fn start(uri: &Uri, options: &Options) -> Result<Option<Self>> {
        let (export, daemon) = match uri {
            Uri::Memory { .. }
            | Uri::Rbd(_)
            | Uri::Gluster(_)
            | Uri::Image {
                format: Format::Raw,
                ..
            } => return Ok(None),
            Uri::Nbd(export) => (export.clone(), None),
            Uri::Image { format, path } => {
                let daemon = Daemon::start(*format, path, options)?;
                (daemon.export(), Some(daemon))
            }
        };
        Ok(Some(Self { export, daemon }))
    }

    /// Returns the path of a unix socket where the server exports the image under the empty name,
    /// if it belongs to the image.
    pub fn nbd_socket(&self) -> Option<PathBuf> {
        self.daemon.as_ref().map(Daemon::socket)
    }
}

impl Connect for Server {
    fn connect(&self, protocol: Protocol, is_dirty: bool) -> Result<OwnedFd> {
        match (&self.daemon, protocol) {
            (Some(daemon), _) => daemon.connect(protocol, is_dirty),
            (None, Protocol::Nbd) => nbd::connect_to(&self.export),
            (None, Protocol::VhostUser) => Err(foreign()),
        }
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.daemon
            .as_ref()
            .map_or_else(|| Err(foreign()), |daemon| daemon.resize(size))
    }

    fn stop(&self) -> Result<()> {
        self.daemon.as_ref().map_or(Ok(()), Daemon::stop)
    }
}

/// Returns the error of asking a server for what only that of an image file does.
fn foreign() -> Error {
    Error::new(
        Errno::OPNOTSUPP,
        "the server does not belong to the image",
        "this is an error of the program, report it",
    )
}
