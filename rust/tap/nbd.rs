// SPDX-License-Identifier: GPL-2.0-only

//! The NBD socket of a disk whose image has no server of its own.
//!
//! Xen's toolstack passes its path to the device model of an HVM guest, which emulates the disk
//! until the guest unplugs the emulated disk. QEMU's storage daemon has a socket of its own.

use crate::listen::listen;
use engine::nbd;
use engine::nbd::Export;
use engine::Engine;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::sync::Arc;
use std::sync::Weak;
use std::thread;
use std::time::Duration;
use std::time::Instant;

/// The greatest number of clients at the same time. The device model is one.
const MAX_CLIENTS: usize = 2;

/// The time that the end of a disk waits for requests of clients: rblkd waits 10 seconds for the
/// process.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The limit for sending a reply.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// The socket. Only root may connect.
pub(crate) struct NbdSocket {
    listener: UnixListener,
    /// The connections. Each is owned by the thread that serves it.
    clients: Vec<Weak<UnixStream>>,
    is_stopped: Arc<AtomicBool>,
    /// Each thread has a copy of the sender, and nothing is sent: the copies end with the threads.
    running: Sender<()>,
    ended: Receiver<()>,
}

impl NbdSocket {
    /// Creates the socket, unless the monitor has linked that of the image's server.
    pub(crate) fn new(path: &Path) -> io::Result<Option<Self>> {
        if path.is_symlink() {
            return Ok(None);
        }
        let listener = listen(path)?;
        let (running, ended) = mpsc::channel();
        Ok(Some(Self {
            listener,
            clients: Vec::new(),
            is_stopped: Arc::default(),
            running,
            ended,
        }))
    }

    /// Accepts a client, and starts a thread that serves it. `discard` allows to free storage.
    ///
    /// An error means that no client can be accepted any more.
    pub(crate) fn accept(
        &mut self,
        engine: &dyn Engine,
        discard: bool,
        name: &str,
    ) -> io::Result<()> {
        let client = match self.listener.accept() {
            Ok((client, _)) => client,
            Err(error) if is_transient(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        if let Err(error) = self.start(client, engine, discard, name) {
            api::message!("{name}: a client of the NBD socket is refused: {error}");
        }
        Ok(())
    }

    fn start(
        &mut self,
        client: UnixStream,
        engine: &dyn Engine,
        discard: bool,
        name: &str,
    ) -> io::Result<()> {
        self.clients.retain(|client| client.strong_count() != 0);
        if self.clients.len() >= MAX_CLIENTS {
            return Err(io::Error::other("it has too many clients"));
        }
        client.set_nonblocking(false)?;
        client.set_write_timeout(Some(SEND_TIMEOUT))?;
        let queue = engine.queue(nbd::DEPTH);
        let queue = queue.map_err(|error| io::Error::other(error.to_string()))?;
        let client = Arc::new(client);
        self.clients.push(Arc::downgrade(&client));
        let (info, name) = (engine.info(), name.to_owned());
        let (is_stopped, running) = (self.is_stopped.clone(), self.running.clone());
        let thread = thread::Builder::new().name(format!("{name}-nbd"));
        thread.spawn(move || {
            let export = Export::new(info, queue, discard, &is_stopped);
            if let Err(error) = export.serve(&*client) {
                api::message!("{name}: a client of the NBD socket is disconnected: {error}");
            }
            drop(running);
        })?;
        Ok(())
    }

    /// Disconnects the clients, and waits until their requests have ended, for [`STOP_TIMEOUT`] at
    /// most.
    pub(crate) fn stop(self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        for client in self.clients.iter().filter_map(Weak::upgrade) {
            // It may have disconnected.
            let _ = client.shutdown(Shutdown::Both);
        }
        drop(self.running);
        let deadline = Instant::now() + STOP_TIMEOUT;
        let left = || deadline.saturating_duration_since(Instant::now());
        while self.ended.recv_timeout(left()) == Ok(()) {}
    }
}

/// Returns `true` if the next client may be accepted after this error.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}

impl AsFd for NbdSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}
