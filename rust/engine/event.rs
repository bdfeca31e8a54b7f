// SPDX-License-Identifier: GPL-2.0-only

//! An eventfd that is readable while completions wait.

use crate::error::{Error, Result};
use rustix::event::{eventfd, EventfdFlags};
use rustix::io::{read, write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// An eventfd that is readable while completions wait.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    /// Creates an event that is not set.
    pub(crate) fn new() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| {
            Error::new(
                errno,
                format!("creating an eventfd: {errno}"),
                "raise the limit of open files",
            )
        })?;
        Ok(Self(fd))
    }

    /// Makes the file descriptor readable.
    pub(crate) fn set(&self) {
        // It only fails if the counter is at its maximum, and then the descriptor is readable.
        let _ = write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes the file descriptor not readable.
    pub(crate) fn clear(&self) {
        // It only fails if the counter is 0 already.
        let _ = read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
