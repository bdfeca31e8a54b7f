// SPDX-License-Identifier: GPL-2.0-only

//! The connection that the queues of an image share.
//!
//! A thread waits for the end of each connection, and wakes all queues. The first queue that
//! notices it connects again, and the others use the same new connection.

use super::vhost_user::{DeviceConfig, Messages, Session};
use super::virtqueue::MAX_QUEUES;
use crate::connect::{Connect, Protocol};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::info::Info;
use crate::options::Options;
use crate::reconnect::connect_in_time;
use crate::shared_memory::SharedMemory;
use crate::uri::NbdExport;
use crate::writes::Writes;
use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::Errno;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError, Weak};
use std::thread;

/// Stack of a thread that waits.
const STACK: usize = 64 << 10;

/// The state that the queues of an image share.
pub(super) struct Shared {
    pub(super) path: PathBuf,
    pub(super) options: Options,
    pub(super) server: Arc<dyn Connect>,
    /// The NBD export of the server.
    pub(super) export: NbdExport,
    pub(super) memory: Arc<SharedMemory>,
    messages: Messages,
    pub(super) writes: Writes,
    /// The geometry, with the size at the time of opening.
    info: Info,
    size: AtomicU64,
    /// The properties of the device at the time of opening.
    pub(super) config: DeviceConfig,
    session: Mutex<Arc<Session>>,
    /// The first connection, until a thread waits for its end.
    unwatched: Mutex<Weak<Session>>,
    /// Is locked for reading while a queue takes what the daemon has completed.
    pub(super) taking: RwLock<()>,
    queues: Arc<Queues>,
}

/// The events that make the queues readable, by their numbers.
#[derive(Default)]
struct Queues(Mutex<[Option<Arc<Event>>; MAX_QUEUES]>);

impl Queues {
    fn lock(&self) -> MutexGuard<'_, [Option<Arc<Event>>; MAX_QUEUES]> {
        // The table is valid at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Creates the state of an image, with a connection that has been set up.
    ///
    /// No thread is started: the process may be confined after this, by its only thread.
    pub(super) fn new(
        path: PathBuf,
        options: Options,
        (server, export): (Arc<dyn Connect>, NbdExport),
        (memory, messages): (Arc<SharedMemory>, Messages),
        (session, config): (Session, DeviceConfig),
        info: Info,
        writes: Writes,
    ) -> Arc<Self> {
        let session = Arc::new(session);
        Arc::new(Self {
            path,
            options,
            server,
            export,
            memory,
            messages,
            writes,
            size: AtomicU64::new(info.size),
            info,
            config,
            unwatched: Mutex::new(Arc::downgrade(&session)),
            session: Mutex::new(session),
            taking: RwLock::default(),
            queues: Arc::default(),
        })
    }

    pub(super) fn info(&self) -> Info {
        Info {
            size: self.size.load(Ordering::Relaxed),
            ..self.info
        }
    }

    /// Enlarges the image. The connection stays meanwhile: QEMU's device fails if it is to tell of
    /// a new size before its client has given it a socket for that.
    pub(super) fn resize(&self, size: u64) -> Result<()> {
        let _current = self.try_lock_session().ok_or_else(not_connected)?;
        self.server.resize(size)
    }

    /// Reads the size again.
    pub(super) fn refresh(self: &Arc<Self>) -> Result<Info> {
        let session = self.session_in_time()?;
        let config = session.config(&self.messages)?;
        self.size.store(config.size, Ordering::Relaxed);
        Ok(self.info())
    }

    fn lock_session(&self) -> MutexGuard<'_, Arc<Session>> {
        // The session is valid at any time.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the connection, unless it was lost or is being made.
    fn try_lock_session(&self) -> Option<MutexGuard<'_, Arc<Session>>> {
        let current = match self.session.try_lock() {
            Ok(current) => current,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        (!current.is_lost()).then_some(current)
    }

