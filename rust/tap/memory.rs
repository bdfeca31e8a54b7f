// SPDX-License-Identifier: GPL-2.0-only

//! The data path: moves data between the frontend's pages and the image.
//!
//! The image's I/O uses memory of this process only, so that the kernel needs none of the
//! frontend's pages when a process has been killed during I/O. (In a PV dom0 it could not unmap
//! them: Xen needs the page tables of the process.) The data is copied in one of two ways:
//!
//! - *Persistent grants*: the frontend uses the same pages again, so they stay mapped, and this
//!   process copies the data, without a system call.
//! - *Grant copy*: Xen copies the data. One call copies that of many requests, and nothing has to
//!   be unmapped.
//!
//! The segments of an indirect request are copied before they are checked, so that the frontend
//! cannot change them in between.

use blkif::backoff::Backoff;
use blkif::request::DiskLimits;
use blkif::request::Extent;
use blkif::request::InvalidRequest;
use blkif::request::Segment;
use blkif::request::SegmentChecker;
use blkif::request::Unfetched;
use blkif::wire::Status;
use blkif::wire::WireSegment;
use blkif::wire::SEGMENTS_PER_INDIRECT_PAGE;
use engine::Access;
use engine::Buffer;
use engine::Queue;
use engine::SharedMemory;
use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::fmt;
use std::hash::BuildHasherDefault;
use std::hash::Hasher;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::time::Instant;
use xen_user::grant::Copies;
use xen_user::grant::CopyStatus;
use xen_user::grant::Grants;
use xen_user::grant::Piece;
use xen_user::memory::Pages;
use xen_user::memory::PAGE_SIZE;

/// Persistent grants of a queue, at most (`max_persistent_grants` of xen-blkback).
const MAX_PERSISTENT: usize = 1056;

/// A persistent grant that was not used for this long is unmapped
/// (`persistent_grant_unused_seconds`).
pub(crate) const UNUSED: Duration = Duration::from_secs(60);

/// Time between two scans of a full table for unused grants.
const SCAN_PERIOD: Duration = Duration::from_secs(1);

/// Time for which copies are retried while the frontend's pages are paged out, in milliseconds: as
/// long as Linux waits.
const PAGED_OUT_MS: u32 = 32_000;

/// Bytes of a segment in a page of segments.
const SEGMENT_BYTES: usize = 8;

/// Sizes of the pool's memory: 1, 2, 4, ... 256 pages.
const SIZES: usize = 9;

/// Pages that the pool keeps (`max_buffer_pages` of xen-blkback).
const MAX_POOL_PAGES: usize = 1024;

/// The reason why the data of a request cannot be moved.
#[derive(Debug)]
pub(crate) enum DataError {
    /// The segments, once fetched, are not valid.
    Refused(InvalidRequest),
    /// A grant cannot be copied from or to.
    Copy(CopyStatus),
    /// A call fails.
    Call(io::Error),
}

impl DataError {
    pub(crate) fn status(&self) -> Status {
        match self {
            DataError::Refused(refusal) => refusal.status(),
            DataError::Copy(_) | DataError::Call(_) => Status::Error,
        }
    }
}

impl fmt::Display for DataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DataError::Refused(refusal) => write!(f, "{refusal}"),
            DataError::Copy(status) => write!(f, "Xen refuses a copy: status {}", status.0),
            DataError::Call(error) => write!(f, "cannot copy: {error}"),
        }
    }
}

impl From<io::Error> for DataError {
    fn from(error: io::Error) -> Self {
        DataError::Call(error)
    }
}

/// The data path of a queue.
pub(crate) struct DataPath {
    domain: u16,
    grants: Arc<dyn Grants>,
    persistent: Option<PersistentGrants>,
    pool: Pool,
}

impl DataPath {
    /// Creates the data path of a queue. An image that shares memory with its daemon reads and
    /// writes data there.
    pub(crate) fn new(
        domain: u16,
        grants: Arc<dyn Grants>,
        persistent: bool,
        shared: Option<Arc<SharedMemory>>,
    ) -> Self {
        Self {
            domain,
            grants,
            persistent: persistent.then(PersistentGrants::default),
            pool: Pool::new(shared),
        }
    }

