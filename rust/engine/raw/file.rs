// SPDX-License-Identifier: GPL-2.0-only

//! Opening a file or block device, and its geometry.

use super::lock;
use crate::error::{Error, Result};
use crate::info::{Discard, Guarantees, Info};
use crate::memory::allocate;
use crate::options::Options;
use rustix::fs::{
    fallocate, fcntl_getfl, fcntl_setfl, fstat, ioctl_blkpbszget, ioctl_blksszget, major, minor,
    open, seek, statx, AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags,
};
use rustix::io::Errno;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// The smallest unit of a disk.
pub(super) const SECTOR: u64 = 512;

/// The unit of a disk as `Info` has it.
const SECTOR_SIZE: u32 = 512;

/// The greatest length of a read or write.
const MAX_TRANSFER: u64 = 32 << 20;

/// The greatest number of buffers: `UIO_MAXIOV` of `include/uapi/linux/uio.h`.
const MAX_BUFFERS: usize = 1024;

/// Delay between two attempts to open a device.
const RETRY: Duration = Duration::from_millis(20);

/// The kind of storage of an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// A regular file.
    File,
    /// A block device.
    Device,
}

/// An open file or block device.
#[derive(Debug)]
pub(super) struct Storage {
    pub(super) fd: OwnedFd,
    pub(super) kind: Kind,
    /// The geometry at the time of opening.
    pub(super) info: Info,
}

/// Opens and locks an image, and reads its geometry.
pub(super) fn open_path(path: &Path, options: &Options) -> Result<Storage> {
    let stat = rustix::fs::stat(path).map_err(|errno| open_error(errno, path))?;
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    flags |= if options.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    // Without O_CREAT this claims a block device: other claims, and mounts, fail.
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    if is_device && options.exclusive && !options.read_only {
        flags |= OFlags::EXCL;
    }
    let deadline = Instant::now() + options.lock_timeout;
    let fd = loop {
        match open(path, flags, Mode::empty()) {
            Ok(fd) => break fd,
            Err(Errno::BUSY) if Instant::now() < deadline => thread::sleep(RETRY),
            Err(Errno::BUSY) => return Err(device_in_use(path)),
            Err(errno) => return Err(open_error(errno, path)),
        }
    };
    prepare(fd, path, options)
}

/// Locks an image that is open, and reads its geometry.
fn prepare(fd: OwnedFd, path: &Path, options: &Options) -> Result<Storage> {
    let stat = fstat(&fd).map_err(|errno| open_error(errno, path))?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::BlockDevice => Kind::Device,
        _ => {
            return Err(Error::new(
                Errno::INVAL,
                format!("{} is neither a file nor a block device", path.display()),
                "name an image file or a block device",
            ));
        }
    };
    lock::lock(fd.as_fd(), kind, path, options)?;
    let alignment = set_direct(&fd, kind, path, options)?;
    let size = size(&fd, path)?;
    let (logical, physical) = block_sizes(&fd, kind, path)?;
    let discard = if options.read_only {
        None
    } else {
        discard(&fd, kind, size, stat.st_rdev, stat.st_blksize as u32)
    };
    let info = Info {
        size,
        logical_block_size: logical,
        physical_block_size: physical,
        max_transfer: MAX_TRANSFER,
        max_buffers: MAX_BUFFERS,
        max_queues: 64,
        buffer_alignment: alignment.map_or(1, |alignment| alignment.memory.max(alignment.length)),
        read_only: options.read_only,
        discard,
        write_zeroes: !options.read_only,
        guarantees: Guarantees {
            durable: true,
            direct: alignment.is_some(),
            exclusive: options.exclusive,
        },
    };
    Ok(Storage { fd, kind, info })
}

/// The alignment in bytes that the storage requires for direct I/O.
#[derive(Clone, Copy, Debug)]
struct Alignment {
    memory: usize,
    length: usize,
}

/// Bypasses the page cache if the storage can do it in units of a block.
///
/// Returns [`None`] if the page cache is used.
fn set_direct(
    fd: &OwnedFd,
    kind: Kind,
    path: &Path,
    options: &Options,
) -> Result<Option<Alignment>> {
    if options.direct == Some(false) {
        return Ok(None);
    }
    let flags = fcntl_getfl(fd).map_err(|errno| open_error(errno, path))?;
    let result = fcntl_setfl(fd, flags | OFlags::DIRECT)
        .and_then(|()| alignment(fd, kind))
        .and_then(|alignment| match kind {
            Kind::File if alignment.length > SECTOR_SIZE as usize => Err(Errno::INVAL),
            _ => Ok(alignment),
        });
    match result {
        Ok(alignment) => Ok(Some(alignment)),
        Err(errno) if options.direct == Some(true) => Err(Error::new(
            errno,
            format!(
                "{} cannot be accessed in blocks of {SECTOR} bytes without the page cache: {errno}",
                path.display()
            ),
            "allow the page cache, or use other storage",
        )),
        Err(_) => {
            fcntl_setfl(fd, flags - OFlags::DIRECT).map_err(|errno| open_error(errno, path))?;
            Ok(None)
        }
    }
}

