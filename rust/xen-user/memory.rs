// SPDX-License-Identifier: GPL-2.0-only

//! Memory that the kernel or another domain may read and change at any time.
//!
//! [`Pages`] owns a mapping. No reference to its content ever exists; it is accessed by word and by
//! copies.

use crate::unmapper::Unmapper;
use io_buffer::Access;
use io_buffer::Buffer;
use rustix::fs;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
#[cfg(target_arch = "x86_64")]
use std::arch::asm;
use std::fs::File;
use std::io;
use std::ptr;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

/// Bytes in a page, which is also what one grant stands for.
pub const PAGE_SIZE: usize = 4096;

/// A mapping of whole pages.
///
/// # Invariants
///
/// - The `len` bytes from `start` are mapped for reading until this is dropped, and no one else
///   unmaps them; for writing too if `writable`.
/// - `start` is a multiple of [`PAGE_SIZE`], and so is `len`, which is not 0.
/// - There is no reference to any of these bytes, but to atomics.
pub struct Pages {
    start: NonNull<u8>,
    len: usize,
    writable: bool,
    /// Grants that end with the mapping.
    unmapper: Option<Unmapper>,
}

// SAFETY: By the type invariants the mapping belongs to this object, whichever thread has it.
unsafe impl Send for Pages {}

