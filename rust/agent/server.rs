// SPDX-License-Identifier: GPL-2.0-only

//! The socket for `rblk`.
//!
//! Each connection has a thread of its own, which reads the records of disks and calls their
//! processes. A process that does not answer delays only the clients that wait for it. What changes
//! a disk is sent to the [`Supervisor`](crate::supervisor::Supervisor).

use crate::disk::Outcome;
use crate::host::Host;
use crate::supervisor::{Command, Commands};
use crate::threads::in_threads;
use api::agent::{EVENTS_WAIT, INTERFACE};
use api::socket;
use api::{AgentCall, DiskCommand, DiskEntry, DiskId, DiskStatus, Failure, FailureKind};
use api::{Record, RunDir};
use rustix::net::sockopt::socket_peercred;
use serde_json::{json, Value};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The greatest number of clients at the same time. The last ones have to be root.
const MAX_CLIENTS: usize = 32;
const MAX_OTHER_CLIENTS: usize = 24;

/// Limit for the next request of a client.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Limit for the answer of a process.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Limit for a process to resize its image.
const RESIZE_TIMEOUT: Duration = Duration::from_secs(50);

/// Limit for requests in flight when a disk is paused.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Limit for a new process to open its image. A client waits for this and [`PAUSE_TIMEOUT`].
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Time between two looks at a process.
const POLL: Duration = Duration::from_millis(50);

/// Answers clients.
#[derive(Clone)]
pub struct Server {
    run: RunDir,
    commands: Commands,
    host: Host,
    /// One reference for each client, and one of the thread that accepts them.
    clients: Arc<()>,
    /// The disks that a client pauses or replaces the process of.
    changing: Arc<Mutex<BTreeSet<DiskId>>>,
}

/// A disk that a client pauses or replaces the process of. No other client does.
struct Changing<'a>(&'a Mutex<BTreeSet<DiskId>>, DiskId);

impl<'a> Changing<'a> {
    fn new(disks: &'a Mutex<BTreeSet<DiskId>>, disk: DiskId) -> Result<Self, Failure> {
        if lock(disks).insert(disk) {
            return Ok(Self(disks, disk));
        }
        let cause = format!("another command is changing disk {disk}");
        Err(Failure::new(FailureKind::Refused, cause, "try again later"))
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        lock(self.0).remove(&self.1);
    }
}

