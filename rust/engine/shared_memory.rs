// SPDX-License-Identifier: GPL-2.0-only

//! Memory that is shared with the daemon of an image.
//!
//! All unsafe code for it: a mapping of a memfd, whose descriptor the daemon gets. Words are
//! accessed one at a time, because the daemon may write at any time; data is accessed through
//! [`Buffer`]s only.

use crate::error::{Error, Result};
use buddy_system_allocator::FrameAllocator;
use io_buffer::{Access, Buffer};
use rustix::fs::{fcntl_add_seals, ftruncate, memfd_create, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{madvise, mmap, munmap, Advice, MapFlags, ProtFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE_SIZE: usize = 4096;

/// The greatest allocation is 2 to the power of this minus 1, in pages: all memory for data.
const ORDERS: usize = 17;

/// The bytes at the start that are not for data.
pub(crate) const WORDS: usize = 1 << 20;

/// The bytes for data.
const DATA: usize = PAGE_SIZE << (ORDERS - 1);

/// The bytes of a shared memory. Those that were never used take no memory.
pub(crate) const SIZE: usize = WORDS + DATA;

/// Memory that is shared with the daemon of an image.
///
/// # Invariants
///
/// - [`SIZE`] bytes from `start` are mapped for reading and writing as long as `self` exists, and
///   their file cannot be made smaller.
/// - There is no reference to the first [`WORDS`] bytes, but to atomics for the time of one access.
/// - Each page after them belongs to one [`Chunk`], or is free and not accessed.
pub struct SharedMemory {
    start: NonNull<u8>,
    file: OwnedFd,
    pages: Mutex<Pages>,
}

// SAFETY: By the type invariants the mapping belongs to this object, whichever thread has it.
unsafe impl Send for SharedMemory {}

// SAFETY: By the type invariants accesses are atomic, or are made by the owner of a chunk.
unsafe impl Sync for SharedMemory {}

/// The allocation of the pages for data.
struct Pages {
    free: FrameAllocator<ORDERS>,
    used: usize,
    /// The end of the pages that were used since none was in use.
    end: usize,
}

/// Pages for data, which are free when this is dropped.
struct Chunk {
    memory: Arc<SharedMemory>,
    first: usize,
    count: usize,
}

impl SharedMemory {
    /// Creates zeroed memory.
    pub(crate) fn new() -> Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("rblk-data", flags).map_err(error)?;
        ftruncate(&file, SIZE as u64).map_err(error)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(error)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let start =
            // SAFETY: The kernel chooses an address where nothing is mapped.
            unsafe { mmap(ptr::null_mut(), SIZE, protection, MapFlags::SHARED, &file, 0) };
        let start = NonNull::new(start.map_err(error)?.cast());
        let start = start.ok_or_else(|| error(Errno::NOMEM))?;
        let mut free = FrameAllocator::new();
        free.add_frame(0, DATA / PAGE_SIZE);
        // INVARIANT: This was mapped just now, all pages are free, and the file is sealed.
        Ok(Self {
            start,
            file,
            pages: Mutex::new(Pages {
                free,
                used: 0,
                end: 0,
            }),
        })
    }

    /// Allocates memory, which has zeros or earlier data of the same image.
    ///
    /// The error is `EAGAIN` if all memory is in use.
    pub fn allocate(self: &Arc<Self>, len: usize) -> Result<Buffer> {
        let count = len.div_ceil(PAGE_SIZE).max(1);
        let first = self.lock().allocate(count);
        let Some(first) = first else {
            return Err(Error::new(
                Errno::AGAIN,
                format!("{len} bytes of the memory of the image are not free"),
                "try again when requests have completed",
            ));
        };
        let offset = WORDS.saturating_add(first.saturating_mul(PAGE_SIZE));
        // SAFETY: By the type invariants the page is inside the mapping.
        let start = unsafe { self.start.add(offset) };
        let owner = Arc::new(Chunk {
            memory: self.clone(),
            first,
            count,
        });
        // SAFETY: The pages are mapped as long as the chunk exists, and belong to it only.
        Ok(unsafe { Buffer::from_raw_parts(start, len, Access::ReadWrite, owner) })
    }

    /// Returns the offset of a buffer in the memory, if it is in it.
    pub(crate) fn offset(&self, buffer: &Buffer) -> Option<usize> {
        let offset = (buffer.as_ptr() as usize).checked_sub(self.start.as_ptr() as usize)?;
        let end = offset.checked_add(buffer.len())?;
        (end <= SIZE).then_some(offset)
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        // The state is valid between any two statements that change it.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the address of `len` bytes before the data, if they are aligned to their length.
    fn word(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        let is_word = end <= WORDS && offset.checked_rem(len) == Some(0);
        is_word.then(|| self.start.as_ptr().wrapping_add(offset))
    }

    /// Reads a byte. Beyond the words there are zeros.
    pub(crate) fn load_u8(&self, offset: usize) -> u8 {
        self.word(offset, 1).map_or(0, |address| {
            // SAFETY: By `word` and the type invariants the byte is mapped, and accessed atomically
            // only; the reference ends with the access.
            unsafe { AtomicU8::from_ptr(address) }.load(Ordering::Relaxed)
        })
    }

    /// Reads 16 bits, before later accesses. Elsewhere than in the words there are zeros.
    pub(crate) fn load_u16(&self, offset: usize) -> u16 {
        let value = self.word(offset, 2).map_or(0, |address| {
            // SAFETY: As in `load_u8`, and the address is aligned.
            unsafe { AtomicU16::from_ptr(address.cast()) }.load(Ordering::Acquire)
        });
        u16::from_le(value)
    }

    /// Reads 32 bits. Elsewhere than in the words there are zeros.
    pub(crate) fn load_u32(&self, offset: usize) -> u32 {
        let value = self.word(offset, 4).map_or(0, |address| {
            // SAFETY: As in `load_u16`.
            unsafe { AtomicU32::from_ptr(address.cast()) }.load(Ordering::Relaxed)
        });
        u32::from_le(value)
    }

    /// Writes a byte. Beyond the words it has no effect.
    pub(crate) fn store_u8(&self, offset: usize, value: u8) {
        if let Some(address) = self.word(offset, 1) {
            // SAFETY: As in `load_u8`.
            unsafe { AtomicU8::from_ptr(address) }.store(value, Ordering::Relaxed);
        }
    }

    /// Writes 16 bits, after earlier accesses. Elsewhere than in the words it has no effect.
    pub(crate) fn store_u16(&self, offset: usize, value: u16) {
        if let Some(address) = self.word(offset, 2) {
            // SAFETY: As in `load_u16`.
            unsafe { AtomicU16::from_ptr(address.cast()) }.store(value.to_le(), Ordering::Release);
        }
    }

    /// Writes 32 bits. Elsewhere than in the words it has no effect.
    pub(crate) fn store_u32(&self, offset: usize, value: u32) {
        if let Some(address) = self.word(offset, 4) {
            // SAFETY: As in `load_u16`.
            unsafe { AtomicU32::from_ptr(address.cast()) }.store(value.to_le(), Ordering::Relaxed);
        }
    }

    /// Writes 64 bits. Elsewhere than in the words it has no effect.
    pub(crate) fn store_u64(&self, offset: usize, value: u64) {
        if let Some(address) = self.word(offset, 8) {
            // SAFETY: As in `load_u16`.
            unsafe { AtomicU64::from_ptr(address.cast()) }.store(value.to_le(), Ordering::Relaxed);
        }
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: By the type invariants this mapping is ours. Chunks share the ownership, so none
        // is left. Only a wrong range is an error.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), SIZE) };
    }
}

impl Pages {
    fn allocate(&mut self, count: usize) -> Option<usize> {
        let first = self.free.alloc(count)?;
        self.used = self.used.saturating_add(count);
        self.end = self.end.max(first.saturating_add(count));
        Some(first)
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let mut pages = self.memory.lock();
        pages.free.dealloc(self.first, self.count);
        pages.used = pages.used.saturating_sub(self.count);
        if pages.used == 0 {
            let len = std::mem::take(&mut pages.end).saturating_mul(PAGE_SIZE);
            let start = self.memory.start.as_ptr().wrapping_add(WORDS);
            // SAFETY: These pages are inside the mapping, and by the type invariants nothing
            // accesses them, because all are free. If it fails, they only stay in memory.
            let _ = unsafe { madvise(start.cast(), len, Advice::LinuxRemove) };
        }
    }
}

fn error(errno: Errno) -> Error {
    Error::new(
        errno,
        format!("creating the memory of the image: {errno}"),
        "free some memory, and raise the limit of open files",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_do_not_overlap_and_are_freed() {
        let memory = Arc::new(SharedMemory::new().unwrap());
        let mut buffers = Vec::new();
        for len in [1, 4096, 5000, 1 << 20, 512, 3 << 20] {
            let mut buffer = memory.allocate(len).unwrap();
            assert!(memory.offset(&buffer).unwrap() >= WORDS);
            buffer.fill(0, len, buffers.len() as u8 + 1).unwrap();
            buffers.push(buffer);
        }
        for (index, buffer) in buffers.iter().enumerate() {
            let mut bytes = vec![0; buffer.len()];
            buffer.read_at(0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == index as u8 + 1));
        }
        let errno = memory.allocate(DATA).unwrap_err().errno();
        assert_eq!(errno, Errno::AGAIN);
        drop(buffers);
        let all = memory.allocate(DATA).unwrap();
        let mut bytes = vec![1; 4 << 20];
        all.read_at(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        assert!(memory.allocate(1).is_err());
        assert!(memory.allocate(usize::MAX).is_err());
        let other = Buffer::allocate(512, 512).unwrap();
        assert_eq!(memory.offset(&other), None);
    }

    #[test]
    fn words_have_a_place_before_the_data() {
        let memory = SharedMemory::new().unwrap();
        memory.store_u64(8, 0x0807_0605_0403_0201);
        assert_eq!(memory.load_u32(8), 0x0403_0201);
        assert_eq!(memory.load_u16(14), 0x0807);
        memory.store_u8(15, 9);
        memory.store_u32(8, 7);
        memory.store_u16(12, 6);
        assert_eq!(memory.load_u8(15), 9);
        assert_eq!((memory.load_u16(8), memory.load_u16(12)), (7, 6));
        memory.store_u64(WORDS, 1);
        memory.store_u32(2, 1);
        memory.store_u16(usize::MAX, 1);
        assert_eq!((memory.load_u32(WORDS), memory.load_u32(2)), (0, 0));
        assert_eq!((memory.load_u8(WORDS), memory.load_u16(9)), (0, 0));
    }
}
