// SPDX-License-Identifier: GPL-2.0-only

//! Requests to an image and their completions.

use crate::error::Result;
use io_buffer::Buffer;

/// The operation of a [`Request`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Operation {
    /// Reads to the buffers.
    Read,
    /// Writes from the buffers.
    Write {
        /// The data is durable when the request completes ("forced unit access").
        fua: bool,
    },
    /// Makes the writes durable that completed before the flush was submitted.
    Flush,
    /// Tells the storage that the data is not needed any more. What is read from there afterwards
    /// is undefined.
    Discard,
    /// Sets the range to zero.
    WriteZeroes {
        /// The storage may be freed.
        may_unmap: bool,
    },
}

/// A request to an image.
///
/// A request completes with an error, and without any I/O, if
///
/// - offset or length are no multiples of the logical block size, or the length is 0 (`EINVAL`);
///   a flush has offset and length 0 and no buffers,
/// - the buffers of a read or write do not have `length` bytes together, or there are more bytes
///   or buffers than [`Info`](crate::Info) says (`EINVAL`),
/// - it reads to a buffer that is mapped for reading only (`EFAULT`),
/// - it is not inside the image (`EIO`),
/// - it modifies an image that is read-only (`EROFS`),
/// - the engine does not support the operation (`EOPNOTSUPP`).
#[derive(Debug)]
pub struct Request {
    /// The operation.
    pub operation: Operation,
    /// The offset in the image in bytes.
    pub offset: u64,
    /// The length in bytes.
    pub length: u64,
    /// The memory of a read or write.
    pub buffers: Vec<Buffer>,
    /// A number of the caller's choice, which the completion carries.
    pub tag: u64,
}

impl Request {
    /// Creates a read of as many bytes as `buffers` have.
    pub fn read(tag: u64, offset: u64, buffers: Vec<Buffer>) -> Self {
        Self::new(tag, Operation::Read, offset, length(&buffers), buffers)
    }

    /// Creates a write of all bytes of `buffers`.
    pub fn write(tag: u64, offset: u64, buffers: Vec<Buffer>) -> Self {
        let operation = Operation::Write { fua: false };
        Self::new(tag, operation, offset, length(&buffers), buffers)
    }

    /// Creates a flush.
    pub fn flush(tag: u64) -> Self {
        Self::new(tag, Operation::Flush, 0, 0, Vec::new())
    }

    /// Creates a discard.
    pub fn discard(tag: u64, offset: u64, length: u64) -> Self {
        Self::new(tag, Operation::Discard, offset, length, Vec::new())
    }

    /// Creates a request that sets a range to zero.
    pub fn write_zeroes(tag: u64, offset: u64, length: u64, may_unmap: bool) -> Self {
        let operation = Operation::WriteZeroes { may_unmap };
        Self::new(tag, operation, offset, length, Vec::new())
    }

    fn new(tag: u64, operation: Operation, offset: u64, length: u64, buffers: Vec<Buffer>) -> Self {
        Self {
            operation,
            offset,
            length,
            buffers,
            tag,
        }
    }

    /// Returns the completion of this request with `result`.
    pub(crate) fn complete(self, result: Result<()>) -> Completion {
        Completion {
            tag: self.tag,
            result,
            buffers: self.buffers,
        }
    }
}

/// Returns the sum of the lengths of `buffers`; a sum that does not fit is no valid length.
fn length(buffers: &[Buffer]) -> u64 {
    buffers
        .iter()
        .fold(0, |sum, buffer| sum.saturating_add(buffer.len() as u64))
}

/// The completion of a [`Request`].
#[derive(Debug)]
pub struct Completion {
    /// The number that the request carried.
    pub tag: u64,
    /// The result. After an error the range of a write has undefined content, and so have the
    /// buffers of a read.
    pub result: Result<()>,
    /// The buffers of the request, in the same order.
    pub buffers: Vec<Buffer>,
}
