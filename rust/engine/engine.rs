// SPDX-License-Identifier: GPL-2.0-only

//! Asynchronous I/O on disk images and network storage behind one trait.
//!
//! An [`Engine`] is one open image; [`open`] creates it from a [`Uri`]. It corresponds to QEMU's
//! `BlockBackend`, and its [`Queue`]s to libblkio's `blkioq`. An engine knows nothing about Xen.
//!
//! # Use
//!
//! One thread owns one [`Queue`], normally the thread that serves one ring:
//!
//! 1. Open the image once, read its [`Info`], and create a queue for each thread.
//! 2. Allocate memory for data with [`Engine::allocate`]. Other memory works as well, for example
//!    mapped guest pages, but an engine may have to copy it. Memory that is used again and again
//!    costs less if it is given to [`Queue::register`].
//! 3. Call [`Queue::submit`] for each request of a batch, then [`Queue::kick`] once.
//! 4. Wait until the queue's file descriptor is readable, together with the event channel and
//!    whatever else the thread waits for, and call [`Queue::completions`].
//! 5. At the end call [`Queue::drain`], drop all queues and call [`Engine::close`].
//!
//! ```
//! use engine::{Options, Request};
//! use std::time::Duration;
//!
//! let engine = engine::open(&"memory:1M".parse()?, &Options::default())?;
//! let mut queue = engine.queue(64)?;
//! let mut buffer = engine.allocate(4096)?;
//! buffer.write_at(0, b"data").map_err(engine::Error::from)?;
//! queue.submit(Request::write(1, 8192, vec![buffer]));
//! queue.submit(Request::flush(2));
//! let mut completions = Vec::new();
//! queue.drain(Duration::from_secs(10), &mut completions)?;
//! assert!(completions.iter().all(|completion| completion.result.is_ok()));
//! drop(queue);
//! engine.close()?;
//! # Ok::<(), engine::Error>(())
//! ```
//!
//! # Requests
//!
//! A submitted request completes exactly once, with a result and with its buffers. Requests in
//! flight may be executed in any order, even if they overlap. A flush covers the writes that
//! completed before it was submitted.
//!
//! Memory is safe whatever a caller does: the engine owns the buffers of a request until nothing
//! in the kernel or in another process can access them.

mod bounce;
mod callback;
mod check;
mod connect;
mod error;
mod event;
pub mod gluster;
mod info;
mod linux;
pub mod memory;
pub mod nbd;
mod options;
pub mod qsd;
pub mod raw;
pub mod rbd;
mod reconnect;
mod request;
mod server;
mod shared_memory;
mod socket;
mod uri;
mod uring;
pub mod vhd;
mod writes;

pub use connect::{Connect, Protocol};
pub use error::{Error, Result};
pub use info::{Discard, Guarantees, Info};
pub use io_buffer::{Access, Buffer};
pub use options::Options;
pub use request::{Completion, Operation, Request};
pub use rustix::io::Errno;
pub use server::Server;
pub use shared_memory::SharedMemory;
pub use uri::{
    Format, GlusterFile, GlusterVolume, NbdAddress, NbdExport, RbdAddress, RbdImageName, Uri,
};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One open image.
///
/// Dropping it without [`Self::close`] releases the image without a flush.
pub trait Engine: Send + Sync {
    /// Returns the geometry of the image and what the engine supports.
    fn info(&self) -> Info;

    /// Reads the size of the image again, and returns the geometry with it.
    ///
    /// All queues of the engine accept requests up to the new size at once. An engine whose
    /// storage does not tell about a new size notices it here only.
    fn refresh(&self) -> Result<Info>;

    /// Enlarges the image to `size` bytes, and returns the geometry with its new size.
    ///
    /// The error is `EINVAL` if the image is larger, or `size` is no multiple of a block, and
    /// `EOPNOTSUPP` if the engine cannot do it.
    fn resize(&self, size: u64) -> Result<Info> {
        Err(Error::new(
            Errno::OPNOTSUPP,
            format!("the storage cannot be enlarged to {size} bytes from here"),
            "enlarge it with the tools of the storage, and use rblk disk resize without a size",
        ))
    }

    /// Creates a queue that has up to `depth` requests in flight at the same time.
    ///
    /// Further submitted requests wait inside the queue.
    fn queue(&self, depth: u32) -> Result<Box<dyn Queue>>;

    /// Allocates zeroed memory that this engine's I/O uses without a copy.
    fn allocate(&self, len: usize) -> Result<Buffer>;