// SAFETY: By the type invariants all accesses are atomic, or are made by the kernel.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps pages of zeros that no other domain has.
    pub fn anonymous(count: usize) -> io::Result<Self> {
        let len = size(count)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let start =
            // SAFETY: The kernel chooses an address where nothing is mapped.
            unsafe { mm::mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE) }?;
        // SAFETY: This was mapped just now for reading and writing, and no one else has it.
        unsafe { Self::from_raw(start, len, true, None) }
    }

    /// Maps a file from its start, after setting its size to that of the pages. Each process that
    /// maps it shares them, and what is written stays in the file when a process is killed.
    ///
    /// The file system must have space for all of it, because an access to a page without space
    /// ends the process by a signal. So does one after another process has made the file smaller.
    pub fn of_file(file: &File, count: usize) -> io::Result<Self> {
        let len = size(count)?;
        file.set_len(len as u64)?;
        match fs::fallocate(file, FallocateFlags::empty(), 0, len as u64) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let start =
            // SAFETY: The kernel chooses an address where nothing is mapped.
            unsafe { mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0) }?;
        // SAFETY: This was mapped just now for reading and writing, and no one else has it.
        unsafe { Self::from_raw(start, len, true, None) }
    }

    /// Takes over a mapping.
    ///
    /// # Safety
    ///
    /// The type invariants must hold for the arguments, except that `start` may be null, which is
    /// an error.
    pub(crate) unsafe fn from_raw(
        start: *mut libc::c_void,
        len: usize,
        writable: bool,
        unmapper: Option<Unmapper>,
    ) -> io::Result<Self> {
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // INVARIANT: By the requirements of this function.
        Ok(Self {
            start,
            len,
            writable,
            unmapper,
        })
    }

    /// Returns the memory for I/O.
    pub fn into_buffer(self) -> Buffer {
        let (start, len) = (self.start, self.len);
        let access = if self.writable {
            Access::ReadWrite
        } else {
            Access::ReadOnly
        };
        // SAFETY: The mapping lasts as long as the owner, and nothing accesses it through that.
        unsafe { Buffer::from_raw_parts(start, len, access, Arc::new(self)) }
    }

    /// Returns the size in bytes, a multiple of [`PAGE_SIZE`].
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns `false`: there is at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns `true` if the memory may be written to. Writes to other memory have no effect.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Reads a 32-bit word, in one access. Beyond the end there are zeros.
    #[inline]
    pub fn load(&self, word: usize) -> u32 {
        self.word(word).map_or(0, |word| word.load(Relaxed))
    }

    /// Writes a 32-bit word, in one access. Beyond the end it has no effect.
    #[inline]
    pub fn store(&self, word: usize, value: u32) {
        if let Some(word) = self.word(word).filter(|_| self.writable) {
            word.store(value, Relaxed);
        }
    }

    /// Adds to a 64-bit number at a multiple of 8 bytes, in one access. Elsewhere, and beyond the
    /// end, it has no effect.
    #[inline]
    pub fn add(&self, at: usize, value: u64) {
        let address = self.address(at, 8).filter(|_| self.writable && at % 8 == 0);
        if let Some(address) = address {
            // SAFETY: The address is aligned, as `start` is, and 8 bytes from it are within the
            // mapping, which is writable; the reference ends with the access.
            unsafe { AtomicU64::from_ptr(address.cast()) }.fetch_add(value, Relaxed);
        }
    }

    /// Copies bytes from the memory. Returns `false`, and copies nothing, if they are not all in
    /// it.
    pub fn read(&self, at: usize, to: &mut [u8]) -> bool {
        let Some(mut address) = self.address(at, to.len()) else {
            return false;
        };
        let mut chunks = to.chunks_exact_mut(8);
        if address.align_offset(8) == 0 {
            for chunk in &mut chunks {
                // SAFETY: `address` is aligned, and 8 bytes from it are within the mapping, because
                // `address()` has checked all of `to`; the reference ends with the access.
                let value = unsafe { AtomicU64::from_ptr(address.cast()) }.load(Relaxed);
                chunk.copy_from_slice(&value.to_ne_bytes());
                address = address.wrapping_add(8);
            }
            copy_out(address, chunks.into_remainder());
        } else {
            copy_out(address, to);
        }
        true
    }

    /// Copies bytes to the memory. Returns `false`, and copies nothing, if they do not all fit, or
    /// if it is not writable.
    pub fn write(&self, at: usize, from: &[u8]) -> bool {
        let Some(mut address) = self.address(at, from.len()).filter(|_| self.writable) else {
            return false;
        };
        let mut rest = from;
        while address.align_offset(8) == 0 {
            let Some((chunk, after)) = rest.split_first_chunk::<8>() else {
                break;
            };
            // SAFETY: `address` is aligned, and 8 bytes from it are within the mapping, because
            // `address()` has checked all of `from`; the reference ends with the access.
            unsafe { AtomicU64::from_ptr(address.cast()) }
                .store(u64::from_ne_bytes(*chunk), Relaxed);
            address = address.wrapping_add(8);
            rest = after;
        }
        copy_in(address, rest);
        true
    }

    /// Returns `count` 32-bit words, if all of them are in the memory and it may be written to.
    #[inline]
    pub fn words(&self, first: usize, count: usize) -> Option<&[AtomicU32]> {
        let address = self.address(first.checked_mul(4)?, count.checked_mul(4)?)?;
        let words = self.writable.then_some(address)?.cast();
        // SAFETY: The address is a multiple of 4, as `start` is one of `PAGE_SIZE`, and `count`
        // words from it are within the mapping, which is writable and lives as long as `self`.
        Some(unsafe { slice::from_raw_parts(words, count) })
    }

    /// Copies `len` bytes of the memory to a buffer. Returns `false`, and copies nothing, if they
    /// are not all in both, or if the buffer is read-only.
    ///
    /// If another domain writes to the memory at the same time, the copy may have parts of both.
    pub fn copy_to(&self, at: usize, buffer: &mut Buffer, offset: usize, len: usize) -> bool {
        let end = offset.checked_add(len);
        let fits = end.is_some_and(|end| end <= buffer.len());
        let from = self.address(at, len);
        let Some(from) = from.filter(|_| fits && buffer.access() == Access::ReadWrite) else {
            return false;
        };
        let to = buffer.as_mut_ptr().wrapping_add(offset);
        // SAFETY: `address()` and `fits` have checked that the bytes are in the mapping and in the
        // buffer, which is writable and borrowed. They do not overlap, because by their type
        // invariants nothing else in this process refers to either.
        unsafe { copy(from, to, len) };
        true
    }

    /// Copies `len` bytes of a buffer to the memory. Returns `false`, and copies nothing, if they
    /// are not all in both, or if the memory is not writable.
    pub fn copy_from(&self, at: usize, buffer: &Buffer, offset: usize, len: usize) -> bool {
        let end = offset.checked_add(len);
        let fits = end.is_some_and(|end| end <= buffer.len());
        let to = self.address(at, len);
        let Some(to) = to.filter(|_| fits && self.writable) else {
            return false;
        };
        let from = buffer.as_ptr().wrapping_add(offset);
        // SAFETY: As in `copy_to`; the mapping is writable.
        unsafe { copy(from, to, len) };
        true
    }

    /// Returns the word of a number, if there is one.
    #[inline]
    fn word(&self, word: usize) -> Option<&AtomicU32> {
        let address = self.address(word.checked_mul(4)?, 4)?;
        // SAFETY: The address is a multiple of 4, as `start` is one of `PAGE_SIZE`, and 4 bytes
        // from it are within the mapping, which lives as long as `self`. A read-only one is only
        // loaded from.
        Some(unsafe { AtomicU32::from_ptr(address.cast()) })
    }

    /// Returns where bytes are, if all of them are in the mapping.
    #[inline]
    pub(crate) fn address(&self, at: usize, len: usize) -> Option<*mut u8> {
        let end = at.checked_add(len)?;
        (end <= self.len).then(|| self.start.as_ptr().wrapping_add(at))
    }
}

