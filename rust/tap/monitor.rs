// SPDX-License-Identifier: GPL-2.0-only

//! The privileged process of a disk, which does for the confined one what that cannot do.
//!
//! A disk has two processes, as `sshd` has for a connection. The *monitor* is root. It is the
//! process that is started, and that `rblkd` and `xentop` know. It never sees data of the guest.
//! The *server*, its child, serves the guest, and is [confined](crate::confine). When one of them
//! ends, so does the other.
//!
//! The server asks the monitor for three things only: access to its nodes in xenstore, through a
//! [`Proxy`], connections to the server of its image, and a larger image.

use crate::handover::Handover;
use blkif::state::XenbusState;
use engine::Connect;
use engine::Errno;
use engine::Protocol;
use engine::Server;
use serde::Deserialize;
use serde::Serialize;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;
use xen_user::proxy::Permissions;
use xen_user::proxy::Proxy;
use xen_user::xenstore::Xenstore;

/// Time for which a request of a server that has ended is waited for.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);

/// The message with which the server gets its connection to xenstore.
#[derive(Deserialize, Serialize)]
struct Start;

/// A request of the server.
#[derive(Deserialize, Serialize)]
enum Call {
    /// Asks for a connection to the server of the image.
    Connect { is_vhost: bool, is_dirty: bool },
    /// Asks the server of the image to enlarge it.
    Resize { size: u64 },
}

/// An error of an engine.
#[derive(Deserialize, Serialize)]
struct Failure {
    errno: i32,
    cause: String,
    remedy: String,
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Self {
        Self {
            errno: error.errno().raw_os_error(),
            cause: error.cause().to_owned(),
            remedy: error.remedy().to_owned(),
        }
    }
}

impl From<Failure> for engine::Error {
    fn from(failure: Failure) -> Self {
        let errno = Errno::from_raw_os_error(failure.errno);
        Self::new(errno, failure.cause, failure.remedy)
    }
}

/// The end of a server.
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// A request of the server is still carried out, such as a check of the image.
    pub is_busy: bool,
}