    /// Fetches the segments of an indirect request, checks them, and adds them to `pieces`.
    pub(crate) fn fetch_segments(
        &mut self,
        unfetched: &Unfetched<'_>,
        limits: &DiskLimits,
        pieces: &mut Vec<Piece>,
        now: Instant,
    ) -> Result<Extent, DataError> {
        let mut checker = unfetched.checker(limits);
        let mut left = usize::from(unfetched.count());
        for reference in unfetched.grefs() {
            let here = left.min(SEGMENTS_PER_INDIRECT_PAGE);
            left = left.saturating_sub(here);
            if let Some(page) = self.page(*reference, now) {
                for number in 0..here {
                    let word = number.saturating_mul(2);
                    let words = [page.load(word), page.load(word.saturating_add(1))];
                    check_segment(&mut checker, words, pieces)?;
                }
                continue;
            }
            let page = self.fetch(*reference, here.saturating_mul(SEGMENT_BYTES))?;
            for bytes in page.chunks_exact(SEGMENT_BYTES) {
                let bytes = bytes.first_chunk().ok_or_else(invalid)?;
                check_segment(&mut checker, segment_words(*bytes), pieces)?;
            }
        }
        checker.finish().map_err(DataError::Refused)
    }

    /// Copies the beginning of a granted page.
    fn fetch(&self, reference: u32, len: usize) -> Result<Vec<u8>, DataError> {
        let no_memory = || io::Error::from(io::ErrorKind::OutOfMemory);
        let mut buffer = Buffer::allocate(len, SEGMENT_BYTES).ok_or_else(no_memory)?;
        let piece = Piece {
            reference,
            offset: 0,
            len: u16::try_from(len).unwrap_or(u16::MAX),
        };
        self.copy_from(&mut buffer, &[piece])?;
        let mut bytes = vec![0; len];
        buffer.read_at(0, &mut bytes).map_err(io::Error::other)?;
        Ok(bytes)
    }

    /// Returns a page of the frontend that is, or now becomes, mapped persistently.
    fn page(&mut self, reference: u32, now: Instant) -> Option<&Pages> {
        let persistent = self.persistent.as_mut()?;
        persistent.page(&*self.grants, self.domain, reference, now)
    }

    /// Allocates memory for a number of bytes.
    pub(crate) fn allocate(
        &mut self,
        image: &mut dyn Queue,
        len: usize,
    ) -> Result<Buffer, DataError> {
        self.pool.take(image, len)
    }

    /// Takes back the memory of a request that has ended.
    pub(crate) fn free(&mut self, image: &mut dyn Queue, buffer: Buffer) {
        self.pool.put(image, buffer);
    }

    /// Copies pages that are mapped persistently to a buffer. Returns `false` if one of them is
    /// not.
    pub(crate) fn read_mapped(
        &mut self,
        buffer: &mut Buffer,
        pieces: &[Piece],
        now: Instant,
    ) -> bool {
        self.each_mapped(pieces, now, |page, piece, at| {
            page.copy_to(piece.offset.into(), buffer, at, piece.len.into())
        })
    }

    /// Copies a buffer to pages that are mapped persistently. Returns `false` if one of them is
    /// not.
    pub(crate) fn write_mapped(&mut self, buffer: &Buffer, pieces: &[Piece], now: Instant) -> bool {
        self.each_mapped(pieces, now, |page, piece, at| {
            page.copy_from(piece.offset.into(), buffer, at, piece.len.into())
        })
    }

    /// Calls a function for each piece, with its page and its place in the data, until it returns
    /// `false` or a page is not mapped persistently.
    fn each_mapped(
        &mut self,
        pieces: &[Piece],
        now: Instant,
        mut copy: impl FnMut(&Pages, &Piece, usize) -> bool,
    ) -> bool {
        if self.persistent.is_none() {
            return false;
        }
        let mut at = 0usize;
        pieces.iter().all(|piece| {
            let start = at;
            at = at.saturating_add(piece.len.into());
            let page = self.page(piece.reference, now);
            page.is_some_and(|page| copy(page, piece, start))
        })
    }

