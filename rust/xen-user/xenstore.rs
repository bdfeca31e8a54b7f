// SPDX-License-Identifier: GPL-2.0-only

//! Xenstore: `/dev/xen/xenbus`, `xen/include/public/io/xs_wire.h`.
//!
//! A [`Xenstore`] is a connection of its own: watches belong to it and end with it. It is used by
//! one thread, which polls [`Xenstore::fd`] and then takes all events:
//!
//! ```
//! # use xen_user::fake::Host;
//! use xen_user::xenstore::Nodes;
//!
//! # let mut store = Host::new().xenstore()?;
//! store.watch("backend/vbd3", "disks")?;
//! store.write("backend/vbd3/5/51712/state", "2")?;
//! while let Some(event) = store.next_event()? {
//!     println!("{} has changed", event.path);
//! }
//! # Ok::<(), std::io::Error>(())
//! ```

use rustix::event::poll;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use std::collections::VecDeque;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

/// Largest payload of a message (`XENSTORE_PAYLOAD_MAX`).
pub(crate) const MAX_PAYLOAD: usize = 4096;

/// Bytes of `struct xsd_sockmsg`.
pub(crate) const HEADER: usize = 16;

/// Limit for an answer, in seconds.
const ANSWER_SECONDS: i64 = 30;

/// Number of attempts at a transaction that conflicts with other changes.
const TRANSACTION_TRIES: u32 = 64;

/// Kind of a message (`enum xsd_sockmsg_type`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum Kind {
    Directory = 1,
    Read = 2,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    Write = 11,
    Remove = 13,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Directory,
        Self::Read,
        Self::Watch,
        Self::Unwatch,
        Self::TransactionStart,
        Self::TransactionEnd,
        Self::Write,
        Self::Remove,
    ];

    /// Returns the kind with a number.
    pub(crate) fn of(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }
}

pub(crate) const KIND_WATCH_EVENT: u32 = 15;
pub(crate) const KIND_ERROR: u32 = 16;

/// Names of errors on the wire, with their numbers.
pub(crate) const ERRORS: [(&str, i32); 15] = [
    ("EINVAL", libc::EINVAL),
    ("EACCES", libc::EACCES),
    ("EEXIST", libc::EEXIST),
    ("EISDIR", libc::EISDIR),
    ("ENOENT", libc::ENOENT),
    ("ENOMEM", libc::ENOMEM),
    ("ENOSPC", libc::ENOSPC),
    ("EIO", libc::EIO),
    ("ENOTEMPTY", libc::ENOTEMPTY),
    ("ENOSYS", libc::ENOSYS),
    ("EROFS", libc::EROFS),
    ("EBUSY", libc::EBUSY),
    ("EAGAIN", libc::EAGAIN),
    ("E2BIG", libc::E2BIG),
    ("EPERM", libc::EPERM),
];

/// A watched node, or one below it, has changed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WatchEvent {
    /// Path of the node, in the form that the watch was set with.
    pub path: String,
    /// The watch's token.
    pub token: String,
}

/// Reads and writes nodes: a connection, or a transaction of it.
///
/// A path that does not begin with `/` is relative to the domain's own directory.
pub trait Nodes {
    /// Sends a request and returns the payload of its answer.
    fn exchange(&mut self, kind: Kind, payload: &[&[u8]]) -> io::Result<Vec<u8>>;

    /// Reads a node. Returns `None` if it does not exist, or if its directory is being removed.
    fn read(&mut self, path: &str) -> io::Result<Option<Vec<u8>>> {
        existing(self.exchange(Kind::Read, &[text(path)?, b"\0"]))
    }

