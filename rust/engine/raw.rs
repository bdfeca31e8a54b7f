// SPDX-License-Identifier: GPL-2.0-only

//! Images without a format: files and block devices, through io_uring.
//!
//! It corresponds to QEMU's `block/file-posix.c`, and uses the same locks. The page cache is
//! bypassed where the storage can do it.

mod file;
mod lock;
mod queue;

use crate::error::{Error, Result};
use crate::info::Info;
use crate::memory::in_use;
use crate::options::Options;
use crate::{Engine, Queue};
use file::{Kind, Storage};
use io_buffer::Buffer;
use queue::RawQueue;
use rustix::fs::fdatasync;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// A file or block device.
pub struct RawEngine {
    image: Arc<Image>,
}

/// The state that the queues of an image share.
struct Image {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    kind: Kind,
    /// The geometry, with the size at the time of opening.
    info: Info,
    /// The size in bytes.
    size: AtomicU64,
}

impl Image {
    fn info(&self) -> Info {
        Info {
            size: self.size.load(Ordering::Relaxed),
            ..self.info
        }
    }
}

impl RawEngine {
    /// Opens the file or block device at `path`.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        Ok(Self::new(file::open_path(path, options)?, path))
    }

    fn new(storage: Storage, path: &Path) -> Self {
        Self {
            image: Arc::new(Image {
                fd: Arc::new(storage.fd),
                path: path.to_owned(),
                kind: storage.kind,
                info: storage.info,
                size: AtomicU64::new(storage.info.size),
            }),
        }
    }
}

impl Engine for RawEngine {
    fn info(&self) -> Info {
        self.image.info()
    }

    fn refresh(&self) -> Result<Info> {
        let size = file::size(&self.image.fd, &self.image.path)?;
        self.image.size.store(size, Ordering::Relaxed);
        Ok(self.info())
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn Queue>> {
        Ok(Box::new(RawQueue::new(self.image.clone(), depth)?))
    }

    fn allocate(&self, len: usize) -> Result<Buffer> {
        file::allocate_aligned(len, &self.image.info)
    }

    fn close(self: Box<Self>) -> Result<()> {
        if Arc::strong_count(&self.image) > 1 {
            return Err(in_use());
        }
        if self.image.info.read_only {
            return Ok(());
        }
        fdatasync(&self.image.fd).map_err(|errno| {
            Error::new(
                errno,
                format!("flushing {}: {errno}", self.image.path.display()),
                "check the storage below the image: the last writes may be lost",
            )
        })
    }
}
