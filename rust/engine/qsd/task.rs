// SPDX-License-Identifier: GPL-2.0-only

//! A request and its state, as the commands of a virtio block device.
//!
//! The data is one range of the shared memory: the buffer of the request, or a copy of its buffers.

use super::link::Shared;
use super::vhost_user::DeviceConfig;
use super::virtqueue::Payload;
use crate::bounce;
use crate::error::{Error, Result};
use crate::request::{Completion, Operation, Request};
use io_buffer::Buffer;
use rustix::io::Errno;
use std::mem;

const SECTOR: u64 = 512;

/// The types of requests (`VIRTIO_BLK_T_IN` and so on).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const UNMAP: u32 = 1;

/// A request and its state.
pub(super) struct Task {
    request: Request,
    /// The data, if the buffers of the request cannot be used.
    copy: Option<Buffer>,
    /// The offset of the data in the shared memory.
    data: usize,
    /// The offset in the image of what is not done.
    position: u64,
    /// The data of a write has been written, and is being flushed.
    is_flushing: bool,
    /// The number of writes that were completed before.
    writes: u64,
    /// The number of connections that were lost since the request was submitted.
    losses: u8,
}

/// The continuation of a task when the device has completed a command.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Next {
    /// With another command.
    Again,
    /// It is complete.
    Done,
}

impl Task {
    /// Creates the task of a request that has passed the checks.
    pub(super) fn new(
        request: Request,
        shared: &Shared,
    ) -> std::result::Result<Self, (Request, Error)> {
        let (data, copy) = match place(&request, shared) {
            Ok(placed) => placed,
            Err(error) => return Err((request, error)),
        };
        Ok(Self {
            position: request.offset,
            is_flushing: false,
            writes: shared.writes.completed(),
            losses: 0,
            request,
            copy,
            data,
        })
    }

    /// Returns the type, the sector and the payload of the next command.
    pub(super) fn command(&self, config: &DeviceConfig) -> (u32, u64, Payload) {
        let sector = self.position / SECTOR;
        // By the checks of the request it is not longer than what the geometry says.
        let len = self.request.length as u32;
        let range = |unmap| {
            let sectors = (self.chunk(config) / SECTOR) as u32;
            Payload::Range(sectors, if unmap { UNMAP } else { 0 })
        };
        match self.request.operation {
            _ if self.is_flushing => (FLUSH, 0, Payload::None),
            Operation::Read => (IN, sector, Payload::In(self.data, len)),
            Operation::Write { .. } => (OUT, sector, Payload::Out(self.data, len)),
            Operation::Flush => (FLUSH, 0, Payload::None),
            Operation::Discard => (DISCARD, sector, range(false)),
            Operation::WriteZeroes { may_unmap } => (WRITE_ZEROES, sector, range(may_unmap)),
        }
    }

    /// Returns the length of the next command of a discard or write zeroes.
    fn chunk(&self, config: &DeviceConfig) -> u64 {
        let max = match self.request.operation {
            Operation::Discard => config.max_discard_sectors,
            _ => config.max_write_zeroes_sectors,
        };
        self.left().min(u64::from(max).saturating_mul(SECTOR))
    }

    fn left(&self) -> u64 {
        let end = self.request.offset.saturating_add(self.request.length);
        end.saturating_sub(self.position)
    }

    /// Takes the completion of a command into account.
    pub(super) fn advance(&mut self, config: &DeviceConfig) -> Next {
        match self.request.operation {
            Operation::Write { fua: true } if !self.is_flushing => {
                self.is_flushing = true;
                Next::Again
            }
            Operation::Discard | Operation::WriteZeroes { .. } => {
                self.position = self.position.saturating_add(self.chunk(config));
                match self.left() {
                    0 => Next::Done,
                    _ => Next::Again,
                }
            }
            _ => Next::Done,
        }
    }

    /// Returns the task after its connection was lost: it starts again.
    pub(super) fn after_loss(mut self) -> Self {
        self.position = self.request.offset;
        self.is_flushing = false;
        self.losses = self.losses.saturating_add(1);
        self
    }

