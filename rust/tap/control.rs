// SPDX-License-Identifier: GPL-2.0-only

//! The socket for `rblk`: one request and one answer for each connection, a line of JSON each.
//!
//! A request is `{"command": "stats"}`; the commands are those of [`Command`]. Only root may
//! connect.

use serde_json::Value;
use std::fs;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

/// Limit for a client to send its request, and to read the answer.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Longest request in bytes.
const MAX_REQUEST: u64 = 4096;

/// The command of a client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Command {
    /// State and counters.
    Stats,
    /// Take no more requests from the frontend.
    Pause,
    /// Take them again.
    Resume,
    /// Read the size of the image again.
    Resize,
}

impl Command {
    fn parse(text: &[u8]) -> Result<Self, String> {
        let request: Value = serde_json::from_slice(text)
            .map_err(|error| format!("the request is not JSON: {error}"))?;
        match request.get("command").and_then(Value::as_str) {
            Some("stats") => Ok(Self::Stats),
            Some("pause") => Ok(Self::Pause),
            Some("resume") => Ok(Self::Resume),
            Some("resize") => Ok(Self::Resize),
            Some(other) => Err(format!(
                "there is no command {other:?}: use stats, pause, resume or resize"
            )),
            None => Err("the request has no \"command\"".to_string()),
        }
    }
}

/// The socket. Dropping it removes it.
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// A client that waits for its answer.
pub(crate) struct Client(UnixStream);

impl ControlSocket {
    /// Creates the socket, in place of that of a predecessor.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Accepts a client, and reads its request. Returns `None` if there is none.
    pub(crate) fn accept(&self) -> Option<(Result<Command, String>, Client)> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).ok()?;
        stream.set_write_timeout(Some(TIMEOUT)).ok()?;
        let mut text = Vec::new();
        BufReader::new((&stream).take(MAX_REQUEST))
            .read_until(b'\n', &mut text)
            .ok()?;
        Some((Command::parse(&text), Client(stream)))
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // One that stays is replaced by the next process.
        let _ = fs::remove_file(&self.path);
    }
}

impl Client {
    /// Sends the answer.
    pub(crate) fn answer(mut self, answer: &Value) {
        // A client that has left does not need it.
        let _ = self.0.write_all(format!("{answer}\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_commands() {
        assert_eq!(
            Command::parse(br#"{"command":"stats"}"#),
            Ok(Command::Stats)
        );
        assert!(Command::parse(b"").unwrap_err().contains("not JSON"));
        assert!(Command::parse(b"{}")
            .unwrap_err()
            .contains("no \"command\""));
        let unknown = Command::parse(br#"{"command":"stop"}"#).unwrap_err();
        assert!(unknown.contains("stop") && unknown.contains("resize"));
    }
}
