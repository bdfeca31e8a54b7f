// SPDX-License-Identifier: GPL-2.0-only

//! Images of a Ceph cluster, through librbd.
//!
//! It corresponds to QEMU's `block/rbd.c`. An image that is open for writing has the exclusive lock
//! of RBD, so that no other client writes to it. When the lock of a dead client is broken, the
//! storage daemons no longer accept requests of that client.
//!
//! [`RbdPool`] creates, resizes, copies and removes images.

mod library;

use crate::callback::{self, CallbackEngine, Limits, Task};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::request::Request;
use crate::uri::{RbdAddress, RbdImageName};
use crate::Engine;
use library::{ConnectError, Pool, RbdImage};
use percent_encoding::{utf8_percent_encode, AsciiSet, CONTROLS};
use rustix::io::Errno;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Settings of each connection. Without librbd's cache a completed write is durable. A cluster that
/// cannot be reached is an error before the limit of `rblkd` for opening an image.
const SETTINGS: [(&str, &str); 2] = [("rbd_cache", "false"), ("client_mount_timeout", "6")];

/// The key of the setting of the cache in the metadata of an image or of a pool.
const CACHE: &str = "conf_rbd_cache";

/// Settings of a connection for administration, whose operations fail when the storage daemons do
/// not answer. Those of a disk wait.
const ADMIN_SETTINGS: [(&str, &str); 3] =
    [SETTINGS[0], SETTINGS[1], ("rados_osd_op_timeout", "20")];

/// Settings of a connection that fences. The client is added to the blocklist before its lock is
/// broken: librbd would do that for an hour only.
const FENCE_SETTINGS: [(&str, &str); 4] = [
    ADMIN_SETTINGS[0],
    ADMIN_SETTINGS[1],
    ADMIN_SETTINGS[2],
    ("rbd_blocklist_on_break_lock", "false"),
];

/// Time in seconds for which the storage daemons refuse a client that was fenced: a year. A host
/// that was frozen or cut off for longer may send writes of before.
const FENCE_SECONDS: u32 = 31_536_000;

/// The characters that are encoded in the name of a file.
const ENCODED: &AsciiSet = &CONTROLS.add(b'/').add(b'%');

/// The greatest length of the encoded name of an image in bytes.
const MAX_NAME: usize = 200;

/// Time between two attempts to acquire the lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// The limits of librbd.
const LIMITS: Limits = Limits {
    max_buffers: 8192,
    granularity: 64 << 10,
};

/// An open image.
struct Image {
    rbd: RbdImage,
    name: String,
    /// The file with the address of this client, which has the lock.
    owner_file: Option<PathBuf>,
}

/// Opens an image.
pub fn open(name: &RbdImageName, options: &Options) -> Result<Box<dyn Engine>> {
    let pool = Arc::new(connect(&name.address, &SETTINGS)?);
    let read_only = options.read_only || name.snapshot.is_some();
    if !options.read_only && read_only {
        return Err(Error::new(
            Errno::ROFS,
            format!("{name} is a snapshot"),
            "open it for reading only, or clone it",
        ));
    }
    let rbd = RbdImage::open(pool, &name.image, name.snapshot.as_deref(), read_only)
        .map_err(|errno| open_error(errno, name))?;
    if !read_only {
        check_cache(&rbd, name)?;
    }
    let owner_file = match needs_lock(name, options) {
        true => Some(acquire_lock(&rbd, name, options)?),
        false => None,
    };
    let is_locked = owner_file.is_some();
    let name = name.to_string();
    let image = Image {
        rbd,
        name,
        owner_file,
    };
    let engine = CallbackEngine::new(image, &LIMITS, read_only, is_locked)?;
    Ok(Box::new(engine))
}

/// Connects to a pool.
fn connect(address: &RbdAddress, settings: &[(&str, &str)]) -> Result<Pool> {
    let conf = address.conf.as_deref();
    let id = address.id.as_deref();
    let namespace = address.namespace.as_deref().unwrap_or_default();
    Pool::connect(id, conf, settings, &address.pool, namespace)
        .map_err(|error| connect_error(error, address))
}

