// SPDX-License-Identifier: GPL-2.0-only

//! Requests as operations of io_uring.
//!
//! A request is one operation, unless the kernel does only a part of it, or cannot do it as one.

use super::file::{self, Kind, SECTOR};
use super::Image;
use crate::bounce;
use crate::check::check;
use crate::error::{Error, Result};
use crate::memory::allocate;
use crate::request::{Completion, Operation, Request};
use crate::uring::{FallocateMode, Finished, Op, Ring, Sync, Transfer};
use crate::Queue;
use io_buffer::Buffer;
use rustix::fs::{seek, SeekFrom};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// The length of one write of zeros, where the storage has no operation for it.
const ZEROS: u64 = 1 << 20;

/// Number of consecutive transfers of nothing that are accepted.
const MAX_STALLS: u8 = 8;

/// A queue of an image.
pub(super) struct RawQueue {
    image: Arc<Image>,
    ring: Ring<Task>,
    /// Requests for which the ring has no room.
    waiting: VecDeque<Request>,
    /// Operations that the ring has not taken.
    refused: VecDeque<(Op, Task)>,
}

/// A request in the ring.
struct Task {
    tag: u64,
    operation: Operation,
    /// The offset in the image of what is not done.
    position: u64,
    end: u64,
    /// The buffers of the request, if the operation does not use them.
    bounced: Vec<Buffer>,
    /// The error of a request that cannot be carried out.
    refused: Option<Box<Error>>,
    stalls: u8,
}

/// The next step of a task.
enum Next {
    /// It starts an operation.
    Start(Op),
    /// It is complete, and no longer needs its buffers.
    Complete(Result<()>, Vec<Buffer>),
}

impl RawQueue {
    pub(super) fn new(image: Arc<Image>, depth: u32) -> Result<Self> {
        let ring = Ring::new(depth, image.fd.clone())?;
        Ok(Self {
            image,
            ring,
            waiting: VecDeque::new(),
            refused: VecDeque::new(),
        })
    }

    /// Starts a request. There must be room in the ring. Returns `false` if it takes nothing.
    fn start(&mut self, mut request: Request) -> bool {
        let info = self.image.info();
        let mut task = Task {
            tag: request.tag,
            operation: request.operation,
            position: request.offset,
            end: request.offset.saturating_add(request.length),
            bounced: Vec::new(),
            refused: None,
            stalls: 0,
        };
        let op = check(&request, &info).and_then(|()| self.first_op(&mut request, &mut task));
        let op = op.unwrap_or_else(|error| {
            task.refused = Some(Box::new(error));
            task.bounced = request.buffers;
            Op::Nop
        });
        self.push(op, task)
    }

    /// Returns the first operation of a request that has passed the checks.
    ///
    /// Takes the buffers of the request, unless it fails.
    fn first_op(&self, request: &mut Request, task: &mut Task) -> Result<Op> {
        Ok(match request.operation {
            Operation::Read => Op::Read(request.offset, self.transfer(request, task)?),
            Operation::Write { fua } => {
                // In the page cache it is flushed afterwards: the error of a write that includes a
                // flush does not say which of the two has failed.
                let is_direct = self.image.info.guarantees.direct;
                let sync = if fua && is_direct {
                    Sync::Data
                } else {
                    Sync::No
                };
                Op::Write(request.offset, self.transfer(request, task)?, sync)
            }
            Operation::Flush => Op::Datasync,
            Operation::Discard => match self.image.kind {
                Kind::Device => Op::BlockDiscard(request.offset, request.length),
                Kind::File => {
                    Op::Fallocate(FallocateMode::PunchHole, request.offset, request.length)
                }
            },
            Operation::WriteZeroes { may_unmap } => {
                let mode = if may_unmap {
                    FallocateMode::PunchHole
                } else {
                    FallocateMode::ZeroRange
                };
                Op::Fallocate(mode, request.offset, request.length)
            }
        })
    }

