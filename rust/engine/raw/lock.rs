// SPDX-License-Identifier: GPL-2.0-only

//! Locks against other users of an image file.
//!
//! The locks are those of QEMU's `block/file-posix.c`, so that QEMU and its tools respect a
//! running rblktap, and the other way round: byte `100 + p` is locked by a process that uses
//! permission `p` of the image, byte `200 + p` by one that does not let others use it.
//!
//! A process that writes for a disk also locks a byte of that disk, far behind those. So a
//! successor of a process that was killed waits for its I/O, even if others may use the image.

use super::file::Kind;
use crate::error::{Error, Result};
use crate::linux::{is_locked, lock_byte, LockKind};
use crate::options::Options;
use rustix::fs::{fstat, Stat};
use rustix::io::Errno;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const USED: i64 = 100;
const NOT_SHARED: i64 = 200;

/// `BLK_PERM_CONSISTENT_READ`, `BLK_PERM_WRITE` and `BLK_PERM_RESIZE`, as numbers of bits.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// The first of the bytes of disks.
const DISKS: u64 = 1 << 56;

/// Delay between two attempts.
const RETRY: Duration = Duration::from_millis(20);

/// Locks an image as `options` say. A block device is claimed when it is opened, so only its disk
/// is locked here.
///
/// The locks are held until the file is closed and no I/O on it is in flight any more. If the
/// image stays in use until the options' timeout, the error is `EBUSY` and names the user.
pub(super) fn lock(file: BorrowedFd<'_>, kind: Kind, path: &Path, options: &Options) -> Result<()> {
    let uses: &[i64] = match kind {
        Kind::Device => &[],
        Kind::File if options.read_only => &[READ],
        Kind::File => &[READ, WRITE],
    };
    let refuses: &[i64] = match kind {
        Kind::File if options.exclusive => &[WRITE, RESIZE],
        Kind::File | Kind::Device => &[],
    };
    let disk = options.disk.filter(|_| !options.read_only);
    let deadline = Instant::now() + options.lock_timeout;
    loop {
        let locked = lock_disk(file, disk)
            .and_then(|is_locked| Ok(is_locked && try_lock(file, uses, refuses)?));
        match locked {
            Ok(true) => return Ok(()),
            Ok(false) if Instant::now() < deadline => thread::sleep(RETRY),
            Ok(false) => return Err(in_use(file, path)),
            Err(errno) => {
                return Err(Error::new(
                    errno,
                    format!("{} cannot be locked: {errno}", path.display()),
                    "use a file system with fcntl locks",
                ));
            }
        }
    }
}

/// Returns `false` if another process writes for the same disk, or its I/O has not ended.
fn lock_disk(file: BorrowedFd<'_>, disk: Option<u64>) -> std::result::Result<bool, Errno> {
    let Some(disk) = disk else {
        return Ok(true);
    };
    let byte = disk.checked_add(DISKS).map(i64::try_from);
    let byte = byte.and_then(std::result::Result::ok).ok_or(Errno::INVAL)?;
    match lock_byte(file, byte, LockKind::Exclusive) {
        Ok(()) => Ok(true),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Returns `false` if another process uses the image.
///
/// The own locks are set before those of others are tested: of two processes at the same time both
/// may be refused, but never none.
fn try_lock(
    file: BorrowedFd<'_>,
    uses: &[i64],
    refuses: &[i64],
) -> std::result::Result<bool, Errno> {
    let own = uses
        .iter()
        .map(|permission| USED + permission)
        .chain(refuses.iter().map(|permission| NOT_SHARED + permission));
    for byte in own {
        match lock_byte(file, byte, LockKind::Shared) {
            Ok(()) => {}
            Err(Errno::AGAIN | Errno::ACCESS) => return Ok(false),
            Err(errno) => return Err(errno),
        }
    }
    let others = uses
        .iter()
        .map(|permission| NOT_SHARED + permission)
        .chain(refuses.iter().map(|permission| USED + permission));
    for byte in others {
        if is_locked(file, byte, LockKind::Exclusive)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Returns the error for an image that another process uses.
pub(super) fn in_use(file: BorrowedFd<'_>, path: &Path) -> Error {
    let users = fstat(file)
        .map(|stat| users(file, &stat))
        .unwrap_or_default();
    let by = if users.is_empty() {
        "a process that is not visible here, or I/O of a process that has ended".to_owned()
    } else {
        users.join(", ")
    };
    Error::new(
        Errno::BUSY,
        format!("{} is in use by {by}", path.display()),
        "detach it there first",
    )
}

/// Returns names and ids of the other processes that have the file open for writing or locked.
fn users(own: BorrowedFd<'_>, image: &Stat) -> Vec<String> {
    let own = own.as_fd().as_raw_fd().to_string();
    let mut users = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let dir = process.path();
        let name = process.file_name();
        let Some(id) = name.to_str().filter(|id| id.parse::<u32>().is_ok()) else {
            continue;
        };
        let is_own = id.parse() == Ok(std::process::id());
        let has_image = fs::read_dir(dir.join("fd"))
            .into_iter()
            .flatten()
            .flatten()
            .filter(|file| !(is_own && file.file_name().to_str() == Some(&own)))
            .filter_map(|file| fs::metadata(file.path()).ok())
            .any(|found| is_same(&found, image));
        if has_image {
            let command = fs::read_to_string(dir.join("comm")).unwrap_or_default();
            users.push(format!("{} (process {id})", command.trim()));
        }
    }
    users
}

/// Returns `true` if `found` is the image: the same file, or the same block device.
fn is_same(found: &fs::Metadata, image: &Stat) -> bool {
    if image.st_rdev != 0 {
        return found.st_rdev() == image.st_rdev;
    }
    found.st_dev() == image.st_dev && found.st_ino() == image.st_ino
}
