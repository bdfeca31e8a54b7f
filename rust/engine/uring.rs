// SPDX-License-Identifier: GPL-2.0-only

//! I/O on one file through io_uring.
//!
//! All unsafe code for the kernel's `include/uapi/linux/io_uring.h`, on top of the crate
//! `io-uring`. A [`Ring`] owns the memory and the file of each operation until its completion has
//! been read, so that no safe caller can free or change what the kernel still uses.

use crate::error::{Error, Result};
use crate::wait_readable;
use io_buffer::Buffer;
use io_uring::{opcode, squeue, types, IoUring};
use rustix::io::Errno;
use std::mem::{self, ManuallyDrop};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// `BLOCK_URING_CMD_DISCARD` of `include/uapi/linux/blkdev.h`: `_IO(0x12, 0)`.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// The number of buffers that a ring registers at most.
const MAX_REGISTERED: u16 = 1024;

/// The number of the last ring that was created.
static LAST_RING: AtomicU64 = AtomicU64::new(0);

/// Time for which starting operations is retried while the kernel has no memory for them.
const SUBMIT_TIMEOUT: Duration = Duration::from_secs(5);

/// An operation on the file of a ring, with the memory that it uses.
#[derive(Debug)]
pub(crate) enum Op {
    /// `IORING_OP_READV` at an offset.
    Read(u64, Transfer),
    /// `IORING_OP_WRITEV` at an offset; with `RWF_DSYNC` for [`Sync::Data`].
    Write(u64, Transfer, Sync),
    /// `IORING_OP_FSYNC` with `IORING_FSYNC_DATASYNC`.
    Datasync,
    /// `IORING_OP_FALLOCATE` of a range.
    Fallocate(FallocateMode, u64, u64),
    /// `BLOCK_URING_CMD_DISCARD` of a range, on a block device.
    BlockDiscard(u64, u64),
    /// `IORING_OP_NOP`.
    Nop,
}

/// When a write completes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Sync {
    /// When the kernel or the device has accepted the data.
    No,
    /// When the data is durable (`RWF_DSYNC`).
    Data,
}

/// The mode of a fallocate, all with `FALLOC_FL_KEEP_SIZE`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum FallocateMode {
    /// `FALLOC_FL_PUNCH_HOLE`: zeroes and frees.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`: zeroes and stays allocated.
    ZeroRange,
}

impl FallocateMode {
    fn flags(self) -> i32 {
        libc::FALLOC_FL_KEEP_SIZE
            | match self {
                Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
                Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
            }
    }
}

/// The memory of a read or write, and how much of it is done.
///
/// # Invariants
///
/// Each of `vectors` describes a part of the memory of one of `buffers`.
#[derive(Debug)]
pub(crate) struct Transfer {
    buffers: Vec<Buffer>,
    vectors: Vectors,
    /// The index of the first vector that is not done.
    first: usize,
}

/// Ranges of memory; a single one, as most transfers have, takes no allocation.
#[derive(Debug)]
enum Vectors {
    One(libc::iovec),
    Many(Vec<libc::iovec>),
}

impl Vectors {
    fn as_slice(&self) -> &[libc::iovec] {
        match self {
            Self::One(vector) => slice::from_ref(vector),
            Self::Many(vectors) => vectors,
        }
    }

    fn as_mut_slice(&mut self) -> &mut [libc::iovec] {
        match self {
            Self::One(vector) => slice::from_mut(vector),
            Self::Many(vectors) => vectors,
        }
    }
}