    /// Returns the memory that the engine shares with another process, which reads and writes the
    /// data there. Data in other memory is copied.
    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        None
    }

    /// Flushes the image and releases it.
    ///
    /// All queues must have been dropped, otherwise the error is `EBUSY` and the image is released
    /// together with the last queue.
    fn close(self: Box<Self>) -> Result<()>;
}

/// A path of requests to an image, used by one thread at a time.
///
/// Its file descriptor is readable while completions wait.
///
/// Dropping a queue waits for the requests in flight. If the storage does not answer for
/// [`DROP_TIMEOUT`], their memory is leaked instead, because the kernel may still write to it.
pub trait Queue: AsFd + Send {
    /// Adds a request.
    ///
    /// A request that cannot be carried out completes with an error; see [`Request`].
    fn submit(&mut self, request: Request);

    /// Starts the requests that were submitted since the last call.
    ///
    /// An error means that the queue can no longer start requests. Those in flight still complete.
    fn kick(&mut self) -> Result<()>;

    /// Moves the completions that are there to the end of `completions`, without waiting.
    fn completions(&mut self, completions: &mut Vec<Completion>) -> Result<()>;

    /// Returns the number of requests that were submitted and whose completions were not taken.
    fn in_flight(&self) -> usize;

    /// Prepares memory that many requests of this queue will use, so that they cost less, if the
    /// engine can do that.
    fn register(&mut self, _buffer: &mut Buffer) {}

    /// Frees memory that was registered. What is dropped instead may stay allocated until the queue
    /// is dropped.
    fn unregister(&mut self, buffer: Buffer) {
        drop(buffer);
    }

    /// Starts submitted requests and waits until all have completed.
    ///
    /// The error is `ETIMEDOUT` if requests are still in flight after `timeout`. Completions up
    /// to then are in `completions`.
    fn drain(&mut self, timeout: Duration, completions: &mut Vec<Completion>) -> Result<()> {
        let deadline = Instant::now() + timeout;
        self.kick()?;
        loop {
            self.completions(completions)?;
            if self.in_flight() == 0 {
                return Ok(());
            }
            if !wait_readable(self.as_fd(), deadline)? {
                return Err(Error::new(
                    Errno::TIMEDOUT,
                    format!(
                        "{} requests are still in flight after {timeout:?}",
                        self.in_flight()
                    ),
                    "check the storage below the image",
                ));
            }
        }
    }
}

/// Time for which dropping a [`Queue`] waits for requests in flight.
pub const DROP_TIMEOUT: Duration = Duration::from_secs(30);

/// Opens an image.
///
/// An image that cannot be opened as the options say is refused with an error that names the
/// cause.
pub fn open(uri: &Uri, options: &Options) -> Result<Box<dyn Engine>> {
    let server = Server::start(uri, options)?;
    let server = server.map(|server| -> Arc<dyn Connect> { Arc::new(server) });
    open_with(uri, options, server)
}

/// Opens an image whose server, if it has one, was started with [`Server::start`].
pub fn open_with(
    uri: &Uri,
    options: &Options,
    server: Option<Arc<dyn Connect>>,
) -> Result<Box<dyn Engine>> {
    match (uri, server) {
        (Uri::Memory { size }, _) => Ok(Box::new(memory::MemoryEngine::open(*size, options)?)),
        (Uri::Nbd(export), Some(server)) => {
            Ok(Box::new(nbd::NbdEngine::open(export, options, server)?))
        }
        (Uri::Image { path, .. }, None) => Ok(Box::new(raw::RawEngine::open(path, options)?)),
        (Uri::Image { path, .. }, Some(server)) => {
            Ok(Box::new(qsd::QsdEngine::open(path, options, server)?))
        }
        (Uri::Rbd(image), _) => rbd::open(image, options),
        (Uri::Gluster(file), _) => gluster::open(file, options),
        (Uri::Nbd(export), None) => Err(Error::new(
            Errno::NOTCONN,
            format!("{export} has no server"),
            "this is an error of the program, report it",
        )),
    }
}

/// Removes what a process that was confined when it closed an image has left in `runtime_dir` of
/// the options with which it had opened it.
pub fn remove_files(uri: &Uri, options: &Options) -> Result<()> {
    match uri {
        Uri::Rbd(image) => rbd::remove_owner(image, options),
        Uri::Image { .. } => writes::remove(options),
        Uri::Nbd(_) | Uri::Gluster(_) | Uri::Memory { .. } => Ok(()),
    }
}

/// Waits until `fd` is readable.
///
/// Returns `false` if it is not by `deadline`.
fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| {
            Error::new(Errno::INVAL, "the timeout is too long", "use hours at most")
        })?;
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => continue,
            Err(errno) => {
                return Err(Error::new(errno, "poll of the queue fails", "report this"));
            }
        }
    }
}
