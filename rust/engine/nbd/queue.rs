// SPDX-License-Identifier: GPL-2.0-only

//! Requests over one connection, which is replaced when it is lost.

use super::connect::Stream;
use super::protocol::{
    Command, CMD_DISC, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, FLAG_SEND_FLUSH, FLAG_SEND_FUA,
};
use super::reply::{Handler, Position, ReplyReader, Violation};
use super::Shared;
use crate::bounce;
use crate::check::check;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::reconnect::{Connecting, Target};
use crate::request::{Completion, Operation, Request};
use crate::socket::Deadlined;
use crate::{Queue, DROP_TIMEOUT};
use rustix::event::epoll::{add, create, delete, modify, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

/// The number of bytes that one system call sends or receives.
const CHUNK: usize = 256 << 10;

/// The greatest range of one discard or write zeroes: a multiple of each block size.
const MAX_RANGE: u64 = 1 << 30;

/// A queue of an export.
pub(super) struct NbdQueue {
    shared: Arc<Shared>,
    depth: usize,
    /// Is readable when the stream or `event` has something to do.
    epoll: OwnedFd,
    event: Arc<Event>,
    link: Link,
    requests: Requests,
    /// The memory that bytes are received in.
    scratch: Vec<u8>,
}

/// The state of the connection.
enum Link {
    /// There is a connection.
    Up(Connection),
    /// A thread connects.
    Connecting(Connecting<Stream>),
    /// There is no connection, and no request that needs one.
    Down,
}

struct Connection {
    stream: Stream,
    sender: Sender,
    reader: ReplyReader,
    /// The queue waits until the stream can be written to.
    waits_for_space: bool,
}

/// The bytes that are being sent.
struct Sender {
    bytes: Vec<u8>,
    /// The number of bytes that were sent.
    sent: usize,
    /// The write whose data is being sent, and the position in it.
    data: Option<(u64, usize)>,
}

/// The requests of a queue, by the cookie of their command.
struct Requests {
    entries: BTreeMap<u64, Entry>,
    /// The cookies of the requests that were not sent yet, in order.
    unsent: VecDeque<u64>,
    next_cookie: u64,
    /// The number of connections that were lost since the last reply.
    losses: u32,
    completed: Vec<Completion>,
    shared: Arc<Shared>,
}

/// A request that is not complete.
struct Entry {
    request: Request,
    submitted: Instant,
    /// The number of writes that were completed before.
    writes: u64,
    command: Command,
    is_sent: bool,
    /// The number of bytes that a read has received.
    received: u64,
    error: Option<Errno>,
}

impl Entry {
    /// Returns the offset of the end of the request.
    fn end(&self) -> u64 {
        self.request.offset.saturating_add(self.request.length)
    }

    /// Returns `true` if the command makes data durable.
    fn is_flush(&self) -> bool {
        self.command.kind == CMD_FLUSH || self.command.flags & CMD_FLAG_FUA != 0
    }

    /// Prepares to send the command again from the start.
    fn reset(&mut self) {
        self.is_sent = false;
        self.received = 0;
        self.error = None;
    }
}

/// Returns the first command of a request.
fn command(request: &Request, cookie: u64, export_flags: u16) -> Command {
    let has_fua = export_flags & FLAG_SEND_FUA != 0;
    let (kind, flags) = match request.operation {
        Operation::Read => (CMD_READ, 0),
        Operation::Write { fua: true } if has_fua => (CMD_WRITE, CMD_FLAG_FUA),
        Operation::Write { .. } => (CMD_WRITE, 0),
        Operation::Flush => (CMD_FLUSH, 0),
        Operation::Discard => (CMD_TRIM, 0),
        Operation::WriteZeroes { may_unmap: true } => (CMD_WRITE_ZEROES, 0),
        Operation::WriteZeroes { may_unmap: false } => (CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE),
    };
    Command {
        kind,
        flags,
        cookie,
        offset: request.offset,
        length: request.length.min(MAX_RANGE) as u32,
    }
}

impl Requests {
    fn new(shared: Arc<Shared>) -> Self {
        Self {
            entries: BTreeMap::new(),
            unsent: VecDeque::new(),
            next_cookie: 0,
            losses: 0,
            completed: Vec::new(),
            shared,
        }
    }

    fn add(&mut self, request: Request) {
        let cookie = self.next_cookie;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let command = command(&request, cookie, self.shared.flags);
        self.unsent.push_back(cookie);
        self.entries.insert(
            cookie,
            Entry {
                request,
                submitted: Instant::now(),
                writes: self.shared.writes.completed(),
                command,
                is_sent: false,
                received: 0,
                error: None,
            },
        );
    }

    fn complete(&mut self, cookie: u64, result: Result<()>) {
        self.losses = 0;
        if let Some(entry) = self.entries.remove(&cookie) {
            match entry.request.operation {
                Operation::Read => {}
                Operation::Flush if result.is_ok() => self.shared.writes.flush(entry.writes),
                Operation::Flush => {}
                _ => self.shared.writes.add(),
            }
            self.completed.push(entry.request.complete(result));
        }
    }

    /// Returns the number of requests that the server has.
    fn sent(&self) -> usize {
        self.entries.len().saturating_sub(self.unsent.len())
    }

    /// Sends all requests again, in the order of their submission. Those that were submitted
    /// before `oldest` fail with `error`.
    fn restart(&mut self, oldest: Option<Instant>, error: &Error) {
        self.unsent.clear();
        let entries = mem::take(&mut self.entries);
        for (cookie, mut entry) in entries {
            if oldest.is_none_or(|oldest| entry.submitted >= oldest) {
                entry.reset();
                // A server that was restarted may have lost what it has done.
                entry.command = command(&entry.request, cookie, self.shared.flags);
                self.unsent.push_back(cookie);
                self.entries.insert(cookie, entry);
            } else {
                self.completed
                    .push(entry.request.complete(Err(error.clone())));
            }
        }
    }

    /// Fails all requests.
    fn fail(&mut self, error: &Error) {
        self.unsent.clear();
        for entry in mem::take(&mut self.entries).into_values() {
            self.completed
                .push(entry.request.complete(Err(error.clone())));
        }
    }

    /// Returns the read that data belongs to, after a check that the range is inside it.
    fn read(&mut self, cookie: u64, offset: u64, length: u64) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&cookie)?;
        let end = offset.checked_add(length)?;
        let fits = entry.request.operation == Operation::Read && end <= entry.request.length;
        entry.received = entry.received.saturating_add(length);
        fits.then_some(entry)
    }
}