    /// Returns the memory of a read or write: its buffers, or a copy that direct I/O can use.
    fn transfer(&self, request: &mut Request, task: &mut Task) -> Result<Transfer> {
        let alignment = self.image.info.buffer_alignment;
        if bounce::is_aligned(&request.buffers, alignment) {
            return Ok(Transfer::new(mem::take(&mut request.buffers)));
        }
        let length = bounce::length(&request.buffers);
        let mut copy = file::allocate_aligned(length, &self.image.info)?;
        if request.operation != Operation::Read {
            bounce::gather(&request.buffers, &mut copy)?;
        }
        task.bounced = mem::take(&mut request.buffers);
        Ok(Transfer::new(vec![copy]))
    }

    /// Adds an operation to the ring, where there must be room. Returns `false` if the ring does
    /// not take it: `kick` and `completions` report that.
    fn push(&mut self, op: Op, task: Task) -> bool {
        let refused = self.ring.push(op, task).err();
        let is_taken = refused.is_none();
        self.refused.extend(refused);
        is_taken
    }

    /// Moves operations and requests to the ring while there is room.
    fn refill(&mut self) {
        while self.ring.has_room() {
            let is_taken = if let Some((op, task)) = self.refused.pop_front() {
                self.push(op, task)
            } else if let Some(request) = self.waiting.pop_front() {
                self.start(request)
            } else {
                return;
            };
            if !is_taken {
                return;
            }
        }
    }

    /// Decides how a task continues after an operation.
    fn next(&self, op: Op, task: &mut Task, result: std::result::Result<u32, Errno>) -> Next {
        match op {
            Op::Nop => {
                let refused = task.refused.take();
                Next::Complete(refused.map_or(Ok(()), |error| Err(*error)), Vec::new())
            }
            Op::Datasync => Next::Complete(self.image.flushed(result.map(drop)), Vec::new()),
            Op::Read(_, transfer) => self.next_read(transfer, task, result),
            Op::Write(_, transfer, sync) => next_write(transfer, sync, task, result),
            Op::Fallocate(..) | Op::BlockDiscard(..) => next_range(&op, task, result),
        }
    }

    fn next_read(
        &self,
        mut transfer: Transfer,
        task: &mut Task,
        result: std::result::Result<u32, Errno>,
    ) -> Next {
        let count = match result {
            Ok(count) => count as usize,
            Err(errno) => {
                return Next::Complete(Err(io_error(errno, task)), transfer.into_buffers())
            }
        };
        let reached = task.position.saturating_add(count as u64);
        if count < transfer.left() && self.is_end(reached) {
            transfer.advance(count);
            let result = transfer.zero_rest();
            return Next::Complete(result, transfer.into_buffers());
        }
        match advance(&mut transfer, task, count) {
            Ok(true) => Next::Complete(Ok(()), transfer.into_buffers()),
            Ok(false) => Next::Start(Op::Read(task.position, transfer)),
            Err(error) => Next::Complete(Err(error), transfer.into_buffers()),
        }
    }

    /// Returns `true` if there is no data at `offset` and beyond: it is in the last sector of a
    /// file whose size is no multiple of a sector, or the file has shrunk.
    fn is_end(&self, offset: u64) -> bool {
        self.image.kind == Kind::File
            && seek(self.ring.file(), SeekFrom::End(0)).is_ok_and(|size| offset >= size)
    }
}

/// Takes the result of a transfer into account.
///
/// Returns `true` if all bytes are done. A part of a sector is done again with the next operation.
fn advance(transfer: &mut Transfer, task: &mut Task, count: usize) -> Result<bool> {
    let left = transfer.left();
    if count >= left {
        return Ok(true);
    }
    let whole = count.saturating_sub(count % SECTOR as usize);
    if whole == 0 {
        task.stalls = task.stalls.saturating_add(1);
        if task.stalls > MAX_STALLS {
            return Err(io_error(Errno::IO, task));
        }
    } else {
        task.stalls = 0;
    }
    transfer.advance(whole);
    task.position = task.position.saturating_add(whole as u64);
    Ok(false)
}

