// SPDX-License-Identifier: GPL-2.0-only

//! Calls of `ioctl` with a structure of the request's own size.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A structure that an `ioctl` takes.
///
/// # Safety
///
/// The kernel reads and writes no more than the structure's own bytes for `REQUEST`, and memory
/// that pointers in it lead to, which [`call`]'s caller answers for. Each pattern of bytes that the
/// kernel writes is a value of the type.
pub(crate) unsafe trait Argument {
    /// Number of the request.
    const REQUEST: libc::Ioctl;
}

/// Returns the number of a request with no direction, as all of Xen's are (`_IOC(_IOC_NONE, ...)`).
pub(crate) const fn request(kind: u8, number: u8, size: usize) -> libc::Ioctl {
    ((size as libc::Ioctl) << 16) | ((kind as libc::Ioctl) << 8) | number as libc::Ioctl
}

/// Calls `ioctl` and returns its value, which is not negative.
///
/// # Safety
///
/// Pointers in `argument` must lead to memory that the kernel may read and write as the request
/// says.
pub(crate) unsafe fn call<A: Argument>(file: &File, argument: &mut A) -> io::Result<u32> {
    let argument: *mut A = argument;
    // SAFETY: By the requirements of `Argument` the kernel stays within the structure, and by those
    // of this function within what it points to.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), A::REQUEST, argument) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