const NOT_INSIDE: Violation = Violation("a reply has data that was not asked for");

impl Handler for Requests {
    fn data_length(&self, cookie: u64) -> Option<u64> {
        let entry = self.entries.get(&cookie).filter(|entry| entry.is_sent)?;
        match entry.request.operation {
            Operation::Read => Some(entry.request.length),
            _ => Some(0),
        }
    }

    fn data(
        &mut self,
        cookie: u64,
        position: Position,
        data: &[u8],
    ) -> std::result::Result<(), Violation> {
        let start = self.entries.get(&cookie).map(|entry| entry.request.offset);
        let offset = match (position, start) {
            (Position::Request(offset), _) => Some(offset),
            (Position::Image(offset), Some(start)) => offset.checked_sub(start),
            (Position::Image(_), None) => None,
        };
        let offset = offset.ok_or(NOT_INSIDE)?;
        let entry = self
            .read(cookie, offset, data.len() as u64)
            .ok_or(NOT_INSIDE)?;
        bounce::write_at(&mut entry.request.buffers, offset, data).map_err(|_| NOT_INSIDE)
    }

    fn hole(
        &mut self,
        cookie: u64,
        offset: u64,
        length: u32,
    ) -> std::result::Result<(), Violation> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut left = u64::from(length);
        let mut offset = offset;
        while left > 0 {
            let count = left.min(ZEROS.len() as u64);
            let zeros = ZEROS.get(..count as usize).unwrap_or(&ZEROS);
            self.data(cookie, Position::Image(offset), zeros)?;
            left = left.saturating_sub(count);
            offset = offset.saturating_add(count);
        }
        Ok(())
    }

    fn error(&mut self, cookie: u64, errno: Errno) -> std::result::Result<(), Violation> {
        if let Some(entry) = self.entries.get_mut(&cookie) {
            entry.error.get_or_insert(errno);
        }
        Ok(())
    }

    fn done(&mut self, cookie: u64) -> std::result::Result<(), Violation> {
        let Some(entry) = self.entries.get_mut(&cookie) else {
            return Ok(());
        };
        if let Some(errno) = entry.error {
            let errno = match errno {
                // The server may have reported once what it could not write back, and the next
                // flush would succeed without it. So this is not an error that may pass.
                Errno::NOSPC if entry.is_flush() && !self.shared.keeps_writes => Errno::IO,
                errno => errno,
            };
            let error = server_error(errno, &entry.request);
            self.complete(cookie, Err(error));
            return Ok(());
        }
        let command = &mut entry.command;
        let next = command.offset.saturating_add(u64::from(command.length));
        match entry.request.operation {
            Operation::Read if entry.received != entry.request.length => {
                return Err(Violation("a reply lacks data"));
            }
            Operation::Write { fua: true }
                if command.kind == CMD_WRITE && command.flags & CMD_FLAG_FUA == 0 =>
            {
                if self.shared.flags & FLAG_SEND_FLUSH == 0 {
                    self.complete(cookie, Ok(()));
                    return Ok(());
                }
                command.kind = CMD_FLUSH;
                command.offset = 0;
                command.length = 0;
            }
            Operation::Discard | Operation::WriteZeroes { .. } if next < entry.end() => {
                let left = entry.end().saturating_sub(next);
                let command = &mut entry.command;
                command.offset = next;
                command.length = left.min(MAX_RANGE) as u32;
            }
            _ => {
                self.complete(cookie, Ok(()));
                return Ok(());
            }
        }
        entry.reset();
        self.unsent.push_front(cookie);
        Ok(())
    }
}