fn lock(disks: &Mutex<BTreeSet<DiskId>>) -> MutexGuard<'_, BTreeSet<DiskId>> {
    // A set is whole after each statement.
    disks.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Starts a thread that answers the clients of a socket.
    pub fn start(
        listener: UnixListener,
        run: RunDir,
        commands: Commands,
        host: Host,
    ) -> io::Result<()> {
        let clients = Arc::new(());
        let server = Self {
            run,
            commands,
            host,
            clients,
            changing: Arc::default(),
        };
        thread::Builder::new()
            .name("accept".to_owned())
            .spawn(move || server.accept(&listener))?;
        Ok(())
    }

    /// Creates the socket, to which only root may connect until [`allow_group`].
    pub fn bind(run: &RunDir) -> io::Result<UnixListener> {
        let path = run.agent_socket();
        // That of an earlier rblkd: there is no other one, see the lock of the supervisor.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    fn accept(&self, listener: &UnixListener) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => self.start_client(stream),
                Err(error) => {
                    api::message!("the socket: {error}; it is tried again");
                    thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }

    /// Starts a thread for a client. One too many is disconnected.
    fn start_client(&self, stream: UnixStream) {
        let is_root = is_root(&stream);
        let limit = if is_root {
            MAX_CLIENTS
        } else {
            MAX_OTHER_CLIENTS
        };
        if Arc::strong_count(&self.clients) > limit {
            return;
        }
        let client = self.clone();
        let thread = thread::Builder::new().name("client".to_owned());
        let started = thread.spawn(move || {
            // A client that is silent or gone is disconnected.
            let _ = stream.set_read_timeout(Some(CLIENT_TIMEOUT));
            let _ = stream.set_write_timeout(Some(CLIENT_TIMEOUT));
            let _ = socket::serve(stream, |call| client.handle_from(is_root, call));
        });
        if let Err(error) = started {
            api::message!("no thread for a client: {error}");
        }
    }

    /// Answers a client that is root, or one that may make only calls that change nothing.
    fn handle_from(&self, is_root: bool, call: AgentCall) -> Result<Value, Failure> {
        if !is_root && !call.only_reads() {
            let cause = "only root may change disks";
            return Err(Failure::new(
                FailureKind::InvalidCall,
                cause,
                "run this as root",
            ));
        }
        self.handle(call)
    }

    fn handle(&self, call: AgentCall) -> Result<Value, Failure> {
        match call {
            AgentCall::HostStatus => Ok(json!(self.host.status())),
            AgentCall::Events { after, wait } => {
                let wait = if wait { EVENTS_WAIT } else { Duration::ZERO };
                Ok(json!(self.host.journal.after(after, wait)))
            }
            AgentCall::Interface => Ok(json!(INTERFACE)),
            AgentCall::List => Ok(json!(self.list()?)),
            AgentCall::Stats { disk } => Ok(json!(self.status(disk)?)),
            AgentCall::Pause { disk } => self.pause(disk),
            AgentCall::Resume { disk } => self.send(disk, DiskCommand::Resume),
            AgentCall::Resize { disk, size } => self.resize(disk, size),
            AgentCall::Retarget { disk, image } => self.replace(disk, Some(image)),
            AgentCall::Restart { disk } => self.replace(disk, None),
        }
    }

    /// Returns all disks. Several processes are asked at a time: some may not answer.
    fn list(&self) -> Result<Vec<DiskEntry>, Failure> {
        let records = self
            .run
            .records()
            .map_err(|error| self.unreadable(&error))?;
        Ok(in_threads(&records, |record| self.entry(record)))
    }

    fn entry(&self, record: &Record) -> DiskEntry {
        let has_process = record.phase.pid().is_some();
        let status = has_process.then(|| self.status(record.disk).ok());
        DiskEntry {
            record: record.clone(),
            status: status.flatten(),
        }
    }

    fn unreadable(&self, error: &io::Error) -> Failure {
        let cause = format!("the records in {}: {error}", self.run.path().display());
        Failure::new(FailureKind::Failed, cause, "check the file system")
    }

    fn record(&self, disk: DiskId) -> Result<Record, Failure> {
        let record = self.run.read_record(disk);
        record
            .map_err(|error| self.unreadable(&error))?
            .ok_or_else(|| {
                let cause = format!("there is no disk {disk}");
                Failure::new(FailureKind::NoSuchDisk, cause, "see rblk disk list")
            })
    }

    fn status(&self, disk: DiskId) -> Result<DiskStatus, Failure> {
        self.record(disk)?;
        let path = self.run.control_socket(disk);
        socket::command(&path, DiskCommand::Stats, ANSWER_TIMEOUT)
    }

    fn send(&self, disk: DiskId, command: DiskCommand) -> Result<Value, Failure> {
        self.record(disk)?;
        socket::command(&self.run.control_socket(disk), command, ANSWER_TIMEOUT)
    }

    fn resize(&self, disk: DiskId, size: Option<u64>) -> Result<Value, Failure> {
        self.record(disk)?;
        let command = DiskCommand::Resize { size };
        socket::command(&self.run.control_socket(disk), command, RESIZE_TIMEOUT)
    }

    /// Pauses or drains a disk and waits until no request is in flight. If that fails, or takes too
    /// long, a disk that was not paused before is resumed.
    fn quiesce(&self, disk: DiskId, command: DiskCommand) -> Result<(), Failure> {
        let was_paused = self.status(disk)?.paused;
        let result = self.await_quiet(disk, command);
        if result.is_err() && !was_paused {
            // The first error is the one to report. A drain ends by itself.
            let _ = self.send(disk, DiskCommand::Resume);
        }
        result
    }

    fn await_quiet(&self, disk: DiskId, command: DiskCommand) -> Result<(), Failure> {
        self.send(disk, command)?;
        let deadline = Instant::now() + PAUSE_TIMEOUT;
        while !is_quiet(&self.status(disk)?) {
            if Instant::now() >= deadline {
                let seconds = PAUSE_TIMEOUT.as_secs();
                let cause = format!("requests are still in flight after {seconds} seconds");
                return Err(Failure::new(
                    FailureKind::Refused,
                    cause,
                    "check the storage of the image",
                ));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    fn pause(&self, disk: DiskId) -> Result<Value, Failure> {
        let _changing = Changing::new(&self.changing, disk)?;
        self.quiesce(disk, DiskCommand::Pause)?;
        Ok(Value::Null)
    }

    /// Replaces the process of a disk, which is drained before. Returns the new process.
    ///
    /// A disk that was paused stays paused, unless it gets another image.
    fn replace(&self, disk: DiskId, image: Option<String>) -> Result<Value, Failure> {
        self.check_served(disk)?;
        let _changing = Changing::new(&self.changing, disk)?;
        let has_new_image = image.is_some();
        self.quiesce(disk, DiskCommand::Drain)?;
        let (outcome, outcomes) = channel();
        let command = Command::Replace {
            disk,
            image,
            outcome,
        };
        self.tell(command)?;
        let pid = await_process(disk, &outcomes)?;
        if has_new_image {
            // It connects to the guest before it answers.
            let path = self.run.control_socket(disk);
            socket::command::<Value>(&path, DiskCommand::Resume, START_TIMEOUT)?;
        }
        Ok(json!(pid))
    }

    fn check_served(&self, disk: DiskId) -> Result<(), Failure> {
        if self.record(disk)?.phase.is_running() {
            return Ok(());
        }
        let cause = format!("no process serves disk {disk}");
        Err(Failure::new(
            FailureKind::Refused,
            cause,
            "see rblk disk list",
        ))
    }

    fn tell(&self, command: Command) -> Result<(), Failure> {
        self.commands.send(command).map_err(|error| {
            let cause = format!("rblkd is ending: {error}");
            Failure::new(FailureKind::NoAnswer, cause, "try again")
        })
    }
}

/// Waits until a new process has opened the image. Returns its number.
fn await_process(disk: DiskId, outcomes: &Receiver<Outcome>) -> Result<u32, Failure> {
    let seconds = START_TIMEOUT.as_secs();
    match outcomes.recv_timeout(START_TIMEOUT) {
        Ok(Ok(pid)) => Ok(pid),
        Ok(Err(reason)) => {
            let remedy = "the disk is served as before";
            Err(Failure::new(FailureKind::Refused, reason, remedy))
        }
        Err(RecvTimeoutError::Disconnected) => {
            let cause = format!("disk {disk} has been detached");
            Err(Failure::new(
                FailureKind::NoSuchDisk,
                cause,
                "see rblk disk list",
            ))
        }
        Err(RecvTimeoutError::Timeout) => Err(Failure::new(
            FailureKind::NoAnswer,
            format!("the new process of disk {disk} has not opened the image in {seconds} seconds"),
            "it serves the disk when it has; see rblk disk list",
        )),
    }
}

/// Lets the members of a group connect to the socket, or only root.
///
/// The kernel checks the groups of a client when it connects; what it may call is another matter.
pub fn allow_group(run: &RunDir, group: Option<u32>) -> io::Result<()> {
    let path = run.agent_socket();
    std::os::unix::fs::chown(&path, None, Some(group.unwrap_or(0)))?;
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))
}

/// Returns `true` if a client is root. One that cannot be asked is not.
fn is_root(stream: &UnixStream) -> bool {
    socket_peercred(stream).is_ok_and(|peer| peer.uid.is_root())
}

/// Returns `true` if a disk is paused and has no request in flight.
fn is_quiet(status: &DiskStatus) -> bool {
    status.paused && status.queues.iter().all(|queue| queue.paused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Startup;
    use crate::options::tests::options;
    use crate::process::tests::PROGRAM;
    use crate::process::Process;
    use crate::supervisor::Supervisor;
    use api::{Counters, Phase, QueueStatus, Quota};
    use std::io::{BufRead, BufReader, Write};
    use xen_user::fake;
    use xen_user::xenstore::Nodes;
    use xen_user::xenstore::Xenstore;

    const DISK: DiskId = DiskId {
        domid: 5,
        devid: 51712,
    };

    const QUOTA: Quota = Quota {
        pages: 8,
        requests: 4,
    };

    fn host_state() -> Host {
        Startup::new().finish(Arc::default(), Arc::default())
    }

    fn serve(run: &RunDir, commands: Commands, host: Host) {
        let listener = Server::bind(run).unwrap();
        Server::start(listener, run.clone(), commands, host).unwrap();
    }

    fn wait_until(what: &str, mut is_done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_done() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_disk_is_quiet_when_all_queues_are() {
        let mut status = DiskStatus {
            pid: 1,
            sectors: 8,
            block_size: 512,
            paused: true,
            stays_paused: true,
            quota: QUOTA,
            queues: vec![
                QueueStatus {
                    in_flight: 0,
                    oldest: None,
                    paused: true,
                };
                2
            ],
            counters: Counters::default(),
        };
        assert!(is_quiet(&status));
        status.queues[1].paused = false;
        assert!(!is_quiet(&status));
    }

    /// Plays the control socket of [`DISK`], which is that of the recorded process. One that fails
    /// does not answer.
    fn serve_control(run: &RunDir) {
        let listener = UnixListener::bind(run.control_socket(DISK)).unwrap();
        let run = run.clone();
        thread::spawn(move || {
            let mut paused = false;
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                match serde_json::from_str(&line).unwrap() {
                    DiskCommand::Pause | DiskCommand::Drain => paused = true,
                    DiskCommand::Resume => paused = false,
                    DiskCommand::Stats | DiskCommand::Resize { .. } | DiskCommand::SetQuota(_) => {}
                }
                let record = run.read_record(DISK).unwrap().unwrap();
                let pid = match record.phase.pid() {
                    Some(pid) if !record.image.starts_with("fail:") => pid,
                    _ => continue,
                };
                let answer = json!({
                    "pid": pid, "sectors": 8, "block_size": 512, "paused": paused,
                    "queues": [{"in_flight": 0, "oldest": null, "paused": paused}],
                    "quota": QUOTA, "counters": {},
                });
                writeln!(stream, "{answer}").unwrap();
            }
        });
    }

    /// Starts a supervisor and a server for one disk. Returns its host, and a connection to
    /// xenstore.
    fn start(run: &RunDir) -> (fake::Host, Xenstore) {
        let host = fake::Host::new();
        let mut store = host.xenstore().unwrap();
        store.write("backend/vbd3/5/51712/params", "serve").unwrap();
        store.write("backend/vbd3/5/51712/state", "1").unwrap();
        let connection = host.xenstore().unwrap();
        let (supervisor, commands) =
            Supervisor::new(connection, run.clone(), PROGRAM.into(), options(&[])).unwrap();
        thread::spawn(move || supervisor.run());
        serve(run, commands, host_state());
        (host, store)
    }

    /// Plays the processes of [`DISK`] that open its image.
    fn open_images(run: &RunDir, mut store: Xenstore) {
        let run = run.clone();
        thread::spawn(move || {
            while let Ok(record) = run.read_record(DISK) {
                let record = record.filter(|record| !record.image.starts_with("fail:"));
                if let Some(Phase::Opening { pid, .. }) = record.map(|record| record.phase) {
                    let node = "backend/vbd3/5/51712/kthread-pid";
                    store.write(node, &pid.to_string()).unwrap();
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
    }

    #[test]
    fn a_process_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let (host, mut store) = start(&run);
        open_images(&run, host.xenstore().unwrap());
        let pid = || {
            let phase = run.read_record(DISK).unwrap()?.phase;
            phase.pid().filter(|_| phase.is_running())
        };
        wait_until("no process", || pid().is_some());
        store.write("backend/vbd3/5/51712/state", "4").unwrap();
        serve_control(&run);
        let disk = DISK;
        let call = |call: &AgentCall| -> Result<Value, Failure> {
            socket::call(&run.agent_socket(), call, Duration::from_secs(60))
        };
        assert_eq!(call(&AgentCall::Pause { disk }), Ok(Value::Null));
        assert_eq!(call(&AgentCall::Stats { disk }).unwrap()["paused"], true);
        call(&AgentCall::Resume { disk }).unwrap();
        let first = pid();
        let image = "serve b".to_owned();
        let second = call(&AgentCall::Retarget { disk, image }).unwrap();
        assert_eq!(second.as_u64(), pid().map(u64::from));
        assert_ne!(pid(), first);
        let image = "fail:no".to_owned();
        let failure = call(&AgentCall::Retarget { disk, image }).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Refused);
        assert_eq!(failure.text.cause, "no");
        wait_until("no process", || pid().is_some());
        let record = run.read_record(DISK).unwrap().unwrap();
        assert_eq!(record.image, "serve b");
        store.remove("backend/vbd3/5").unwrap();
        let (pid, start_time) = record.phase.process().unwrap();
        Process::adopt(pid, start_time).unwrap().kill();
    }

    /// A server without disks, and its supervisor.
    fn idle_server(run: &RunDir) -> (Server, Supervisor) {
        let store = fake::Host::new().xenstore().unwrap();
        let (supervisor, commands) =
            Supervisor::new(store, run.clone(), PROGRAM.into(), options(&[])).unwrap();
        let server = Server {
            run: run.clone(),
            commands,
            host: host_state(),
            clients: Arc::default(),
            changing: Arc::default(),
        };
        (server, supervisor)
    }

    #[test]
    fn a_disk_that_cannot_be_drained_is_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let (server, _supervisor) = idle_server(&run);
        let phase = Phase::Running {
            pid: 1,
            start_time: 1,
        };
        run.write_record(&Record {
            disk: DISK,
            name: "xvda".to_owned(),
            domain: None,
            image: "aio:/a".to_owned(),
            restarts: 0,
            replaced: None,
            phase,
        })
        .unwrap();
        let listener = UnixListener::bind(run.control_socket(DISK)).unwrap();
        let commands = thread::spawn(move || {
            let mut commands: Vec<DiskCommand> = Vec::new();
            // It does not answer the question whether it is quiet.
            for answers in [true, true, false, true] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                commands.push(serde_json::from_str(&line).unwrap());
                let answer = json!({
                    "pid": 1, "sectors": 8, "block_size": 512, "paused": false,
                    "queues": [], "quota": QUOTA, "counters": {},
                });
                if answers {
                    writeln!(stream, "{answer}").unwrap();
                }
            }
            commands
        });
        let failure = server
            .handle(AgentCall::Restart { disk: DISK })
            .unwrap_err();
        assert_eq!(failure.kind, FailureKind::NoAnswer);
        let (stats, resume) = (DiskCommand::Stats, DiskCommand::Resume);
        assert_eq!(
            commands.join().unwrap(),
            [stats, DiskCommand::Drain, stats, resume]
        );
    }

    #[test]
    fn one_command_changes_a_disk_at_a_time() {
        let disks = Mutex::default();
        let changing = Changing::new(&disks, DISK).unwrap();
        assert!(Changing::new(&disks, DiskId { domid: 6, ..DISK }).is_ok());
        let failure = Changing::new(&disks, DISK).err().unwrap();
        assert_eq!(failure.kind, FailureKind::Refused);
        drop(changing);
        assert!(Changing::new(&disks, DISK).is_ok());
    }

    #[test]
    fn clients_are_answered() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let (host, _store) = start(&run);
        open_images(&run, host.xenstore().unwrap());
        let call = |call: &AgentCall| -> Result<Vec<DiskEntry>, Failure> {
            socket::call(&run.agent_socket(), call, Duration::from_secs(60))
        };
        let list = || call(&AgentCall::List).unwrap();
        wait_until("no process", || {
            list()
                .first()
                .is_some_and(|entry| entry.record.phase.is_running())
        });
        assert_eq!(list()[0].record.name, "xvda");
        assert_eq!(list()[0].status, None);
        let failure = |disk| call(&AgentCall::Restart { disk }).unwrap_err().kind;
        // The script has no control socket.
        assert_eq!(failure(DISK), FailureKind::NoAnswer);
        assert_eq!(
            failure(DiskId { domid: 6, ..DISK }),
            FailureKind::NoSuchDisk
        );
        let (pid, start_time) = list()[0].record.phase.process().unwrap();
        Process::adopt(pid, start_time).unwrap().kill();
    }

    #[test]
    fn a_group_may_only_read() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let (server, supervisor) = idle_server(&run);
        let (host, commands) = (server.host.clone(), server.commands.clone());
        host.journal
            .add(None, api::EventKind::Storage, "x".to_owned());
        let failure = server
            .handle_from(false, AgentCall::Restart { disk: DISK })
            .unwrap_err();
        assert_eq!(failure.kind, FailureKind::InvalidCall);
        let (after, wait) = (0, true);
        let events = server.handle_from(false, AgentCall::Events { after, wait });
        assert_eq!(events.unwrap()[0]["text"], "x");
        let status = server.handle_from(false, AgentCall::HostStatus).unwrap();
        assert_eq!(status["pid"], std::process::id());
        let interface = server.handle_from(false, AgentCall::Interface).unwrap();
        assert!(interface.as_str().unwrap().contains("interface rblkd"));
        serve(&run, commands, host);
        let mode = || {
            fs::metadata(run.agent_socket())
                .unwrap()
                .permissions()
                .mode()
                & 0o777
        };
        assert_eq!(mode(), 0o600);
        allow_group(&run, Some(0)).unwrap();
        assert_eq!(mode(), 0o660);
        allow_group(&run, None).unwrap();
        assert_eq!(mode(), 0o600);
        drop(supervisor);
    }
}