fn next_write(
    mut transfer: Transfer,
    sync: Sync,
    task: &mut Task,
    result: std::result::Result<u32, Errno>,
) -> Next {
    let length = transfer.left() as u64;
    let done = match result {
        Ok(count) => advance(&mut transfer, task, count as usize),
        Err(errno) => Err(io_error(errno, task)),
    };
    match done {
        Ok(false) => Next::Start(Op::Write(task.position, transfer, sync)),
        Ok(true) if matches!(task.operation, Operation::WriteZeroes { .. }) => {
            task.position = task.position.saturating_add(length);
            write_zeros(task)
        }
        Ok(true) if sync == Sync::No && task.operation == (Operation::Write { fua: true }) => {
            if task.bounced.is_empty() {
                task.bounced = transfer.into_buffers();
            }
            Next::Start(Op::Datasync)
        }
        Ok(true) => Next::Complete(Ok(()), transfer.into_buffers()),
        Err(error) => Next::Complete(Err(error), transfer.into_buffers()),
    }
}

/// Continues after an operation on a range, with another one if the storage does not support it.
fn next_range(op: &Op, task: &mut Task, result: std::result::Result<u32, Errno>) -> Next {
    let length = task.end.saturating_sub(task.position);
    let errno = match result {
        Ok(_) => return Next::Complete(Ok(()), Vec::new()),
        Err(errno) => errno,
    };
    if !matches!(
        errno,
        Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NOTTY | Errno::PERM
    ) {
        return Next::Complete(Err(io_error(errno, task)), Vec::new());
    }
    match (task.operation, op) {
        (Operation::Discard, Op::BlockDiscard(..)) => Next::Start(Op::Fallocate(
            FallocateMode::PunchHole,
            task.position,
            length,
        )),
        (Operation::WriteZeroes { .. }, Op::Fallocate(FallocateMode::PunchHole, ..)) => {
            Next::Start(Op::Fallocate(
                FallocateMode::ZeroRange,
                task.position,
                length,
            ))
        }
        (Operation::WriteZeroes { .. }, _) => write_zeros(task),
        _ => Next::Complete(Err(io_error(Errno::OPNOTSUPP, task)), Vec::new()),
    }
}

/// Continues with a write of zeros, until the end of the range.
fn write_zeros(task: &Task) -> Next {
    let left = task.end.saturating_sub(task.position);
    if left == 0 {
        return Next::Complete(Ok(()), Vec::new());
    }
    match allocate(left.min(ZEROS) as usize, 4096) {
        Ok(zeros) => Next::Start(Op::Write(
            task.position,
            Transfer::new(vec![zeros]),
            Sync::No,
        )),
        Err(error) => Next::Complete(Err(error), Vec::new()),
    }
}

fn io_error(errno: Errno, task: &Task) -> Error {
    let operation = match task.operation {
        Operation::Read => "read",
        Operation::Write { .. } => "write",
        Operation::Flush => "flush",
        Operation::Discard => "discard",
        Operation::WriteZeroes { .. } => "write zeroes",
    };
    let remedy = match errno {
        Errno::NOSPC | Errno::DQUOT => "free some space on the file system of the image",
        _ => "check the storage below the image",
    };
    Error::new(
        errno,
        format!(
            "{operation} of bytes {} to {}: {errno}",
            task.position, task.end
        ),
        remedy,
    )
}

impl AsFd for RawQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl Queue for RawQueue {
    fn submit(&mut self, request: Request) {
        let waits = !self.waiting.is_empty() || !self.refused.is_empty();
        if !waits && self.ring.has_room() {
            self.start(request);
        } else {
            self.waiting.push_back(request);
        }
    }

    fn kick(&mut self) -> Result<()> {
        self.refill();
        self.ring.submit()
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) -> Result<()> {
        while let Some(Finished {
            op,
            context: mut task,
            result,
        }) = self.ring.pop()
        {
            let (mut result, mut buffers) = match self.next(op, &mut task, result) {
                Next::Start(op) => {
                    self.push(op, task);
                    continue;
                }
                Next::Complete(result, buffers) => (result, buffers),
            };
            if !task.bounced.is_empty() {
                if let (Operation::Read, Ok(()), Some(copy)) =
                    (task.operation, &result, buffers.first())
                {
                    result = bounce::scatter(copy, &mut task.bounced);
                }
                buffers = task.bounced;
            }
            completions.push(Completion {
                tag: task.tag,
                result,
                buffers,
            });
        }
        self.kick()
    }

