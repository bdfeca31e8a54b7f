// SPDX-License-Identifier: GPL-2.0-only

//! The server side of NBD, for an image that is open in this process.
//!
//! It corresponds to QEMU's `nbd/server.c`. Xen's toolstack has the device model of an HVM guest
//! open the image of a disk over NBD. The device model emulates the disk until the guest unplugs
//! the emulated disk and uses a driver for Xen's.
//!
//! Each client has a queue of its own. Its requests are carried out one after the other.

use super::protocol::{
    number, take_u32, Command, CMD_DISC, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ,
    CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, FLAG_FIXED_NEWSTYLE, FLAG_HAS_FLAGS, FLAG_NO_ZEROES,
    FLAG_READ_ONLY, FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES,
    INFO_BLOCK_SIZE, INFO_EXPORT, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OPT_ABORT,
    OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, REP_ACK, REP_ERR_INVALID, REP_ERR_UNKNOWN,
    REP_ERR_UNSUP, REP_INFO, REP_SERVER, SIMPLE_REPLY_MAGIC,
};
use super::MAX_TRANSFER;
use crate::info::Info;
use crate::request::{Completion, Operation, Request};
use crate::Queue;
use io_buffer::Buffer;
use rustix::io::Errno;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The greatest number of options of a client, and the greatest length of one.
const MAX_OPTIONS: usize = 64;
const MAX_OPTION: u32 = 4096;

/// The greatest length of a request to the image.
const CHUNK: u64 = 1 << 20;

/// The depth of the queue that a client needs: its longest request has that many parts.
pub const DEPTH: u32 = 32;

/// Zeroes behind the reply to [`OPT_EXPORT_NAME`].
const ZEROES: [u8; 124] = [0; 124];

/// The time after which a wait for a request looks whether the export is stopped.
const STEP: Duration = Duration::from_secs(1);

/// The export of an image, whose name is empty, for one client.
pub struct Export<'a> {
    info: Info,
    queue: Box<dyn Queue>,
    /// The requests in flight are not waited for any more.
    is_stopped: &'a AtomicBool,
}

/// The data that a command has read, or the error for the client.
type Outcome = Result<Vec<Buffer>, Errno>;

/// The step that a client wants after an option.
enum Negotiated {
    /// Another option.
    More,
    /// The transmission phase.
    Go,
    /// The end of the connection.
    Abort,
}

impl<'a> Export<'a> {
    /// Creates the export of an open image with a queue of it.
    ///
    /// Its storage is not freed unless the image supports `discard` and the caller allows it.
    /// Requests are waited for without a limit, as those of a ring, until `is_stopped` is set.
    pub fn new(
        info: Info,
        queue: Box<dyn Queue>,
        discard: bool,
        is_stopped: &'a AtomicBool,
    ) -> Self {
        let discard = info.discard.filter(|_| discard && !info.read_only);
        let write_zeroes = info.write_zeroes && !info.read_only;
        Self {
            info: Info {
                discard,
                write_zeroes,
                ..info
            },
            queue,
            is_stopped,
        }
    }

    /// Serves a client until it disconnects.
    ///
    /// Errors of the image are replies. What this returns is the error of the connection, or that
    /// the export was stopped while a request was in flight.
    pub fn serve(mut self, mut client: impl Read + Write) -> io::Result<()> {
        if !self.negotiate(&mut client)? {
            return Ok(());
        }
        while let Some(command) = read_command(&mut client)? {
            self.carry_out(&mut client, &command)?;
        }
        Ok(())
    }

    /// Returns `true` if the client wants the transmission phase.
    fn negotiate(&self, client: &mut (impl Read + Write)) -> io::Result<bool> {
        let flags = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES;
        let greeting = [
            &NBD_MAGIC.to_be_bytes()[..],
            &OPTION_MAGIC.to_be_bytes(),
            &flags.to_be_bytes(),
        ];
        client.write_all(&greeting.concat())?;
        let flags = u32::from_be_bytes(read(client)?);
        if flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 {
            return Err(invalid("the client is outdated"));
        }
        let no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        for _ in 0..MAX_OPTIONS {
            match self.negotiate_option(client, no_zeroes)? {
                Negotiated::More => {}
                Negotiated::Go => return Ok(true),
                Negotiated::Abort => return Ok(false),
            }
        }
        Err(invalid("the client sends too many options"))
    }

