// SPDX-License-Identifier: GPL-2.0-only

//! The server of an image that is not opened in this process.
//!
//! A process that is confined cannot connect to a server or start one. Another process has the
//! [`Server`] then, and passes connections on: the confined one implements [`Connect`] by asking
//! it.

use crate::connect::Connect;
use crate::error::Result;
use crate::nbd;
use crate::options::Options;
use crate::qsd::process::Daemon;
use crate::uri::{Format, NbdExport, Uri};
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
    fn connect(&self, is_dirty: bool) -> Result<OwnedFd> {
        if let Some(daemon) = &self.daemon {
            daemon.ensure(is_dirty)?;
        }
        nbd::connect_to(&self.export)
    }

    fn stop(&self) -> Result<()> {
        self.daemon.as_ref().map_or(Ok(()), Daemon::stop)
    }
}
