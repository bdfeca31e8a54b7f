// SPDX-License-Identifier: GPL-2.0-only

//! Random uuids, by the kernel.

use engine::{Errno, Error, Result};
use std::fs;

const PATH: &str = "/proc/sys/kernel/random/uuid";

/// Returns a random uuid.
pub(crate) fn random_uuid() -> Result<String> {
    let uuid = fs::read_to_string(PATH).map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        Error::new(errno, format!("{PATH}: {error}"), "mount /proc")
    })?;
    Ok(uuid.trim().to_owned())
}
