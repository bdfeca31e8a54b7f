// SPDX-License-Identifier: GPL-2.0-only

//! Files of a GlusterFS volume, through libgfapi.
//!
//! It corresponds to QEMU's `block/gluster.c`. A volume whose options lose acknowledged writes is
//! refused, unless the URI says `unsafe=on`. While too few bricks are reachable requests fail with
//! `ENOTCONN`, which the caller retries.
//!
//! A file that is open for writing is locked. The bricks release the lock when they lose the
//! connection to its owner.
//!
//! [`GlusterDir`] creates, resizes and removes files.

mod library;
mod volfile;

use crate::callback::{self, CallbackEngine, Limits, Task};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::request::Request;
use crate::uri::{GlusterFile, GlusterVolume};
use crate::Engine;
use library::{File, Volume};
use rustix::io::Errno;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The port of `glusterd`.
const PORT: u16 = 24007;

/// Time between two attempts to lock the file.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// The limits of libgfapi.
const LIMITS: Limits = Limits {
    max_buffers: 1024,
    granularity: 4096,
};

/// An open file.
struct Image {
    file: File,
    name: String,
}

/// Opens a file.
pub fn open(name: &GlusterFile, options: &Options) -> Result<Box<dyn Engine>> {
    let volume = connect(&name.volume)?;
    let file = File::open(volume, &name.path, options.read_only);
    let file = file.map_err(|errno| file_error("opening", &name.to_string(), errno))?;
    let is_locked = !options.read_only && options.exclusive;
    if is_locked {
        lock(&file, name, options.lock_timeout)?;
    }
    let name = name.to_string();
    let image = Image { file, name };
    let engine = CallbackEngine::new(image, &LIMITS, options.read_only, is_locked)?;
    Ok(Box::new(engine))
}

/// Returns the connection to a volume, which the first call establishes.
///
/// It is kept until the process ends, as in QEMU.
fn connect(address: &GlusterVolume) -> Result<&'static Volume> {
    static CONNECTIONS: Mutex<Vec<(GlusterVolume, &Volume)>> = Mutex::new(Vec::new());
    // The list is valid between any two statements that change it.
    let mut connections = CONNECTIONS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, volume)) = connections.iter().find(|(known, _)| known == address) {
        return Ok(volume);
    }
    let volume: &'static Volume = Box::leak(Box::new(new_connection(address)?));
    connections.push((address.clone(), volume));
    Ok(volume)
}

/// Connects to a volume, and checks its options.
fn new_connection(address: &GlusterVolume) -> Result<Volume> {
    let volume = Volume::new(&address.volume)?;
    let connected = volume.connect(&address.host, address.port.unwrap_or(PORT));
    connected.map_err(|errno| connect_error(errno, address))?;
    let description = volume.description();
    let description = description.map_err(|errno| connect_error(errno, address))?;
    match volfile::loses_writes(&description) {
        Some(reason) if !address.allows_loss => Err(unsafe_volume(address, reason)),
        _ => Ok(volume),
    }
}

fn connect_error(errno: Errno, address: &GlusterVolume) -> Error {
    Error::new(
        errno,
        format!("connecting to {address}: {errno}"),
        "check host and volume, and that the volume is started: gluster volume info",
    )
}

fn unsafe_volume(address: &GlusterVolume, reason: &str) -> Error {
    let volume = &address.volume;
    Error::new(
        Errno::PERM,
        format!("the Gluster volume {volume} may lose acknowledged writes: {reason}"),
        format!(
            "use three replicas, gluster volume set {volume} group virt, and gluster volume set \
             {volume} performance.write-behind off; or accept the loss with ?unsafe=on"
        ),
    )
}

/// Locks a file, for which it waits up to `timeout`.
fn lock(file: &File, name: &GlusterFile, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        match file.lock() {
            Ok(()) => return Ok(()),
            Err(Errno::AGAIN | Errno::ACCESS) if Instant::now() < deadline => {
                thread::sleep(LOCK_INTERVAL);
            }
            Err(Errno::AGAIN | Errno::ACCESS) => {
                return Err(Error::new(
                    Errno::BUSY,
                    format!("{name} is in use by another process or host"),
                    "detach it there first",
                ));
            }
            Err(errno) => return Err(file_error("locking", &name.to_string(), errno)),
        }
    }
}

