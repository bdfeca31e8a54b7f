// SPDX-License-Identifier: GPL-2.0-only

//! The life of a disk in xenstore, from the start of the process to the end of the device.
//!
//! [`blkif::state`] decides what has to be done, and [`Device`] does it, in the main thread. The
//! thread is woken by changes of the frontend's state and of the backend's own directory, which the
//! toolstack writes to, by its queues, and by `rblk` over the control socket.
//!
//! The threads of queues own their rings. When a connection ends, the main thread stops them and
//! continues when the last one has ended, which may take as long as the I/O of the image.
//!
//! # A successor of a process that was killed
//!
//! Both states are Connected then, and the rings are unchanged. If there is an in-flight table for
//! exactly these rings, they are taken over without a change that the frontend notices.

use crate::connect;
use crate::connect::Connection;
use crate::connect::Parts;
pub use crate::connect::Xen;
use crate::control::ControlSocket;
use crate::disk::Disk;
use crate::drain::DrainFlush;
use crate::error::During;
use crate::error::Error;
use crate::inflight::InflightFile;
use crate::inflight::InflightTable;
use crate::memory::UNUSED;
use crate::nbd::NbdSocket;
use crate::queue::EventSender;
use crate::queue::QueueControl;
use crate::queue::QueueEvent;
pub use crate::queue::Settings;
use crate::queue::MESSAGES;
use crate::queue::MESSAGE_MS;
use crate::stats;
use crate::stats::Stats;
use crate::wakeup;
use crate::wakeup::Wakeup;
use crate::xenstore::read;
use crate::xenstore::read_number;
use crate::xenstore::read_state;
use crate::xenstore::require;
use crate::xenstore::write;
use api::DiskAnswer;
use api::DiskCommand;
use api::DiskStatus;
use api::Quota;
use blkif::backoff::Backoff;
use blkif::negotiate::BackLimits;
use blkif::node::InvalidNode;
use blkif::node::Reason;
use blkif::ring::MAX_PAGE_ORDER;
use blkif::state;
use blkif::state::BackAction;
use blkif::state::BackEvent;
use blkif::state::BackState;
use blkif::state::Failure;
use blkif::state::XenbusState;
use blkif::token_bucket::TokenBucket;
use engine::Engine;
use engine::Errno;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::time::Instant;
use xen_user::proxy::Permissions;
use xen_user::xenstore::Nodes;
use xen_user::xenstore::Transaction;
use xen_user::xenstore::Xenstore;

/// Connections that a frontend may make at once, and how long each one more takes, in milliseconds.
const CONNECTIONS: u32 = 16;
const CONNECTION_MS: u64 = 500;

/// Delays between attempts after a temporary failure, in milliseconds.
const RETRIES: Backoff = Backoff::new(100, 10_000);

/// Events of xenstore that are taken at a time.
const MAX_EVENTS: usize = 64;

/// Stack of a queue's thread.
const STACK: usize = 256 << 10;

/// The configuration of a device.
#[derive(Clone)]
pub struct Config {
    /// Domain of the frontend.
    pub domain: u16,
    /// Number of the virtual device.
    pub device: u32,
    /// The process that `rblkd` and `xentop` know.
    pub pid: u32,
    /// Directory of the backend, relative to that of this domain.
    pub dir: String,
    /// The directory of the in-flight table and the control socket.
    pub state_dir: PathBuf,
    /// The directory in which the statistics for `xentop` are created, if any.
    pub stats_root: Option<PathBuf>,
    /// Largest number of rings.
    pub max_queues: u32,
    /// Use persistent grants if the frontend does.
    pub persistent: bool,
    /// The device model of an HVM guest may use the image before the guest connects.
    pub is_exported: bool,
    /// The settings of error handling.
    pub settings: Settings,
    /// The pages and requests that the disk may use at first: its share of those of its domain.
    pub quota: Quota,
    /// The time after which a drained disk takes requests again if its process has not been ended.
    pub drain_time: Duration,
}