/// Starts the server with `command`, and serves it until it has ended.
///
/// `connects` is called before the server writes that the guest of the device `dir` is connected.
/// If that fails, the server ends.
pub fn run(
    mut command: Command,
    store: Xenstore,
    permissions: Permissions,
    image: Option<Arc<Server>>,
    dir: &str,
    connects: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<Ended> {
    let (handover, other) = Handover::pair()?;
    let (proxy, client) = Proxy::new(store, permissions)?;
    let connected = XenbusState::Connected.number().to_string();
    let proxy = proxy.before_write(&format!("{dir}/state"), &connected, connects);
    let mut child = command.stdin(Stdio::from(other)).spawn()?;
    // The command has a copy of the other end.
    drop(command);
    handover.send(&Start, Some(client.as_fd()))?;
    drop(client);
    let calls = thread::Builder::new().name("calls".to_owned());
    let (ended, calls_ended) = channel::<()>();
    calls.spawn(move || {
        answer_calls(&handover, image.as_deref());
        drop((image, ended));
    })?;
    let proxied = proxy.run();
    let status = child.wait()?;
    let calls_ended = calls_ended.recv_timeout(CALL_TIMEOUT);
    proxied?;
    Ok(Ended {
        status,
        is_busy: calls_ended == Err(RecvTimeoutError::Timeout),
    })
}

/// Answers the requests of the server until it has ended.
fn answer_calls(handover: &Handover, image: Option<&Server>) {
    while let Ok(Some((call, _))) = handover.receive::<Call>() {
        let answer = match image {
            Some(image) => carry_out(&call, image),
            None => Err(engine::Error::new(
                Errno::OPNOTSUPP,
                "the image has no server",
                "this is an error of the program, report it",
            )),
        };
        let (reply, fd) = match answer {
            Ok(fd) => (Ok(()), fd),
            Err(error) => (Err(Failure::from(error)), None),
        };
        // A server that has ended is noticed by `receive`.
        let _ = handover.send(&reply, fd.as_ref().map(AsFd::as_fd));
    }
}

fn carry_out(call: &Call, image: &Server) -> engine::Result<Option<OwnedFd>> {
    match *call {
        Call::Connect { is_vhost, is_dirty } => {
            let protocol = if is_vhost {
                Protocol::VhostUser
            } else {
                Protocol::Nbd
            };
            image.connect(protocol, is_dirty).map(Some)
        }
        Call::Resize { size } => image.resize(size).map(|()| None),
    }
}

/// The monitor, as the server sees it.
pub struct Monitor(Mutex<Handover>);

impl Monitor {
    /// Returns the monitor of this process, and the connection to xenstore that it gives.
    pub fn attach() -> io::Result<(Self, Xenstore)> {
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        Self::from_socket(socket)
    }

    fn from_socket(socket: OwnedFd) -> io::Result<(Self, Xenstore)> {
        let handover = Handover::new(socket);
        match handover.receive::<Start>()? {
            Some((Start, Some(store))) => {
                Ok((Self(Mutex::new(handover)), Xenstore::from_fd(store)))
            }
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn call(&self, call: &Call) -> io::Result<(Result<(), Failure>, Option<OwnedFd>)> {
        let handover = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        handover.send(call, None)?;
        let reply = handover.receive()?;
        reply.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl Connect for Monitor {
    fn connect(&self, protocol: Protocol, is_dirty: bool) -> engine::Result<OwnedFd> {
        let is_vhost = protocol == Protocol::VhostUser;
        match self.call(&Call::Connect { is_vhost, is_dirty }) {
            Ok((Ok(()), Some(fd))) => Ok(fd),
            Ok((Err(failure), _)) => Err(failure.into()),
            Ok((Ok(()), None)) | Err(_) => Err(ended()),
        }
    }

    fn resize(&self, size: u64) -> engine::Result<()> {
        match self.call(&Call::Resize { size }) {
            Ok((Ok(()), _)) => Ok(()),
            Ok((Err(failure), _)) => Err(failure.into()),
            Err(_) => Err(ended()),
        }
    }

    fn stop(&self) -> engine::Result<()> {
        // The monitor does it when this process has ended.
        Ok(())
    }
}

fn ended() -> engine::Error {
    engine::Error::new(
        Errno::NOTCONN,
        "the monitor of the disk has ended",
        "see the messages of rblktap",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read;
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::os::unix::net::UnixStream;

    /// Returns both ends of a handover, after the message of the start.
    fn attach() -> (Handover, Monitor) {
        let (handover, other) = Handover::pair().unwrap();
        let (store, _) = UnixStream::pair().unwrap();
        handover.send(&Start, Some(store.as_fd())).unwrap();
        let (monitor, _) = Monitor::from_socket(other).unwrap();
        (handover, monitor)
    }

    #[test]
    fn the_server_gets_connections_and_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let uri = format!("nbd+unix:///?socket={}", path.display());
        let image = Server::start(&uri.parse().unwrap(), &engine::Options::default());
        let image = image.unwrap().unwrap();
        let (handover, monitor) = attach();
        let thread = thread::spawn(move || answer_calls(&handover, Some(&image)));
        let mut stream = UnixStream::from(monitor.connect(Protocol::Nbd, false).unwrap());
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.write_all(b"data").unwrap();
        let mut data = [0; 4];
        stream.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"data");
        fs::remove_file(&path).unwrap();
        let error = monitor.connect(Protocol::Nbd, true).unwrap_err();
        assert_eq!(error.errno(), Errno::NOENT);
        assert!(error.cause().starts_with("connecting to"), "{error}");
        let error = monitor.resize(1 << 20).unwrap_err();
        assert_eq!(error.errno(), Errno::OPNOTSUPP);
        let error = monitor.connect(Protocol::VhostUser, false).unwrap_err();
        assert_eq!(error.errno(), Errno::OPNOTSUPP);
        drop(monitor);
        thread.join().unwrap();
    }

    #[test]
    fn a_monitor_that_has_ended_is_an_error() {
        let (handover, monitor) = attach();
        drop(handover);
        let error = monitor.connect(Protocol::Nbd, false).unwrap_err();
        assert_eq!(error.errno(), Errno::NOTCONN);
    }
}