fn server_error(errno: Errno, request: &Request) -> Error {
    Error::new(
        errno,
        format!(
            "the NBD server fails {:?} of {} bytes at {}: {errno}",
            request.operation, request.length, request.offset
        ),
        "check the log of the NBD server and its storage",
    )
}

impl Sender {
    fn new() -> Self {
        Self {
            bytes: Vec::new(),
            sent: 0,
            data: None,
        }
    }

    /// Sends what there is, and returns `true` if the stream accepts no more.
    fn send(
        &mut self,
        stream: &mut Stream,
        requests: &mut Requests,
        depth: usize,
    ) -> io::Result<bool> {
        loop {
            if self.sent >= self.bytes.len() {
                self.bytes.clear();
                self.sent = 0;
                self.fill(requests, depth)?;
                if self.bytes.is_empty() {
                    return Ok(false);
                }
            }
            match stream.write(self.bytes.get(self.sent..).unwrap_or_default()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Adds headers and data of requests.
    fn fill(&mut self, requests: &mut Requests, depth: usize) -> io::Result<()> {
        loop {
            let room = CHUNK.saturating_sub(self.bytes.len());
            if room == 0 {
                return Ok(());
            }
            if let Some((cookie, position)) = self.data.take() {
                self.fill_data(requests, cookie, position, room)?;
                continue;
            }
            if requests.sent() >= depth {
                return Ok(());
            }
            let Some(cookie) = requests.unsent.pop_front() else {
                return Ok(());
            };
            let Some(entry) = requests.entries.get_mut(&cookie) else {
                continue;
            };
            entry.is_sent = true;
            self.bytes.extend(entry.command.encode());
            if entry.command.kind == CMD_WRITE {
                self.data = Some((cookie, 0));
            }
        }
    }

    /// Adds data of a write, up to `room` bytes.
    fn fill_data(
        &mut self,
        requests: &Requests,
        cookie: u64,
        position: usize,
        room: usize,
    ) -> io::Result<()> {
        // A server that answers before it has all data violates the protocol.
        let entry = requests
            .entries
            .get(&cookie)
            .ok_or(io::ErrorKind::InvalidData)?;
        let length = entry.command.length as usize;
        let count = length.saturating_sub(position).min(room);
        let start = self.bytes.len();
        self.bytes.resize(start.saturating_add(count), 0);
        let part = self.bytes.get_mut(start..).unwrap_or_default();
        bounce::read_at(&entry.request.buffers, position as u64, part).map_err(io::Error::other)?;
        let reached = position.saturating_add(count);
        if reached < length {
            self.data = Some((cookie, reached));
        }
        Ok(())
    }
}

impl Connection {
    fn new(stream: Stream) -> Self {
        Self {
            stream,
            sender: Sender::new(),
            reader: ReplyReader::new(),
            waits_for_space: false,
        }
    }

    /// Receives what there is.
    fn receive(&mut self, requests: &mut Requests, scratch: &mut [u8]) -> io::Result<()> {
        loop {
            match self.stream.read(scratch) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    let bytes = scratch.get(..count).unwrap_or_default();
                    self.reader
                        .receive(bytes, requests)
                        .map_err(|violation| io::Error::other(violation.0))?;
                    if count < scratch.len() {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl NbdQueue {
    pub(super) fn new(shared: Arc<Shared>, depth: u32) -> Result<Self> {
        let epoll = create(CreateFlags::CLOEXEC).map_err(epoll_error)?;
        let event = Arc::new(Event::new()?);
        add(&epoll, &event, EventData::new_u64(0), EventFlags::IN).map_err(epoll_error)?;
        let idle = shared.idle().take();
        let stream = match idle {
            Some(stream) => stream,
            None => shared.reconnect()?,
        };
        let mut queue = Self {
            depth: depth.clamp(1, 4096) as usize,
            epoll,
            event,
            link: Link::Down,
            requests: Requests::new(shared.clone()),
            scratch: vec![0; CHUNK],
            shared,
        };
        queue.use_stream(stream)?;
        Ok(queue)
    }

    fn use_stream(&mut self, stream: Stream) -> Result<()> {
        stream
            .set_timeout(None)
            .map_err(|error| Error::from_io(&error, "using an NBD connection", "report this"))?;
        add(&self.epoll, &stream, EventData::new_u64(1), EventFlags::IN).map_err(epoll_error)?;
        self.link = Link::Up(Connection::new(stream));
        Ok(())
    }

    /// Does what can be done without waiting.
    fn run(&mut self, receive: bool) {
        if let Link::Connecting(connecting) = &self.link {
            let used = connecting.result().map(|stream| self.use_stream(stream?));
            if let Some(Err(error)) = used {
                self.fail(&error);
            }
        }
        if matches!(self.link, Link::Down) && !self.requests.entries.is_empty() {
            self.connect();
        }
        if let Err(error) = self.transfer(receive) {
            self.lost(&error);
        }
    }

    /// Receives and sends over the connection, if there is one.
    fn transfer(&mut self, receive: bool) -> io::Result<()> {
        let Link::Up(connection) = &mut self.link else {
            return Ok(());
        };
        if receive {
            connection.receive(&mut self.requests, &mut self.scratch)?;
        }
        let waits =
            connection
                .sender
                .send(&mut connection.stream, &mut self.requests, self.depth)?;
        if waits != connection.waits_for_space {
            connection.waits_for_space = waits;
            let flags = match waits {
                true => EventFlags::IN | EventFlags::OUT,
                false => EventFlags::IN,
            };
            modify(
                &self.epoll,
                &connection.stream,
                EventData::new_u64(1),
                flags,
            )?;
        }
        Ok(())
    }

    /// Replaces a connection that was lost.
    fn lost(&mut self, error: &io::Error) {
        // Closes the stream, which removes it from the epoll.
        self.link = Link::Down;
        let error = Error::new(
            Errno::NOTCONN,
            format!("the connection to {} was lost: {error}", self.shared.export),
            "check the NBD server and the network",
        );
        let oldest = Instant::now().checked_sub(self.shared.reconnect_timeout);
        self.requests.restart(oldest, &error);
        if !self.requests.entries.is_empty() {
            self.connect();
        }
        self.requests.losses = self.requests.losses.saturating_add(1);
    }

    /// Starts a thread that connects.
    fn connect(&mut self) {
        let shared = self.shared.clone();
        let target = Target {
            name: shared.export.to_string(),
            remedy: "check the NBD server and the network",
            timeout: shared.reconnect_timeout,
            losses: self.requests.losses,
        };
        match Connecting::start(target, &self.event, move || shared.reconnect()) {
            Ok(connecting) => self.link = Link::Connecting(connecting),
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &Error) {
        self.link = Link::Down;
        self.requests.fail(error);
    }
}

fn epoll_error(errno: Errno) -> Error {
    Error::new(
        errno,
        format!("waiting for an NBD connection: {errno}"),
        "raise the limit of open files",
    )
}

/// Flushes an export over a connection that no queue uses, and ends the connection.
pub(super) fn flush_blocking(shared: &Arc<Shared>, mut stream: Stream) -> Result<()> {
    let result = flush_and_disconnect(shared, &mut stream);
    result.map_err(|error| {
        Error::from_io(
            &error,
            "flushing an NBD export",
            "check the NBD server: the last writes may be lost",
        )
    })
}

fn flush_and_disconnect(shared: &Arc<Shared>, stream: &mut Stream) -> io::Result<()> {
    stream.set_timeout(Some(DROP_TIMEOUT))?;
    let mut requests = Requests::new(shared.clone());
    // The queue that had the connection before may have used small numbers.
    requests.next_cookie = u64::MAX;
    requests.add(Request::flush(0));
    let mut reader = ReplyReader::new();
    Sender::new().send(stream, &mut requests, 1)?;
    let mut scratch = [0; 64];
    let deadline = Instant::now() + DROP_TIMEOUT;
    while requests.completed.is_empty() {
        let socket = &mut *stream;
        match (Deadlined { socket, deadline }).read(&mut scratch)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => reader
                .receive(scratch.get(..count).unwrap_or_default(), &mut requests)
                .map_err(|violation| io::Error::other(violation.0))?,
        }
    }
    disconnect(stream);
    match requests.completed.pop() {
        Some(Completion {
            result: Err(error), ..
        }) => Err(error.errno().into()),
        _ => Ok(()),
    }
}

/// Tells the server that the connection ends.
fn disconnect(stream: &mut Stream) {
    let command = Command {
        kind: CMD_DISC,
        flags: 0,
        cookie: 0,
        offset: 0,
        length: 0,
    };
    // The server notices the end of the connection as well.
    let _ = stream.write_all(&command.encode());
}

impl AsFd for NbdQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Queue for NbdQueue {
    fn submit(&mut self, request: Request) {
        let has_flush = self.shared.flags & FLAG_SEND_FLUSH != 0;
        match check(&request, &self.shared.info()) {
            Ok(()) if request.operation == Operation::Flush && !has_flush => {
                self.requests.completed.push(request.complete(Ok(())));
            }
            Ok(()) => self.requests.add(request),
            Err(error) => self.requests.completed.push(request.complete(Err(error))),
        }
    }

    fn kick(&mut self) -> Result<()> {
        self.run(false);
        if !self.requests.completed.is_empty() {
            self.event.set();
        }
        Ok(())
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) -> Result<()> {
        self.event.clear();
        self.run(true);
        completions.append(&mut self.requests.completed);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.requests
            .entries
            .len()
            .saturating_add(self.requests.completed.len())
    }
}

impl Drop for NbdQueue {
    fn drop(&mut self) {
        // Requests that do not complete in time use memory of this process only.
        let _ = self.drain(DROP_TIMEOUT, &mut Vec::new());
        let is_idle = self.in_flight() == 0;
        if let Link::Up(connection) = mem::replace(&mut self.link, Link::Down) {
            let removed = delete(&self.epoll, &connection.stream).is_ok();
            if is_idle && removed {
                if let Some(mut other) = self.shared.idle().replace(connection.stream) {
                    disconnect(&mut other);
                }
            }
        }
        self.shared.queues.fetch_sub(1, Ordering::AcqRel);
    }
}