impl Config {
    /// Returns the path of the in-flight table.
    pub fn inflight_path(&self) -> PathBuf {
        self.path("inflight")
    }

    /// Returns the path of the NBD socket that the device model of an HVM guest opens.
    pub fn nbd_path(&self) -> PathBuf {
        self.path("nbd")
    }

    fn control_path(&self) -> PathBuf {
        self.path("sock")
    }

    /// Removes the files of the device, which has ended.
    pub fn remove_files(&self) {
        // Those that stay are replaced or overwritten by those of the next process.
        let _ = fs::remove_file(self.control_path());
        let _ = fs::remove_file(self.nbd_path());
        let _ = fs::remove_file(self.inflight_path());
        if let Some(root) = &self.stats_root {
            let _ = fs::remove_dir_all(stats::directory(root, self.pid));
        }
    }

    fn path(&self, extension: &str) -> PathBuf {
        let name = format!("{}-{}.{extension}", self.domain, self.device);
        self.state_dir.join(name)
    }
}

/// The nodes that a device writes to its directory.
const WRITTEN: [&str; 16] = [
    "state",
    "kthread-pid",
    "feature-max-indirect-segments",
    "multi-queue-max-queues",
    "max-ring-page-order",
    "feature-flush-cache",
    "feature-barrier",
    "feature-discard",
    "discard-granularity",
    "discard-alignment",
    "discard-secure",
    "feature-persistent",
    "sectors",
    "info",
    "sector-size",
    "physical-sector-size",
];

/// Returns what a device uses of xenstore: `dir` is its directory, `frontend` that of its frontend.
pub fn permissions(dir: &str, frontend: &str) -> Permissions {
    let own = WRITTEN.iter().map(|node| format!("{dir}/{node}"));
    Permissions {
        readable: vec![dir.to_owned(), frontend.to_owned()],
        writable: own.chain([format!("error/{dir}/error")]).collect(),
    }
}

/// Returns `true` if a frontend is connected to a device, which a process before this one served.
pub fn is_connected(nodes: &mut impl Nodes, dir: &str) -> io::Result<bool> {
    Ok(read_state(nodes, dir)? == Some(XenbusState::Connected))
}

/// The nodes of the toolstack that describe a disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ToolstackNodes {
    /// The directory of the frontend.
    pub frontend: String,
    /// The disk refuses writes.
    pub read_only: bool,
    /// Other users may write to the image at the same time.
    pub shared: bool,
    /// Discard is not forbidden.
    pub discard: bool,
    /// The medium is removable.
    pub removable: bool,
    /// The disk is a CD-ROM.
    pub cdrom: bool,
}

impl ToolstackNodes {
    /// Reads the nodes, and checks that they are those of the domain's disk.
    pub fn read(nodes: &mut impl Nodes, dir: &str, domain: u16) -> Result<Self, Error> {
        let id = require(nodes, dir, "frontend-id")?;
        if id != domain.to_string().as_bytes() {
            let bad = InvalidNode::new("frontend-id", &id, Reason::Unknown);
            return Err(Error::Toolstack(bad));
        }
        let frontend = require(nodes, dir, "frontend")?;
        let mode = require(nodes, dir, "mode")?;
        if !mode.contains(&b'w') && mode != b"r" {
            return Err(Error::Toolstack(InvalidNode::new(
                "mode",
                &mode,
                Reason::Unknown,
            )));
        }
        let mut is = |node, text: &[u8]| -> Result<bool, Error> {
            Ok(read(nodes, dir, node)?.is_some_and(|value| value == text))
        };
        Ok(Self {
            frontend: String::from_utf8_lossy(&frontend).into_owned(),
            read_only: mode == b"r",
            shared: mode.contains(&b'!'),
            discard: !is("discard-enable", b"0")?,
            removable: is("removable", b"1")?,
            cdrom: is("device-type", b"cdrom")?,
        })
    }
}

