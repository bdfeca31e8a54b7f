// SPDX-License-Identifier: GPL-2.0-only

//! A xenstore in memory, served over sockets by a thread for each connection.
//!
//! A transaction works on a copy of the whole tree, and fails if anything was changed since.

use super::lock;
use crate::xenstore;
use crate::xenstore::Kind;
use crate::xenstore::Message;
use crate::xenstore::Xenstore;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread;

/// Directory that relative paths are in: that of domain 0.
const HOME: &str = "/local/domain/0/";

/// Nodes by their whole paths. All nodes on the way to one are there too.
type Tree = BTreeMap<String, Vec<u8>>;

#[derive(Clone, Default)]
pub(super) struct Server(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    tree: Tree,
    /// Counts the changes.
    generation: u64,
    last_transaction: u32,
    transactions: BTreeMap<u32, Transaction>,
    last_connection: u64,
    watches: Vec<Watch>,
    /// The connections that answers and events are written to.
    connections: BTreeMap<u64, UnixStream>,
}

struct Transaction {
    tree: Tree,
    generation: u64,
    changed: BTreeSet<String>,
}

struct Watch {
    connection: u64,
    /// As it was given.
    path: String,
    token: String,
}

/// Name of an error on the wire.
type Failure = &'static str;

impl Server {
    pub(super) fn connect(&self) -> io::Result<Xenstore> {
        let (client, server) = UnixStream::pair()?;
        let connection = {
            let mut state = lock(&self.0);
            state.last_connection = state.last_connection.wrapping_add(1);
            let connection = state.last_connection;
            state.connections.insert(connection, server.try_clone()?);
            connection
        };
        let state = self.0.clone();
        thread::spawn(move || serve(&state, connection, server));
        Ok(Xenstore::from_fd(client.into()))
    }
}

/// Answers a connection until the other end is closed.
fn serve(state: &Mutex<State>, connection: u64, mut socket: UnixStream) {
    while let Ok(message) = Message::read(&mut socket) {
        lock(state).answer(connection, &message);
    }
    let mut state = lock(state);
    state.connections.remove(&connection);
    state.watches.retain(|watch| watch.connection != connection);
}

impl State {
    fn answer(&mut self, connection: u64, message: &Message) {
        let (kind, payload) = match self.handle(connection, message) {
            Ok(payload) => (message.kind, payload),
            Err(name) => (xenstore::KIND_ERROR, format!("{name}\0").into_bytes()),
        };
        self.send(connection, kind, message, &payload);
        if kind == Kind::Watch as u32 {
            if let Some(watch) = self.watches.last() {
                let (path, token) = (watch.path.clone(), watch.token.clone());
                self.send_event(connection, &path, &token);
            }
        }
    }

    fn send(&mut self, connection: u64, kind: u32, message: &Message, payload: &[u8]) {
        let (id, transaction) = (message.id, message.transaction);
        if let Ok(answer) = xenstore::encode(kind, id, transaction, &[payload]) {
            self.write(connection, &answer);
        }
    }

    fn send_event(&mut self, connection: u64, path: &str, token: &str) {
        let payload = format!("{path}\0{token}\0");
        let event = xenstore::encode(xenstore::KIND_WATCH_EVENT, 0, 0, &[payload.as_bytes()]);
        if let Ok(event) = event {
            self.write(connection, &event);
        }
    }

    /// Writes to a connection. One that is closed is found out by its thread.
    fn write(&mut self, connection: u64, message: &[u8]) {
        if let Some(socket) = self.connections.get_mut(&connection) {
            let _ = socket.write_all(message);
        }
    }

    fn handle(&mut self, connection: u64, message: &Message) -> Result<Vec<u8>, Failure> {
        let parts = xenstore::strings(&message.payload);
        let first = parts.first().map(String::as_str).unwrap_or_default();
        let second = parts.get(1).map(String::as_str).unwrap_or_default();
        let path = absolute(first);
        match message.kind {
            kind if kind == Kind::Read as u32 => {
                self.tree(message)?.get(&path).cloned().ok_or("ENOENT")
            }
            kind if kind == Kind::Directory as u32 => directory(self.tree(message)?, &path),
            kind if kind == Kind::Write as u32 => {
                let value = message.payload.iter().position(|byte| *byte == 0);
                let value = value.and_then(|end| message.payload.get(end + 1..));
                let value = value.unwrap_or_default().to_vec();
                self.change(message, &path, |tree| write(tree, &path, value))
            }
            kind if kind == Kind::Remove as u32 => {
                self.change(message, &path, |tree| remove(tree, &path))
            }
            kind if kind == Kind::Watch as u32 => {
                self.watches.push(Watch {
                    connection,
                    path: first.to_string(),
                    token: second.to_string(),
                });
                Ok(b"OK\0".to_vec())
            }
            kind if kind == Kind::Unwatch as u32 => {
                self.watches.retain(|watch| {
                    watch.connection != connection || watch.path != first || watch.token != second
                });
                Ok(b"OK\0".to_vec())
            }
            kind if kind == Kind::TransactionStart as u32 => Ok(self.start_transaction()),
            kind if kind == Kind::TransactionEnd as u32 => {
                self.end_transaction(message.transaction, first == "T")
            }
            _ => Err("ENOSYS"),
        }
    }

