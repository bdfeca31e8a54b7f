// SPDX-License-Identifier: GPL-2.0-only

//! Image files with a format, through one `qemu-storage-daemon` per image.
//!
//! QEMU's code serves qcow2 with backing files, fixed and dynamic VHD, VHDX, VMDK and LUKS.
//!
//! The daemon belongs to this process. When this process ends, in any way, the daemon writes its
//! caches, releases the image and ends.
//!
//! When the daemon is killed, or cannot write its caches, they are lost. If all completed writes
//! had been flushed before, it is started again, after a check and repair of the image, and the
//! requests in flight are sent again. Otherwise all further requests fail with `ENOTRECOVERABLE`.
//! If this process has ended too, a successor that has to continue is refused with that error: a
//! file says if there were writes that were not flushed, and the directory of the daemon if it has
//! written its caches.
//!
//! The daemon is the device and this process the driver of a virtio block device (vhost-user-blk).
//! Both map the same memory, so data is not copied between them; a buffer from elsewhere is copied
//! once. On the path of a request there are two eventfds, and no socket.
//!
//! The daemon exports the image over NBD, too, under the empty name, on a socket in a private
//! directory. QEMU's device model can use that export, see [`Server::nbd_socket`](crate::Server),
//! and a request that has failed is carried out again over it, because a virtio block device does
//! not say why it fails.

mod image;
mod link;
pub(crate) mod process;
mod qmp;
mod queue;
mod second;
mod task;
mod tool;
mod vhost_user;
mod virtqueue;

use crate::connect::{Connect, Protocol};
use crate::error::{Error, Result};
use crate::info::{Discard, Guarantees, Info};
use crate::memory::in_use;
use crate::options::Options;
use crate::request::Request;
use crate::shared_memory::SharedMemory;
use crate::writes::{self, Writes};
use crate::{Engine, Queue, DROP_TIMEOUT};
use io_buffer::Buffer;
use link::Shared;
use queue::QsdQueue;
use rustix::io::Errno;
use std::path::Path;
use std::sync::Arc;
use vhost_user::{DeviceConfig, Messages, Session};

const BLOCK_SIZE: u32 = 512;
const PHYSICAL_BLOCK_SIZE: u32 = 4096;

/// The greatest length of a transfer, which is one range of the shared memory.
const MAX_TRANSFER: u64 = 16 << 20;

/// The greatest number of buffers of a request.
const MAX_BUFFERS: usize = 8192;

/// An image that a `qemu-storage-daemon` serves.
pub struct QsdEngine {
    shared: Arc<Shared>,
}

impl QsdEngine {
    /// Opens the image file at `path`, which `daemon` serves.
    pub fn open(path: &Path, options: &Options, daemon: Arc<dyn Connect>) -> Result<Self> {
        let memory = Arc::new(SharedMemory::new()?);
        let messages = Messages::new()?;
        let stream = daemon.connect(Protocol::VhostUser, false)?;
        let (session, config) = Session::new(stream, &memory, &messages)?;
        let info = info(&config, path, options)?;
        // Only for messages: where the daemon's socket is, is known to the one who connects.
        let export = process::export(path);
        let shared = Shared::new(
            path.to_owned(),
            options.clone(),
            (daemon, export),
            (memory, messages),
            (session, config),
            info,
            writes_of(options)?,
        );
        Ok(Self { shared })
    }

    /// Makes all completed writes durable.
    fn flush(&self) -> Result<()> {
        let mut queue = QsdQueue::new(self.shared.clone(), 1)?;
        let mut completions = Vec::new();
        queue.submit(Request::flush(0));
        queue.drain(DROP_TIMEOUT, &mut completions)?;
        completions
            .pop()
            .map_or(Ok(()), |completion| completion.result)
    }
}

/// Returns the numbers of writes; those of a disk have a record.
fn writes_of(options: &Options) -> Result<Writes> {
    let Some(disk) = options.disk else {
        return Ok(Writes::default());
    };
    let path = writes::record(&options.runtime_dir, disk);
    Writes::in_file(&path).map_err(|error| writes::file_error(&error, &path))
}

/// Returns the geometry of an image.
fn info(config: &DeviceConfig, path: &Path, options: &Options) -> Result<Info> {
    if config.size == 0 {
        return Err(Error::new(
            Errno::INVAL,
            format!("{} is empty", path.display()),
            "name an image with a size",
        ));
    }
    Ok(Info {
        size: config.size,
        logical_block_size: BLOCK_SIZE,
        physical_block_size: PHYSICAL_BLOCK_SIZE,
        max_transfer: MAX_TRANSFER,
        max_buffers: MAX_BUFFERS,
        max_queues: config.queues,
        buffer_alignment: 1,
        read_only: options.read_only,
        discard: (!options.read_only).then_some(Discard {
            granularity: PHYSICAL_BLOCK_SIZE,
            alignment: 0,
        }),
        write_zeroes: !options.read_only,
        guarantees: Guarantees {
            durable: true,
            direct: process::is_direct(path, options)?,
            exclusive: options.exclusive,
        },
    })
}

impl Engine for QsdEngine {
    fn info(&self) -> Info {
        self.shared.info()
    }

    fn refresh(&self) -> Result<Info> {
        self.shared.refresh()
    }

    fn resize(&self, size: u64) -> Result<Info> {
        let old = self.refresh()?.size;
        if size < old || size % u64::from(BLOCK_SIZE) != 0 {
            return Err(Error::new(
                Errno::INVAL,
                format!("the image has {old} bytes, and cannot be resized to {size}"),
                "choose a larger multiple of 512; an image cannot be made smaller",
            ));
        }
        if size > old {
            self.shared.resize(size)?;
        }
        self.refresh()
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn Queue>> {
        Ok(Box::new(QsdQueue::new(self.shared.clone(), depth)?))
    }

    fn allocate(&self, len: usize) -> Result<Buffer> {
        let mut buffer = self.shared.memory.allocate(len)?;
        buffer.fill(0, len, 0)?;
        Ok(buffer)
    }

    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        Some(self.shared.memory.clone())
    }

    fn close(self: Box<Self>) -> Result<()> {
        if self.shared.has_queues() {
            return Err(in_use());
        }
        let flushed = match self.shared.info().read_only {
            true => Ok(()),
            false => self.flush(),
        };
        self.shared.close();
        flushed?;
        self.shared.server.stop()
    }
}

#[cfg(test)]
mod tests;