/// A device.
pub struct Device {
    config: Config,
    nodes: ToolstackNodes,
    store: Xenstore,
    xen: Xen,
    engine: Box<dyn Engine>,
    disk: Arc<Disk>,
    stats: Arc<Stats>,
    control: ControlSocket,
    /// Set if the image has no server with such a socket.
    nbd: Option<NbdSocket>,
    state: BackState,
    /// The state that was last written, or found at the start.
    written: XenbusState,
    limits: BackLimits,
    /// A predecessor may have left requests in flight.
    may_adopt: bool,
    queues: Vec<Arc<QueueControl>>,
    inflight: InflightFile,
    /// The table of the connection.
    table: Option<InflightTable>,
    /// Threads that have not ended, of all connections.
    threads: usize,
    /// The queues were stopped; the next step is taken when all have ended.
    draining: bool,
    /// No requests are taken.
    paused: bool,
    /// When a drain ends by itself.
    drain_end: Option<Instant>,
    drain_flush: DrainFlush,
    quota: Quota,
    connects: TokenBucket,
    /// Limits the messages about failures, which a frontend can cause.
    messages: TokenBucket,
    started: Instant,
    retries: Backoff,
    /// Time of the next attempt after a failure.
    retry_at: Option<Instant>,
    /// When queues have to give up memory that they have not used.
    purge_at: Option<Instant>,
    /// The last error that was reported.
    reported: Option<String>,
    connection: u64,
    wakeup: Arc<Wakeup>,
    sender: Sender<(u64, QueueEvent)>,
    events: Receiver<(u64, QueueEvent)>,
}

/// The result of writing a state.
#[derive(Debug, Eq, PartialEq)]
enum Switched {
    Written,
    /// Another state was found.
    Refused(XenbusState),
    /// The frontend has withdrawn its rings.
    Withdrawn,
}

/// The work after a step.
#[derive(Debug, Eq, PartialEq)]
enum Next {
    /// Take another step.
    Again,
    /// Wait for an event.
    Wait,
}

impl Device {
    /// Creates a device, whose image is open, with all files that it will use.
    pub fn new(
        config: Config,
        nodes: ToolstackNodes,
        mut store: Xenstore,
        xen: Xen,
        engine: Box<dyn Engine>,
        disk: Disk,
    ) -> Result<Self, Error> {
        let (sender, events) = mpsc::channel();
        let written = read_state(&mut store, &config.dir)
            .during("reading xenstore")?
            .unwrap_or(XenbusState::Unknown);
        let stats = match &config.stats_root {
            Some(root) => Stats::in_file(root, config.pid, config.domain, config.device),
            None => Stats::private(),
        };
        let path = config.control_path();
        let inflight = InflightFile::open(&config.inflight_path());
        let inflight = inflight.during("opening the in-flight table")?;
        Ok(Self {
            disk: Arc::new(disk),
            stats: Arc::new(stats.during("creating the file for xentop")?),
            control: ControlSocket::new(&path).during("creating the control socket")?,
            nbd: match config.is_exported {
                true => NbdSocket::new(&config.nbd_path()).during("creating the NBD socket")?,
                false => None,
            },
            state: match written {
                XenbusState::Closing | XenbusState::Closed => BackState::StartingClosed,
                _ => BackState::Starting,
            },
            written,
            limits: BackLimits {
                max_ring_page_order: MAX_PAGE_ORDER,
                max_queues: u32::try_from(engine.info().max_queues)
                    .unwrap_or(u32::MAX)
                    .min(config.max_queues)
                    .max(1),
                persistent: config.persistent,
            },
            may_adopt: false,
            queues: Vec::new(),
            table: None,
            threads: 0,
            draining: false,
            paused: inflight.is_paused(),
            drain_end: None,
            drain_flush: DrainFlush::Due,
            inflight,
            quota: config.quota,
            connects: TokenBucket::new(CONNECTIONS, CONNECTION_MS, 0),
            messages: TokenBucket::new(MESSAGES, MESSAGE_MS, 0),
            started: Instant::now(),
            retries: RETRIES,
            retry_at: None,
            purge_at: None,
            reported: None,
            connection: 0,
            wakeup: Arc::new(Wakeup::new().during("creating a wakeup")?),
            sender,
            events,
            config,
            nodes,
            store,
            xen,
            engine,
        })
    }