fn connect_error(error: ConnectError, address: &RbdAddress) -> Error {
    let conf = address.conf.as_deref().unwrap_or("/etc/ceph/ceph.conf");
    match error {
        ConnectError::Library(error) => error,
        ConnectError::Configuration(errno) => Error::new(
            errno,
            format!("reading {conf}: {errno}"),
            "check the path and the contents of Ceph's configuration file",
        ),
        ConnectError::Cluster(errno @ (Errno::TIMEDOUT | Errno::NOENT)) => Error::new(
            errno,
            format!("the Ceph cluster of {conf} does not answer: {errno}"),
            "check mon_host, the monitors and the network",
        ),
        ConnectError::Cluster(errno) => Error::new(
            errno,
            format!("the Ceph cluster of {conf} refuses the connection: {errno}"),
            "check the keyring and the capabilities of the client",
        ),
        ConnectError::Pool(errno) => Error::new(
            errno,
            format!("opening the pool {}: {errno}", address.pool),
            "see ceph osd pool ls",
        ),
    }
}

fn open_error(errno: Errno, name: &RbdImageName) -> Error {
    let remedy = match errno {
        Errno::NOENT => "see rbd ls",
        Errno::PERM | Errno::ACCESS => "check the capabilities of the client",
        _ => "check the state of the cluster: ceph -s",
    };
    Error::new(errno, format!("opening {name}: {errno}"), remedy)
}

/// Checks that librbd's cache is off: metadata of an image or of its pool override [`SETTINGS`].
fn check_cache(rbd: &RbdImage, name: &RbdImageName) -> Result<()> {
    let failed = |errno| open_error(errno, name);
    let of_image = rbd.metadata(CACHE).map_err(failed)?;
    let value = match of_image {
        Some(value) => Some(value),
        None => rbd.pool_metadata(CACHE).map_err(failed)?,
    };
    match value.as_deref() {
        None | Some("false" | "0" | "no" | "off") => Ok(()),
        Some(value) => Err(Error::new(
            Errno::INVAL,
            format!("{name} has the setting rbd_cache={value}, which loses completed writes"),
            "remove it: rbd config image rm IMAGE rbd_cache, or rbd config pool rm POOL rbd_cache",
        )),
    }
}

/// Acquires the exclusive lock, and returns the file with the address of this client.
///
/// If the image was not closed, the lock of the process before this one is broken first, by the
/// address that it has written on this host.
fn acquire_lock(rbd: &RbdImage, name: &RbdImageName, options: &Options) -> Result<PathBuf> {
    let file = owner_file(name, &options.runtime_dir);
    let former = fs::read_to_string(&file).unwrap_or_default();
    let failed = |errno| {
        Error::new(
            errno,
            format!("locking {name}: {errno}"),
            "check the state of the cluster: ceph -s",
        )
    };
    let deadline = Instant::now() + options.lock_timeout;
    loop {
        let owner = rbd.lock_owner().map_err(failed)?;
        let is_dead = |owner: &&String| options.unclean && **owner == former;
        match owner.as_ref().filter(is_dead) {
            Some(dead) => match rbd.break_lock(dead) {
                // Another client was faster.
                Ok(()) | Err(Errno::NOENT | Errno::BUSY) => {}
                Err(errno) => return Err(failed(errno)),
            },
            None if owner.is_some() && Instant::now() < deadline => {
                thread::sleep(LOCK_INTERVAL);
                continue;
            }
            None if owner.is_some() => return Err(locked(name, owner.unwrap_or_default())),
            None => {}
        }
        match rbd.acquire_lock() {
            Ok(()) => break,
            // Another client was faster.
            Err(Errno::ROFS | Errno::BUSY) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    let owner = rbd.lock_owner().map_err(failed)?.unwrap_or_default();
    let written = write_owner(&file, &owner);
    written.map_err(|error| {
        Error::from_io(&error, file.display(), "check the directory of sockets")
    })?;
    Ok(file)
}

/// Writes the file with the address of the client that has the lock, as a whole or not at all.
fn write_owner(file: &Path, owner: &str) -> io::Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, owner)?;
    fs::rename(&new, file)
}

fn locked(name: &RbdImageName, owner: String) -> Error {
    Error::new(
        Errno::BUSY,
        format!("{name} is in use by the client with the address {owner}"),
        "detach it there first; if that client has died, remove its lock: rbd lock ls, rbd lock rm",
    )
}