    fn negotiate_option(
        &self,
        client: &mut (impl Read + Write),
        no_zeroes: bool,
    ) -> io::Result<Negotiated> {
        if u64::from_be_bytes(read(client)?) != OPTION_MAGIC {
            return Err(invalid("the client sends no option"));
        }
        let option = u32::from_be_bytes(read(client)?);
        let length = u32::from_be_bytes(read(client)?);
        if length > MAX_OPTION {
            return Err(invalid("the client sends an option that is too long"));
        }
        let mut data = vec![0; length as usize];
        client.read_exact(&mut data)?;
        match option {
            OPT_EXPORT_NAME if data.is_empty() => {
                client.write_all(&self.size_and_flags())?;
                if !no_zeroes {
                    client.write_all(&ZEROES)?;
                }
                Ok(Negotiated::Go)
            }
            OPT_EXPORT_NAME => Err(invalid("the client wants an export that does not exist")),
            OPT_ABORT => reply(client, option, REP_ACK, &[]).map(|()| Negotiated::Abort),
            OPT_LIST => {
                reply(client, option, REP_SERVER, &0u32.to_be_bytes())?;
                reply(client, option, REP_ACK, &[]).map(|()| Negotiated::More)
            }
            OPT_INFO | OPT_GO => self.describe(client, option, &data),
            _ => reply(client, option, REP_ERR_UNSUP, &[]).map(|()| Negotiated::More),
        }
    }

    /// Answers [`OPT_INFO`] and [`OPT_GO`], whose data is the name of the export and what else the
    /// client wants to know; it is told all that there is.
    fn describe(
        &self,
        client: &mut (impl Read + Write),
        option: u32,
        data: &[u8],
    ) -> io::Result<Negotiated> {
        let refusal = match take_u32(&mut &data[..]) {
            None => REP_ERR_INVALID,
            Some(0) => {
                let export = [&INFO_EXPORT.to_be_bytes()[..], &self.size_and_flags()];
                reply(client, option, REP_INFO, &export.concat())?;
                reply(client, option, REP_INFO, &self.block_sizes())?;
                reply(client, option, REP_ACK, &[])?;
                return Ok(match option {
                    OPT_GO => Negotiated::Go,
                    _ => Negotiated::More,
                });
            }
            Some(_) => REP_ERR_UNKNOWN,
        };
        reply(client, option, refusal, &[]).map(|()| Negotiated::More)
    }

    fn size_and_flags(&self) -> [u8; 10] {
        let flag = |flag: u16, is_set| if is_set { flag } else { 0 };
        let flags = FLAG_HAS_FLAGS
            | FLAG_SEND_FLUSH
            | FLAG_SEND_FUA
            | flag(FLAG_READ_ONLY, self.info.read_only)
            | flag(FLAG_SEND_TRIM, self.info.discard.is_some())
            | flag(FLAG_SEND_WRITE_ZEROES, self.info.write_zeroes);
        let mut bytes = [0; 10];
        let all = self.info.size.to_be_bytes().into_iter();
        for (byte, value) in bytes.iter_mut().zip(all.chain(flags.to_be_bytes())) {
            *byte = value;
        }
        bytes
    }

    fn block_sizes(&self) -> Vec<u8> {
        let (least, preferred) = (self.info.logical_block_size, self.info.physical_block_size);
        let sizes = [least, preferred.max(4096), MAX_TRANSFER].map(u32::to_be_bytes);
        [&INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes.concat()].concat()
    }

    /// Carries a command out, and replies.
    fn carry_out(&mut self, client: &mut (impl Read + Write), command: &Command) -> io::Result<()> {
        if command.kind == CMD_WRITE && command.length > MAX_TRANSFER {
            return Err(invalid("the client writes too much at once"));
        }
        let data = match command.kind {
            CMD_READ | CMD_WRITE => self.buffers(command.length),
            _ => Ok(Vec::new()),
        };
        let data = match (command.kind, data) {
            (CMD_WRITE, Ok(mut data)) => receive(client, &mut data).map(|()| Ok(data))?,
            (CMD_WRITE, Err(errno)) => skip(client, command.length).map(|()| Err(errno))?,
            (_, data) => data,
        };
        let result = match data {
            Ok(data) => self.carry_out_with(command, data)?,
            Err(errno) => Err(errno),
        };
        let error = result.as_ref().err().map_or(0, |errno| number(*errno));
        let header = [
            &SIMPLE_REPLY_MAGIC.to_be_bytes()[..],
            &error.to_be_bytes(),
            &command.cookie.to_be_bytes(),
        ];
        client.write_all(&header.concat())?;
        match result {
            Ok(data) if command.kind == CMD_READ => send(client, &data),
            _ => Ok(()),
        }
    }