/// Returns what the storage requires of direct I/O.
fn alignment(fd: &OwnedFd, kind: Kind) -> rustix::io::Result<Alignment> {
    let reported = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|statx| statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .map(|statx| (statx.stx_dio_mem_align, statx.stx_dio_offset_align));
    match reported {
        Some((0, _) | (_, 0)) => Err(Errno::INVAL),
        Some((memory, length)) => Ok(Alignment {
            memory: memory as usize,
            length: length as usize,
        }),
        // Before Linux 6.1.
        None => match kind {
            Kind::Device => ioctl_blksszget(fd).map(|size| Alignment {
                memory: size as usize,
                length: size as usize,
            }),
            Kind::File => try_direct_read(fd),
        },
    }
}

/// Reads one block directly, to find out if that is possible.
fn try_direct_read(fd: &OwnedFd) -> rustix::io::Result<Alignment> {
    const LEN: usize = SECTOR_SIZE as usize;
    let mut memory = vec![0u8; LEN * 2];
    let start = memory.as_ptr().align_offset(LEN);
    let part = memory
        .get_mut(start..start.saturating_add(LEN))
        .ok_or(Errno::INVAL)?;
    rustix::io::pread(fd, part, SECTOR)?;
    Ok(Alignment {
        memory: LEN,
        length: LEN,
    })
}

/// Returns the size of the image in bytes, a multiple of a sector.
///
/// The part of the last sector that a file does not have reads as zeros.
pub(super) fn size(fd: &OwnedFd, path: &Path) -> Result<u64> {
    let size = seek(fd, SeekFrom::End(0)).map_err(|errno| open_error(errno, path))?;
    match size.checked_next_multiple_of(SECTOR) {
        Some(size) if size > 0 => Ok(size),
        _ => Err(Error::new(
            Errno::INVAL,
            format!("{} is empty", path.display()),
            "give the image a size, for example with truncate or qemu-img",
        )),
    }
}

/// Returns the logical and the physical block size in bytes.
fn block_sizes(fd: &OwnedFd, kind: Kind, path: &Path) -> Result<(u32, u32)> {
    match kind {
        Kind::File => Ok((SECTOR_SIZE, SECTOR_SIZE)),
        Kind::Device => {
            let logical = ioctl_blksszget(fd).map_err(|errno| open_error(errno, path))?;
            let physical = ioctl_blkpbszget(fd).unwrap_or(logical);
            Ok((logical, physical.max(logical)))
        }
    }
}

/// Returns how discards are supported.
fn discard(fd: &OwnedFd, kind: Kind, size: u64, device: u64, block: u32) -> Option<Discard> {
    let granularity = match kind {
        Kind::File => {
            // Beyond the end there is nothing to be freed.
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let probe = size.checked_next_multiple_of(u64::from(block.max(1)))?;
            fallocate(fd, mode, probe, SECTOR).ok()?;
            block
        }
        Kind::Device => {
            let limit = queue_attribute(device, "discard_max_bytes")?;
            if limit == 0 {
                return None;
            }
            queue_attribute(device, "discard_granularity")?
        }
    };
    Some(Discard {
        granularity: granularity.max(SECTOR_SIZE),
        alignment: 0,
    })
}

/// Reads an attribute of a block device's queue from sysfs.
///
/// A partition has that of its disk.
fn queue_attribute(device: u64, name: &str) -> Option<u32> {
    let dir = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let read = |path: String| fs::read_to_string(path).ok();
    let text =
        read(format!("{dir}/queue/{name}")).or_else(|| read(format!("{dir}/../queue/{name}")))?;
    let value: u64 = text.trim().parse().ok()?;
    Some(u32::try_from(value).unwrap_or(u32::MAX))
}

/// Allocates memory that direct I/O uses without a copy.
pub(super) fn allocate_aligned(len: usize, info: &Info) -> Result<io_buffer::Buffer> {
    allocate(len, info.buffer_alignment.max(4096))
}

fn device_in_use(path: &Path) -> Error {
    match open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => lock::in_use(fd.as_fd(), path),
        Err(errno) => open_error(errno, path),
    }
}

fn open_error(errno: Errno, path: &Path) -> Error {
    let remedy = match errno {
        Errno::NOENT => "check the path",
        Errno::ACCESS | Errno::PERM => "check the permissions of the file and its directories",
        Errno::ROFS => "attach the disk read-only, or mount the file system read-write",
        Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM => "check that the device is connected",
        Errno::TXTBSY => "detach the image from its other use",
        _ => "check the file and the storage below it",
    };
    Error::new(
        errno,
        format!("{} cannot be opened: {errno}", path.display()),
        remedy,
    )
}