    fn start(&mut self) -> Result<(), Error> {
        self.watch().during("watching xenstore")?;
        let frontend = read_state(&mut self.store, &self.nodes.frontend);
        let connected = self.written == XenbusState::Connected
            && frontend.during("reading xenstore")? == Some(XenbusState::Connected)
            && self.inflight.has_table();
        let dir = &self.config.dir;
        if connected {
            // The offer is that of the predecessor.
            let persistent = read(&mut self.store, dir, "feature-persistent")?;
            self.limits.persistent = persistent.as_deref() == Some(b"1");
            self.may_adopt = true;
            self.state = BackState::Waiting;
            self.check_image()?;
        }
        // xentop finds the statistics by it, and rblkd that the image can be used.
        let written = write(
            &mut self.store,
            &self.config.dir,
            "kthread-pid",
            self.config.pid,
        );
        written.during("writing xenstore")
    }

    fn watch(&mut self) -> io::Result<()> {
        let (dir, frontend) = (&self.config.dir, &self.nodes.frontend);
        self.store.watch(&format!("{frontend}/state"), "frontend")?;
        self.store.watch(&format!("{dir}/state"), "state")?;
        self.store.watch(&format!("{dir}/online"), "online")
    }

    /// Checks that the image can be used by a guest that is connected to a disk with another one,
    /// or with this one as it was before.
    fn check_image(&mut self) -> Result<(), Error> {
        let (dir, frontend) = (&self.config.dir, &self.nodes.frontend);
        let rings = read_number(&mut self.store, frontend, "multi-queue-num-queues")?.unwrap_or(1);
        let sectors = read_number(&mut self.store, dir, "sectors")?.unwrap_or(0);
        let block = read_number(&mut self.store, dir, "sector-size")?;
        let (has_sectors, has_block) = (self.disk.sectors(), u64::from(self.disk.block_size()));
        let cause = if rings > self.limits.max_queues.into() {
            let max = self.limits.max_queues;
            format!("the guest uses {rings} rings, and the image supports {max}")
        } else if sectors > has_sectors {
            format!("the guest has a disk of {sectors} sectors, and the image {has_sectors}")
        } else if block.is_some_and(|block| block < has_block) {
            format!("the guest uses smaller blocks than the {has_block} bytes of the image")
        } else {
            return Ok(());
        };
        let remedy =
            "use an image that is as large and supports the same, or detach the disk first";
        Err(engine::Error::new(Errno::INVAL, cause, remedy).into())
    }

    /// Serves the device until it is removed. Returns an error if it cannot be served any longer.
    pub fn run(mut self) -> Result<(), Error> {
        self.start()?;
        while self.state != BackState::Removed {
            while self.step()? == Next::Again {}
            if self.state != BackState::Removed {
                // An event may have been read along with a reply; `poll` does not report it.
                let any = self.take_events()?;
                self.wait(!any)?;
                self.take_events()?;
            }
        }
        if let Some(table) = self.table.take() {
            table.end();
        }
        self.close_nbd();
        self.engine.close()?;
        Ok(())
    }

    /// Disconnects the clients of the NBD socket: the image cannot be closed while one has a queue.
    fn close_nbd(&mut self) {
        if let Some(nbd) = self.nbd.take() {
            nbd.stop();
        }
    }

