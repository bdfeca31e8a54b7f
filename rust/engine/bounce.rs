// SPDX-License-Identifier: GPL-2.0-only

//! Copies between the buffers of a request and memory that an engine can use.

use crate::error::Result;
use io_buffer::{AccessError, Buffer};

/// Returns `true` if address and length of each buffer are multiples of `alignment`.
pub(crate) fn is_aligned(buffers: &[Buffer], alignment: usize) -> bool {
    let is_multiple = |value: usize| value.checked_rem(alignment) == Some(0);
    buffers
        .iter()
        .all(|buffer| is_multiple(buffer.as_ptr() as usize) && is_multiple(buffer.len()))
}

/// Returns the number of bytes of all buffers.
pub(crate) fn length(buffers: &[Buffer]) -> usize {
    buffers
        .iter()
        .fold(0, |sum, buffer| sum.saturating_add(buffer.len()))
}

/// Copies all `buffers` to the start of `copy`.
pub(crate) fn gather(buffers: &[Buffer], copy: &mut Buffer) -> Result<()> {
    let mut offset: usize = 0;
    for buffer in buffers {
        copy.copy_from(offset, buffer, 0, buffer.len())?;
        offset = offset.saturating_add(buffer.len());
    }
    Ok(())
}

/// Fills all `buffers` from the start of `copy`.
pub(crate) fn scatter(copy: &Buffer, buffers: &mut [Buffer]) -> Result<()> {
    let mut offset: usize = 0;
    for buffer in buffers {
        let len = buffer.len();
        buffer.copy_from(0, copy, offset, len)?;
        offset = offset.saturating_add(len);
    }
    Ok(())
}

/// Copies `data` to all `buffers` as if they were one, starting at `offset`.
pub(crate) fn write_at(buffers: &mut [Buffer], offset: u64, mut data: &[u8]) -> Result<()> {
    let mut skip = usize::try_from(offset).unwrap_or(usize::MAX);
    for buffer in buffers {
        let start = skip.min(buffer.len());
        skip = skip.saturating_sub(start);
        let count = buffer.len().saturating_sub(start).min(data.len());
        let (part, rest) = data.split_at(count);
        buffer.write_at(start, part)?;
        data = rest;
    }
    check_all(data)
}

/// Copies bytes of all `buffers`, as if they were one, to `data`, starting at `offset`.
pub(crate) fn read_at(buffers: &[Buffer], offset: u64, mut data: &mut [u8]) -> Result<()> {
    let mut skip = usize::try_from(offset).unwrap_or(usize::MAX);
    for buffer in buffers {
        let start = skip.min(buffer.len());
        skip = skip.saturating_sub(start);
        let count = buffer.len().saturating_sub(start).min(data.len());
        let (part, rest) = data.split_at_mut(count);
        buffer.read_at(start, part)?;
        data = rest;
    }
    check_all(data)
}

/// Checks that no data was left over.
fn check_all(rest: &[u8]) -> Result<()> {
    match rest {
        [] => Ok(()),
        _ => Err(AccessError::OutOfBounds.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathered_buffers_are_scattered_as_they_were() {
        let buffer = |bytes: &[u8]| {
            let mut buffer = Buffer::allocate(bytes.len(), 1).unwrap();
            buffer.write_at(0, bytes).unwrap();
            buffer
        };
        let buffers = [buffer(b"abc"), buffer(b"d"), buffer(b"ef")];
        let mut copy = Buffer::allocate(6, 8).unwrap();
        gather(&buffers, &mut copy).unwrap();
        let mut bytes = [0; 6];
        copy.read_at(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abcdef");
        let mut buffers = [buffer(b"....."), buffer(b".")];
        scatter(&copy, &mut buffers).unwrap();
        buffers[0].read_at(0, &mut bytes[..5]).unwrap();
        assert_eq!(&bytes, b"abcdef");
        let mut short = Buffer::allocate(5, 8).unwrap();
        assert!(gather(&buffers, &mut short).is_err());
        assert!(scatter(&short, &mut buffers).is_err());
        assert_eq!(length(&buffers), 6);
        assert!(!is_aligned(&buffers, 4));
        assert!(is_aligned(&[Buffer::allocate(8, 8).unwrap()], 4));
    }

    #[test]
    fn buffers_are_accessed_as_if_they_were_one() {
        let mut buffers = [3, 1, 4].map(|len| Buffer::allocate(len, 1).unwrap());
        write_at(&mut buffers, 2, b"abc").unwrap();
        let mut bytes = [1; 8];
        read_at(&buffers, 0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0\0abc\0\0\0");
        let mut bytes = [1; 2];
        read_at(&buffers, 3, &mut bytes).unwrap();
        assert_eq!(&bytes, b"bc");
        assert!(read_at(&buffers, 7, &mut bytes).is_err());
        assert!(write_at(&mut buffers, u64::MAX, &bytes).is_err());
    }
}