// SAFETY: By the type invariants the pointers in `vectors` are those of `buffers`, which is `Send`.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Creates a transfer of all bytes of `buffers`.
    pub(crate) fn new(mut buffers: Vec<Buffer>) -> Self {
        let vector = |buffer: &mut Buffer| libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // INVARIANT: Each vector is the whole memory of a buffer.
        let vectors = match &mut buffers[..] {
            [buffer] => Vectors::One(vector(buffer)),
            buffers => Vectors::Many(buffers.iter_mut().map(vector).collect()),
        };
        Self {
            buffers,
            vectors,
            first: 0,
        }
    }

    /// Excludes the first `count` bytes from further operations.
    pub(crate) fn advance(&mut self, mut count: usize) {
        while let Some(vector) = self.vectors.as_mut_slice().get_mut(self.first) {
            if let Some(left) = vector.iov_len.checked_sub(count).filter(|left| *left > 0) {
                vector.iov_base = vector.iov_base.wrapping_byte_add(count);
                // INVARIANT: The vector is the end of what it was.
                vector.iov_len = left;
                return;
            }
            count = count.saturating_sub(vector.iov_len);
            self.first = self.first.saturating_add(1);
        }
    }

    /// Returns the number of bytes that are not done.
    pub(crate) fn left(&self) -> usize {
        self.pending()
            .iter()
            .fold(0, |sum, vector| sum.saturating_add(vector.iov_len))
    }

    /// Sets the bytes that are not done to zero.
    pub(crate) fn zero_rest(&mut self) -> Result<()> {
        let mut skip = self
            .buffers
            .iter()
            .fold(0usize, |sum, buffer| sum.saturating_add(buffer.len()))
            .saturating_sub(self.left());
        for buffer in &mut self.buffers {
            let start = skip.min(buffer.len());
            buffer.fill(start, buffer.len().saturating_sub(start), 0)?;
            skip = skip.saturating_sub(start);
        }
        Ok(())
    }

    /// Returns the buffers.
    pub(crate) fn into_buffers(self) -> Vec<Buffer> {
        self.buffers
    }

    fn pending(&self) -> &[libc::iovec] {
        let vectors = self.vectors.as_slice();
        vectors.get(self.first..).unwrap_or_default()
    }

    /// Returns the registration of the memory if it is in one buffer, else 0.
    fn registration(&self) -> u64 {
        match &self.buffers[..] {
            [buffer] => buffer.registration(),
            _ => 0,
        }
    }
}

/// An operation that is complete.
#[derive(Debug)]
pub(crate) struct Finished<T> {
    /// The operation, with its memory.
    pub(crate) op: Op,
    /// The caller's data.
    pub(crate) context: T,
    /// The result that the system call would have returned.
    pub(crate) result: std::result::Result<u32, Errno>,
}

/// A pair of submission and completion ring for one file.
///
/// Its file descriptor is readable while completions wait.
///
/// # Invariants
///
/// - Each entry of the submission ring, and each operation that the kernel has not completed, has
///   its index in `slots` as user data, and that slot holds the operation.
/// - `ring` is dropped only when the kernel has completed all operations.
pub(crate) struct Ring<T> {
    ring: ManuallyDrop<IoUring>,
    /// Is open while an operation uses it.
    file: Arc<OwnedFd>,
    slots: Vec<Option<(Op, T)>>,
    free: Vec<usize>,
    capacity: usize,
    /// The upper bits of the registrations of this ring's buffers; the lower 16 are an index.
    number: u64,
    /// Indices without a buffer in the kernel's table of registered buffers.
    unregistered: Vec<u16>,
}

