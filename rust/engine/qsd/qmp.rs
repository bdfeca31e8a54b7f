// SPDX-License-Identifier: GPL-2.0-only

//! Commands to a running daemon (QEMU's `docs/interop/qmp-spec.rst`).

use crate::error::{Error, Result};
use crate::socket::{connect, Deadlined};
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
    stream: BufReader<Deadlined<UnixStream>>,
    /// An export has been removed.
    has_deleted: bool,
    /// The id of the last command.
    last_id: u64,
}

/// The state of the NBD export.
enum Presence {
    /// There is none.
    No,
    /// It is there.
    Yes,
    /// It is being removed.
    Ending,
}

impl Monitor {
    /// Connects to the monitor at `path`.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let greet = || {
            let socket = connect(path, TIMEOUT)?;
            socket.set_write_timeout(Some(TIMEOUT))?;
            let deadline = Instant::now() + TIMEOUT;
            let mut monitor = Self {
                stream: BufReader::new(Deadlined { socket, deadline }),
                has_deleted: false,
                last_id: 0,
            };
            // The greeting.
            monitor.receive()?;
            Ok(monitor)
        };
        let mut monitor = greet().map_err(|error| io_error(&error))?;
        monitor.run("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Enlarges the image. QEMU does not do that while there is an NBD export, so it is removed:
    /// the caller adds it again.
    pub(super) fn resize(&mut self, size: u64) -> Result<()> {
        self.remove_export()?;
        let arguments = json!({ "node-name": "disk", "size": size });
        self.run("block_resize", &arguments)?;
        Ok(())
    }

    /// Adds the NBD export with these arguments, if it is not there.
    pub(super) fn add_export(&mut self, arguments: &Value) -> Result<()> {
        if let Presence::Ending = self.presence()? {
            self.wait_deleted()?;
        }
        if let Presence::No = self.presence()? {
            self.run("block-export-add", arguments)?;
        }
        Ok(())
    }

    fn remove_export(&mut self) -> Result<()> {
        match self.presence()? {
            Presence::No => return Ok(()),
            Presence::Yes => {
                // Is refused if the export has clients.
                let removed = self.run("block-export-del", &json!({ "id": NBD_EXPORT }));
                removed.map_err(|error| {
                    Error::new(
                        Errno::BUSY,
                        format!("the NBD export of the image is in use: {}", error.cause()),
                        "detach the emulated disk, or resize when the guest has unplugged it",
                    )
                })?;
            }
            Presence::Ending => {}
        }
        self.wait_deleted()
    }

    /// Finds out if the NBD export is there.
    fn presence(&mut self) -> Result<Presence> {
        let exports = self.run("query-block-exports", &json!({}))?;
        let is_ours = |export: &&Value| export.get("id") == Some(&json!(NBD_EXPORT));
        let export = exports.as_array().and_then(|all| all.iter().find(is_ours));
        Ok(match export.map(|export| export.get("shutting-down")) {
            None => Presence::No,
            Some(Some(Value::Bool(true))) => Presence::Ending,
            Some(_) => Presence::Yes,
        })
    }

    /// Waits until the NBD export has been removed.
    fn wait_deleted(&mut self) -> Result<()> {
        self.stream.get_mut().deadline = Instant::now() + TIMEOUT;
        // The event may have come before the reply to the command.
        while !self.has_deleted {
            self.receive().map_err(|error| io_error(&error))?;
        }
        Ok(())
    }

    /// Runs a command, and returns its result.
    fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.last_id = self.last_id.wrapping_add(1);
        let id = json!(self.last_id);
        let message = json!({ "execute": command, "arguments": arguments, "id": id });
        let mut line = message.to_string();
        line.push('\n');
        let stream = self.stream.get_mut();
        stream.deadline = Instant::now() + TIMEOUT;
        let sent = stream.socket.write_all(line.as_bytes());
        sent.map_err(|error| io_error(&error))?;
        loop {
            let mut reply = self.receive().map_err(|error| io_error(&error))?;
            if reply.get("id").is_some_and(|found| *found != id) {
                continue;
            }
            if let Some(result) = reply.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = reply.get("error") {
                let text = error.get("desc").and_then(Value::as_str);
                return Err(refused(command, text.unwrap_or("no reason")));
            }
        }
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

    /// A reply with the result of the command, or an event.
    const DONE: &str = r#"{"return": {}, "id": ID}"#;
    const THERE: &str =
        r#"{"return": [{"id": "vhost"}, {"id": "disk", "shutting-down": false}], "id": ID}"#;
    const ENDING: &str = r#"{"return": [{"id": "disk", "shutting-down": true}], "id": ID}"#;
    const AWAY: &str = r#"{"return": [{"id": "vhost", "shutting-down": false}], "id": ID}"#;
    const DELETED: &str = r#"{"event": "BLOCK_EXPORT_DELETED"}"#;
    const OTHER: &str = r#"{"return": {}, "id": 0}"#;

    /// Calls a function with the monitor of a daemon that answers each command with these lines.
    /// Returns its result, and the commands.
    fn with_daemon<T>(
        replies: Vec<Vec<&'static str>>,
        call: impl FnOnce(&mut Monitor) -> Result<T>,
    ) -> (Result<T>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let daemon = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut commands = Vec::new();
            writeln!(stream, "{{\"QMP\": {{}}}}").unwrap();
            for replies in [vec![DONE]].into_iter().chain(replies) {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                let command: Value = serde_json::from_str(&line).unwrap();
                commands.push(command["execute"].as_str().unwrap().to_owned());
                for reply in replies {
                    let reply = reply.replace("ID", &command["id"].to_string());
                    writeln!(stream, "{reply}").unwrap();
                }
            }
            commands.split_off(1)
        });
        let result = Monitor::connect(&path).and_then(|mut monitor| call(&mut monitor));
        (result, daemon.join().unwrap())
    }

    const QUERY: &str = "query-block-exports";
    const DEL: &str = "block-export-del";
    const ADD: &str = "block-export-add";
    const RESIZE: &str = "block_resize";

    #[test]
    fn the_export_is_removed_before_a_resize() {
        for (replies, expected) in [
            (
                vec![vec![THERE], vec![DONE, DELETED], vec![DONE]],
                vec![QUERY, DEL, RESIZE],
            ),
            (
                vec![vec![THERE], vec![DELETED, DONE], vec![DONE]],
                vec![QUERY, DEL, RESIZE],
            ),
            // The replies to another command.
            (
                vec![
                    vec![OTHER, THERE],
                    vec![OTHER, DONE, OTHER, DELETED],
                    vec![OTHER, DONE],
                ],
                vec![QUERY, DEL, RESIZE],
            ),
            // An earlier resize was interrupted.
            (vec![vec![AWAY], vec![DONE]], vec![QUERY, RESIZE]),
            (vec![vec![ENDING, DELETED], vec![DONE]], vec![QUERY, RESIZE]),
        ] {
            let (resized, commands) = with_daemon(replies, |monitor| monitor.resize(8192));
            resized.unwrap();
            assert_eq!(commands, expected);
        }
    }

    #[test]
    fn the_export_is_added_if_it_is_not_there() {
        for (replies, expected) in [
            (vec![vec![THERE], vec![THERE]], vec![QUERY, QUERY]),
            (
                vec![vec![AWAY], vec![AWAY], vec![DONE]],
                vec![QUERY, QUERY, ADD],
            ),
            (
                vec![vec![ENDING, DELETED], vec![AWAY], vec![DONE]],
                vec![QUERY, QUERY, ADD],
            ),
        ] {
            let (added, commands) = with_daemon(replies, |monitor| monitor.add_export(&json!({})));
            added.unwrap();
            assert_eq!(commands, expected);
        }
    }

    #[test]
    fn errors_name_their_cause() {
        let errno = |replies| {
            let (resized, _) = with_daemon(replies, |monitor| monitor.resize(8192));
            resized.unwrap_err().errno()
        };
        const REFUSAL: &str =
            r#"{"error": {"desc": "Image format driver does not support resize"}, "id": ID}"#;
        let refused = errno(vec![vec![THERE], vec![DONE, DELETED], vec![REFUSAL]]);
        assert_eq!(refused, Errno::OPNOTSUPP);
        let used = errno(vec![
            vec![THERE],
            vec![r#"{"error": {"desc": "in use"}, "id": ID}"#],
        ]);
        assert_eq!(used, Errno::BUSY);
        errno(vec![vec!["nonsense"]]);
        errno(vec![vec![THERE], vec![DONE, "{\"event\": "]]);
        errno(vec![vec![THERE], vec![DONE]]);
    }
}
