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
use crate::writes::LostWrites;
use crate::{Engine, Queue};
use file::{Kind, Storage};
use io_buffer::Buffer;
use queue::RawQueue;
use rustix::fs::fdatasync;
use rustix::io::Errno;
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
    /// A flush has failed, and what was in the page cache may be lost.
    lost_writes: LostWrites,
}

impl Image {
    fn info(&self) -> Info {
        Info {
            size: self.size.load(Ordering::Relaxed),
            ..self.info
        }
    }

    /// Returns the result of a flush.
    ///
    /// The kernel reports once that it could not write data back, and then forgets that data: the
    /// next flush would succeed without it. So the error is not one that may pass, and no later
    /// flush succeeds where the page cache is used.
    fn flushed(&self, result: std::result::Result<(), Errno>) -> Result<()> {
        let error = |errno, cause| {
            Err(Error::new(
                errno,
                format!("flushing {}: {cause}", self.path.display()),
                "check the storage below the image: the last writes may be lost",
            ))
        };
        match result {
            Ok(()) if self.lost_writes.is_set() => {
                error(Errno::IO, "an earlier flush has failed".to_owned())
            }
            Ok(()) => Ok(()),
            Err(errno @ (Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS)) => {
                error(errno, errno.to_string())
            }
            Err(errno) => {
                if !self.info.guarantees.direct {
                    self.lost_writes.set();
                }
                error(Errno::IO, errno.to_string())
            }
        }
    }
}

impl RawEngine {
    /// Opens the file or block device at `path`.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        Self::new(file::open_path(path, options)?, path, options)
    }

    fn new(storage: Storage, path: &Path, options: &Options) -> Result<Self> {
        let uses_cache = !options.read_only && !storage.info.guarantees.direct;
        let lost_writes = match options.disk.filter(|_| uses_cache) {
            Some(disk) => LostWrites::of_disk(disk, options)?,
            None => LostWrites::default(),
        };
        Ok(Self {
            image: Arc::new(Image {
                fd: Arc::new(storage.fd),
                path: path.to_owned(),
                kind: storage.kind,
                info: storage.info,
                size: AtomicU64::new(storage.info.size),
                lost_writes,
            }),
        })
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
        self.image.flushed(fdatasync(&self.image.fd))
    }
}