    /// Reads a node as text. What is not UTF-8 is replaced.
    fn read_text(&mut self, path: &str) -> io::Result<Option<String>> {
        let value = self.read(path)?;
        Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    /// Lists the names of the nodes in a directory. Returns `None` if it does not exist.
    fn list(&mut self, path: &str) -> io::Result<Option<Vec<String>>> {
        let names = existing(self.exchange(Kind::Directory, &[text(path)?, b"\0"]))?;
        Ok(names.map(|names| strings(&names)))
    }

    /// Writes a node, and creates it and its directories if they do not exist.
    fn write(&mut self, path: &str, value: &str) -> io::Result<()> {
        self.exchange(Kind::Write, &[text(path)?, b"\0", value.as_bytes()])?;
        Ok(())
    }

    /// Removes a node and all below it. One that does not exist is no error.
    fn remove(&mut self, path: &str) -> io::Result<()> {
        existing(self.exchange(Kind::Remove, &[text(path)?, b"\0"]))?;
        Ok(())
    }
}

/// A connection to xenstore.
pub struct Xenstore {
    file: File,
    events: VecDeque<WatchEvent>,
    last_id: u32,
}

impl Xenstore {
    /// Path of the device.
    pub const PATH: &'static str = "/dev/xen/xenbus";

    /// Opens a connection.
    pub fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(Self::PATH)?;
        Ok(Self::from_fd(file.into()))
    }