    fn in_flight(&self) -> usize {
        self.ring
            .in_flight()
            .saturating_add(self.waiting.len())
            .saturating_add(self.refused.len())
    }

    fn register(&mut self, buffer: &mut Buffer) {
        self.ring.register(buffer);
    }

    fn unregister(&mut self, buffer: Buffer) {
        self.ring.unregister(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use crate::raw::RawEngine;

    const SIZE: u64 = 1 << 20;

    /// Returns a queue of an empty image.
    fn queue(direct: Option<bool>, depth: u32) -> RawQueue {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, vec![0; SIZE as usize]).unwrap();
        let options = Options {
            direct,
            ..Options::default()
        };
        let engine = RawEngine::open(&path, &options).unwrap();
        RawQueue::new(engine.image, depth).unwrap()
    }

    fn task(operation: Operation, offset: u64, length: u64) -> Task {
        Task {
            tag: 7,
            operation,
            position: offset,
            end: offset + length,
            bounced: Vec::new(),
            refused: None,
            stalls: 0,
        }
    }

    /// Returns the error number of a flush for which the kernel has this result.
    fn flush(queue: &RawQueue, result: std::result::Result<u32, Errno>) -> Option<Errno> {
        match queue.next(Op::Datasync, &mut task(Operation::Flush, 0, 0), result) {
            Next::Complete(result, _) => result.err().map(|error| error.errno()),
            Next::Start(_) => panic!("a flush is one operation"),
        }
    }

    #[test]
    fn no_flush_succeeds_after_one_that_has_failed() {
        for errno in [Errno::NOSPC, Errno::DQUOT, Errno::TIMEDOUT, Errno::AGAIN] {
            let queue = queue(Some(false), 4);
            assert_eq!(flush(&queue, Err(Errno::OPNOTSUPP)), Some(Errno::OPNOTSUPP));
            assert_eq!(flush(&queue, Ok(0)), None);
            assert_eq!(flush(&queue, Err(errno)), Some(Errno::IO));
            assert_eq!(flush(&queue, Ok(0)), Some(Errno::IO));
        }
    }

    #[test]
    fn a_write_to_the_page_cache_is_flushed_by_an_operation_of_its_own() {
        let mut queue = queue(Some(false), 4);
        let buffer = allocate(4096, 4096).unwrap();
        let mut request = Request::write(7, 0, vec![buffer]);
        request.operation = Operation::Write { fua: true };
        let mut task = task(request.operation, 0, 4096);
        let op = queue.first_op(&mut request, &mut task).unwrap();
        assert!(matches!(op, Op::Write(_, _, Sync::No)));
        let Next::Start(op) = queue.next(op, &mut task, Ok(4096)) else {
            panic!("the write is not flushed");
        };
        assert!(matches!(op, Op::Datasync));
        queue.push(op, task);
        let mut completions = Vec::new();
        queue.drain(crate::DROP_TIMEOUT, &mut completions).unwrap();
        completions[0].result.as_ref().unwrap();
        assert_eq!(completions[0].buffers.len(), 1);
    }

    #[test]
    fn what_the_ring_does_not_take_is_continued_later() {
        let mut queue = queue(None, 1);
        queue.submit(Request::flush(1));
        // Half of it is done.
        let mut task = task(Operation::Write { fua: false }, 0, 8192);
        task.position = 4096;
        let mut transfer = Transfer::new(vec![allocate(8192, 4096).unwrap()]);
        transfer.advance(4096);
        assert!(!queue.push(Op::Write(4096, transfer, Sync::No), task));
        assert_eq!(queue.in_flight(), 2);
        let mut completions = Vec::new();
        queue.drain(crate::DROP_TIMEOUT, &mut completions).unwrap();
        assert_eq!(completions.len(), 2);
        for completion in completions {
            completion.result.unwrap();
        }
    }
}
