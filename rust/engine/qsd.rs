// SPDX-License-Identifier: GPL-2.0-only

//! Image files with a format, through one `qemu-storage-daemon` per image.
//!
//! QEMU's code serves qcow2 with backing files, fixed and dynamic VHD, VHDX, VMDK and LUKS.
//!
//! The daemon belongs to this process. When this process ends, in any way, the daemon writes its
//! caches, so that no completed write is lost, releases the image and ends.
//!
//! When the daemon is killed, its caches are lost. If all completed writes had been flushed before,
//! it is started again, after a check and repair of the image, and the requests in flight are sent
//! again. Otherwise all further requests fail with `ENOTRECOVERABLE`.
//!
//! The daemon exports the image over NBD, under the empty name, on a socket in a private directory.
//! QEMU's device model can use the same export, see [`Server::nbd_socket`](crate::Server).

mod image;
pub(crate) mod process;
mod tool;

use crate::connect::Connect;
use crate::error::Result;
use crate::info::{Guarantees, Info};
use crate::nbd::NbdEngine;
use crate::options::Options;
use crate::{Engine, Queue};
use io_buffer::Buffer;
use std::path::Path;
use std::sync::Arc;

/// An image that a `qemu-storage-daemon` serves.
pub struct QsdEngine {
    nbd: Box<NbdEngine>,
    daemon: Arc<dyn Connect>,
    guarantees: Guarantees,
}

impl QsdEngine {
    /// Opens the image file at `path`, which `daemon` serves.
    pub fn open(path: &Path, options: &Options, daemon: Arc<dyn Connect>) -> Result<Self> {
        // Only for messages: where the daemon's socket is, is known to the one who connects.
        let export = process::export(path);
        let nbd = NbdEngine::open(&export, options, daemon.clone())?;
        Ok(Self {
            nbd: Box::new(nbd),
            guarantees: Guarantees {
                durable: true,
                direct: process::is_direct(path, options)?,
                exclusive: options.exclusive,
            },
            daemon,
        })
    }
}

impl Engine for QsdEngine {
    fn info(&self) -> Info {
        Info {
            guarantees: self.guarantees,
            ..self.nbd.info()
        }
    }

    fn refresh(&self) -> Result<Info> {
        self.nbd.refresh()?;
        Ok(self.info())
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn Queue>> {
        self.nbd.queue(depth)
    }

    fn allocate(&self, len: usize) -> Result<Buffer> {
        self.nbd.allocate(len)
    }

    fn close(self: Box<Self>) -> Result<()> {
        let QsdEngine { nbd, daemon, .. } = *self;
        nbd.close()?;
        daemon.stop()
    }
}