/// Copies bytes: a multiple of 8 bytes as `copy_page` of the kernel does.
///
/// # Safety
///
/// `len` bytes from `from` can be read, and `len` bytes from `to` written. They do not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len % 8 == 0 {
        // SAFETY: This reads and writes the bytes that the caller allows. The direction flag is
        // clear, by the ABI.
        unsafe {
            asm!(
                "rep movsq",
                inout("rcx") len / 8 => _,
                inout("rsi") from => _,
                inout("rdi") to => _,
                options(nostack, preserves_flags),
            );
        }
        return;
    }
    // SAFETY: By the requirements of this function.
    unsafe { ptr::copy_nonoverlapping(from, to, len) };
}

/// Copies single bytes from a mapping. All of them must be in it.
fn copy_out(mut address: *mut u8, to: &mut [u8]) {
    for byte in to {
        // SAFETY: The callers have checked that all bytes of `to` are within the mapping; the
        // reference ends with the access.
        *byte = unsafe { AtomicU8::from_ptr(address) }.load(Relaxed);
        address = address.wrapping_add(1);
    }
}

/// Copies single bytes to a mapping. All of them must be in it.
fn copy_in(mut address: *mut u8, from: &[u8]) {
    for byte in from {
        // SAFETY: As in `copy_out`, and the callers have checked that the mapping is writable.
        unsafe { AtomicU8::from_ptr(address) }.store(*byte, Relaxed);
        address = address.wrapping_add(1);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: By the type invariants this mapping is ours, and there are no references to it.
        // There is nothing that could be done about an error, which only a wrong range gives.
        let _ = unsafe { mm::munmap(self.start.as_ptr().cast(), self.len) };
        // Grants are given up after the mapping of their pages.
        drop(self.unmapper.take());
    }
}

/// Returns the size of pages in bytes, at least one page.
pub(crate) fn size(count: usize) -> io::Result<usize> {
    count
        .checked_mul(PAGE_SIZE)
        .filter(|len| *len != 0)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn words_and_bytes_are_the_same_memory() {
        let pages = Pages::anonymous(2).unwrap();
        assert_eq!(pages.len(), 2 * PAGE_SIZE);
        pages.store(1, 0x0403_0201);
        let mut bytes = [9; 10];
        assert!(pages.read(3, &mut bytes));
        assert_eq!(bytes, [0, 1, 2, 3, 4, 0, 0, 0, 0, 0]);
        let text: Vec<u8> = (0..100).collect();
        for at in 0..9 {
            let mut back = vec![0; 100];
            assert!(pages.write(at, &text) && pages.read(at, &mut back));
            assert_eq!(back, text);
        }
    }

    #[test]
    fn a_mapped_file_has_its_space() {
        let file = File::from(fs::memfd_create("pages", fs::MemfdFlags::CLOEXEC).unwrap());
        let pages = Pages::of_file(&file, 3).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), pages.len() as u64);
        assert_eq!(metadata.blocks() * 512, metadata.len());
    }

    #[test]
    fn nothing_is_reached_beyond_the_end() {
        let pages = Pages::anonymous(1).unwrap();
        pages.store(1024, 1);
        pages.store(usize::MAX, 1);
        assert_eq!((pages.load(1024), pages.load(usize::MAX)), (0, 0));
        let mut bytes = [0; 2];
        assert!(!pages.read(4095, &mut bytes));
        assert!(!pages.read(usize::MAX, &mut bytes));
        assert!(!pages.write(4095, &bytes));
        assert_eq!(pages.words(1022, 2).unwrap().len(), 2);
        assert!(pages.words(1023, 2).is_none() && pages.words(usize::MAX, 1).is_none());
        assert!(Pages::anonymous(0).is_err());
        assert!(Pages::anonymous(usize::MAX / 2).is_err());
    }

    #[test]
    fn buffers_are_copied_within_bounds() {
        let pages = Pages::anonymous(1).unwrap();
        let mut buffer = Buffer::allocate(8, 8).unwrap();
        buffer.write_at(0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert!(pages.copy_from(4093, &buffer, 5, 3));
        assert!(!pages.copy_from(4093, &buffer, 5, 4));
        assert!(!pages.copy_from(4094, &buffer, 5, 3));
        assert!(!pages.copy_from(0, &buffer, usize::MAX, 2));
        assert!(pages.copy_to(4092, &mut buffer, 0, 4));
        let mut whole = Pages::anonymous(1).unwrap().into_buffer();
        assert!(pages.copy_to(0, &mut whole, 0, PAGE_SIZE));
        let mut last = [0; 4];
        whole.read_at(4092, &mut last).unwrap();
        assert_eq!(last, [0, 6, 7, 8]);
        assert!(!pages.copy_to(4092, &mut buffer, 5, 4));
        assert!(!pages.copy_to(usize::MAX, &mut buffer, 0, 2));
        let mut bytes = [0; 8];
        buffer.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 6, 7, 8, 5, 6, 7, 8]);
    }
}
