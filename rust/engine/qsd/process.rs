// SPDX-License-Identifier: GPL-2.0-only

//! The process that serves an image.
//!
//! A thread owns the process, because the kernel signals it when the thread that started it ends.

use super::image::{prepare, qemu_error};
use super::tool::{command, Files};
use crate::error::{Error, Result};
use crate::linux::terminate_with_thread;
use crate::options::Options;
use crate::uri::{Format, NbdAddress, NbdExport};
use rustix::fs::{open, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Value};
use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Prefix of the names of directories for sockets, before the id of the process.
const PREFIX: &str = "rblk-qsd-";

/// Limit for a daemon to open its image.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Limit for a daemon to write its caches and end.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Poll interval of a starting or ending daemon.
const POLL: Duration = Duration::from_millis(5);

/// Delay before the next attempt if the image is in use.
const RETRY: Duration = Duration::from_millis(50);

/// A daemon and the thread that owns it.
pub(crate) struct Daemon {
    dir: TempDir,
    orders: Mutex<Option<Sender<Order>>>,
    thread: Mutex<Option<JoinHandle<Result<()>>>>,
}

/// An order to start the daemon if it does not run.
struct Order {
    /// There are completed writes that were not flushed.
    is_dirty: bool,
    result: Sender<Result<()>>,
}

/// The parameters of a daemon.
struct Config {
    format: Format,
    path: PathBuf,
    options: Options,
    is_direct: bool,
    dir: PathBuf,
}

impl Daemon {
    /// Checks the image and starts a daemon for it.
    pub(crate) fn start(format: Format, path: &Path, options: &Options) -> Result<Self> {
        remove_stale(&options.runtime_dir);
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let dir = TempDir::with_prefix_in(prefix, &options.runtime_dir).map_err(|error| {
            Error::from_io(
                &error,
                format_args!("creating a directory in {}", options.runtime_dir.display()),
                "create it, or choose another directory",
            )
        })?;
        let is_direct = is_direct(path, options)?;
        let config = Config {
            format,
            path: path.to_owned(),
            options: options.clone(),
            is_direct,
            dir: dir.path().to_owned(),
        };
        let (orders, received) = channel();
        let thread = thread::Builder::new()
            .name("qsd".to_owned())
            .spawn(move || own(&config, &received))
            .map_err(|error| {
                Error::from_io(&error, "starting a thread", "raise the limit of threads")
            })?;
        let daemon = Self {
            dir,
            orders: Mutex::new(Some(orders)),
            thread: Mutex::new(Some(thread)),
        };
        daemon.ensure(false)?;
        Ok(daemon)
    }

    /// Returns the path of the NBD socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// Returns the export of the daemon.
    pub(crate) fn export(&self) -> NbdExport {
        export(&self.socket())
    }

    /// Starts the daemon if it does not run, and waits until it serves the image.
    ///
    /// The error is `ENOTRECOVERABLE` if it has ended while the image `is_dirty`: there were
    /// completed writes that were not flushed.
    pub(crate) fn ensure(&self, is_dirty: bool) -> Result<()> {
        let (sender, result) = channel();
        let sent = self
            .orders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_some_and(|orders| {
                let result = sender;
                orders.send(Order { is_dirty, result }).is_ok()
            });
        match result.recv() {
            Ok(result) if sent => result,
            _ => Err(Error::new(
                Errno::NOTCONN,
                "the image is being closed",
                "open it again",
            )),
        }
    }

    /// Ends the daemon and waits until it has written its caches.
    pub(crate) fn stop(&self) -> Result<()> {
        let orders = self
            .orders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(orders);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match thread.map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) | None => Ok(()),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The result is for callers of `stop`.
        let _ = self.stop();
    }
}

/// Removes the directories of processes that were killed.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'))
            .and_then(|(id, _)| id.parse::<u32>().ok());
        let is_stale = owner.is_some_and(|id| !Path::new(&format!("/proc/{id}")).exists());
        if is_stale {
            // It may belong to another user.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Carries out orders until there can be no more, then ends the daemon.
fn own(config: &Config, orders: &Receiver<Order>) -> Result<()> {
    let mut child: Option<Child> = None;
    let mut has_lost_writes = false;
    while let Ok(order) = orders.recv() {
        let is_started = child.is_some();
        let runs = child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        has_lost_writes |= is_started && !runs && order.is_dirty;
        let result = match (runs, has_lost_writes) {
            (true, _) => Ok(()),
            (false, true) => Err(lost_writes(config)),
            // One that was killed has not written its caches.
            (false, false) => {
                start(config, is_started || config.options.unclean).map(|new| child = Some(new))
            }
        };
        // The sender of the order may have ended.
        let _ = order.result.send(result);
    }
    child.map_or(Ok(()), stop)
}

fn lost_writes(config: &Config) -> Error {
    Error::new(
        Errno::NOTRECOVERABLE,
        format!(
            "qemu-storage-daemon for {} was killed before it had written its caches",
            config.path.display()
        ),
        "find out why, detach the disk, and check the file system in it",
    )
}

/// Starts a daemon; waits for other users of the image as long as the options say.
fn start(config: &Config, unclean: bool) -> Result<Child> {
    let deadline = Instant::now() + config.options.lock_timeout;
    loop {
        let result = prepare(config.format, &config.path, &config.options, unclean)
            .and_then(|backing| start_once(config, &backing));
        match result {
            Err(error) if error.errno() == Errno::BUSY && Instant::now() < deadline => {
                thread::sleep(RETRY);
            }
            result => return result,
        }
    }
}

fn start_once(config: &Config, backing: &[PathBuf]) -> Result<Child> {
    let socket = config.dir.join("nbd.sock");
    let log = config.dir.join("log");
    // What a daemon before it has left.
    let _ = fs::remove_file(&socket);
    let errors = File::create(&log)
        .map_err(|error| Error::from_io(&error, log.display(), "check the directory"))?;
    let options = &config.options;
    let mut files = Files::of_image(&config.path, options.read_only, backing).writing(&config.dir);
    if let Some(key) = &options.key_file {
        files = files.reading(key);
    }
    let mut command = command("qemu-storage-daemon", options, &files);
    command
        .args(arguments(config, &socket)?)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors);
    terminate_with_thread(&mut command);
    let child = command.spawn().map_err(|error| {
        Error::from_io(
            &error,
            "running qemu-storage-daemon",
            "install the package qemu-utils",
        )
    })?;
    wait_for_socket(child, &socket, || {
        let message = fs::read_to_string(&log).unwrap_or_default();
        qemu_error(&message, &config.path)
    })
}