/// Returns the path of the file with the address of the client that has the lock of an image.
fn owner_file(name: &RbdImageName, runtime_dir: &Path) -> PathBuf {
    let name = name.to_string();
    // The name of a file has up to 255 bytes. Two images with one file do no harm: a client has the
    // lock of one image.
    let name: String = utf8_percent_encode(&name, ENCODED)
        .flat_map(str::chars)
        .take(MAX_NAME)
        .collect();
    runtime_dir.join(format!("{name}.owner"))
}

impl callback::Image for Image {
    fn size(&self) -> Result<u64> {
        self.rbd.size().map_err(|errno| {
            let cause = format!("reading the size of {}: {errno}", self.name);
            Error::new(errno, cause, "check the state of the cluster: ceph -s")
        })
    }

    fn start(&self, task: Task) {
        self.rbd.start(task);
    }

    fn close(self, flushes: bool) -> Result<()> {
        if flushes {
            self.rbd.flush().map_err(|errno| {
                Error::new(
                    errno,
                    format!("flushing {}: {errno}", self.name),
                    "check the state of the cluster: the last writes may be lost",
                )
            })?;
        }
        self.owner_file.as_deref().map_or(Ok(()), remove)
    }
}

/// Removes the file with the address of the client that had the lock of an image, if one that has
/// opened the image with these options had it.
pub(crate) fn remove_owner(name: &RbdImageName, options: &Options) -> Result<()> {
    match needs_lock(name, options) {
        true => remove(&owner_file(name, &options.runtime_dir)),
        false => Ok(()),
    }
}

/// Returns `true` if an image is opened with its lock.
fn needs_lock(name: &RbdImageName, options: &Options) -> bool {
    options.exclusive && !options.read_only && name.snapshot.is_none()
}

fn remove(owner_file: &Path) -> Result<()> {
    match fs::remove_file(owner_file) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::from_io(
            &error,
            format_args!("removing {}", owner_file.display()),
            "remove it",
        )),
        _ => Ok(()),
    }
}

/// Returns the error of a request that failed.
fn io_error(errno: Errno, request: &Request) -> Error {
    let remedy = match errno {
        Errno::NOSPC | Errno::DQUOT => "add storage to the cluster or raise the quota of the pool",
        Errno::SHUTDOWN => "another host has taken the image over: detach the disk here",
        Errno::ROFS => "the lock was lost: detach the disk",
        _ => "check the state of the cluster: ceph -s",
    };
    Error::new(
        errno,
        format!(
            "{:?} of {} bytes at {}: {errno}",
            request.operation, request.length, request.offset
        ),
        remedy,
    )
}

/// A pool of a Ceph cluster, for the administration of its images.
///
/// An operation fails when the cluster does not answer for 20 seconds.
pub struct RbdPool {
    pool: Arc<Pool>,
    address: RbdAddress,
}

impl RbdPool {
    /// Connects to a pool.
    pub fn connect(address: &RbdAddress) -> Result<Self> {
        Ok(Self {
            pool: Arc::new(connect(address, &ADMIN_SETTINGS)?),
            address: address.clone(),
        })
    }

    /// Lists the names of the images.
    pub fn list(&self) -> Result<Vec<String>> {
        self.pool
            .list()
            .map_err(|errno| self.error("listing", "the images", errno))
    }

    /// Creates an image. The error is `EEXIST` if there is one of the name.
    pub fn create(&self, image: &str, size: u64) -> Result<()> {
        let created = self.pool.create(image, size);
        created.map_err(|errno| self.error("creating", image, errno))
    }

    /// Creates an image with the contents of a snapshot.
    pub fn clone_image(&self, parent: &str, snapshot: &str, image: &str) -> Result<()> {
        let cloned = self.pool.clone_image(parent, snapshot, image);
        cloned.map_err(|errno| self.error("cloning", parent, errno))
    }

    /// Removes an image and the snapshots that `snapshots` names.
    ///
    /// The error is `EBUSY` or `ENOTEMPTY` while it is open for writing or has a clone.
    pub fn remove(&self, image: &str, snapshots: &[String]) -> Result<()> {
        if !snapshots.is_empty() {
            let failed = |errno| self.error("removing a snapshot of", image, errno);
            let open = self.open(image)?;
            // An image that another client has open for writing keeps its snapshots.
            open.acquire_lock().map_err(|errno| match errno {
                Errno::ROFS => failed(Errno::BUSY),
                errno => failed(errno),
            })?;
            for snapshot in snapshots {
                open.remove_snapshot(snapshot).map_err(failed)?;
            }
        }
        let removed = self.pool.remove(image);
        removed.map_err(|errno| self.error("removing", image, errno))
    }