fn file_error(doing: &str, name: &str, errno: Errno) -> Error {
    let remedy = match errno {
        Errno::NOENT => "check the path inside the volume",
        Errno::NOTCONN => "check that enough bricks run: gluster volume status",
        Errno::NOSPC | Errno::DQUOT => "free some space on the bricks",
        _ => "see gluster volume status and the logs of the bricks",
    };
    Error::new(errno, format!("{doing} {name}: {errno}"), remedy)
}

impl callback::Image for Image {
    fn size(&self) -> Result<u64> {
        let size = self.file.size();
        size.map_err(|errno| file_error("reading the size of", &self.name, errno))
    }

    fn start(&self, task: Task) {
        self.file.start(task);
    }

    fn close(self, flushes: bool) -> Result<()> {
        if !flushes {
            return Ok(());
        }
        let synced = self.file.sync();
        synced.map_err(|errno| file_error("flushing", &self.name, errno))
    }
}

/// Returns the error of a request that failed. `is_flush`: its data had been written, and was being
/// flushed.
fn io_error(errno: Errno, request: &Request, is_flush: bool) -> Error {
    let what = format!("{:?} of {} bytes at", request.operation, request.length);
    let errno = match errno {
        // A file that was opened again by the library while too few bricks were reachable.
        Errno::BADFD => Errno::NOTCONN,
        // The file system of a brick reports once what it could not write back: the next flush
        // would succeed without it. So this is not an error that may pass.
        Errno::NOSPC | Errno::DQUOT | Errno::TIMEDOUT if is_flush => Errno::IO,
        errno => errno,
    };
    file_error(&what, &request.offset.to_string(), errno)
}

/// A directory of a volume, for the administration of the files in it.
pub struct GlusterDir {
    volume: &'static Volume,
    dir: String,
}

impl GlusterDir {
    /// Connects to a volume, and creates the directory if there is none.
    pub fn connect(address: &GlusterVolume, dir: &str) -> Result<Self> {
        let volume = connect(address)?;
        let created = volume.create_dir(dir);
        created.map_err(|errno| file_error("creating the directory", dir, errno))?;
        Ok(Self {
            volume,
            dir: dir.to_owned(),
        })
    }

    /// Lists the names of the files.
    pub fn list(&self) -> Result<Vec<String>> {
        let mut names = self.volume.list(&self.dir);
        if let Ok(names) = &mut names {
            names.retain(|name| name != "." && name != "..");
        }
        names.map_err(|errno| file_error("listing", &self.dir, errno))
    }

    /// Creates a file of a size. The error is `EEXIST` if there is one of the name.
    pub fn create(&self, name: &str, size: u64) -> Result<()> {
        let path = self.path(name);
        let created = File::create(self.volume, &path).and_then(|file| {
            file.resize(size)?;
            file.sync()
        });
        created.map_err(|errno| file_error("creating", &path, errno))
    }

    /// Returns the size of a file in bytes.
    pub fn size(&self, name: &str) -> Result<u64> {
        let path = self.path(name);
        let size = File::open(self.volume, &path, true).and_then(|file| file.size());
        size.map_err(|errno| file_error("opening", &path, errno))
    }

    /// Enlarges a file. A larger one stays as it is.
    pub fn enlarge(&self, name: &str, size: u64) -> Result<()> {
        let path = self.path(name);
        let enlarged = File::open(self.volume, &path, false).and_then(|file| file.enlarge(size));
        enlarged.map_err(|errno| file_error("resizing", &path, errno))
    }

    /// Removes a file.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        let removed = self.volume.remove(&path);
        removed.map_err(|errno| file_error("removing", &path, errno))
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_that_has_failed_is_not_an_error_that_may_pass() {
        let errno = |errno, is_flush| io_error(errno, &Request::flush(1), is_flush).errno();
        assert_eq!(errno(Errno::NOSPC, true), Errno::IO);
        assert_eq!(errno(Errno::DQUOT, true), Errno::IO);
        assert_eq!(errno(Errno::NOSPC, false), Errno::NOSPC);
        assert_eq!(errno(Errno::BADFD, true), Errno::NOTCONN);
    }
}