    /// Makes copies that were collected.
    pub(crate) fn copy(&self, copies: &mut Copies<'_>) -> Result<(), DataError> {
        if !copies.is_empty() {
            self.grants.copy(copies)?;
        }
        Ok(())
    }

    /// Copies granted pages to a buffer, and waits for pages that are not in memory.
    pub(crate) fn copy_from(&self, buffer: &mut Buffer, pieces: &[Piece]) -> Result<(), DataError> {
        self.retry(|copies_of| {
            let mut copies = Copies::new(self.domain, pieces.len());
            let range = copies.fetch(buffer, pieces.iter().copied());
            let range = range.ok_or_else(invalid)?;
            copies_of.grants.copy(&mut copies)?;
            Ok(copies.status(range))
        })
    }

    /// Copies a buffer to granted pages, and waits for pages that are not in memory.
    pub(crate) fn copy_to(&self, buffer: &Buffer, pieces: &[Piece]) -> Result<(), DataError> {
        self.retry(|copies_of| {
            let mut copies = Copies::new(self.domain, pieces.len());
            let range = copies.store(buffer, pieces.iter().copied());
            let range = range.ok_or_else(invalid)?;
            copies_of.grants.copy(&mut copies)?;
            Ok(copies.status(range))
        })
    }

    fn retry(
        &self,
        mut copy: impl FnMut(&Self) -> Result<CopyStatus, DataError>,
    ) -> Result<(), DataError> {
        blkif::backoff::retry(
            Backoff::new(1, 256),
            PAGED_OUT_MS,
            |milliseconds| thread::sleep(Duration::from_millis(milliseconds.into())),
            |error| matches!(error, DataError::Copy(CopyStatus::AGAIN)),
            || match copy(self)? {
                CopyStatus::OKAY => Ok(()),
                status => Err(DataError::Copy(status)),
            },
        )
    }

    /// Returns `true` if pages are mapped, or memory is kept, that may not be needed.
    pub(crate) fn keeps_memory(&self) -> bool {
        let persistent = self.persistent.as_ref();
        persistent.is_some_and(|grants| !grants.mapped.is_empty()) || self.pool.pages != 0
    }

    /// Gives up all memory that no request uses, and unmaps the pages that none has used for
    /// [`UNUSED`].
    pub(crate) fn purge(&mut self, image: &mut dyn Queue, now: Instant) {
        self.pool.purge(image);
        if let Some(persistent) = &mut self.persistent {
            persistent.purge(now);
        }
    }
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

fn segment_words(bytes: [u8; SEGMENT_BYTES]) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = bytes;
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

/// Checks a segment of an indirect request, and adds it to `pieces`.
fn check_segment(
    checker: &mut SegmentChecker<'_>,
    words: [u32; 2],
    pieces: &mut Vec<Piece>,
) -> Result<(), DataError> {
    let segment = checker.push(WireSegment::decode(words));
    pieces.push(piece(&segment.map_err(DataError::Refused)?));
    Ok(())
}

/// Returns the piece of a granted page that a segment is.
pub(crate) fn piece(segment: &Segment) -> Piece {
    Piece {
        reference: segment.gref(),
        offset: segment.offset(),
        len: segment.len(),
    }
}

/// Pages of the frontend that stay mapped.
#[derive(Default)]
struct PersistentGrants {
    /// The pages, by grant reference.
    mapped: HashMap<u32, MappedGrant, BuildHasherDefault<ReferenceHasher>>,
    /// When the full table was last scanned.
    scanned: Option<Instant>,
}

/// A page of the frontend that stays mapped.
struct MappedGrant {
    page: Pages,
    /// When it was last used.
    used: Instant,
}

impl PersistentGrants {
    /// Returns a page, which is mapped if it is not yet. Returns `None` if that is not possible:
    /// data has to be copied by Xen then.
    fn page(
        &mut self,
        grants: &dyn Grants,
        domain: u16,
        reference: u32,
        now: Instant,
    ) -> Option<&Pages> {
        let is_full = self.mapped.len() >= MAX_PERSISTENT && !self.make_room(now);
        match self.mapped.entry(reference) {
            Entry::Occupied(entry) => {
                let mapped = entry.into_mut();
                mapped.used = now;
                Some(&mapped.page)
            }
            Entry::Vacant(_) if is_full => None,
            Entry::Vacant(entry) => {
                let page = grants.map(domain, &[reference], Access::ReadWrite).ok()?;
                Some(&entry.insert(MappedGrant { page, used: now }).page)
            }
        }
    }

