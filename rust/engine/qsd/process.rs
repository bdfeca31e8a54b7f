// SPDX-License-Identifier: GPL-2.0-only

//! The process that serves an image.
//!
//! A thread owns the process, because the kernel signals it when the thread that started it ends.

use super::image::{prepare, qemu_error};
use super::qmp::{Monitor, NBD_EXPORT};
use super::tool::{command, Files};
use super::virtqueue::MAX_QUEUES;
use crate::connect::Protocol;
use crate::error::{Error, Result};
use crate::linux::{is_locked, terminate_with_thread, LockKind};
use crate::options::Options;
use crate::socket::connect;
use crate::uri::{Format, NbdAddress, NbdExport};
use crate::writes;
use rustix::fs::{open, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Value};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Prefix of the names of directories for sockets, before the id of the process.
const PREFIX: &str = "rblk-qsd-";

/// The names of the sockets of a daemon, in its directory.
const NBD_SOCKET: &str = "nbd.sock";
const VHOST_SOCKET: &str = "vhost.sock";
const QMP_SOCKET: &str = "qmp.sock";

/// The file that a daemon creates and locks in its directory before it serves, and that it removes
/// when it ends by itself.
const PID_FILE: &str = "pid";

/// The file with the messages of a daemon, and what it says there if it cannot write its caches
/// when it ends.
const LOG: &str = "log";
const FAILED_FLUSH: &str = "Failed to flush";

/// Limit for a daemon to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

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
    dir: PathBuf,
    /// The next process of the disk has to know if writes were lost.
    is_of_disk: bool,
    orders: Mutex<Option<Sender<Order>>>,
    thread: Mutex<Option<JoinHandle<Result<()>>>>,
}

/// An order to the thread that owns the daemon.
struct Order {
    task: OrderTask,
    result: Sender<Result<()>>,
}

