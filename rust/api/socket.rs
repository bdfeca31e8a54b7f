// SPDX-License-Identifier: GPL-2.0-only

//! Both ends of a connection.
//!
//! A client uses [`call`] or [`command`]. `rblkd` answers a connection with [`serve`], `rblktap`
//! with [`read_command`] and [`answer_command`].

use crate::agent::AgentCall;
use crate::disk::{DiskAnswer, DiskCommand};
use crate::failure::{Failure, FailureKind};
use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The greatest length in bytes of a line.
pub const MAX_LINE: u64 = 1 << 20;

/// The greatest number of characters of an error of `rblktap`.
const MAX_ERROR: usize = 1024;

/// A reply of `rblkd` on the wire.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Reply<T> {
    Failure(Failure),
    Success { parameters: T },
}

/// An answer of `rblktap` on the wire.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Answer<T> {
    Failure { error: String },
    Success(T),
}

/// Calls `rblkd` and waits for its reply for up to `timeout`.
pub fn call<R: DeserializeOwned>(
    socket: &Path,
    call: &AgentCall,
    timeout: Duration,
) -> Result<R, Failure> {
    match ask(socket, call, timeout)? {
        Reply::Success { parameters } => Ok(parameters),
        Reply::Failure(failure) => Err(failure),
    }
}

/// Sends a command to `rblktap` and waits for its answer for up to `timeout`.
pub fn command<R: DeserializeOwned>(
    socket: &Path,
    command: DiskCommand,
    timeout: Duration,
) -> Result<R, Failure> {
    match ask(socket, &command, timeout)? {
        Answer::Success(value) => Ok(value),
        Answer::Failure { error } => Err(Failure::new(
            FailureKind::Refused,
            printable(&error),
            "check the image, see rblk disk list",
        )),
    }
}

/// Returns the text of a process, which a guest may have taken over, without control characters.
fn printable(text: &str) -> String {
    let shown = text.chars().filter(|letter| !letter.is_control());
    shown.take(MAX_ERROR).collect()
}

fn ask<R: DeserializeOwned>(
    socket: &Path,
    request: &impl Serialize,
    timeout: Duration,
) -> Result<R, Failure> {
    let line = exchange(socket, &encode(request), timeout);
    let line = line.map_err(|error| no_answer(socket, &error))?;
    serde_json::from_str(&line).map_err(|error| {
        Failure::new(
            FailureKind::NoAnswer,
            format!("the reply from {} is not valid: {error}", socket.display()),
            "use the same version of rblk, rblkd and rblktap",
        )
    })
}

fn exchange(socket: &Path, line: &str, timeout: Duration) -> io::Result<String> {
    let deadline = Instant::now() + timeout;
    let mut stream = Timed {
        stream: connect(socket, timeout)?,
        deadline,
    };
    stream.write_all(line.as_bytes())?;
    match read_line(&mut BufReader::new(stream))? {
        Some(line) => Ok(line),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Connects to a socket. One whose queue is full is waited for.
fn connect(socket: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let flags = SocketFlags::CLOEXEC;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&fd, Timeout::Send, Some(timeout))?;
    rustix::net::connect(&fd, &address)?;
    Ok(fd.into())
}

/// A stream whose reads and writes have a common deadline: the other end may send byte by byte.
struct Timed {
    stream: UnixStream,
    deadline: Instant,
}

impl Timed {
    /// Returns the time that is left.
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(left),
        }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

fn no_answer(socket: &Path, error: &io::Error) -> Failure {
    let why = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => "nothing listens".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer in time".to_owned(),
        io::ErrorKind::UnexpectedEof => "the connection was closed".to_owned(),
        _ => error.to_string(),
    };
    Failure::new(
        FailureKind::NoAnswer,
        format!("{}: {why}", socket.display()),
        "check that rblkd runs, and that you are root",
    )
}

/// Reads a line. Returns `None` at the end of the stream; a line that is too long is an error.
fn read_line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    let len = reader.take(MAX_LINE).read_line(&mut line)?;
    match line.strip_suffix('\n') {
        Some(text) => Ok(Some(text.to_owned())),
        None if len == 0 => Ok(None),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Answers the calls of a connection until the client closes it.
///
/// Context: blocks while the client sends nothing, up to the read timeout of the stream.
pub fn serve<R: Serialize>(
    stream: UnixStream,
    mut handle: impl FnMut(AgentCall) -> Result<R, Failure>,
) -> io::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(line) = read_line(&mut reader)? {
        writer.write_all(answer(&line, &mut handle).as_bytes())?;
    }
    Ok(())
}

/// Reads the command of a client of `rblktap`. Returns [`None`] if it sends none; a line that is no
/// command is an error for [`answer_command`].
pub fn read_command(stream: &UnixStream) -> Option<Result<DiskCommand, String>> {
    let line = read_line(&mut BufReader::new(stream)).ok().flatten()?;
    let command = serde_json::from_str(&line);
    Some(command.map_err(|error| format!("the request is no command: {error}")))
}