    /// Returns the tree that a message is about.
    fn tree(&self, message: &Message) -> Result<&Tree, Failure> {
        match message.transaction {
            0 => Ok(&self.tree),
            id => {
                let transaction = self.transactions.get(&id).ok_or("EINVAL")?;
                Ok(&transaction.tree)
            }
        }
    }

    fn change(
        &mut self,
        message: &Message,
        path: &str,
        change: impl FnOnce(&mut Tree) -> Result<(), Failure>,
    ) -> Result<Vec<u8>, Failure> {
        if message.transaction == 0 {
            change(&mut self.tree)?;
            self.changed([path.to_string()]);
        } else {
            let transaction = self.transactions.get_mut(&message.transaction);
            let transaction = transaction.ok_or("EINVAL")?;
            change(&mut transaction.tree)?;
            transaction.changed.insert(path.to_string());
        }
        Ok(b"OK\0".to_vec())
    }

    /// Tells those who watch that nodes have changed.
    fn changed(&mut self, paths: impl IntoIterator<Item = String>) {
        self.generation = self.generation.wrapping_add(1);
        let mut events = Vec::new();
        for path in paths {
            for watch in &self.watches {
                if let Some(path) = seen_as(&watch.path, &path) {
                    events.push((watch.connection, path, watch.token.clone()));
                }
            }
        }
        for (connection, path, token) in events {
            self.send_event(connection, &path, &token);
        }
    }

    fn start_transaction(&mut self) -> Vec<u8> {
        self.last_transaction = self.last_transaction.wrapping_add(1).max(1);
        let transaction = Transaction {
            tree: self.tree.clone(),
            generation: self.generation,
            changed: BTreeSet::new(),
        };
        self.transactions.insert(self.last_transaction, transaction);
        format!("{}\0", self.last_transaction).into_bytes()
    }

    fn end_transaction(&mut self, id: u32, commit: bool) -> Result<Vec<u8>, Failure> {
        let transaction = self.transactions.remove(&id).ok_or("EINVAL")?;
        if commit && transaction.generation != self.generation {
            return Err("EAGAIN");
        }
        if commit && !transaction.changed.is_empty() {
            self.tree = transaction.tree;
            self.changed(transaction.changed);
        }
        Ok(b"OK\0".to_vec())
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') {
        path.to_string()
    } else {
        format!("{HOME}{path}")
    }
}

/// Returns the path of a changed node as a watch sees it, or `None` if it does not. The removal of
/// a directory is seen by the watches below it.
fn seen_as(watch: &str, changed: &str) -> Option<String> {
    let whole = absolute(watch);
    let below = |path: &str, dir: &str| {
        path.strip_prefix(dir)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if below(changed, &whole) {
        let rest = changed.strip_prefix(&whole)?;
        return Some(format!("{watch}{rest}"));
    }
    below(&whole, changed).then(|| watch.to_string())
}

fn write(tree: &mut Tree, path: &str, value: Vec<u8>) -> Result<(), Failure> {
    let ends = path.match_indices('/').map(|(end, _)| end).skip(1);
    for end in ends {
        let dir = path.get(..end).ok_or("EINVAL")?;
        tree.entry(dir.to_string()).or_default();
    }
    tree.insert(path.to_string(), value);
    Ok(())
}

fn remove(tree: &mut Tree, path: &str) -> Result<(), Failure> {
    tree.remove(path).ok_or("ENOENT")?;
    let prefix = format!("{path}/");
    tree.retain(|path, _| !path.starts_with(&prefix));
    Ok(())
}

fn directory(tree: &Tree, path: &str) -> Result<Vec<u8>, Failure> {
    if !tree.contains_key(path) {
        return Err("ENOENT");
    }
    let prefix = format!("{path}/");
    let names = tree
        .range(prefix.clone()..)
        .map_while(|(path, _)| path.strip_prefix(&prefix))
        .filter(|name| !name.contains('/'));
    let mut payload = Vec::new();
    for name in names {
        payload.extend(name.as_bytes());
        payload.push(0);
    }
    Ok(payload)
}