/// The task of an order.
enum OrderTask {
    /// Starts the daemon if it does not run, and makes it accept a connection. `is_dirty`: there
    /// are completed writes that were not flushed.
    Serve { protocol: Protocol, is_dirty: bool },
    /// Enlarges the image.
    Resize { size: u64 },
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
        remove_stale(path, options)?;
        let dir = create_dir(options)?;
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
            dir: dir.into_path(),
            is_of_disk: options.disk.is_some(),
            orders: Mutex::new(Some(orders)),
            thread: Mutex::new(Some(thread)),
        };
        daemon.order(OrderTask::Serve {
            protocol: Protocol::Nbd,
            is_dirty: false,
        })?;
        Ok(daemon)
    }

    /// Returns the path of the NBD socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join(NBD_SOCKET)
    }

    /// Returns the export of the daemon.
    pub(crate) fn export(&self) -> NbdExport {
        export(&self.socket())
    }

    /// Connects to the daemon, which is started if it does not run.
    ///
    /// The error is `ENOTRECOVERABLE` if it has ended while the image `is_dirty`: there were
    /// completed writes that were not flushed.
    pub(crate) fn connect(&self, protocol: Protocol, is_dirty: bool) -> Result<OwnedFd> {
        self.order(OrderTask::Serve { protocol, is_dirty })?;
        let socket = match protocol {
            Protocol::Nbd => self.socket(),
            Protocol::VhostUser => self.dir.join(VHOST_SOCKET),
        };
        let stream = connect(&socket, CONNECT_TIMEOUT);
        Ok(stream.map_err(|error| connect_error(&error))?.into())
    }

    /// Enlarges the image.
    pub(crate) fn resize(&self, size: u64) -> Result<()> {
        self.order(OrderTask::Resize { size })
    }

    /// Gives an order, and waits for the result.
    fn order(&self, task: OrderTask) -> Result<()> {
        let (sender, received) = channel();
        let order = Order {
            task,
            result: sender,
        };
        let sent = self
            .orders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_some_and(|orders| orders.send(order).is_ok());
        match received.recv() {
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
        if !self.is_of_disk || !has_lost_writes(&self.dir) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Creates the directory of a daemon and, for a disk, the record of its writes.
fn create_dir(options: &Options) -> Result<TempDir> {
    let parent = &options.runtime_dir;
    let failed = |error| {
        Error::from_io(
            &error,
            format_args!("creating a file in {}", parent.display()),
            "create that directory, or choose another one",
        )
    };
    let mut prefix = format!("{PREFIX}{}-", std::process::id());
    if let Some(disk) = options.disk {
        writes::create(&writes::record(parent, disk)).map_err(failed)?;
        prefix.push_str(&format!("{disk:x}-"));
    }
    TempDir::with_prefix_in(prefix, parent).map_err(failed)
}

/// Returns the process and the disk of the directory of a daemon.
fn owner_of(name: &OsStr) -> Option<(u32, Option<u64>)> {
    let (process, rest) = name.to_str()?.strip_prefix(PREFIX)?.split_once('-')?;
    let disk = rest.split_once('-');
    let disk = disk.and_then(|(disk, _)| u64::from_str_radix(disk, 16).ok());
    Some((process.parse().ok()?, disk))
}

/// Removes the directories of processes that were killed.
///
/// The error is `ENOTRECOVERABLE` if a daemon of the same disk has lost writes that a guest relies
/// on.
fn remove_stale(image: &Path, options: &Options) -> Result<()> {
    let entries = fs::read_dir(&options.runtime_dir).into_iter();
    for entry in entries.flatten().flatten() {
        let (name, dir) = (entry.file_name(), entry.path());
        let Some((process, disk)) = owner_of(&name) else {
            continue;
        };
        if disk.is_some() && disk == options.disk {
            wait_for_end(&dir, options)?;
            let is_dirty = disk.is_some_and(|disk| {
                let record = writes::record(&options.runtime_dir, disk);
                options.continues && writes::is_dirty(&record)
            });
            if is_dirty && has_lost_writes(&dir) {
                return Err(lost_writes(image));
            }
        } else if Path::new(&format!("/proc/{process}")).exists()
            || disk.is_some() && has_lost_writes(&dir)
        {
            // It is in use, or for the next process of that disk.
            continue;
        }
        // It may belong to another user.
        let _ = fs::remove_dir_all(dir);
    }
    Ok(())
}

/// Waits until the daemon of a process that was killed has ended.
fn wait_for_end(dir: &Path, options: &Options) -> Result<()> {
    let path = dir.join(PID_FILE);
    let deadline = Instant::now() + options.lock_timeout;
    loop {
        let file = match File::open(&path) {
            Ok(file) => file,
            // It has removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                let remedy = "check the directory of sockets";
                return Err(Error::from_io(&error, path.display(), remedy));
            }
        };
        match is_locked(&file, 0, LockKind::Exclusive) {
            Ok(true) if Instant::now() < deadline => thread::sleep(RETRY),
            Ok(false) => return Ok(()),
            Ok(true) => {
                return Err(Error::new(
                    Errno::BUSY,
                    "qemu-storage-daemon of a process that was killed still runs",
                    "check the storage below the image, on which it waits",
                ));
            }
            Err(errno) => {
                let cause = format!("looking for locks of {}: {errno}", path.display());
                return Err(Error::new(errno, cause, "check the directory of sockets"));
            }
        }
    }
}

/// Returns `true` if a daemon, which has ended, has not written its caches.
fn has_lost_writes(dir: &Path) -> bool {
    dir.join(PID_FILE).exists() || failed_flush(dir).is_some()
}

/// Returns what a daemon has said if it could not write its caches when it ended.
fn failed_flush(dir: &Path) -> Option<String> {
    let messages = fs::read_to_string(dir.join(LOG)).ok()?;
    let failed = messages.lines().find(|line| line.contains(FAILED_FLUSH));
    failed.map(str::to_owned)
}

/// The state of the thread that owns a daemon.
struct Owner<'a> {
    config: &'a Config,
    child: Option<Child>,
    /// A daemon was started before.
    is_started: bool,
    /// The daemon has been told to accept a vhost-user connection.
    is_connected: bool,
    has_lost_writes: bool,
    /// The NBD export may not be there.
    lacks_export: bool,
}

/// Carries out orders until there can be no more, then ends the daemon.
fn own(config: &Config, orders: &Receiver<Order>) -> Result<()> {
    let mut owner = Owner {
        config,
        child: None,
        is_started: false,
        is_connected: false,
        has_lost_writes: false,
        lacks_export: false,
    };
    while let Ok(order) = orders.recv() {
        let result = match order.task {
            OrderTask::Serve { protocol, is_dirty } => owner.serve(protocol, is_dirty),
            OrderTask::Resize { size } => owner.resize(size),
        };
        // The sender of the order may have ended.
        let _ = order.result.send(result);
    }
    owner.child.map_or(Ok(()), |child| stop(child, config))
}