    /// Returns the connection, unless it was lost or is being made.
    pub(super) fn current_session(&self) -> Option<Arc<Session>> {
        self.try_lock_session().map(|current| current.clone())
    }

    /// Returns the connection. Waits for a limited time for one that has to be made, which may take
    /// as long as the check of an image.
    fn session_in_time(self: &Arc<Self>) -> Result<Arc<Session>> {
        if let Some(session) = self.current_session() {
            return Ok(session);
        }
        let shared = self.clone();
        connect_in_time(move || shared.session())
    }

    /// Returns the connection, which is made again if it was lost.
    pub(super) fn session(&self) -> Result<Arc<Session>> {
        let mut current = self.lock_session();
        if !current.is_lost() {
            return Ok(current.clone());
        }
        // Completions that a queue is taking at this moment count. After this no queue takes any
        // from the daemon that has ended.
        drop(self.taking.write().unwrap_or_else(PoisonError::into_inner));
        let is_dirty = self.writes.is_dirty();
        let stream = self.server.connect(Protocol::VhostUser, is_dirty)?;
        let (session, config) = Session::new(stream, &self.memory, &self.messages)?;
        if config.size < self.info().size {
            return Err(Error::new(
                Errno::NOTRECOVERABLE,
                format!("{} is smaller than before", self.path.display()),
                "detach the disk, and attach it again",
            ));
        }
        let session = Arc::new(session);
        // Without the thread no queue would notice the end of the connection.
        self.watch(&session)?;
        *current = session.clone();
        Ok(session)
    }

    /// Watches the first connection, if that is not done yet.
    fn watch_first(&self) -> Result<()> {
        // The reference is valid at any time.
        let unwatched = self.unwatched.lock();
        let mut unwatched = unwatched.unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = unwatched.upgrade() {
            self.watch(&session)?;
            *unwatched = Weak::new();
        }
        Ok(())
    }

    /// Starts a thread that wakes all queues when a connection ends.
    fn watch(&self, session: &Arc<Session>) -> Result<()> {
        let socket = session.socket()?;
        // The image may be closed meanwhile.
        let queues = Arc::downgrade(&self.queues);
        let session = Arc::downgrade(session);
        let builder = thread::Builder::new().name("qsd-watch".to_owned());
        let started = builder.stack_size(STACK).spawn(move || {
            // The end of the connection is reported whatever is asked for.
            let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
            while poll(&mut fds, None) == Err(Errno::INTR) {}
            if let Some(session) = session.upgrade() {
                session.close();
            }
            if let Some(queues) = queues.upgrade() {
                for event in queues.lock().iter().flatten() {
                    event.set();
                }
            }
        });
        started.map(drop).map_err(|error| thread_error(&error))
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        self.lock_session().close();
    }

    /// Returns a number for a queue that `event` makes readable.
    pub(super) fn add_queue(&self, event: &Arc<Event>) -> Result<usize> {
        self.watch_first()?;
        let max = self.info.max_queues;
        let mut queues = self.queues.lock();
        let free = queues.iter_mut().take(max).enumerate();
        let free = free.into_iter().find(|(_, queue)| queue.is_none());
        let Some((number, queue)) = free else {
            return Err(Error::new(
                Errno::BUSY,
                format!("{} supports {max} queues only", self.path.display()),
                "use fewer queues",
            ));
        };
        *queue = Some(event.clone());
        Ok(number)
    }

    /// Makes the number of a queue free that has ended.
    pub(super) fn remove_queue(&self, number: usize) {
        if let Some(queue) = self.queues.lock().get_mut(number) {
            *queue = None;
        }
    }

    /// Returns `true` if there are queues.
    pub(super) fn has_queues(&self) -> bool {
        self.queues.lock().iter().any(Option::is_some)
    }
}

fn not_connected() -> Error {
    Error::new(
        Errno::AGAIN,
        "there is no connection to qemu-storage-daemon",
        "try again when it has been started",
    )
}

fn thread_error(error: &io::Error) -> Error {
    Error::from_io(error, "starting a thread", "raise the limit of threads")
}
