// SPDX-License-Identifier: GPL-2.0-only

//! The checks that each request passes before an engine carries it out.

use crate::error::{Error, Result};
use crate::info::Info;
use crate::request::{Operation, Request};
use io_buffer::Access;
use rustix::io::Errno;

const REPORT: &str = "this is an error of the program, report it";

/// Checks a request against the geometry and the capabilities of an image.
pub(crate) fn check(request: &Request, info: &Info) -> Result<()> {
    match request.operation {
        Operation::Flush => return check_flush(request),
        Operation::Read => {}
        Operation::Write { .. } => check_writable(info)?,
        Operation::Discard => {
            check_writable(info)?;
            check_support(info.discard.is_some(), "discards")?;
        }
        Operation::WriteZeroes { .. } => {
            check_writable(info)?;
            check_support(info.write_zeroes, "write zeroes")?;
        }
    }
    check_range(request, info)?;
    check_buffers(request, info)
}

fn check_flush(request: &Request) -> Result<()> {
    if request.offset != 0 || request.length != 0 || !request.buffers.is_empty() {
        return Err(invalid("a flush has a range or buffers"));
    }
    Ok(())
}

fn check_writable(info: &Info) -> Result<()> {
    if info.read_only {
        return Err(Error::new(
            Errno::ROFS,
            "the image is open for reading only",
            "open it for writing",
        ));
    }
    Ok(())
}

fn check_support(supported: bool, operation: &str) -> Result<()> {
    if !supported {
        return Err(Error::new(
            Errno::OPNOTSUPP,
            format!("the storage does not support {operation}"),
            "do not send them",
        ));
    }
    Ok(())
}

fn check_range(request: &Request, info: &Info) -> Result<()> {
    let block = u64::from(info.logical_block_size);
    if request.length == 0 {
        return Err(invalid("the length is 0"));
    }
    if !is_multiple(request.offset, block) || !is_multiple(request.length, block) {
        return Err(invalid(format!(
            "offset {} or length {} is no multiple of the block size {block}",
            request.offset, request.length
        )));
    }
    match request.offset.checked_add(request.length) {
        Some(end) if end <= info.size => Ok(()),
        _ => Err(Error::new(
            Errno::IO,
            format!(
                "offset {} and length {} are not inside the image of {} bytes",
                request.offset, request.length, info.size
            ),
            "check that the partition table fits the image",
        )),
    }
}

fn check_buffers(request: &Request, info: &Info) -> Result<()> {
    let has_data = matches!(request.operation, Operation::Read | Operation::Write { .. });
    if !has_data {
        if !request.buffers.is_empty() {
            return Err(invalid("a request without data has buffers"));
        }
        return Ok(());
    }
    let mut sum: u64 = 0;
    for buffer in &request.buffers {
        sum = sum.saturating_add(buffer.len() as u64);
        if request.operation == Operation::Read && buffer.access() == Access::ReadOnly {
            return Err(Error::new(
                Errno::FAULT,
                "a read has a buffer that is mapped for reading only",
                REPORT,
            ));
        }
    }
    if sum != request.length {
        return Err(invalid(format!(
            "the buffers have {sum} bytes, the length is {}",
            request.length
        )));
    }
    if sum > info.max_transfer || request.buffers.len() > info.max_buffers {
        return Err(invalid(format!(
            "{sum} bytes in {} buffers are more than {} in {}",
            request.buffers.len(),
            info.max_transfer,
            info.max_buffers
        )));
    }
    Ok(())
}

fn is_multiple(value: u64, unit: u64) -> bool {
    value.checked_rem(unit) == Some(0)
}

fn invalid(cause: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(Errno::INVAL, cause, REPORT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::info::{Discard, Guarantees};
    use io_buffer::Buffer;

    const INFO: Info = Info {
        size: 1 << 20,
        logical_block_size: 512,
        physical_block_size: 4096,
        max_transfer: 8192,
        max_buffers: 2,
        max_queues: 1,
        buffer_alignment: 512,
        read_only: false,
        discard: Some(Discard {
            granularity: 4096,
            alignment: 0,
        }),
        write_zeroes: true,
        guarantees: Guarantees {
            durable: true,
            direct: false,
            exclusive: true,
        },
    };

    fn buffers(lengths: &[usize]) -> Vec<Buffer> {
        lengths
            .iter()
            .map(|len| Buffer::allocate(*len, 8).unwrap())
            .collect()
    }

    fn errno(request: Request, info: &Info) -> Option<Errno> {
        check(&request, info).err().map(|error| error.errno())
    }

    #[test]
    fn valid_requests_pass() {
        for request in [
            Request::read(0, 512, buffers(&[512])),
            Request::write(0, (1 << 20) - 8192, buffers(&[1, 8191])),
            Request::flush(0),
            Request::discard(0, 0, 1 << 20),
            Request::write_zeroes(0, 512, 512, false),
        ] {
            assert_eq!(errno(request, &INFO), None);
        }
    }

    #[test]
    fn ranges_are_checked() {
        for (offset, length, expected) in [
            (0, 0, Errno::INVAL),
            (1, 512, Errno::INVAL),
            (512, 513, Errno::INVAL),
            (1 << 20, 512, Errno::IO),
            ((1 << 20) - 512, 1024, Errno::IO),
            (u64::MAX - 511, 512, Errno::IO),
            (u64::MAX - 511, u64::MAX - 511, Errno::IO),
        ] {
            let request = Request::discard(0, offset, length);
            assert_eq!(errno(request, &INFO), Some(expected), "{offset} {length}");
        }
    }

    #[test]
    fn buffers_are_checked() {
        let mut short = Request::write(0, 0, buffers(&[512]));
        short.length = 1024;
        assert_eq!(errno(short, &INFO), Some(Errno::INVAL));
        let mut flush = Request::flush(0);
        flush.buffers = buffers(&[512]);
        assert_eq!(errno(flush, &INFO), Some(Errno::INVAL));
        let mut discard = Request::discard(0, 0, 512);
        discard.buffers = buffers(&[512]);
        assert_eq!(errno(discard, &INFO), Some(Errno::INVAL));
        let long = Request::read(0, 0, buffers(&[8192, 512]));
        assert_eq!(errno(long, &INFO), Some(Errno::INVAL));
        let many = Request::read(0, 0, buffers(&[512, 512, 512]));
        assert_eq!(errno(many, &INFO), Some(Errno::INVAL));
    }

    #[test]
    fn capabilities_are_checked() {
        let read_only = Info {
            read_only: true,
            ..INFO
        };
        let plain = Info {
            discard: None,
            write_zeroes: false,
            ..INFO
        };
        let requests = || {
            [
                Request::discard(0, 0, 512),
                Request::write_zeroes(0, 0, 512, true),
                Request::write(0, 0, buffers(&[512])),
            ]
        };
        for request in requests() {
            assert_eq!(errno(request, &read_only), Some(Errno::ROFS));
        }
        let expected = [Some(Errno::OPNOTSUPP), Some(Errno::OPNOTSUPP), None];
        for (request, expected) in requests().into_iter().zip(expected) {
            assert_eq!(errno(request, &plain), expected);
        }
        assert_eq!(errno(Request::flush(0), &read_only), None);
    }
}
