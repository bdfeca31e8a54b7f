// SPDX-License-Identifier: GPL-2.0-only

//! Memory that I/O reads from and writes to.
//!
//! A [`Buffer`] is a range of mapped memory and a share in whatever keeps it mapped: an allocation
//! of this process, a mapping of guest pages, a region that is shared with another process. It
//! corresponds to one element of QEMU's `QEMUIOVector`.
//!
//! An I/O engine owns the buffers of a request from submission to completion. A buffer cannot be
//! cloned and two buffers never overlap, so that safe code cannot touch memory that the kernel or
//! another process is reading from or writing to, nor unmap it.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::any::Any;
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// The access to the memory of a buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Writes to the memory fault: a guest granted it for reading only.
    ReadOnly,
    /// The memory can be read and written.
    ReadWrite,
}

/// An error of an access to a buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AccessError {
    /// The range is not inside the buffer.
    OutOfBounds,
    /// The buffer is mapped for reading only.
    ReadOnly,
}

impl fmt::Display for AccessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfBounds => "the range is not inside the buffer",
            Self::ReadOnly => "the buffer is mapped for reading only",
        })
    }
}

impl std::error::Error for AccessError {}

/// A range of memory that an I/O request reads from or writes to.
///
/// # Invariants
///
/// - `ptr` to `ptr + capacity` is mapped with `access` for as long as `owner` exists.
/// - No other [`Buffer`] and no reference covers any of these bytes.
/// - `len` is at most `capacity`.
pub struct Buffer {
    ptr: NonNull<u8>,
    len: usize,
    capacity: usize,
    access: Access,
    owner: Arc<dyn Any + Send + Sync>,
    registration: u64,
}

// SAFETY: By the type invariants nothing else in this process refers to the memory, and `owner`
// is `Send` and `Sync`.
unsafe impl Send for Buffer {}

// SAFETY: A shared reference only allows reads of the memory. By the type invariants there are no
// writes to it by this process at that time.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Creates a buffer from a range of mapped memory.
    ///
    /// Processes and guests outside this process may write to the memory at any time.
    ///
    /// # Safety
    ///
    /// - `ptr` to `ptr + len` is mapped with `access` until `owner` is dropped.
    /// - Until all buffers that come from this call are dropped, nothing else in this process
    ///   refers to the memory.
    pub unsafe fn from_raw_parts(
        ptr: NonNull<u8>,
        len: usize,
        access: Access,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        // INVARIANT: These are the safety requirements of this function.
        Self {
            ptr,
            len,
            capacity: len,
            access,
            owner,
            registration: 0,
        }
    }

    /// Allocates `len` zeroed bytes aligned to `align`, which is a power of two.
    ///
    /// Returns [`None`] if there is no memory, `len` is 0 or `align` is not a power of two.
    pub fn allocate(len: usize, align: usize) -> Option<Self> {
        let allocation = Allocation::new(len, align)?;
        let ptr = allocation.ptr;
        // INVARIANT: The allocation is `len` bytes, readable and writable, lives as long as its
        // owner and is referred to by this buffer only.
        Some(Self {
            ptr,
            len,
            capacity: len,
            access: Access::ReadWrite,
            owner: Arc::new(allocation),
            registration: 0,
        })
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns `true` if the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the number of bytes that it can have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Changes the number of bytes, up to the capacity. The content of the memory stays.
    ///
    /// Returns `false`, and changes nothing, if the capacity is smaller.
    pub fn set_len(&mut self, len: usize) -> bool {
        let fits = len <= self.capacity;
        if fits {
            // INVARIANT: It is at most the capacity.
            self.len = len;
        }
        fits
    }

    /// Returns the number by which an engine knows the memory, 0 if none does.
    pub fn registration(&self) -> u64 {
        self.registration
    }

    /// Sets the number by which an engine knows the memory.
    pub fn set_registration(&mut self, number: u64) {
        self.registration = number;
    }

    /// Returns how the memory is mapped.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Returns the address of the first byte, for a system call.
    ///
    /// The memory stays mapped while the buffer exists.
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    /// Returns the address of the first byte, for a system call that writes to it.
    ///
    /// The memory stays mapped while the buffer exists. Writes fault if [`Self::access`] is
    /// [`Access::ReadOnly`].
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Splits the buffer at `mid` into two that share the owner.
    ///
    /// Returns the unchanged buffer as an error if `mid` is greater than its length.
    pub fn split_at(self, mid: usize) -> Result<(Self, Self), Self> {
        let Some(rest) = self.len.checked_sub(mid) else {
            return Err(self);
        };
        // SAFETY: `mid` is at most `len`, so the result is inside the mapping or one past its end.
        let second = unsafe { self.ptr.add(mid) };
        // INVARIANT: Both are parts of the memory of `self`, which ends here, and do not overlap.
        Ok((
            Self {
                ptr: self.ptr,
                len: mid,
                capacity: mid,
                access: self.access,
                owner: self.owner.clone(),
                registration: self.registration,
            },
            Self {
                ptr: second,
                len: rest,
                capacity: rest,
                access: self.access,
                owner: self.owner,
                registration: self.registration,
            },
        ))
    }

    /// Copies `data` to the buffer, starting at `offset`.
    pub fn write_at(&mut self, offset: usize, data: &[u8]) -> Result<(), AccessError> {
        self.check_range(offset, data.len())?;
        self.check_writable()?;
        // SAFETY: The range is mapped and writable by the type invariants and the checks above.
        // `data` is a reference, so by the type invariants it does not overlap.
        unsafe {
            ptr::copy_nonoverlapping(data.as_ptr(), self.ptr.as_ptr().add(offset), data.len());
        }
        Ok(())
    }

    /// Copies bytes from the buffer, starting at `offset`, to `data`.
    ///
    /// If a guest or another process writes to the memory at the same time, the copy may be a
    /// mixture of old and new bytes.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<(), AccessError> {
        self.check_range(offset, data.len())?;
        // SAFETY: The range is mapped by the type invariants and the check above. `data` is a
        // reference, so by the type invariants it does not overlap.
        unsafe {
            ptr::copy_nonoverlapping(self.ptr.as_ptr().add(offset), data.as_mut_ptr(), data.len());
        }
        Ok(())
    }

    /// Copies `len` bytes of `source`, starting at `source_offset`, to the buffer, starting at
    /// `offset`.
    pub fn copy_from(
        &mut self,
        offset: usize,
        source: &Self,
        source_offset: usize,
        len: usize,
    ) -> Result<(), AccessError> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        source.check_range(source_offset, len)?;
        // SAFETY: Both ranges are mapped, and the target is writable, by the type invariants and
        // the checks above. By the type invariants two buffers do not overlap.
        unsafe {
            ptr::copy_nonoverlapping(
                source.ptr.as_ptr().add(source_offset),
                self.ptr.as_ptr().add(offset),
                len,
            );
        }
        Ok(())
    }

    /// Sets `len` bytes, starting at `offset`, to `value`.
    pub fn fill(&mut self, offset: usize, len: usize, value: u8) -> Result<(), AccessError> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        // SAFETY: The range is mapped and writable by the type invariants and the checks above.
        unsafe { ptr::write_bytes(self.ptr.as_ptr().add(offset), value, len) };
        Ok(())
    }

    fn check_range(&self, offset: usize, len: usize) -> Result<(), AccessError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(AccessError::OutOfBounds),
        }
    }

    fn check_writable(&self) -> Result<(), AccessError> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(AccessError::ReadOnly),
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("ptr", &self.ptr)
            .field("len", &self.len)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