    /// Takes a connection that was opened by another process and has not been used.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self {
            file: fd.into(),
            events: VecDeque::new(),
            last_id: 0,
        }
    }

    /// Returns the file of the connection, which forgets events that have come.
    pub(crate) fn into_file(self) -> File {
        self.file
    }

    /// Returns the descriptor that is readable when an event has come. Events that came between a
    /// request and its answer have been read from it already: call [`Self::next_event`] after
    /// requests, before polling.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Watches a node and all below it. One event comes at once.
    pub fn watch(&mut self, path: &str, token: &str) -> io::Result<()> {
        self.exchange(Kind::Watch, &[text(path)?, b"\0", text(token)?, b"\0"])?;
        Ok(())
    }

    /// Ends a watch. Events of it that came before are still there.
    pub fn unwatch(&mut self, path: &str, token: &str) -> io::Result<()> {
        self.exchange(Kind::Unwatch, &[text(path)?, b"\0", text(token)?, b"\0"])?;
        Ok(())
    }

    /// Takes the next event, or `None` if there is none now. Does not wait.
    pub fn next_event(&mut self) -> io::Result<Option<WatchEvent>> {
        while self.events.is_empty() && is_readable(&self.file, 0)? {
            // An answer without a waiting request has come too late.
            self.receive()?;
        }
        Ok(self.events.pop_front())
    }

    /// Runs a transaction: what `body` reads does not change meanwhile, and what it writes is seen
    /// by others at once. It is run again if others have changed what it is about. If it fails,
    /// nothing is written.
    pub fn transaction<T>(
        &mut self,
        mut body: impl FnMut(&mut Transaction<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        for _ in 0..TRANSACTION_TRIES {
            let id = self.start_transaction()?;
            let result = body(&mut Transaction { store: self, id });
            let end: &[u8] = if result.is_ok() { b"T\0" } else { b"F\0" };
            let ended = self.request(Kind::TransactionEnd, id, &[end]);
            let result = result?;
            match ended {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(error),
                Ok(_) => return Ok(result),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    fn start_transaction(&mut self) -> io::Result<u32> {
        let answer = self.request(Kind::TransactionStart, 0, &[b"\0"])?;
        let id = strings(&answer).first().and_then(|id| id.parse().ok());
        id.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn request(&mut self, kind: Kind, transaction: u32, payload: &[&[u8]]) -> io::Result<Vec<u8>> {
        self.last_id = self.last_id.wrapping_add(1);
        let id = self.last_id;
        let message = encode(kind as u32, id, transaction, payload)?;
        self.file.write_all(&message)?;
        loop {
            if !is_readable(&self.file, ANSWER_SECONDS)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match self.receive()? {
                Some(answer) if answer.id == id => return answer.result(),
                _ => {}
            }
        }
    }

    /// Receives a message. An event is kept; an answer is returned.
    fn receive(&mut self) -> io::Result<Option<Message>> {
        let message = Message::read(&mut self.file)?;
        if message.kind != KIND_WATCH_EVENT {
            return Ok(Some(message));
        }
        let mut parts = strings(&message.payload).into_iter();
        if let (Some(path), Some(token)) = (parts.next(), parts.next()) {
            self.events.push_back(WatchEvent { path, token });
        }
        Ok(None)
    }
}

impl Nodes for Xenstore {
    fn exchange(&mut self, kind: Kind, payload: &[&[u8]]) -> io::Result<Vec<u8>> {
        self.request(kind, 0, payload)
    }
}

/// A transaction that is being made, see [`Xenstore::transaction`].
pub struct Transaction<'a> {
    store: &'a mut Xenstore,
    id: u32,
}

impl Nodes for Transaction<'_> {
    fn exchange(&mut self, kind: Kind, payload: &[&[u8]]) -> io::Result<Vec<u8>> {
        self.store.request(kind, self.id, payload)
    }
}

/// A message as it came.
pub(crate) struct Message {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    /// Number of the transaction, 0 for none.
    pub(crate) transaction: u32,
    pub(crate) payload: Vec<u8>,
}

impl Message {
    pub(crate) fn read(file: &mut impl Read) -> io::Result<Self> {
        let mut words = [0; 4];
        for word in &mut words {
            let mut bytes = [0; 4];
            file.read_exact(&mut bytes)?;
            *word = u32::from_ne_bytes(bytes);
        }
        let [kind, id, transaction, len] = words;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > MAX_PAYLOAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut payload = vec![0; len];
        file.read_exact(&mut payload)?;
        Ok(Self {
            kind,
            id,
            transaction,
            payload,
        })
    }

    /// Returns the bytes of the message.
    pub(crate) fn encode(&self) -> io::Result<Vec<u8>> {
        encode(self.kind, self.id, self.transaction, &[&self.payload])
    }

    /// Returns the bytes of an answer that refuses the request.
    pub(crate) fn refusal(&self) -> io::Result<Vec<u8>> {
        encode(KIND_ERROR, self.id, self.transaction, &[b"EACCES\0"])
    }

    fn result(self) -> io::Result<Vec<u8>> {
        if self.kind != KIND_ERROR {
            return Ok(self.payload);
        }
        let name = strings(&self.payload).into_iter().next();
        let name = name.unwrap_or_default();
        let number = ERRORS.iter().find(|(known, _)| *known == name);
        Err(match number {
            Some((_, number)) => io::Error::from_raw_os_error(*number),
            None => io::Error::other(format!("xenstore: {name}")),
        })
    }
}

/// Makes a message.
pub(crate) fn encode(
    kind: u32,
    id: u32,
    transaction: u32,
    payload: &[&[u8]],
) -> io::Result<Vec<u8>> {
    let payload = payload.concat();
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    if payload.len() > MAX_PAYLOAD {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let mut message = Vec::with_capacity(HEADER.saturating_add(payload.len()));
    for word in [kind, id, transaction, len] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(payload);
    Ok(message)
}

/// Returns the strings of a payload, each of which ends with a zero byte.
pub(crate) fn strings(payload: &[u8]) -> Vec<String> {
    let payload = payload.strip_suffix(b"\0").unwrap_or(payload);
    if payload.is_empty() {
        return Vec::new();
    }
    payload
        .split(|byte| *byte == 0)
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect()
}

/// Checks that a string has no zero byte in it.
fn text(text: &str) -> io::Result<&[u8]> {
    match text.as_bytes() {
        bytes if bytes.contains(&0) => Err(io::ErrorKind::InvalidInput.into()),
        bytes => Ok(bytes),
    }
}

fn existing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Waits until there is something to read.
fn is_readable(file: &File, seconds: i64) -> io::Result<bool> {
    let timeout = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    loop {
        let mut fds = [PollFd::new(file, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return Ok(ready != 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Host;

    #[test]
    fn nodes_are_written_read_listed_and_removed() {
        let mut store = Host::new().xenstore().unwrap();
        assert_eq!(store.read("/a/b").unwrap(), None);
        assert_eq!(store.list("/a").unwrap(), None);
        store.write("/a/b", "1").unwrap();
        store.write("/a/c", "").unwrap();
        assert_eq!(store.read_text("/a/b").unwrap().as_deref(), Some("1"));
        assert_eq!(store.read("/a").unwrap(), Some(Vec::new()));
        assert_eq!(store.list("/a").unwrap().unwrap(), ["b", "c"]);
        assert_eq!(store.list("/a/c").unwrap().unwrap(), [""; 0]);
        store.remove("/a").unwrap();
        store.remove("/a").unwrap();
        assert_eq!(store.read("/a/b").unwrap(), None);
    }

    #[test]
    fn what_cannot_be_sent_is_an_error() {
        let mut store = Host::new().xenstore().unwrap();
        let long = "x".repeat(MAX_PAYLOAD);
        assert_eq!(
            store.write("/a", &long).unwrap_err().raw_os_error(),
            Some(libc::E2BIG)
        );
        assert!(store.read("/a\0b").is_err());
        store.write("/a", "still connected").unwrap();
    }

    #[test]
    fn changes_by_others_are_watched() {
        let host = Host::new();
        let (mut store, mut other) = (host.xenstore().unwrap(), host.xenstore().unwrap());
        store.watch("/a", "token").unwrap();
        let event = |path: &str| WatchEvent {
            path: path.to_string(),
            token: "token".to_string(),
        };
        // The event of a new watch comes after its answer, and before the next answer.
        store.read("/a").unwrap();
        assert_eq!(store.next_event().unwrap(), Some(event("/a")));
        assert_eq!(store.next_event().unwrap(), None);
        other.write("/a/b", "1").unwrap();
        other.write("/b", "1").unwrap();
        // It came while the answer was waited for.
        store.read("/a/b").unwrap();
        assert_eq!(store.next_event().unwrap(), Some(event("/a/b")));
        store.unwatch("/a", "token").unwrap();
        other.write("/a/b", "2").unwrap();
        store.read("/a/b").unwrap();
        assert_eq!(store.next_event().unwrap(), None);
    }

    #[test]
    fn a_transaction_is_run_again_if_others_interfere() {
        let host = Host::new();
        let (mut store, mut other) = (host.xenstore().unwrap(), host.xenstore().unwrap());
        store.write("/n", "1").unwrap();
        let mut runs = 0;
        store
            .transaction(|transaction| {
                runs += 1;
                let old = transaction.read_text("/n")?.unwrap_or_default();
                if runs == 1 {
                    other.write("/n", "5")?;
                }
                transaction.write("/n", &format!("{old}0"))
            })
            .unwrap();
        assert_eq!(runs, 2);
        assert_eq!(other.read_text("/n").unwrap().as_deref(), Some("50"));
        let failed: io::Result<()> = store.transaction(|transaction| {
            transaction.write("/n", "lost")?;
            Err(io::ErrorKind::Other.into())
        });
        assert!(failed.is_err());
        assert_eq!(other.read_text("/n").unwrap().as_deref(), Some("50"));
    }

    #[test]
    fn errors_have_their_numbers() {
        let message = |name: &[u8]| Message {
            kind: KIND_ERROR,
            id: 0,
            transaction: 0,
            payload: name.to_vec(),
        };
        let number = |name| message(name).result().unwrap_err().raw_os_error();
        assert_eq!(number(b"EACCES\0"), Some(libc::EACCES));
        assert_eq!(number(b"EWHAT\0"), None);
        assert_eq!(number(b""), None);
    }
}