    /// Does what is due, and what `rblk` asks for, after having waited for something if `sleeps` is
    /// set.
    fn wait(&mut self, sleeps: bool) -> Result<(), Error> {
        if self.purge_at.is_none() && self.queues.iter().any(|queue| queue.keeps_memory()) {
            self.purge_at = Some(Instant::now() + UNUSED);
        }
        let now = (!sleeps).then(Instant::now);
        let next = self.retry_at.into_iter().chain(self.purge_at);
        let next = next.chain(self.drain_end).chain(now).min();
        let timeout = next.map(|time| time.saturating_duration_since(Instant::now()));
        let control = self.control.as_fd();
        let nbd = self.nbd.as_ref().map_or(control, NbdSocket::as_fd);
        let fds = [self.store.fd(), self.wakeup.as_fd(), control, nbd];
        let [_, woken, control, nbd] = wakeup::wait(fds, timeout).during("waiting for events")?;
        if woken {
            self.wakeup.clear();
        }
        if nbd {
            let name = self.name();
            let accepted = self.nbd.as_mut().map_or(Ok(()), |socket| {
                socket.accept(&*self.engine, self.nodes.discard, &name)
            });
            if let Err(error) = accepted {
                api::message!("{name}: the NBD socket is closed: {error}");
                self.close_nbd();
            }
        }
        if control {
            self.serve_control();
        }
        let now = Instant::now();
        if self.retry_at.is_some_and(|time| time <= now) {
            self.retry_at = None;
        }
        if self.purge_at.is_some_and(|time| time <= now) {
            self.purge_at = None;
            self.queues.iter().for_each(|queue| queue.purge());
        }
        if self.drain_end.is_some_and(|time| time <= now) {
            // The rblkd that was to replace this process has ended, or has given up.
            self.set_paused(self.inflight.is_paused());
        }
        Ok(())
    }

    /// Takes pending events. Returns `true` if there were any. An event of xenstore is only taken;
    /// [`Self::read_event`] reads the nodes.
    fn take_events(&mut self) -> Result<bool, Error> {
        let mut any = false;
        // A guest can cause events faster than they are taken.
        for _ in 0..MAX_EVENTS {
            if self
                .store
                .next_event()
                .during("reading xenstore")?
                .is_none()
            {
                break;
            }
            any = true;
        }
        while let Ok((connection, event)) = self.events.try_recv() {
            any = true;
            self.queue_event(connection, event)?;
        }
        Ok(any)
    }

