// SPDX-License-Identifier: GPL-2.0-only

//! Granted pages of other domains: `/dev/xen/gntdev`, `include/uapi/xen/gntdev.h`.
//!
//! A page is mapped, and is then [`Pages`] until it is dropped, or data is copied from or to it,
//! which takes one hypercall for many pieces and leaves nothing to undo.

use crate::ioctl;
use crate::ioctl::Argument;
use crate::memory;
use crate::memory::Pages;
use crate::memory::PAGE_SIZE;
use crate::unmapper::UnmapGrants;
use crate::unmapper::Unmapper;
use io_buffer::Access;
use io_buffer::Buffer;
use rustix::mm;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

/// Grants that one call maps at most.
pub const MAX_MAPPED: usize = 16;

/// Result of one copy (`GNTST_*`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CopyStatus(pub i16);

impl CopyStatus {
    /// The data was copied (`GNTST_okay`).
    pub const OKAY: Self = Self(0);
    /// There is no such grant (`GNTST_bad_gntref`).
    pub const BAD_REFERENCE: Self = Self(-3);
    /// The grant does not allow it (`GNTST_permission_denied`).
    pub const PERMISSION_DENIED: Self = Self(-8);
    /// Returns `true` if the data was copied.
    pub fn is_okay(self) -> bool {
        self == Self::OKAY
    }

    /// The page is not in memory over there now (`GNTST_eagain`).
    pub const AGAIN: Self = Self(-12);
}

/// A range of bytes in a granted page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Piece {
    /// Grant reference of the page.
    pub reference: u32,
    /// Offset in the page, in bytes.
    pub offset: u16,
    /// Length in bytes.
    pub len: u16,
}

/// Copies that are made together.
///
/// # Invariants
///
/// The addresses of this process in `segments` are within buffers that are borrowed for `'a`:
/// mutably, if the copy is to the buffer, which is not read-only then.
pub struct Copies<'a> {
    domain: u16,
    segments: Vec<CopySegment>,
    buffers: PhantomData<&'a mut Buffer>,
}

impl<'a> Copies<'a> {
    /// Returns an empty list for a domain, with space for a number of pieces.
    pub fn new(domain: u16, capacity: usize) -> Self {
        // INVARIANT: There are no addresses.
        Self {
            domain,
            segments: Vec::with_capacity(capacity),
            buffers: PhantomData,
        }
    }

    /// Returns `true` if there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Adds copies from granted pages to a buffer, one piece behind the other. Returns their
    /// numbers, or `None`, if a piece is not within its page or the buffer; then none is added.
    pub fn fetch(
        &mut self,
        buffer: &'a mut Buffer,
        pieces: impl Iterator<Item = Piece>,
    ) -> Option<Range<usize>> {
        if buffer.access() == Access::ReadOnly {
            return None;
        }
        let (start, len) = (buffer.as_mut_ptr(), buffer.len());
        // INVARIANT: `add` checks the length; the buffer is borrowed mutably, and writable.
        self.add(start, len, pieces, |granted, own| {
            (granted, own, COPY_SOURCE_GRANT)
        })
    }

    /// Adds copies from a buffer to granted pages, as [`Self::fetch`].
    pub fn store(
        &mut self,
        buffer: &'a Buffer,
        pieces: impl Iterator<Item = Piece>,
    ) -> Option<Range<usize>> {
        let (start, len) = (buffer.as_ptr().cast_mut(), buffer.len());
        // INVARIANT: `add` checks the length; the buffer is only read from.
        self.add(start, len, pieces, |granted, own| {
            (own, granted, COPY_DEST_GRANT)
        })
    }