/// Answers the command of a client of `rblktap`.
pub fn answer_command(mut stream: &UnixStream, answer: Result<DiskAnswer, String>) {
    let answer = match answer {
        Ok(answer) => Answer::Success(answer),
        Err(error) => Answer::Failure { error },
    };
    // A client that has left does not need it.
    let _ = stream.write_all(encode(&answer).as_bytes());
}

/// Returns the reply to a line, with its line end. A line that is no call gets an error.
fn answer<R: Serialize>(
    line: &str,
    handle: impl FnOnce(AgentCall) -> Result<R, Failure>,
) -> String {
    let result = match serde_json::from_str(line) {
        Ok(call) => handle(call),
        Err(error) => Err(Failure::new(
            FailureKind::InvalidCall,
            format!("the call is not valid: {error}"),
            "use the same version of rblk, rblkd and rblktap",
        )),
    };
    encode(&match result {
        Ok(parameters) => Reply::Success { parameters },
        Err(failure) => Reply::Failure(failure),
    })
}

/// Encodes a value as a line.
fn encode(value: &impl Serialize) -> String {
    // No type here has a map with keys that are not strings, which is all that could fail.
    let mut line = serde_json::to_string(value).unwrap_or_default();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    const WAIT: Duration = Duration::from_secs(10);

    fn handle(call: AgentCall) -> Result<u32, Failure> {
        match call {
            AgentCall::List => Ok(7),
            _ => Err(Failure::new(FailureKind::Refused, "cause", "remedy")),
        }
    }

    #[test]
    fn a_call_returns_the_result_or_the_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            for _ in 0..2 {
                serve(listener.accept().unwrap().0, handle).unwrap();
            }
        });
        assert_eq!(call(&path, &AgentCall::List, WAIT), Ok(7));
        let disk = "5/51712".parse().unwrap();
        let failure = call::<u32>(&path, &AgentCall::Restart { disk }, WAIT).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Refused);
        assert_eq!(failure.to_string(), "cause; remedy");
        server.join().unwrap();
    }

    #[test]
    fn a_command_returns_the_answer_or_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            for answer in ["{\"sectors\":8}\n", "{\"error\":\"no\"}\n", "x\n"] {
                let mut stream = listener.accept().unwrap().0;
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                assert_eq!(line, "{\"command\":\"resize\"}\n");
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let resize =
            || command::<serde_json::Value>(&path, DiskCommand::Resize { size: None }, WAIT);
        assert_eq!(resize().unwrap()["sectors"], 8);
        assert_eq!(resize().unwrap_err().text.cause, "no");
        assert_eq!(resize().unwrap_err().kind, FailureKind::NoAnswer);
        server.join().unwrap();
    }

    #[test]
    fn rblktap_reads_one_command_and_answers() {
        for (line, read) in [
            ("{\"command\":\"drain\"}\n", Some(Ok(DiskCommand::Drain))),
            ("{\"command\":\"stop\"}\n", Some(Err(()))),
            ("{}\n", Some(Err(()))),
            ("", None),
        ] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(line.as_bytes()).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let command = read_command(&server);
            assert_eq!(command.map(|command| command.map_err(drop)), read);
            answer_command(&server, Err("no".to_owned()));
            drop(server);
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "{\"error\":\"no\"}\n");
        }
    }

    #[test]
    fn a_server_that_is_not_there_or_silent_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let list = || call::<u32>(&path, &AgentCall::List, Duration::from_millis(20));
        let kind = || list().unwrap_err().kind;
        assert_eq!(kind(), FailureKind::NoAnswer);
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(kind(), FailureKind::NoAnswer);
        drop(listener);
        assert_eq!(kind(), FailureKind::NoAnswer);
    }

    #[test]
    fn a_server_that_sends_byte_by_byte_or_accepts_no_one_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(2));
            }
            listener
        });
        let list = || call::<u32>(&path, &AgentCall::List, Duration::from_millis(50));
        assert_eq!(list().unwrap_err().kind, FailureKind::NoAnswer);
        let listener = server.join().unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        let failure = list().unwrap_err();
        assert!(
            failure.text.cause.ends_with("no answer in time"),
            "{failure}"
        );
    }

    #[test]
    fn an_error_of_a_process_is_printable() {
        assert_eq!(printable("a\x1b[2J\nb"), "a[2Jb");
        assert_eq!(printable(&"x".repeat(MAX_ERROR + 1)).len(), MAX_ERROR);
    }

    #[test]
    fn a_line_without_end_is_an_error() {
        let (client, server) = UnixStream::pair().unwrap();
        let client = thread::spawn(move || {
            let mut client = client;
            let _ = client.write_all(&vec![b' '; MAX_LINE as usize + 1]);
        });
        assert!(serve(server, handle).is_err());
        client.join().unwrap();
    }

    proptest! {
        #[test]
        fn any_line_is_answered(line in r#"[{}":,a-z.\[\]]{0,40}"#) {
            let reply = answer(&line, handle);
            let refused = reply.starts_with(r#"{"error":"InvalidCall""#) && reply.ends_with('\n');
            prop_assert!(refused, "{}", reply);
        }
    }
}
