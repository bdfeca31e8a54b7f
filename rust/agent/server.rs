// SPDX-License-Identifier: GPL-2.0-only

//! The socket for `rblk`.
//!
//! Each connection has a thread of its own, which reads the records of disks and calls their
//! processes. A process that does not answer delays only the client that asks for it. What changes
//! a disk is sent to the [`Supervisor`](crate::supervisor::Supervisor).

use crate::host::Host;
use crate::process::Process;
use crate::supervisor::{Command, Commands};
use api::agent::{EVENTS_WAIT, INTERFACE};
use api::socket;
use api::{AgentCall, DiskCommand, DiskEntry, DiskId, DiskStatus, Failure, FailureKind};
use api::{Record, RunDir};
use rustix::net::sockopt::socket_peercred;
use serde_json::{json, Value};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::sync::Arc;
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

/// Limit for a new process to serve a disk.
const START_TIMEOUT: Duration = Duration::from_secs(15);

/// Time between two looks at a process.
const POLL: Duration = Duration::from_millis(50);

/// Answers clients.
#[derive(Clone)]
pub struct Server {
    run: RunDir,
    commands: Commands,
    host: Host,
    /// One reference for each client, and two of the thread that accepts them.
    clients: Arc<()>,
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
                    eprintln!("the socket: {error}; it is tried again");
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
            eprintln!("no thread for a client: {error}");
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
            AgentCall::Pause { disk } => self.quiesce(disk, DiskCommand::Pause),
            AgentCall::Resume { disk } => self.send(disk, DiskCommand::Resume),
            AgentCall::Resize { disk, size } => self.resize(disk, size),
            AgentCall::Retarget { disk, image } => self.replace(disk, Some(image)),
            AgentCall::Restart { disk } => self.replace(disk, None),
        }
    }

    fn list(&self) -> Result<Vec<DiskEntry>, Failure> {
        let records = self
            .run
            .records()
            .map_err(|error| self.unreadable(&error))?;
        let entries = records.into_iter().map(|record| DiskEntry {
            status: record
                .phase
                .pid()
                .and_then(|_| self.status(record.disk).ok()),
            record,
        });
        Ok(entries.collect())
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

    /// Pauses or drains a disk and waits until no request is in flight. If that takes too long it
    /// is resumed.
    fn quiesce(&self, disk: DiskId, command: DiskCommand) -> Result<Value, Failure> {
        self.send(disk, command)?;
        let deadline = Instant::now() + PAUSE_TIMEOUT;
        while !is_quiet(&self.status(disk)?) {
            if Instant::now() >= deadline {
                self.send(disk, DiskCommand::Resume)?;
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
        Ok(Value::Null)
    }

    /// Replaces the process of a disk, which is drained before. Returns the new process.
    ///
    /// A disk that was paused stays paused, unless it gets another image.
    fn replace(&self, disk: DiskId, image: Option<String>) -> Result<Value, Failure> {
        let old = self.running(disk)?;
        let has_new_image = image.is_some();
        self.quiesce(disk, DiskCommand::Drain)?;
        let (failed, failures) = channel();
        let command = Command::Replace {
            disk,
            image,
            failed,
        };
        self.tell(command)?;
        let pid = self.await_process(disk, &old, &failures)?;
        self.tell(Command::Confirm { disk })?;
        if has_new_image {
            self.send(disk, DiskCommand::Resume)?;
        }
        Ok(json!(pid))
    }

    fn running(&self, disk: DiskId) -> Result<Process, Failure> {
        let process = self.record(disk)?.phase.process();
        let process = process.and_then(|(pid, start_time)| Process::adopt(pid, start_time));
        process.ok_or_else(|| {
            let cause = format!("no process serves disk {disk}");
            Failure::new(FailureKind::Refused, cause, "see rblk disk list")
        })
    }

    fn tell(&self, command: Command) -> Result<(), Failure> {
        self.commands.send(command).map_err(|error| {
            let cause = format!("rblkd is ending: {error}");
            Failure::new(FailureKind::NoAnswer, cause, "try again")
        })
    }

    /// Waits until a process other than `old` answers. Returns its number.
    fn await_process(
        &self,
        disk: DiskId,
        old: &Process,
        failures: &Receiver<String>,
    ) -> Result<u32, Failure> {
        let deadline = Instant::now() + START_TIMEOUT;
        while Instant::now() < deadline {
            match failures.recv_timeout(POLL) {
                Ok(reason) => {
                    let remedy = "the disk is served as before";
                    return Err(Failure::new(FailureKind::Refused, reason, remedy));
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            match self.status(disk) {
                Ok(status) if status.pid != old.pid() => return Ok(status.pid),
                _ => {}
            }
        }
        let cause = format!("no new process serves disk {disk}");
        Err(Failure::new(
            FailureKind::NoAnswer,
            cause,
            "see rblk disk list",
        ))
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
    use crate::supervisor::Supervisor;
    use api::{Counters, QueueStatus, Quota};
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

    /// Starts a supervisor and a server for one disk. Returns a connection to its xenstore.
    fn start(run: &RunDir) -> Xenstore {
        let host = fake::Host::new();
        let mut store = host.xenstore().unwrap();
        store.write("backend/vbd3/5/51712/params", "serve").unwrap();
        store.write("backend/vbd3/5/51712/state", "1").unwrap();
        let connection = host.xenstore().unwrap();
        let (supervisor, commands) =
            Supervisor::new(connection, run.clone(), PROGRAM.into(), options(&[])).unwrap();
        thread::spawn(move || supervisor.run());
        serve(run, commands, host_state());
        store
    }

    #[test]
    fn a_process_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let mut store = start(&run);
        let pid = || run.read_record(DISK).unwrap()?.phase.pid();
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

    #[test]
    fn clients_are_answered() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let _store = start(&run);
        let call = |call: &AgentCall| -> Result<Vec<DiskEntry>, Failure> {
            socket::call(&run.agent_socket(), call, Duration::from_secs(60))
        };
        let list = || call(&AgentCall::List).unwrap();
        wait_until("no process", || {
            list()
                .first()
                .is_some_and(|entry| entry.record.phase.pid().is_some())
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
        let store = fake::Host::new().xenstore().unwrap();
        let (supervisor, commands) =
            Supervisor::new(store, run.clone(), PROGRAM.into(), options(&[])).unwrap();
        let host = host_state();
        host.journal
            .add(None, api::EventKind::Storage, "x".to_owned());
        let server = Server {
            run: run.clone(),
            commands: commands.clone(),
            host: host.clone(),
            clients: Arc::default(),
        };
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