    /// Returns the number of connections that were lost since the request was submitted.
    pub(super) fn losses(&self) -> u8 {
        self.losses
    }

    /// Returns `true` if the command of the task is a flush.
    pub(super) fn is_flush(&self) -> bool {
        self.is_flushing || self.request.operation == Operation::Flush
    }

    /// Returns the request for what is not done, and takes the buffers from the task.
    pub(super) fn second_request(&mut self) -> Request {
        let operation = match self.request.operation {
            _ if self.is_flush() => Operation::Flush,
            operation => operation,
        };
        let (offset, length) = match operation {
            Operation::Flush => (0, 0),
            _ => (self.position, self.left()),
        };
        let buffers = match operation {
            Operation::Read | Operation::Write { .. } => match self.copy.take() {
                Some(copy) => vec![copy],
                None => mem::take(&mut self.request.buffers),
            },
            _ => Vec::new(),
        };
        Request {
            operation,
            offset,
            length,
            buffers,
            tag: 0,
        }
    }

    /// Gives the buffers of [`Self::second_request`] back.
    pub(super) fn give_back(&mut self, mut buffers: Vec<Buffer>) {
        if self.request.buffers.is_empty() {
            self.request.buffers = buffers;
        } else if let Some(copy) = buffers.pop() {
            // A flush has none: the copy has stayed.
            self.copy = Some(copy);
        }
    }

    /// Returns the completion of the request.
    pub(super) fn complete(mut self, shared: &Shared, mut result: Result<()>) -> Completion {
        match self.request.operation {
            Operation::Read => {
                if let (Ok(()), Some(copy)) = (&result, &self.copy) {
                    result = bounce::scatter(copy, &mut self.request.buffers);
                }
            }
            Operation::Flush if result.is_ok() => shared.writes.flush(self.writes),
            Operation::Flush => {}
            _ => shared.writes.add(),
        }
        self.request.complete(result)
    }

    /// Returns an error of the device.
    pub(super) fn error(&self, errno: Errno) -> Error {
        Error::new(
            errno,
            format!(
                "qemu-storage-daemon fails {:?} of {} bytes at {}: {errno}",
                self.request.operation, self.request.length, self.request.offset
            ),
            "check the storage below the image",
        )
    }
}

/// Returns where the data of a request is in the shared memory, and the copy that it is in.
fn place(request: &Request, shared: &Shared) -> Result<(usize, Option<Buffer>)> {
    if !matches!(request.operation, Operation::Read | Operation::Write { .. }) {
        return Ok((0, None));
    }
    if let [buffer] = request.buffers.as_slice() {
        if let Some(data) = shared.memory.offset(buffer) {
            return Ok((data, None));
        }
    }
    let mut copy = shared.memory.allocate(bounce::length(&request.buffers))?;
    if request.operation != Operation::Read {
        bounce::gather(&request.buffers, &mut copy)?;
    }
    let data = shared.memory.offset(&copy).unwrap_or_default();
    Ok((data, Some(copy)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{write, FakeServer};
    use super::*;

    #[test]
    fn the_copy_of_a_durable_write_stays_until_it_is_flushed() {
        let (_server, engine, _queue) = FakeServer::open();
        let request = Request {
            operation: Operation::Write { fua: true },
            ..write()
        };
        let Ok(mut task) = Task::new(request, &engine.shared) else {
            panic!("there is no memory");
        };
        assert_eq!(task.advance(&engine.shared.config), Next::Again);
        let second = task.second_request();
        assert_eq!(second.operation, Operation::Flush);
        task.give_back(second.buffers);
        assert!(task.copy.is_some());
        // It is written again from there, and the second attempt gets it.
        let mut task = task.after_loss();
        let second = task.second_request();
        assert_eq!(second.buffers.len(), 1);
        task.give_back(second.buffers);
        assert!(task.copy.is_some());
    }
}