/// Waits until the daemon accepts connections.
fn wait_for_socket(mut child: Child, socket: &Path, error: impl Fn() -> Error) -> Result<Child> {
    let deadline = Instant::now() + START_TIMEOUT;
    while UnixStream::connect(socket).is_err() {
        if !matches!(child.try_wait(), Ok(None)) {
            return Err(error());
        }
        if Instant::now() >= deadline {
            kill(&mut child);
            return Err(Error::new(
                Errno::TIMEDOUT,
                format!("qemu-storage-daemon does not start in {START_TIMEOUT:?}"),
                "check the load of the host and the storage below the image",
            ));
        }
        thread::sleep(POLL);
    }
    Ok(child)
}

/// Ends a daemon.
fn stop(mut child: Child) -> Result<()> {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // If it has ended already, the loop notices that.
        let _ = kill_process(pid, Signal::TERM);
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => {
                return Err(Error::new(
                    Errno::IO,
                    format!("qemu-storage-daemon ended with {status}"),
                    "check the image with qemu-img check",
                ));
            }
            Ok(None) | Err(_) => thread::sleep(POLL),
        }
    }
    kill(&mut child);
    Err(Error::new(
        Errno::TIMEDOUT,
        format!("qemu-storage-daemon did not end in {STOP_TIMEOUT:?} and was killed"),
        "check the storage below the image, and the image with qemu-img check",
    ))
}

fn kill(child: &mut Child) {
    // It may have ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// Returns the arguments of a daemon.
fn arguments(config: &Config, socket: &Path) -> Result<Vec<String>> {
    let (path, socket) = (text(&config.path)?, text(socket)?);
    let is_device =
        fs::metadata(&config.path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let cache = json!({ "direct": config.is_direct });
    let file = json!({
        "node-name": "file",
        "driver": if is_device { "host_device" } else { "file" },
        "filename": path,
        "cache": cache,
        "aio": if config.is_direct { "native" } else { "threads" },
        "read-only": config.options.read_only,
        "discard": "unmap",
    });
    let mut image = json!({
        "node-name": "disk",
        "driver": config.format.qemu_name(),
        "file": "file",
        "cache": cache,
        "read-only": config.options.read_only,
        "discard": "unmap",
    });
    let mut arguments = Vec::new();
    if let (Some(key), Some(image)) = (&config.options.key_file, image.as_object_mut()) {
        let secret = json!({ "qom-type": "secret", "id": "key", "file": text(key)? });
        arguments.extend(["--object".to_owned(), secret.to_string()]);
        image.insert("key-secret".to_owned(), Value::from("key"));
    }
    let export = json!({
        "type": "nbd",
        "id": "disk",
        "node-name": "disk",
        "name": "",
        "writable": !config.options.read_only,
    });
    let server = format!("addr.type=unix,addr.path={socket}");
    for (option, value) in [
        ("--blockdev", file.to_string()),
        ("--blockdev", image.to_string()),
        ("--nbd-server", server),
        ("--export", export.to_string()),
    ] {
        arguments.extend([option.to_owned(), value]);
    }
    Ok(arguments)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .filter(|text| !text.is_empty())
        .ok_or_else(|| {
            Error::new(
                Errno::INVAL,
                format!("{} is not UTF-8", path.display()),
                "rename it",
            )
        })
}

/// Returns the export of a daemon with a socket at `path`.
pub(super) fn export(path: &Path) -> NbdExport {
    NbdExport {
        address: NbdAddress::Unix(path.to_owned()),
        name: String::new(),
    }
}

/// Returns `true` if the page cache can and shall be bypassed.
pub(super) fn is_direct(path: &Path, options: &Options) -> Result<bool> {
    if options.direct == Some(false) {
        return Ok(false);
    }
    let is_file = rustix::fs::stat(path).is_ok_and(|stat| {
        matches!(
            FileType::from_raw_mode(stat.st_mode),
            FileType::RegularFile | FileType::BlockDevice
        )
    });
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
    match open(path, flags, Mode::empty()) {
        Ok(_) if is_file => Ok(true),
        Err(Errno::INVAL) if options.direct.is_none() => Ok(false),
        Ok(_) => Err(Error::new(
            Errno::INVAL,
            format!("{} is neither a file nor a block device", path.display()),
            "name an image",
        )),
        Err(errno) => Err(Error::new(
            errno,
            format!("{} cannot be opened: {errno}", path.display()),
            "check the path and the permissions",
        )),
    }
}