impl Owner<'_> {
    /// Makes a daemon run that accepts a connection.
    fn serve(&mut self, protocol: Protocol, is_dirty: bool) -> Result<()> {
        let is_vhost = protocol == Protocol::VhostUser;
        if !is_vhost && self.is_started && !self.runs() {
            // It is started again for the queues, which know what was not flushed.
            return Err(not_running());
        }
        if !is_vhost && self.is_started {
            self.add_export()?;
        }
        if self.runs() && is_vhost && self.is_connected {
            // It may still work on requests of the connection that was lost.
            let ended = self.child.take().map(|child| stop(child, self.config));
            self.has_lost_writes |= matches!(ended, Some(Err(_))) && is_dirty;
        } else if self.child.is_some() && !self.runs() {
            self.child = None;
            self.has_lost_writes |= is_dirty;
        }
        if self.has_lost_writes {
            return Err(lost_writes(&self.config.path));
        }
        if self.child.is_none() {
            // One that was killed has not written its caches.
            let unclean = self.is_started || self.config.options.unclean;
            self.is_connected = false;
            self.lacks_export = false;
            self.child = Some(start(self.config, unclean)?);
            self.is_started = true;
        }
        self.is_connected |= is_vhost;
        Ok(())
    }

    fn runs(&mut self) -> bool {
        let child = self.child.as_mut();
        child.is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        // The device tells its client of the new size, and fails if there was never one.
        if !self.runs() || !self.is_connected {
            return Err(not_running());
        }
        let mut monitor = self.monitor()?;
        // Whatever happens to the command, it may have removed the export.
        self.lacks_export = true;
        let resized = monitor.resize(size);
        // A command without a reply still runs. Over another connection, commands come after it.
        drop(monitor);
        let added = self.add_export();
        resized.and(added)
    }

    fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.config.dir.join(QMP_SOCKET))
    }

    /// Adds the NBD export, if a resize has removed it and not added it again.
    fn add_export(&mut self) -> Result<()> {
        if self.lacks_export {
            let export = export_arguments(self.config);
            self.monitor()?.add_export(&export)?;
            self.lacks_export = false;
        }
        Ok(())
    }
}

fn not_running() -> Error {
    Error::new(
        Errno::NOTCONN,
        "qemu-storage-daemon does not run",
        "try again",
    )
}