    /// Enlarges an image, which may be open. A larger one stays as it is.
    pub fn enlarge(&self, image: &str, size: u64) -> Result<()> {
        let failed = |errno| self.error("resizing", image, errno);
        let open = self.open(image)?;
        match open.enlarge(size) {
            Err(Errno::INVAL) if open.size().map_err(failed)? >= size => Ok(()),
            result => result.map_err(failed),
        }
    }

    /// Returns the size of an image in bytes.
    pub fn size(&self, image: &str) -> Result<u64> {
        let size = self.inspect(image).and_then(|open| open.size());
        size.map_err(|errno| self.error("opening", image, errno))
    }

    /// Lists the names of the snapshots of an image.
    pub fn snapshots(&self, image: &str) -> Result<Vec<String>> {
        let snapshots = self.inspect(image).and_then(|open| open.snapshots());
        snapshots.map_err(|errno| self.error("listing the snapshots of", image, errno))
    }

    /// Opens an image for reading.
    fn inspect(&self, image: &str) -> std::result::Result<RbdImage, Errno> {
        RbdImage::open(self.pool.clone(), image, None, true)
    }

    /// Creates a snapshot, unless there is one of the name.
    pub fn snapshot(&self, image: &str, name: &str) -> Result<()> {
        let created = self.open(image)?.create_snapshot(name);
        created.map_err(|errno| self.error("creating a snapshot of", image, errno))
    }

    /// Removes a snapshot, if there is one. The error is `EBUSY` if it has clones.
    pub fn remove_snapshot(&self, image: &str, name: &str) -> Result<()> {
        let removed = self.open(image)?.remove_snapshot(name);
        removed.map_err(|errno| self.error("removing a snapshot of", image, errno))
    }

    /// Breaks the exclusive lock of an image, if a client has it.
    ///
    /// The storage daemons accept no request of that client for a year. `confirm` is called after
    /// the client was found, and prevents that by an error.
    pub fn fence(&self, image: &str, confirm: &dyn Fn() -> Result<()>) -> Result<()> {
        let failed = |errno| self.error("breaking the lock of", image, errno);
        let pool = Arc::new(connect(&self.address, &FENCE_SETTINGS)?);
        let open = RbdImage::open(pool.clone(), image, None, false).map_err(failed)?;
        let Some(owner) = open.lock_owner().map_err(failed)? else {
            return Ok(());
        };
        confirm()?;
        pool.refuse_client(&owner, FENCE_SECONDS).map_err(failed)?;
        match open.break_lock(&owner) {
            // The client has released it.
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn open(&self, image: &str) -> Result<RbdImage> {
        RbdImage::open(self.pool.clone(), image, None, false)
            .map_err(|errno| self.error("opening", image, errno))
    }

    fn error(&self, doing: &str, image: &str, errno: Errno) -> Error {
        let remedy = match errno {
            Errno::NOSPC | Errno::DQUOT => "add storage or raise the quota of the pool",
            Errno::PERM | Errno::ACCESS => "check the capabilities of the client",
            Errno::BUSY | Errno::NOTEMPTY => "detach it, and remove its clones first",
            _ => "check the state of the cluster: ceph -s",
        };
        let pool = &self.address.pool;
        Error::new(errno, format!("{doing} {image} in {pool}: {errno}"), remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_leaves_the_owner_of_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let name: RbdImageName = match "rbd:pool/db".parse() {
            Ok(crate::Uri::Rbd(name)) => name,
            _ => panic!("it is no image of Ceph"),
        };
        let options = Options {
            runtime_dir: dir.path().to_owned(),
            ..Options::default()
        };
        let file = owner_file(&name, dir.path());
        write_owner(&file, "address").unwrap();
        for (read_only, exclusive) in [(true, true), (false, false)] {
            let other = Options {
                read_only,
                exclusive,
                ..options.clone()
            };
            remove_owner(&name, &other).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), "address");
        }
        remove_owner(&name, &options).unwrap();
        remove_owner(&name, &options).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