    fn add(
        &mut self,
        start: *mut u8,
        len: usize,
        pieces: impl Iterator<Item = Piece>,
        order: impl Fn(Pointer, Pointer) -> (Pointer, Pointer, u16),
    ) -> Option<Range<usize>> {
        let first = self.segments.len();
        let mut at = 0usize;
        for piece in pieces {
            let end = at.checked_add(piece.len.into()).filter(|end| *end <= len);
            let in_page = usize::from(piece.offset) + usize::from(piece.len) <= PAGE_SIZE;
            let Some(end) = end.filter(|_| in_page) else {
                self.segments.truncate(first);
                return None;
            };
            let granted = Pointer {
                foreign: Foreign {
                    reference: piece.reference,
                    offset: piece.offset,
                    domain: self.domain,
                },
            };
            let own = Pointer {
                own: start.wrapping_add(at),
            };
            let (source, dest, flags) = order(granted, own);
            self.segments.push(CopySegment {
                source,
                dest,
                len: piece.len,
                flags,
                status: 0,
            });
            at = end;
        }
        Some(first..self.segments.len())
    }

    /// Returns how copies went: the first status that is not [`CopyStatus::OKAY`], if there is one.
    pub fn status(&self, numbers: Range<usize>) -> CopyStatus {
        let copies = self.segments.get(numbers).unwrap_or_default();
        let mut statuses = copies.iter().map(|copy| CopyStatus(copy.status));
        let failed = statuses.find(|status| *status != CopyStatus::OKAY);
        failed.unwrap_or(CopyStatus::OKAY)
    }

    /// Returns the domain whose pages they are.
    #[cfg(feature = "fake")]
    pub(crate) fn domain(&self) -> u16 {
        self.domain
    }

    /// Copies one after another by a function, which is given our address and says how it went.
    #[cfg(feature = "fake")]
    pub(crate) fn run(&mut self, mut copy: impl FnMut(Piece, *mut u8, bool) -> CopyStatus) {
        for segment in &mut self.segments {
            let to_grant = segment.flags == COPY_DEST_GRANT;
            let (granted, own) = if to_grant {
                (segment.dest, segment.source)
            } else {
                (segment.source, segment.dest)
            };
            // SAFETY: `add` has set this one to a grant, and the other to an address.
            let (foreign, own) = unsafe { (granted.foreign, own.own) };
            let piece = Piece {
                reference: foreign.reference,
                offset: foreign.offset,
                len: segment.len,
            };
            segment.status = copy(piece, own, to_grant).0;
        }
    }
}

/// Access to the granted pages of other domains.
pub trait Grants: Send + Sync {
    /// Maps 1 to [`MAX_MAPPED`] granted pages of a domain, one behind the other.
    fn map(&self, domain: u16, references: &[u32], access: Access) -> io::Result<Pages>;

    /// Makes copies. How each one went is in [`Copies::status`]; an error means that none of them
    /// is known to have been made.
    fn copy(&self, copies: &mut Copies<'_>) -> io::Result<()>;
}

/// The numbers of the `ioctl`s of a [`GrantDevice`].
pub const REQUESTS: [libc::Ioctl; 3] =
    [MapGrants::REQUEST, UnmapGrants::REQUEST, GrantCopy::REQUEST];

/// The device `/dev/xen/gntdev`.
pub struct GrantDevice {
    file: Arc<File>,
}

impl GrantDevice {
    /// Path of the device.
    pub const PATH: &'static str = "/dev/xen/gntdev";

    /// Opens the device.
    pub fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(Self::PATH)?;
        Ok(Self {
            file: Arc::new(file),
        })
    }
}

impl Grants for GrantDevice {
    fn map(&self, domain: u16, references: &[u32], access: Access) -> io::Result<Pages> {
        let mut map = MapGrants::new(domain, references).ok_or(io::ErrorKind::InvalidInput)?;
        let len = memory::size(references.len())?;
        // SAFETY: There are no pointers in the structure.
        unsafe { ioctl::call(&self.file, &mut map) }?;
        let unmapper = Unmapper::Device {
            device: self.file.clone(),
            index: map.index,
            count: map.count,
        };
        let (protection, writable) = match access {
            Access::ReadOnly => (ProtFlags::READ, false),
            Access::ReadWrite => (ProtFlags::READ | ProtFlags::WRITE, true),
        };
        // SAFETY: The kernel chooses an address where nothing is mapped.
        let start = unsafe {
            mm::mmap(
                ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                &self.file,
                map.index,
            )
        }?;
        // SAFETY: This was mapped just now, as `writable` says, and no one else has it.
        unsafe { Pages::from_raw(start, len, writable, Some(unmapper)) }
    }