    fn queue_event(&mut self, connection: u64, event: QueueEvent) -> Result<(), Error> {
        let current = connection == self.connection;
        match event {
            QueueEvent::Ended => self.threads = self.threads.saturating_sub(1),
            QueueEvent::Broken(error) if current => {
                let is_own = !matches!(error.failure(true), Failure::Frontend);
                if is_own {
                    // The queue starts no more requests, and may not end. A successor of this
                    // process takes over the rings, or ends the connection.
                    return Err(error);
                }
                self.fail(&error)?;
            }
            QueueEvent::Withdraw(node) if current => {
                api::message!("{}: the image has refused this: {node} = 0", self.name());
                let written = write(&mut self.store, &self.config.dir, node, 0);
                written.during("writing xenstore")?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Returns domain and device, for messages.
    fn name(&self) -> String {
        format!("{}-{}", self.config.domain, self.config.device)
    }

    /// Decides what has to be done, and does it.
    fn step(&mut self) -> Result<Next, Error> {
        let action = if !self.draining {
            let event = self.read_event()?;
            self.state.step(event)
        } else if self.threads != 0 {
            return Ok(Next::Wait);
        } else {
            BackAction::Disconnect
        };
        match action {
            BackAction::Wait | BackAction::Open => Ok(Next::Wait),
            BackAction::Connect if self.has_to_wait() => Ok(Next::Wait),
            BackAction::Connect => self.attach(),
            BackAction::Retry => Ok(Next::Wait),
            BackAction::Disconnect if self.stop() => Ok(Next::Wait),
            BackAction::Fail => {
                let state = read(&mut self.store, &self.nodes.frontend, "state")?;
                let state = state.unwrap_or_default();
                let bad = InvalidNode::new("state", &state, Reason::Unknown);
                self.fail(&Error::State(bad))
            }
            BackAction::Restart => {
                let (dir, limits) = (&self.config.dir, &self.limits);
                let offered = connect::write_offers(&mut self.store, dir, limits);
                offered.during("writing offers")?;
                self.enter(BackState::Waiting)
            }
            BackAction::Disconnect => {
                self.draining = false;
                self.may_adopt = false;
                self.limits.persistent = self.config.persistent;
                if let Some(table) = self.table.take() {
                    table.end();
                }
                self.enter(BackState::Disconnected)
            }
            BackAction::Close => self.enter(BackState::Closing),
            BackAction::Finish => self.enter(BackState::Closed),
            BackAction::Remove => self.enter(BackState::Removed),
        }
    }

    /// Returns the states in xenstore, as an event.
    fn read_event(&mut self) -> Result<BackEvent, Error> {
        let state = read_state(&mut self.store, &self.nodes.frontend).during("reading xenstore")?;
        let Some(state) = state else {
            return Ok(BackEvent::BadState);
        };
        let dir = &self.config.dir;
        let exists = self.store.read(&format!("{dir}/state"));
        let exists = exists.during("reading xenstore")?.is_some();
        let online = read(&mut self.store, dir, "online")?;
        Ok(BackEvent::Frontend {
            state: if exists { state } else { XenbusState::Unknown },
            online: exists && state::is_online(online.as_deref(), state),
            ready: true,
        })
    }

    /// Returns the time since the device was created, in milliseconds.
    fn age_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns `true` if the frontend connects too often, or if the delay after a failure has not
    /// passed.
    fn has_to_wait(&mut self) -> bool {
        if self.retry_at.is_some() {
            return true;
        }
        let Err(time) = self.connects.take(self.age_ms()) else {
            return false;
        };
        api::message!(
            "{}: the frontend connects too often: it has to wait",
            self.name()
        );
        self.retry_at = Some(Instant::now() + Duration::from_millis(time));
        true
    }

    /// Connects to the frontend: its rings are served when this returns.
    fn attach(&mut self) -> Result<Next, Error> {
        let connection = match self.connect() {
            Ok(connection) => connection,
            Err(error) => return self.fail(&error),
        };
        match self.describe(&connection)? {
            Switched::Written => {}
            Switched::Withdrawn => return Ok(Next::Again),
            Switched::Refused(found) => return self.refused(BackState::Connected, found),
        }
        self.state = BackState::Connected;
        self.may_adopt = false;
        self.report(&connection);
        self.forget_failures()?;
        self.serve(connection)?;
        Ok(Next::Wait)
    }

    fn connect(&mut self) -> Result<Connection, Error> {
        self.connection = self.connection.wrapping_add(1);
        let parts = Parts {
            xen: &self.xen,
            engine: &*self.engine,
            disk: &self.disk,
            stats: &self.stats,
            frontend: &self.nodes.frontend,
            domain: self.config.domain,
            name: &self.name(),
            limits: &self.limits,
            inflight: &self.inflight,
            events: EventSender {
                sender: self.sender.clone(),
                wakeup: self.wakeup.clone(),
                connection: self.connection,
            },
            settings: self.config.settings,
            quota: self.quota,
        };
        Connection::new(&mut self.store, &parts, self.may_adopt)
    }

    /// Writes the properties of the disk, and Connected. Writes nothing if the toolstack has
    /// written another state, or if the frontend has withdrawn its rings since they were mapped.
    fn describe(&mut self, connection: &Connection) -> Result<Switched, Error> {
        let (disk, frontend) = (self.disk.clone(), self.nodes.frontend.clone());
        let (persistent, cdrom) = (connection.accepted.persistent, self.nodes.cdrom);
        self.switch_with(XenbusState::Connected, |transaction, dir| {
            if !connection.is_offered(transaction, &frontend) {
                return Ok(false);
            }
            connect::write_disk(transaction, dir, &disk, persistent, cdrom)?;
            Ok(true)
        })
    }

    fn report(&self, connection: &Connection) {
        let accepted = &connection.accepted;
        api::message!(
            "{}: {} queues of {} pages, {}, persistent grants {}, {} requests adopted",
            self.name(),
            accepted.rings.queues,
            accepted.rings.pages(),
            accepted.abi.name(),
            if accepted.persistent { "on" } else { "off" },
            connection.adopted,
        );
    }

    fn serve(&mut self, connection: Connection) -> Result<(), Error> {
        self.table = Some(connection.inflight);
        for (index, (queue, control)) in connection.queues.into_iter().enumerate() {
            if self.paused {
                control.pause(true);
            }
            let thread = thread::Builder::new()
                .name(format!("{}-{index}", self.name()))
                .stack_size(STACK);
            // The thread sends `QueueEvent::Ended` when it ends.
            thread
                .spawn(move || queue.serve())
                .during("starting a thread")?;
            self.threads = self.threads.saturating_add(1);
            self.queues.push(control);
        }
        Ok(())
    }

    /// Makes the queues complete their requests and end. Returns `true` if some have not ended yet.
    fn stop(&mut self) -> bool {
        for queue in self.queues.drain(..) {
            queue.stop();
        }
        self.draining = self.threads != 0;
        self.draining
    }

    /// Enters a state, and writes it, unless the toolstack wants another one.
    fn enter(&mut self, next: BackState) -> Result<Next, Error> {
        let switched = match next.xenbus() {
            Some(state) if state != self.written => self.switch_with(state, |_, _| Ok(true))?,
            _ => Switched::Written,
        };
        match switched {
            Switched::Refused(found) => self.refused(next, found),
            Switched::Written | Switched::Withdrawn => {
                self.state = next;
                Ok(Next::Again)
            }
        }
    }

    /// Handles a state that was not written because another one was found.
    fn refused(&mut self, next: BackState, found: XenbusState) -> Result<Next, Error> {
        if found == XenbusState::Closing {
            let action = self.state.step(BackEvent::ToolstackClosing);
            return match action.next_state() {
                Some(closing) => self.enter(closing),
                None => Ok(Next::Wait),
            };
        }
        match next {
            // The directory is gone, or is that of a new device.
            BackState::Closing | BackState::Closed | BackState::Removed => {
                self.state = next;
                Ok(Next::Again)
            }
            _ => Ok(Next::Wait),
        }
    }

    /// Replaces the state that was written last, in one transaction with the writes of `body`.
    fn switch_with(
        &mut self,
        state: XenbusState,
        mut body: impl FnMut(&mut Transaction<'_>, &str) -> io::Result<bool>,
    ) -> Result<Switched, Error> {
        let (dir, own) = (self.config.dir.clone(), self.written);
        let switched = self.store.transaction(|transaction| {
            let found = read_state(transaction, &dir)?.unwrap_or(XenbusState::Unknown);
            let replaces = found == own || state == XenbusState::Closed;
            if found != state && !replaces || found == XenbusState::Unknown {
                return Ok(Switched::Refused(found));
            }
            if found == state && found != own {
                return Ok(Switched::Written);
            }
            if !body(transaction, &dir)? {
                return Ok(Switched::Withdrawn);
            }
            write(transaction, &dir, "state", state.number())?;
            Ok(Switched::Written)
        });
        let switched = switched.during("writing the state")?;
        if switched == Switched::Written {
            self.written = state;
        }
        Ok(switched)
    }

    /// Handles a failure: closes the connection, or schedules another attempt.
    fn fail(&mut self, error: &Error) -> Result<Next, Error> {
        let connected = read(&mut self.store, &self.config.dir, "sectors")?.is_some();
        let failure = error.failure(connected);
        let action = self.state.step(BackEvent::Failed(failure));
        self.report_failure(error)?;
        match action.next_state() {
            Some(next) => self.enter(next),
            None => {
                if action == BackAction::Retry {
                    let delay = Duration::from_millis(self.retries.next_delay().into());
                    self.retry_at = Some(Instant::now() + delay);
                }
                Ok(Next::Wait)
            }
        }
    }

    /// Writes a failure to the log and to xenstore, if it is a new one.
    fn report_failure(&mut self, error: &Error) -> Result<(), Error> {
        let text = error.to_string();
        if self.reported.as_ref() != Some(&text) {
            if self.messages.take(self.age_ms()).is_ok() {
                api::message!("{}: {text}", self.name());
            }
            let node = format!("error/{}/error", self.config.dir);
            let written = self.store.write(&node, &text);
            written.during("writing the error")?;
            self.reported = Some(text);
        }
        Ok(())
    }

    fn forget_failures(&mut self) -> Result<(), Error> {
        self.retries = RETRIES;
        if self.reported.take().is_some() {
            let node = format!("error/{}/error", self.config.dir);
            self.store.remove(&node).during("removing the error")?;
        }
        Ok(())
    }

    fn serve_control(&mut self) {
        if let Some(client) = self.control.accept() {
            client.answer(|command| self.command(command));
        }
    }

    fn command(&mut self, command: DiskCommand) -> Result<DiskAnswer, String> {
        match command {
            DiskCommand::Stats => {
                let is_flushed = self.flush_drained().map_err(|error| error.to_string())?;
                let mut status = self.status();
                status.paused &= is_flushed;
                Ok(DiskAnswer::Status(Box::new(status)))
            }
            DiskCommand::Pause => {
                self.inflight.set_paused(true);
                Ok(self.set_paused(true))
            }
            DiskCommand::Drain => {
                let answer = self.set_paused(true);
                self.drain_end = Some(Instant::now() + self.config.drain_time);
                Ok(answer)
            }
            DiskCommand::Resume => {
                self.inflight.set_paused(false);
                Ok(self.set_paused(false))
            }
            DiskCommand::SetQuota(quota) => Ok(self.set_quota(quota)),
            DiskCommand::Resize { size } => match self.resize(size) {
                Ok(sectors) => Ok(DiskAnswer::Resized { sectors }),
                Err(error) => Err(error.to_string()),
            },
        }
    }

    /// Has the server of the image, if it belongs to that, write its caches when the disk is
    /// drained. Returns `true` if it has.
    fn flush_drained(&mut self) -> engine::Result<bool> {
        let has_caches = self.engine.shared_memory().is_some() && !self.engine.info().read_only;
        if self.drain_end.is_none() || !has_caches {
            return Ok(true);
        }
        let is_quiet = self.queues.iter().all(|queue| queue.is_paused());
        Ok(is_quiet && self.drain_flush.poll(&*self.engine)?)
    }

    fn status(&self) -> DiskStatus {
        DiskStatus {
            pid: self.config.pid,
            sectors: self.disk.sectors(),
            block_size: self.disk.block_size(),
            paused: self.paused,
            stays_paused: self.inflight.is_paused(),
            quota: self.quota,
            queues: self.queues.iter().map(|queue| queue.status()).collect(),
            counters: self.stats.counters(),
        }
    }

    fn set_quota(&mut self, quota: Quota) -> DiskAnswer {
        self.quota = quota;
        let share = quota.share(self.queues.len());
        self.queues.iter().for_each(|queue| queue.set_quota(share));
        DiskAnswer::Quota(quota)
    }

    /// Sets whether requests are taken from the rings, and ends a drain.
    fn set_paused(&mut self, paused: bool) -> DiskAnswer {
        self.drain_end = None;
        self.drain_flush = DrainFlush::Due;
        self.paused = paused;
        for queue in &self.queues {
            queue.pause(paused);
        }
        DiskAnswer::Paused { paused }
    }

    /// Enlarges the image if there is a size, reads its size again, and tells the frontend.
    fn resize(&mut self, size: Option<u64>) -> Result<u64, Error> {
        let info = match size {
            Some(size) => self.engine.resize(size)?,
            None => self.engine.refresh()?,
        };
        self.disk.set_size(info.size);
        let sectors = self.disk.sectors();
        // An earlier call may have failed after it had set the size.
        if self.state == BackState::Connected && !self.draining {
            self.switch_with(XenbusState::Connected, |transaction, dir| {
                write(transaction, dir, "sectors", sectors)?;
                Ok(true)
            })?;
        }
        Ok(sectors)
    }
}