fn lost_writes(image: &Path) -> Error {
    Error::new(
        Errno::NOTRECOVERABLE,
        format!(
            "qemu-storage-daemon for {} has ended before it had written its caches",
            image.display()
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
    let socket = config.dir.join(NBD_SOCKET);
    let log = config.dir.join(LOG);
    for name in [NBD_SOCKET, VHOST_SOCKET, QMP_SOCKET, PID_FILE] {
        // What a daemon before it has left.
        let _ = fs::remove_file(config.dir.join(name));
    }
    let errors = File::create(&log)
        .map_err(|error| Error::from_io(&error, log.display(), "check the directory"))?;
    let options = &config.options;
    let mut files = Files::of_image(&config.path, options.read_only, backing).writing(&config.dir);
    if let Some(key) = &options.key_file {
        files = files.reading(key);
    }
    let mut command = command("qemu-storage-daemon", options, &files);
    command
        .args(arguments(config)?)
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
    while connect(socket, CONNECT_TIMEOUT).is_err() {
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

/// Ends a daemon. The error says that it may not have written its caches.
fn stop(mut child: Child, config: &Config) -> Result<()> {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // If it has ended already, the loop notices that.
        let _ = kill_process(pid, Signal::TERM);
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => {
                return failed_flush(&config.dir).map_or(Ok(()), |message| {
                    let remedy = "check the storage below the image: the last writes are lost";
                    Err(Error::new(Errno::IO, message, remedy))
                });
            }
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
fn arguments(config: &Config) -> Result<Vec<String>> {
    let (path, dir) = (text(&config.path)?, text(&config.dir)?);
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
    let vhost = json!({
        "type": "vhost-user-blk",
        "id": "vhost",
        "node-name": "disk",
        "addr": { "type": "unix", "path": format!("{dir}/{VHOST_SOCKET}") },
        "num-queues": MAX_QUEUES,
        "writable": !config.options.read_only,
    });
    for (option, value) in [
        ("--blockdev", file.to_string()),
        ("--blockdev", image.to_string()),
        (
            "--chardev",
            format!("socket,id=qmp,path={dir}/{QMP_SOCKET},server=on,wait=off"),
        ),
        ("--monitor", "chardev=qmp".to_owned()),
        ("--pidfile", format!("{dir}/{PID_FILE}")),
        ("--export", vhost.to_string()),
        // The last of the sockets: when it is there, so are the others.
        (
            "--nbd-server",
            format!("addr.type=unix,addr.path={dir}/{NBD_SOCKET}"),
        ),
        ("--export", export_arguments(config).to_string()),
    ] {
        arguments.extend([option.to_owned(), value]);
    }
    Ok(arguments)
}

/// Returns the arguments of the NBD export.
fn export_arguments(config: &Config) -> Value {
    json!({
        "type": "nbd",
        "id": NBD_EXPORT,
        "node-name": "disk",
        "name": "",
        "writable": !config.options.read_only,
    })
}

fn connect_error(error: &io::Error) -> Error {
    Error::from_io(
        error,
        "connecting to qemu-storage-daemon",
        "check its messages, and the load of the host",
    )
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::lock_byte;

    const DISK: u64 = (5 << 32) | 51712;

    /// A directory that a process of the disk has left.
    struct Left(TempDir);

    impl Left {
        fn new(is_dirty: bool) -> Self {
            let dir = TempDir::new().unwrap();
            let file = writes::create(&writes::record(dir.path(), DISK)).unwrap();
            drop(file);
            if is_dirty {
                fs::write(writes::record(dir.path(), DISK), "1").unwrap();
            }
            let left = Self(dir);
            fs::create_dir(left.path()).unwrap();
            left
        }

        fn path(&self) -> PathBuf {
            // No process has this number.
            self.0.path().join(format!("{PREFIX}4294967295-{DISK:x}-x"))
        }

        /// Starts a process of a disk. Returns the error, and if the directory was removed.
        fn start(&self, disk: Option<u64>, continues: bool) -> (Option<Errno>, bool) {
            let options = Options {
                disk,
                continues,
                runtime_dir: self.0.path().to_owned(),
                ..Options::default()
            };
            let result = remove_stale(Path::new("/image"), &options);
            let errno = result.err().map(|error| error.errno());
            (errno, !self.path().exists())
        }
    }

    const LOST: (Option<Errno>, bool) = (Some(Errno::NOTRECOVERABLE), false);

    #[test]
    fn lost_writes_are_known_to_the_next_process_of_the_disk_only() {
        for (file, contents) in [
            (PID_FILE, "7"),
            (LOG, "x: Failed to flush the L2 block cache: No space left"),
        ] {
            let left = Left::new(true);
            fs::write(left.path().join(file), contents).unwrap();
            assert_eq!(left.start(None, true), (None, false));
            assert_eq!(left.start(Some(DISK + 1), true), (None, false));
            assert_eq!(left.start(Some(DISK), true), LOST);
            assert_eq!(left.start(Some(DISK), true), LOST);
            // The guest that has written is gone.
            assert_eq!(left.start(Some(DISK), false), (None, true));
        }
    }

    #[test]
    fn nothing_is_lost_that_was_flushed_or_written_at_the_end() {
        let left = Left::new(false);
        fs::write(left.path().join(PID_FILE), "7").unwrap();
        assert_eq!(left.start(Some(DISK), true), (None, true));
        for disk in [None, Some(DISK), Some(DISK + 1)] {
            let left = Left::new(true);
            fs::write(left.path().join(LOG), "a warning").unwrap();
            assert_eq!(left.start(disk, true), (None, true));
        }
    }

    #[test]
    fn a_daemon_that_still_writes_is_waited_for() {
        let left = Left::new(true);
        let file = File::create(left.path().join(PID_FILE)).unwrap();
        lock_byte(&file, 0, LockKind::Exclusive).unwrap();
        assert_eq!(left.start(Some(DISK), true), (Some(Errno::BUSY), false));
        fs::remove_file(left.path().join(PID_FILE)).unwrap();
        drop(file);
        assert_eq!(left.start(Some(DISK), true), (None, true));
    }
}
