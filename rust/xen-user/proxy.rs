// SPDX-License-Identifier: GPL-2.0-only

//! A connection to xenstore for a process that may use few nodes.
//!
//! A connection of domain 0 has access to all of xenstore, and xenstored cannot restrict one. A
//! process that must not have that gets the [`Xenstore`] of [`Proxy::new`] in place of a connection
//! of its own: a socket. Its messages are checked and passed on by a process that it does not
//! control.
//!
//! A request that is not allowed is answered with `EACCES`.

use crate::xenstore;
use crate::xenstore::Kind;
use crate::xenstore::Message;
use crate::xenstore::Xenstore;
use rustix::event::poll;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// Watches that a process may have at a time.
const MAX_WATCHES: usize = 16;

/// Transactions that a process may have at a time.
const MAX_TRANSACTIONS: usize = 4;

/// The nodes that a process may use, by their paths as it writes them.
#[derive(Clone, Debug, Default)]
pub struct Permissions {
    /// Directories that it may read and watch, with all below them.
    pub readable: Vec<String>,
    /// Nodes that it may write and remove.
    pub writable: Vec<String>,
}

impl Permissions {
    fn may_read(&self, path: &str) -> bool {
        self.readable.iter().any(|dir| {
            let rest = path.strip_prefix(dir.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    fn may_write(&self, path: &str) -> bool {
        self.writable.iter().any(|node| node == path)
    }
}

/// A call that is made once, before a node is written with a value.
struct Hook {
    /// The path and the value, as in the request.
    payload: Vec<u8>,
    run: Box<dyn FnOnce() -> io::Result<()> + Send>,
}

/// A connection to xenstore, and the socket of the process that uses it.
pub struct Proxy {
    store: File,
    client: UnixStream,
    permissions: Permissions,
    hook: Option<Hook>,
    /// The watches that the process has, as in the requests: path and token.
    watches: BTreeSet<Vec<u8>>,
    /// The identifiers of requests that have no answer.
    unanswered: BTreeSet<u32>,
    /// Those for a transaction.
    starting: BTreeSet<u32>,
    /// The transactions that the process has.
    transactions: BTreeSet<u32>,
}

impl Proxy {
    /// Restricts a connection that has not been used, or has no watches. Returns the socket for the
    /// process, which is for [`Xenstore::from_fd`].
    pub fn new(store: Xenstore, permissions: Permissions) -> io::Result<(Self, OwnedFd)> {
        let (client, other) = UnixStream::pair()?;
        let proxy = Self {
            store: store.into_file(),
            client,
            permissions,
            hook: None,
            watches: BTreeSet::new(),
            unanswered: BTreeSet::new(),
            starting: BTreeSet::new(),
            transactions: BTreeSet::new(),
        };
        Ok((proxy, other.into()))
    }

    /// Has `hook` called once, before the process writes a value to a node for the first time. If
    /// that fails, nothing is written, and [`Self::run`] ends with its error.
    pub fn before_write(
        mut self,
        path: &str,
        value: &str,
        hook: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Self {
        self.hook = Some(Hook {
            payload: format!("{path}\0{value}").into_bytes(),
            run: Box::new(hook),
        });
        self
    }

    /// Passes messages on until the process has closed its socket.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            let (from_store, from_client) = self.wait()?;
            if from_store {
                self.answer()?;
            }
            if from_client && !self.request()? {
                return Ok(());
            }
        }
    }

    /// Waits until there are messages, and returns from where.
    fn wait(&self) -> io::Result<(bool, bool)> {
        let mut fds = [
            PollFd::new(&self.store, PollFlags::IN),
            PollFd::new(&self.client, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {
                let [store, client] = fds.map(|fd| !fd.revents().is_empty());
                Ok((store, client))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Passes an answer or an event to the process.
    fn answer(&mut self) -> io::Result<()> {
        let message = Message::read(&mut self.store)?;
        if message.kind != xenstore::KIND_WATCH_EVENT {
            self.unanswered.remove(&message.id);
            self.record_transaction(&message);
        }
        // One that has ended is noticed by `request`.
        let _ = self.client.write_all(&message.encode()?);
        Ok(())
    }

    /// Passes on or refuses a request of the process. Returns `false` if there are no more.
    fn request(&mut self) -> io::Result<bool> {
        let Ok(message) = Message::read(&mut self.client) else {
            return Ok(false);
        };
        if self.allows(&message) {
            self.run_hook(&message)?;
            self.record(&message);
            self.store.write_all(&message.encode()?)?;
        } else {
            // One that has ended is noticed with the next request.
            let _ = self.client.write_all(&message.refusal()?);
        }
        Ok(true)
    }

    fn allows(&self, message: &Message) -> bool {
        let Some(kind) = Kind::of(message.kind) else {
            return false;
        };
        // The answers could not be told apart.
        if self.unanswered.contains(&message.id) {
            return false;
        }
        let parts = xenstore::strings(&message.payload);
        let path = parts.first().map(String::as_str).unwrap_or_default();
        match kind {
            Kind::Read | Kind::Directory => self.permissions.may_read(path),
            Kind::Watch => self.permissions.may_read(path) && self.watches.len() < MAX_WATCHES,
            Kind::Unwatch => self.watches.contains(&message.payload),
            Kind::Write | Kind::Remove => self.permissions.may_write(path),
            Kind::TransactionStart => self.may_start(),
            Kind::TransactionEnd => self.transactions.contains(&message.transaction),
        }
    }

    /// Runs the hook if it belongs to a request.
    fn run_hook(&mut self, message: &Message) -> io::Result<()> {
        let is_write = Kind::of(message.kind) == Some(Kind::Write);
        let is_its = |hook: &mut Hook| is_write && hook.payload == message.payload;
        match self.hook.take_if(is_its) {
            Some(hook) => (hook.run)(),
            None => Ok(()),
        }
    }

    fn may_start(&self) -> bool {
        let transactions = self.transactions.len().saturating_add(self.starting.len());
        transactions < MAX_TRANSACTIONS
    }

    /// Records what an allowed request changes.
    fn record(&mut self, message: &Message) {
        self.unanswered.insert(message.id);
        match Kind::of(message.kind) {
            Some(Kind::Watch) => {
                self.watches.insert(message.payload.clone());
            }
            Some(Kind::Unwatch) => {
                self.watches.remove(&message.payload);
            }
            Some(Kind::TransactionStart) => {
                self.starting.insert(message.id);
            }
            Some(Kind::TransactionEnd) => {
                self.transactions.remove(&message.transaction);
            }
            _ => {}
        }
    }

    /// Records the transaction that an answer gives to the process.
    fn record_transaction(&mut self, answer: &Message) {
        if !self.starting.remove(&answer.id) || answer.kind != Kind::TransactionStart as u32 {
            return;
        }
        let parts = xenstore::strings(&answer.payload);
        if let Some(transaction) = parts.first().and_then(|text| text.parse().ok()) {
            self.transactions.insert(transaction);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Host;
    use crate::xenstore::Nodes;
    use std::thread;

    fn permissions() -> Permissions {
        Permissions {
            readable: vec!["backend/vbd3/5/51712".into(), "/local/domain/5/a".into()],
            writable: vec!["backend/vbd3/5/51712/state".into()],
        }
    }

    #[test]
    fn a_process_uses_the_nodes_that_it_may_use() {
        let host = Host::new();
        let mut other = host.xenstore().unwrap();
        other.write("/local/domain/5/a/state", "3").unwrap();
        other.write("/local/domain/5/ab", "3").unwrap();
        let (proxy, client) = Proxy::new(host.xenstore().unwrap(), permissions()).unwrap();
        let thread = thread::spawn(move || proxy.run());
        let mut store = Xenstore::from_fd(client);
        let read = |store: &mut Xenstore, path| store.read_text(path).map_err(|e| e.kind());
        assert_eq!(
            read(&mut store, "/local/domain/5/a/state"),
            Ok(Some("3".into()))
        );
        let denied = Err(io::ErrorKind::PermissionDenied);
        for path in ["/local/domain/5/ab", "/local", "", "backend/vbd3/6/51712"] {
            assert_eq!(read(&mut store, path), denied, "{path}");
        }
        store.write("backend/vbd3/5/51712/state", "2").unwrap();
        for path in ["backend/vbd3/5/51712/params", "backend/vbd3/5/51712"] {
            assert!(store.write(path, "/etc/shadow").is_err(), "{path}");
            assert!(store.remove(path).is_err(), "{path}");
        }
        let written = store.transaction(|transaction| {
            transaction.write("backend/vbd3/5/51712/state", "4")?;
            Ok(transaction.write("/a", "1").is_err())
        });
        assert!(written.unwrap());
        let state = other.read_text("backend/vbd3/5/51712/state").unwrap();
        assert_eq!(state.as_deref(), Some("4"));
        drop(store);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_write_comes_after_its_hook() {
        let path = "backend/vbd3/5/51712/state";
        for succeeds in [true, false] {
            let host = Host::new();
            let mut other = host.xenstore().unwrap();
            let mut watched = host.xenstore().unwrap();
            let (proxy, client) = Proxy::new(host.xenstore().unwrap(), permissions()).unwrap();
            let proxy = proxy.before_write(path, "4", move || {
                assert_eq!(watched.read_text(path)?.as_deref(), Some("2"));
                match succeeds {
                    true => Ok(()),
                    false => Err(io::ErrorKind::TimedOut.into()),
                }
            });
            let thread = thread::spawn(move || proxy.run());
            let mut store = Xenstore::from_fd(client);
            store.write(path, "2").unwrap();
            // The hook would find another value the second time.
            let written = [0; 2].map(|_| store.write(path, "4").is_ok());
            assert_eq!(written, [succeeds; 2]);
            let expected = if succeeds { "4" } else { "2" };
            let state = other.read_text(path).unwrap();
            assert_eq!(state.as_deref(), Some(expected));
            drop(store);
            assert_eq!(thread.join().unwrap().is_ok(), succeeds);
        }
    }

    #[test]
    fn watches_are_limited_and_events_passed_on() {
        let host = Host::new();
        let (proxy, client) = Proxy::new(host.xenstore().unwrap(), permissions()).unwrap();
        let thread = thread::spawn(move || proxy.run());
        let mut store = Xenstore::from_fd(client);
        assert!(store.watch("/local/domain/6", "token").is_err());
        for number in 0..MAX_WATCHES {
            let token = number.to_string();
            store.watch("/local/domain/5/a", &token).unwrap();
        }
        assert!(store.watch("/local/domain/5/a", "more").is_err());
        // The end of a watch that does not exist makes no room.
        assert!(store.unwatch("/local/domain/5/a", "more").is_err());
        assert!(store.watch("/local/domain/5/a", "more").is_err());
        store.unwatch("/local/domain/5/a", "0").unwrap();
        store.watch("/local/domain/5/a", "more").unwrap();
        let mut events = 0;
        while events <= MAX_WATCHES {
            store.read("/local/domain/5/a").unwrap();
            while store.next_event().unwrap().is_some() {
                events += 1;
            }
        }
        drop(store);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn answers_belong_to_one_request() {
        let (store, mut server) = UnixStream::pair().unwrap();
        let store = Xenstore::from_fd(store.into());
        let (proxy, client) = Proxy::new(store, permissions()).unwrap();
        let thread = thread::spawn(move || proxy.run());
        let mut client = UnixStream::from(client);
        let limit = Some(std::time::Duration::from_secs(60));
        client.set_read_timeout(limit).unwrap();
        server.set_read_timeout(limit).unwrap();
        let message =
            |kind: Kind, path: &[u8]| xenstore::encode(kind as u32, 7, 0, &[path]).unwrap();
        client
            .write_all(&message(Kind::Read, b"/local/domain/5/a\0"))
            .unwrap();
        client
            .write_all(&message(Kind::TransactionStart, b"\0"))
            .unwrap();
        // The second one is refused, because the first one has no answer yet.
        let refused = Message::read(&mut client).unwrap();
        assert_eq!(refused.kind, xenstore::KIND_ERROR);
        let passed = Message::read(&mut server).unwrap();
        assert_eq!(passed.kind, Kind::Read as u32);
        server.write_all(&message(Kind::Read, b"1")).unwrap();
        assert_eq!(Message::read(&mut client).unwrap().payload, b"1");
        client
            .write_all(&message(Kind::TransactionStart, b"\0"))
            .unwrap();
        let passed = Message::read(&mut server).unwrap();
        assert_eq!(passed.kind, Kind::TransactionStart as u32);
        drop((client, server));
        // It ends with either of them.
        let _ = thread.join().unwrap();
    }

    #[test]
    fn transactions_are_limited() {
        let host = Host::new();
        let (proxy, client) = Proxy::new(host.xenstore().unwrap(), permissions()).unwrap();
        let thread = thread::spawn(move || proxy.run());
        let mut store = Xenstore::from_fd(client);
        for _ in 0..MAX_TRANSACTIONS {
            store.exchange(Kind::TransactionStart, &[b"\0"]).unwrap();
        }
        // The end of a transaction that does not exist makes no room.
        assert!(store.exchange(Kind::TransactionEnd, &[b"F\0"]).is_err());
        assert!(store.exchange(Kind::TransactionStart, &[b"\0"]).is_err());
        drop(store);
        thread.join().unwrap().unwrap();
    }
}
