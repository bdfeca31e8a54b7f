// SPDX-License-Identifier: GPL-2.0-only

//! Options for opening an image.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Options for opening an image.
#[derive(Clone, Debug)]
pub struct Options {
    /// The image is opened for reading only.
    pub read_only: bool,
    /// The host's page cache is bypassed: `Some(true)` refuses storage that cannot do it,
    /// [`None`] uses the page cache on such storage.
    pub direct: Option<bool>,
    /// An image that another process has open for writing is refused.
    pub exclusive: bool,
    /// The disk that the image is opened for. Images of files and devices wait for a process with
    /// the same one that was killed until its I/O has ended, even if the image is not `exclusive`.
    pub disk: Option<u64>,
    /// A guest that has used the disk before still does. If completed writes that it has not
    /// flushed were lost with the process before this one, opening fails with `ENOTRECOVERABLE`.
    pub continues: bool,
    /// Time for which opening waits for another process to release the image, and for I/O of a
    /// process that was killed.
    pub lock_timeout: Duration,
    /// Time for which a network engine tries to connect again before requests fail.
    pub reconnect_timeout: Duration,
    /// The image was not closed: it is checked and repaired before it is opened.
    pub unclean: bool,
    /// The file with the passphrase of a LUKS container.
    pub key_file: Option<PathBuf>,
    /// The directory in which an engine creates a directory for sockets.
    pub runtime_dir: PathBuf,
    /// The command that confines QEMU's programs, which parse images; without one they run as they
    /// are. It gets `--read PATH` and `--write PATH` for each file or directory that a program
    /// uses, and the program with its arguments after `--`.
    pub launcher: Vec<OsString>,
}

impl Default for Options {
    /// Returns the options for a disk of a guest: writable, direct if possible, exclusive, with
    /// no wait for another user of the image, and with 30 seconds to connect again.
    fn default() -> Self {
        Self {
            read_only: false,
            direct: None,
            exclusive: true,
            disk: None,
            continues: false,
            lock_timeout: Duration::ZERO,
            reconnect_timeout: Duration::from_secs(30),
            unclean: false,
            key_file: None,
            runtime_dir: env::temp_dir(),
            launcher: Vec::new(),
        }
    }
}