    fn copy(&self, copies: &mut Copies<'_>) -> io::Result<()> {
        let mut request = GrantCopy {
            count: u32::try_from(copies.segments.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            segments: copies.segments.as_mut_ptr(),
        };
        // SAFETY: `segments` has `count` elements. By the type invariants of `Copies` the kernel
        // may read and write our memory as they say.
        unsafe { ioctl::call(&self.file, &mut request) }?;
        Ok(())
    }
}

const COPY_SOURCE_GRANT: u16 = 1;
const COPY_DEST_GRANT: u16 = 2;

/// `struct ioctl_gntdev_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy)]
struct GrantRef {
    domain: u32,
    reference: u32,
}

/// `struct ioctl_gntdev_map_grant_ref`, with space for more references.
#[repr(C)]
struct MapGrants {
    count: u32,
    pad: u32,
    index: u64,
    references: [GrantRef; MAX_MAPPED],
}

impl MapGrants {
    fn new(domain: u16, references: &[u32]) -> Option<Self> {
        let none = GrantRef {
            domain: 0,
            reference: 0,
        };
        let mut map = Self {
            count: u32::try_from(references.len()).ok()?,
            pad: 0,
            index: 0,
            references: [none; MAX_MAPPED],
        };
        if references.is_empty() || references.len() > MAX_MAPPED {
            return None;
        }
        for (to, reference) in map.references.iter_mut().zip(references) {
            *to = GrantRef {
                domain: domain.into(),
                reference: *reference,
            };
        }
        Some(map)
    }
}

// SAFETY: The kernel reads `count` references, which `MapGrants::new` has limited to those that are
// there, and writes the index.
unsafe impl Argument for MapGrants {
    // The size in the number is that of the structure with one reference.
    const REQUEST: libc::Ioctl = ioctl::request(b'G', 0, 24);
}

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
struct GrantCopy {
    count: u32,
    segments: *mut CopySegment,
}

// SAFETY: The kernel reads the structure, which is its own, and follows the pointer.
unsafe impl Argument for GrantCopy {
    const REQUEST: libc::Ioctl = ioctl::request(b'G', 8, size_of::<Self>());
}

/// `struct gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopySegment {
    source: Pointer,
    dest: Pointer,
    len: u16,
    flags: u16,
    status: i16,
}

#[repr(C)]
#[derive(Clone, Copy)]
union Pointer {
    own: *mut u8,
    foreign: Foreign,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Foreign {
    reference: u32,
    offset: u16,
    domain: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_those_of_the_header() {
        assert_eq!(MapGrants::REQUEST, 0x18_4700);
        assert_eq!(GrantCopy::REQUEST, 0x10_4708);
        assert_eq!(size_of::<CopySegment>(), 24);
    }

    #[test]
    fn copies_stay_within_page_and_buffer() {
        let fits = |offset, len, size| {
            let mut buffer = Buffer::allocate(size, 8).unwrap();
            let mut copies = Copies::new(1, 2);
            let piece = Piece {
                reference: 1,
                offset,
                len,
            };
            let added = copies.fetch(&mut buffer, [piece; 2].into_iter());
            assert_eq!(added.is_none(), copies.is_empty());
            added == Some(0..2)
        };
        assert!(fits(0, 4096, 8192) && fits(4095, 1, 2) && fits(512, 3584, 7168));
        assert!(!fits(1, 4096, 8192) && !fits(u16::MAX, 1, 8) && !fits(0, 4096, 8191));
    }

    #[test]
    fn no_more_grants_than_fit() {
        assert!(MapGrants::new(1, &[]).is_none());
        assert!(MapGrants::new(1, &[7; MAX_MAPPED]).is_some());
        assert!(MapGrants::new(1, &[7; MAX_MAPPED + 1]).is_none());
    }
}
