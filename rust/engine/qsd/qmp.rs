// SPDX-License-Identifier: GPL-2.0-only

//! Commands to a running daemon (QEMU's `docs/interop/qmp-spec.rst`).

use crate::error::{Error, Result};
use rustix::io::Errno;
use serde_json::{json, Value};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The id of the NBD export.
pub(super) const NBD_EXPORT: &str = "disk";

/// Limit for a command.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The greatest length of a message.
const MAX_MESSAGE: u64 = 64 << 10;

/// The greatest length of an error that is passed on.
const MAX_ERROR: usize = 300;

/// A connection to the monitor of a daemon.
pub(super) struct Monitor {
    stream: BufReader<UnixStream>,
    /// An export has been removed.
    has_deleted: bool,
}

impl Monitor {
    /// Connects to the monitor at `path`.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            let mut monitor = Self {
                stream: BufReader::new(stream),
                has_deleted: false,
            };
            // The greeting.
            monitor.receive()?;
            Ok(monitor)
        };
        let mut monitor = connect().map_err(|error| io_error(&error))?;
        monitor.run("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Enlarges the image. QEMU does not do that while there is an NBD export, so it is removed
    /// meanwhile.
    pub(super) fn resize(&mut self, export: &Value, size: u64) -> Result<()> {
        // Refuses to remove an export that has clients.
        self.run("block-export-del", &json!({ "id": NBD_EXPORT }))
            .map_err(|error| {
                Error::new(
                    Errno::BUSY,
                    format!("the NBD export of the image is in use: {}", error.cause()),
                    "detach the emulated disk, or resize when the guest has unplugged it",
                )
            })?;
        let deleted = self.wait_deleted();
        let resized = deleted.and_then(|()| {
            let arguments = json!({ "node-name": "disk", "size": size });
            self.run("block_resize", &arguments)
        });
        self.run("block-export-add", export)?;
        resized
    }

    /// Waits until the NBD export has been removed.
    fn wait_deleted(&mut self) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        // The event may have come before the reply to the command.
        while !self.has_deleted {
            if Instant::now() >= deadline {
                return Err(io_error(&io::ErrorKind::TimedOut.into()));
            }
            self.receive().map_err(|error| io_error(&error))?;
        }
        Ok(())
    }

    /// Runs a command.
    fn run(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let message = json!({ "execute": command, "arguments": arguments });
        let mut line = message.to_string();
        line.push('\n');
        let sent = self.stream.get_mut().write_all(line.as_bytes());
        sent.map_err(|error| io_error(&error))?;
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            let reply = self.receive().map_err(|error| io_error(&error))?;
            if reply.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = reply.get("error") {
                let text = error.get("desc").and_then(Value::as_str);
                return Err(refused(command, text.unwrap_or("no reason")));
            }
        }
        Err(io_error(&io::ErrorKind::TimedOut.into()))
    }

    fn receive(&mut self) -> io::Result<Value> {
        let mut line = Vec::new();
        let mut limited = self.stream.by_ref().take(MAX_MESSAGE);
        limited.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let message: Value = serde_json::from_slice(&line)?;
        let event = message.get("event").and_then(Value::as_str);
        self.has_deleted |= event == Some("BLOCK_EXPORT_DELETED");
        Ok(message)
    }
}

/// Returns the error of a command that the daemon has refused.
fn refused(command: &str, text: &str) -> Error {
    let text: String = text
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_ERROR)
        .collect();
    let has = |part| text.contains(part);
    let (errno, remedy) = if has("does not support resize") {
        (
            Errno::OPNOTSUPP,
            "detach the disk, and convert the image to qcow2 with rblk image convert",
        )
    } else if has("No space left on device") {
        (Errno::NOSPC, "free some space")
    } else {
        (
            Errno::INVAL,
            "detach the disk, and use qemu-img resize, which says more",
        )
    };
    let cause = format!("qemu-storage-daemon refuses {command}: {text}");
    Error::new(errno, cause, remedy)
}

fn io_error(error: &io::Error) -> Error {
    let errno = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Errno::TIMEDOUT,
        _ => Errno::from_io_error(error).unwrap_or(Errno::IO),
    };
    Error::new(
        errno,
        format!("a command to qemu-storage-daemon: {error}"),
        "check the load of the host and the storage below the image",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// Returns the result of a resize by a daemon that answers with these lines.
    fn resize(replies: &'static [&'static str]) -> (Result<()>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let daemon = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut commands = Vec::new();
            writeln!(stream, "{{\"QMP\": {{}}}}").unwrap();
            for reply in replies {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                let command: Value = serde_json::from_str(&line).unwrap();
                commands.push(command["execute"].as_str().unwrap().to_owned());
                stream.write_all(reply.as_bytes()).unwrap();
            }
            commands
        });
        let resized =
            Monitor::connect(&path).and_then(|mut monitor| monitor.resize(&json!({}), 8192));
        (resized, daemon.join().unwrap())
    }

    const DONE: &str = "{\"return\": {}}\n";
    const DELETED: &str = "{\"return\": {}}\n{\"event\": \"BLOCK_EXPORT_DELETED\"}\n";
    const EARLY: &str = "{\"event\": \"BLOCK_EXPORT_DELETED\"}\n{\"return\": {}}\n";

    const REFUSAL: &str =
        "{\"error\": {\"desc\": \"Image format driver does not support resize\"}}\n";

    #[test]
    fn the_export_is_away_during_a_resize() {
        for replies in [&[DONE, DELETED, DONE, DONE], &[DONE, EARLY, DONE, DONE]] {
            let (resized, commands) = resize(replies);
            resized.unwrap();
            let expected = [
                "qmp_capabilities",
                "block-export-del",
                "block_resize",
                "block-export-add",
            ];
            assert_eq!(commands, expected);
        }
    }

    #[test]
    fn errors_name_their_cause() {
        let (resized, commands) = resize(&[DONE, DELETED, REFUSAL, DONE]);
        assert_eq!(resized.unwrap_err().errno(), Errno::OPNOTSUPP);
        assert_eq!(commands.len(), 4);
        let (resized, _) = resize(&[DONE, "{\"error\": {\"desc\": \"in use\"}}\n"]);
        assert_eq!(resized.unwrap_err().errno(), Errno::BUSY);
        let (resized, _) = resize(&["nonsense\n"]);
        assert!(resized.is_err());
        let (resized, _) = resize(&[DONE, "{\"return\": {}}\n{\"event\": "]);
        assert!(resized.is_err());
    }
}