impl<T> Ring<T> {
    /// Creates a ring for up to `capacity` operations at the same time.
    pub(crate) fn new(capacity: u32, file: Arc<OwnedFd>) -> Result<Self> {
        let capacity = capacity.clamp(1, 4096);
        // With coop_taskrun, new in Linux 5.19, completions do not interrupt this thread.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .build(capacity)
            .or_else(|_| IoUring::new(capacity))
            .map_err(|error| {
                Error::from_io(
                    &error,
                    "io_uring cannot be used",
                    "set kernel.io_uring_disabled to 0, and allow io_uring in seccomp filters",
                )
            })?;
        ring.submitter()
            .register_files(&[file.as_raw_fd()])
            .map_err(|error| Error::from_io(&error, "io_uring takes no file", "report this"))?;
        // New in Linux 5.19; without it, the pages of buffers are pinned for each operation.
        let submitter = ring.submitter();
        let sparse = submitter.register_buffers_sparse(MAX_REGISTERED.into());
        let indices = if sparse.is_ok() { MAX_REGISTERED } else { 0 };
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            file,
            slots: Vec::new(),
            free: Vec::new(),
            capacity: capacity as usize,
            number: LAST_RING.fetch_add(1, Ordering::Relaxed).wrapping_add(1) << 16,
            unregistered: (0..indices).rev().collect(),
        })
    }

    /// Registers the memory of a buffer, if that is possible: the kernel pins its pages once, and
    /// not for each operation.
    pub(crate) fn register(&mut self, buffer: &mut Buffer) {
        let Some(index) = self.unregistered.pop() else {
            return;
        };
        let vector = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.capacity(),
        };
        if self.update(index, vector).is_ok() {
            buffer.set_registration(self.number | u64::from(index));
        } else {
            self.unregistered.push(index);
        }
    }

    /// Frees a buffer, which may be registered.
    pub(crate) fn unregister(&mut self, buffer: Buffer) {
        let Some(index) = self.index(buffer.registration()) else {
            return;
        };
        let none = libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        if self.update(index, none).is_ok() {
            self.unregistered.push(index);
        }
    }

    /// Changes an element of the kernel's table of registered buffers.
    fn update(&self, index: u16, vector: libc::iovec) -> std::io::Result<()> {
        let submitter = self.ring.submitter();
        // SAFETY: The vector is empty or the whole memory of a buffer. The kernel holds its pages
        // as long as they are registered, and accesses them for operations only, whose buffers
        // exist; an operation has the index of the table that its buffer was registered under.
        unsafe { submitter.register_buffers_update(index.into(), &[vector], None) }
    }

    /// Returns the index of a registration if it is one of this ring.
    fn index(&self, registration: u64) -> Option<u16> {
        let index = registration as u16;
        (registration == self.number | u64::from(index)).then_some(index)
    }

    /// Returns the file.
    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Returns the number of operations that are not complete.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Returns `true` if there is room for one more operation.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight() < self.capacity
    }

    /// Adds an operation, which starts with the next [`Self::submit`].
    ///
    /// Returns it as an error if there is no room.
    pub(crate) fn push(&mut self, op: Op, context: T) -> std::result::Result<(), (Op, T)> {
        if !self.has_room() || (self.ring.submission().is_full() && self.submit().is_err()) {
            return Err((op, context));
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len().saturating_sub(1)
        });
        let registered = match &op {
            Op::Read(_, transfer) | Op::Write(_, transfer, _) => transfer.registration(),
            _ => 0,
        };
        let registered = self.index(registered);
        let Some(slot) = self.slots.get_mut(index) else {
            return Err((op, context));
        };
        let (op, _) = &*slot.insert((op, context));
        let entry = entry(op, registered).user_data(index as u64);
        // SAFETY: By the type invariants of `Transfer` and `Buffer` the entry describes mapped
        // memory. The slot keeps the memory and the vectors until the operation is complete.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            let taken = slot.take();
            self.free.push(index);
            return taken.map_or(Ok(()), Err);
        }
        Ok(())
    }

    /// Starts the operations that were added.
    pub(crate) fn submit(&mut self) -> Result<()> {
        let mut deadline = None;
        while !self.ring.submission().is_empty() {
            let Err(error) = self.ring.submit() else {
                continue;
            };
            let now = Instant::now();
            let deadline = *deadline.get_or_insert(now + SUBMIT_TIMEOUT);
            match Errno::from_io_error(&error) {
                Some(Errno::INTR) => {}
                // The kernel lacks memory, or completions must be read first.
                Some(Errno::AGAIN | Errno::BUSY) if now < deadline => {
                    if !self.ring.completion().is_empty() {
                        return Ok(());
                    }
                    thread::sleep(Duration::from_millis(1));
                }
                _ => {
                    return Err(Error::from_io(
                        &error,
                        "io_uring starts no operation",
                        "free some memory of the host",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Takes an operation that is complete.
    pub(crate) fn pop(&mut self) -> Option<Finished<T>> {
        loop {
            let completion = self.ring.completion().next()?;
            let Ok(index) = usize::try_from(completion.user_data()) else {
                continue;
            };
            let Some((op, context)) = self.slots.get_mut(index).and_then(Option::take) else {
                continue;
            };
            self.free.push(index);
            let result = match u32::try_from(completion.result()) {
                Ok(value) => Ok(value),
                Err(_) => Err(Errno::from_raw_os_error(completion.result().wrapping_neg())),
            };
            return Some(Finished {
                op,
                context,
                result,
            });
        }
    }
}

/// Returns the submission ring's entry for an operation, whose memory may be registered.
fn entry(op: &Op, registered: Option<u16>) -> squeue::Entry {
    let file = types::Fixed(0);
    match op {
        Op::Read(offset, transfer) => match (transfer.pending(), registered) {
            ([vector], Some(index)) => {
                opcode::ReadFixed::new(file, vector.iov_base.cast(), length(vector), index)
                    .offset(*offset)
                    .build()
            }
            ([vector], None) => opcode::Read::new(file, vector.iov_base.cast(), length(vector))
                .offset(*offset)
                .build(),
            (vectors, _) => opcode::Readv::new(file, vectors.as_ptr(), vectors.len() as u32)
                .offset(*offset)
                .build(),
        },
        Op::Write(offset, transfer, sync) => {
            let flags = match sync {
                Sync::No => 0,
                Sync::Data => libc::RWF_DSYNC,
            };
            match (transfer.pending(), registered) {
                ([vector], Some(index)) => {
                    opcode::WriteFixed::new(file, vector.iov_base.cast(), length(vector), index)
                        .offset(*offset)
                        .rw_flags(flags)
                        .build()
                }
                ([vector], None) => {
                    opcode::Write::new(file, vector.iov_base.cast(), length(vector))
                        .offset(*offset)
                        .rw_flags(flags)
                        .build()
                }
                (vectors, _) => opcode::Writev::new(file, vectors.as_ptr(), vectors.len() as u32)
                    .offset(*offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Op::Datasync => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Op::Fallocate(mode, offset, length) => opcode::Fallocate::new(file, *length)
            .offset(*offset)
            .mode(mode.flags())
            .build(),
        Op::BlockDiscard(offset, length) => {
            // The length is in `addr3`, which is where the command's data starts.
            let mut command = [0; 16];
            let (addr3, _) = command.split_at_mut(8);
            addr3.copy_from_slice(&length.to_ne_bytes());
            opcode::UringCmd16::new(file, BLOCK_URING_CMD_DISCARD)
                .cmd(command)
                .addr(Some(*offset))
                .build()
        }
        Op::Nop => opcode::Nop::new().build(),
    }
}

/// Returns the length of a vector; a longer one is done in several operations.
fn length(vector: &libc::iovec) -> u32 {
    const MAX: u32 = 1 << 30;
    u32::try_from(vector.iov_len).map_or(MAX, |len| len.min(MAX))
}

impl<T> AsFd for Ring<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: The ring is open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        let deadline = Instant::now() + crate::DROP_TIMEOUT;
        let started = self.submit().is_ok();
        loop {
            while self.pop().is_some() {}
            if self.in_flight() == 0 {
                // The kernel destroys a ring later, and the file's locks last as long as the file.
                let _ = self.ring.submitter().unregister_files();
                // SAFETY: It is not used after this. By the type invariants the kernel has
                // completed all operations, since no slot is in use.
                unsafe { ManuallyDrop::drop(&mut self.ring) };
                return;
            }
            if !started || !matches!(wait_readable(self.as_fd(), deadline), Ok(true)) {
                break;
            }
        }
        // The kernel may still write to the memory, so it is never freed.
        mem::forget(mem::take(&mut self.slots));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(lengths: &[usize]) -> Transfer {
        let buffers = lengths.iter().map(|len| Buffer::allocate(*len, 8).unwrap());
        Transfer::new(buffers.collect())
    }

    #[test]
    fn a_transfer_continues_where_it_ended() {
        let mut transfer = transfer(&[4, 8, 2]);
        for buffer in &mut transfer.buffers {
            buffer.fill(0, buffer.len(), 1).unwrap();
        }
        assert_eq!(transfer.left(), 14);
        transfer.advance(3);
        transfer.advance(3);
        assert_eq!(transfer.left(), 8);
        transfer.zero_rest().unwrap();
        let mut bytes = Vec::new();
        for buffer in &transfer.buffers {
            let mut part = vec![0; buffer.len()];
            buffer.read_at(0, &mut part).unwrap();
            bytes.extend(part);
        }
        assert_eq!(bytes, [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        transfer.advance(100);
        assert_eq!(transfer.left(), 0);
    }

    #[test]
    fn a_ring_has_room_for_its_capacity() {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let mut ring = Ring::new(3, file).unwrap();
        for number in 0..3 {
            ring.push(Op::Nop, number).unwrap();
        }
        assert!(matches!(ring.push(Op::Nop, 9), Err((Op::Nop, 9))));
        ring.submit().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut sum = 0;
        while ring.in_flight() > 0 {
            assert!(wait_readable(ring.as_fd(), deadline).unwrap());
            while let Some(finished) = ring.pop() {
                assert_eq!(finished.result, Ok(0));
                sum += finished.context;
            }
        }
        assert_eq!(sum, 3);
        ring.push(Op::Nop, 4).unwrap();
    }
}