    fn carry_out_with(&mut self, command: &Command, data: Vec<Buffer>) -> io::Result<Outcome> {
        let fua = command.flags & CMD_FLAG_FUA != 0;
        let operation = match command.kind {
            CMD_READ => Operation::Read,
            CMD_WRITE => Operation::Write { fua },
            CMD_FLUSH => return self.submit(vec![Request::flush(0)]),
            CMD_TRIM => Operation::Discard,
            CMD_WRITE_ZEROES => Operation::WriteZeroes {
                may_unmap: command.flags & CMD_FLAG_NO_HOLE == 0 && self.info.discard.is_some(),
            },
            _ => return Ok(Err(Errno::INVAL)),
        };
        match operation {
            Operation::Read | Operation::Write { .. } => {
                self.submit(requests(operation, command.offset, data))
            }
            Operation::Discard if self.info.discard.is_none() => Ok(Err(Errno::OPNOTSUPP)),
            _ => self.submit_without_data(operation, command, fua),
        }
    }

    fn submit_without_data(
        &mut self,
        operation: Operation,
        command: &Command,
        fua: bool,
    ) -> io::Result<Outcome> {
        let request = Request {
            operation,
            offset: command.offset,
            length: command.length.into(),
            buffers: Vec::new(),
            tag: 0,
        };
        match self.submit(vec![request])? {
            Ok(_) if fua => self.submit(vec![Request::flush(0)]),
            done => Ok(done),
        }
    }

    /// Carries requests out, whose tags are their places, and returns their buffers in order.
    fn submit(&mut self, requests: Vec<Request>) -> io::Result<Outcome> {
        requests
            .into_iter()
            .for_each(|request| self.queue.submit(request));
        let mut done: Vec<Completion> = Vec::new();
        while let Err(error) = self.queue.drain(STEP, &mut done) {
            let is_slow = error.errno() == Errno::TIMEDOUT && self.queue.in_flight() != 0;
            if !is_slow || self.is_stopped.load(Ordering::Relaxed) {
                return Err(io::Error::other(error.to_string()));
            }
        }
        done.sort_by_key(|completion| completion.tag);
        let mut buffers = Vec::new();
        for completion in done {
            match completion.result {
                Ok(()) => buffers.extend(completion.buffers),
                Err(error) => return Ok(Err(error.errno())),
            }
        }
        Ok(Ok(buffers))
    }

    /// Returns memory for the data of a command, each part for one request.
    fn buffers(&self, length: u32) -> Outcome {
        if length == 0 || length > MAX_TRANSFER {
            return Err(Errno::INVAL);
        }
        let block = u64::from(self.info.logical_block_size);
        let most = self.info.max_transfer.min(CHUNK);
        let most = most.saturating_sub(most.checked_rem(block).unwrap_or(0));
        let mut left = u64::from(length);
        let mut buffers = Vec::new();
        while left != 0 {
            let part = usize::try_from(left.min(most)).unwrap_or(0);
            let align = self.info.buffer_alignment;
            buffers.push(Buffer::allocate(part, align).ok_or(Errno::NOMEM)?);
            left = left.saturating_sub(part as u64);
        }
        Ok(buffers)
    }
}

/// Returns a request for each buffer, for adjacent ranges.
fn requests(operation: Operation, mut offset: u64, buffers: Vec<Buffer>) -> Vec<Request> {
    let mut requests = Vec::new();
    for (tag, buffer) in (0..).zip(buffers) {
        let length = buffer.len() as u64;
        requests.push(Request {
            operation,
            offset,
            length,
            buffers: vec![buffer],
            tag,
        });
        offset = offset.saturating_add(length);
    }
    requests
}

fn reply(client: &mut impl Write, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    let message = [
        &OPTION_REPLY_MAGIC.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ];
    client.write_all(&message.concat())
}

/// Reads a command. Returns [`None`] if the client disconnects instead.
fn read_command(client: &mut impl Read) -> io::Result<Option<Command>> {
    let bytes = match read(client) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    match Command::decode(&bytes) {
        Some(command) if command.kind == CMD_DISC => Ok(None),
        Some(command) => Ok(Some(command)),
        None => Err(invalid("the client sends no command")),
    }
}

fn read<const N: usize>(client: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Receives the data of a write.
fn receive(client: &mut impl Read, data: &mut [Buffer]) -> io::Result<()> {
    for buffer in data {
        let mut bytes = vec![0; buffer.len()];
        client.read_exact(&mut bytes)?;
        buffer.write_at(0, &bytes).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Receives the data of a write that cannot be carried out.
fn skip(client: &mut impl Read, length: u32) -> io::Result<()> {
    let length = u64::from(length);
    match io::copy(&mut client.take(length), &mut io::sink())? {
        copied if copied == length => Ok(()),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    }
}

/// Sends the data of a read.
fn send(client: &mut impl Write, data: &[Buffer]) -> io::Result<()> {
    for buffer in data {
        let mut bytes = vec![0; buffer.len()];
        buffer.read_at(0, &mut bytes).map_err(io::Error::other)?;
        client.write_all(&bytes)?;
    }
    Ok(())
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}