    /// Unmaps unused pages of a full table, now and then. Returns `true` if there is room.
    fn make_room(&mut self, now: Instant) -> bool {
        if self.scanned.is_none_or(|then| then + SCAN_PERIOD <= now) {
            self.scanned = Some(now);
            self.purge(now);
        }
        self.mapped.len() < MAX_PERSISTENT
    }

    fn purge(&mut self, now: Instant) {
        self.mapped.retain(|_, grant| grant.used + UNUSED > now);
    }
}

/// Hashes grant references. The frontend chooses them, and if it chooses bad ones, only its own
/// disk becomes slow.
#[derive(Default)]
struct ReferenceHasher(u64);

impl Hasher for ReferenceHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32((*byte).into());
        }
    }

    fn write_u32(&mut self, value: u32) {
        // Fibonacci hashing, as `hash_32` of Linux.
        let mixed = self.0 ^ u64::from(value);
        self.0 = mixed.wrapping_mul(0x61c8_8646_80b5_83eb);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Memory of our own, or of the image, that only data of this frontend was ever in.
struct Pool {
    shared: Option<Arc<SharedMemory>>,
    free: [Vec<Buffer>; SIZES],
    /// Number of pages in `free`.
    pages: usize,
}

impl Pool {
    fn new(shared: Option<Arc<SharedMemory>>) -> Self {
        Self {
            shared,
            free: Default::default(),
            pages: 0,
        }
    }

    /// Takes memory for a number of bytes, which is the length of the result.
    fn take(&mut self, image: &mut dyn Queue, len: usize) -> Result<Buffer, DataError> {
        let pages = len.div_ceil(PAGE_SIZE).max(1).next_power_of_two();
        let size = pages.trailing_zeros() as usize;
        let kept = self.free.get_mut(size).and_then(Vec::pop);
        let mut buffer = match kept {
            Some(buffer) => {
                self.pages = self.pages.saturating_sub(pages);
                buffer
            }
            None => {
                let mut buffer = self.allocate(pages)?;
                image.register(&mut buffer);
                buffer
            }
        };
        match buffer.set_len(len) {
            true => Ok(buffer),
            false => Err(invalid().into()),
        }
    }

    /// Allocates memory. The error is `WouldBlock` if other queues may give some back.
    fn allocate(&self, pages: usize) -> Result<Buffer, DataError> {
        match &self.shared {
            Some(shared) => {
                let buffer = shared.allocate(pages.saturating_mul(PAGE_SIZE));
                buffer.map_err(|_| DataError::Call(io::ErrorKind::WouldBlock.into()))
            }
            None => Ok(Pages::anonymous(pages)?.into_buffer()),
        }
    }

    fn put(&mut self, image: &mut dyn Queue, buffer: Buffer) {
        let pages = buffer.capacity() / PAGE_SIZE;
        let kept = self.pages.saturating_add(pages);
        let size = pages.trailing_zeros() as usize;
        match self.free.get_mut(size) {
            Some(free) if kept <= MAX_POOL_PAGES => {
                free.push(buffer);
                self.pages = kept;
            }
            _ => image.unregister(buffer),
        }
    }

    fn purge(&mut self, image: &mut dyn Queue) {
        self.pages = 0;
        for buffer in self.free.iter_mut().flat_map(std::mem::take) {
            image.unregister(buffer);
        }
    }
}