/// Memory from the global allocator.
///
/// # Invariants
///
/// `ptr` comes from [`alloc_zeroed`] with `layout`.
struct Allocation {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: The allocation is freed by its drop only, which may happen in any thread.
unsafe impl Send for Allocation {}

// SAFETY: A shared reference gives no access to the memory.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn new(len: usize, align: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len, align).ok()?;
        if len == 0 {
            return None;
        }
        // SAFETY: The size of the layout is not zero.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        // INVARIANT: It was just allocated with this layout.
        Some(Self { ptr, layout })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: By the type invariants it was allocated with this layout. All buffers that point
        // to it share its ownership, so none is left.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_are_zeroed_and_aligned() {
        let buffer = Buffer::allocate(5000, 4096).unwrap();
        assert_eq!(buffer.as_ptr() as usize % 4096, 0);
        let mut bytes = [1; 5000];
        buffer.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 5000]);
        assert!(Buffer::allocate(0, 512).is_none());
        assert!(Buffer::allocate(512, 3).is_none());
        assert!(Buffer::allocate(usize::MAX, 512).is_none());
    }

    #[test]
    fn accesses_are_checked() {
        let mut buffer = Buffer::allocate(8, 8).unwrap();
        assert_eq!(buffer.write_at(5, &[1; 4]), Err(AccessError::OutOfBounds));
        assert_eq!(buffer.fill(usize::MAX, 2, 0), Err(AccessError::OutOfBounds));
        assert_eq!(buffer.read_at(9, &mut []), Err(AccessError::OutOfBounds));
        assert_eq!(buffer.read_at(8, &mut []), Ok(()));
        assert_eq!(buffer.write_at(5, &[1; 3]), Ok(()));
        let mut bytes = [0; 8];
        buffer.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn read_only_memory_is_not_written() {
        static PAGE: [u8; 16] = [7; 16];
        // SAFETY: A static is mapped forever, and only this buffer refers to it.
        let mut buffer = unsafe {
            Buffer::from_raw_parts(
                NonNull::from(&PAGE).cast(),
                16,
                Access::ReadOnly,
                Arc::new(()),
            )
        };
        assert_eq!(buffer.write_at(0, &[1]), Err(AccessError::ReadOnly));
        assert_eq!(buffer.fill(0, 1, 0), Err(AccessError::ReadOnly));
        let mut bytes = [0; 16];
        buffer.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 16]);
    }

    #[test]
    fn a_buffer_changes_its_length_within_its_capacity() {
        let mut buffer = Buffer::allocate(8, 8).unwrap();
        assert!(buffer.set_len(4) && !buffer.set_len(9));
        assert_eq!((buffer.len(), buffer.capacity()), (4, 8));
        assert_eq!(buffer.fill(4, 1, 7), Err(AccessError::OutOfBounds));
        assert!(buffer.set_len(8));
        let (mut first, second) = buffer.split_at(6).unwrap();
        assert!(!first.set_len(7));
        assert_eq!(second.capacity(), 2);
    }

    #[test]
    fn parts_share_the_owner() {
        let owner = Arc::new(());
        let mut memory = [0u8; 16];
        let ptr = NonNull::from(&mut memory).cast();
        // SAFETY: The array outlives the buffers, and is not used while they exist.
        let buffer = unsafe { Buffer::from_raw_parts(ptr, 16, Access::ReadWrite, owner.clone()) };
        let buffer = buffer.split_at(17).unwrap_err();
        let (mut first, second) = buffer.split_at(12).unwrap();
        assert_eq!((first.len(), second.len()), (12, 4));
        first.fill(0, 12, 3).unwrap();
        drop(first);
        let mut bytes = [9; 4];
        second.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4]);
        assert_eq!(Arc::strong_count(&owner), 2);
        drop(second);
        assert_eq!(Arc::strong_count(&owner), 1);
        assert_eq!(memory[..12], [3; 12]);
    }
}
