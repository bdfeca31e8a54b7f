// SPDX-License-Identifier: GPL-2.0-only

//! The data path: moves data between the frontend's pages and the image.
//!
//! - *Persistent grants*: the frontend's pages stay mapped, and are the buffers of the I/O. They
//!   are not offered by default: if a process is killed during such I/O, the page tables that Xen
//!   knows the mapping by are gone before a PV dom0 unmaps it (`__unmap_grant_pages_done` of
//!   gntdev.c warns), so the grants leak.
//! - *Grant copy*: Xen copies the data from or to memory of this process. One call copies the data
//!   of many requests, and nothing has to be unmapped.
//!
//! The segments of an indirect request are copied before they are checked, so that the frontend
//! cannot change them in between.

use blkif::backoff::Backoff;
use blkif::request::DiskLimits;
use blkif::request::Extent;
use blkif::request::InvalidRequest;
use blkif::request::Segment;
use blkif::request::Unfetched;
use blkif::wire::Status;
use blkif::wire::WireSegment;
use blkif::wire::SEGMENTS_PER_INDIRECT_PAGE;
use engine::Access;
use engine::Block;
use engine::Buffer;
use engine::SharedMemory;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::time::Instant;
use xen_user::grant::Copies;
use xen_user::grant::CopyStatus;
use xen_user::grant::Grants;
use xen_user::grant::Piece;
use xen_user::memory::DataPages;
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

/// Pages that the pool keeps.
const MAX_POOL_PAGES: usize = 256;

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

/// The memory of a request's data.
#[derive(Default)]
pub(crate) enum Memory {
    /// There is no data.
    #[default]
    None,
    /// Memory of this process: the data is copied.
    Own(Arc<Block>),
    /// Pages of the frontend, with their grant references.
    Mapped(Vec<(u32, Arc<DataPages>)>),
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
    /// writes data there, so it is copied to and from there even if grants are `persistent`.
    pub(crate) fn new(
        domain: u16,
        grants: Arc<dyn Grants>,
        persistent: bool,
        shared: Option<Arc<SharedMemory>>,
    ) -> Self {
        let maps = persistent && shared.is_none();
        Self {
            domain,
            grants,
            persistent: maps.then(PersistentGrants::default),
            pool: Pool::new(shared),
        }
    }

    /// Fetches the segments of an indirect request and checks them.
    pub(crate) fn fetch_segments(
        &self,
        unfetched: &Unfetched<'_>,
        limits: &DiskLimits,
        segments: &mut Vec<Segment>,
    ) -> Result<Extent, DataError> {
        let mut checker = unfetched.checker(limits);
        let mut left = usize::from(unfetched.count());
        for reference in unfetched.grefs() {
            let here = left.min(SEGMENTS_PER_INDIRECT_PAGE);
            left = left.saturating_sub(here);
            let page = self.fetch(*reference, here.saturating_mul(SEGMENT_BYTES))?;
            for words in page.chunks_exact(SEGMENT_BYTES) {
                let words = words.first_chunk().ok_or_else(invalid)?;
                let segment = checker.push(decode_segment(*words));
                segments.push(segment.map_err(DataError::Refused)?);
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

    /// Returns memory for segments: mapped pages if the frontend uses persistent grants and all of
    /// them can be mapped, else our own.
    pub(crate) fn prepare(
        &mut self,
        segments: &[Segment],
        max_buffers: usize,
        now: Instant,
    ) -> Result<(Memory, Vec<Buffer>), DataError> {
        if let Some(persistent) = &mut self.persistent {
            if segments.len() <= max_buffers {
                let mapped = persistent.take(&*self.grants, self.domain, segments, now);
                if let Some((pages, buffers)) = mapped {
                    return Ok((Memory::Mapped(pages), buffers));
                }
            }
        }
        let len = segments
            .iter()
            .map(|segment| usize::from(segment.len()))
            .sum();
        let (pages, buffer) = self.pool.take(len)?;
        Ok((Memory::Own(pages), vec![buffer]))
    }

    /// Takes back the memory of a request that has ended. Its buffers must have been dropped.
    pub(crate) fn release(&mut self, memory: Memory, now: Instant) {
        match (memory, &mut self.persistent) {
            (Memory::Own(pages), _) => self.pool.put(pages),
            (Memory::Mapped(pages), Some(persistent)) => persistent.put(pages, now),
            _ => {}
        }
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
        let mapped = self.persistent.as_ref();
        mapped.is_some_and(|persistent| !persistent.unused.is_empty()) || self.pool.pages != 0
    }

    /// Gives up all memory that no request uses and none has used for [`UNUSED`].
    pub(crate) fn purge(&mut self, now: Instant) {
        self.pool.purge();
        if let Some(persistent) = &mut self.persistent {
            persistent.purge(now);
        }
    }
}

fn no_memory() -> DataError {
    DataError::Call(io::ErrorKind::OutOfMemory.into())
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

fn decode_segment(bytes: [u8; SEGMENT_BYTES]) -> WireSegment {
    let [a, b, c, d, e, f, g, h] = bytes;
    WireSegment::decode([
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ])
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
///
/// A request takes its pages out and puts them back when it has ended, so no page is unmapped that
/// is in use.
#[derive(Default)]
struct PersistentGrants {
    /// Those that no request uses, by grant reference, with the time of the last use.
    unused: HashMap<u32, (Arc<DataPages>, Instant)>,
    /// Number of those that requests use.
    used: usize,
    /// When the full table was last scanned.
    scanned: Option<Instant>,
}

/// Pages that were taken out, and buffers in them.
type Taken = (Vec<(u32, Arc<DataPages>)>, Vec<Buffer>);

impl PersistentGrants {
    /// Takes out the pages of segments, and maps those that are missing. Returns `None` if that is
    /// not possible: data has to be copied then.
    fn take(
        &mut self,
        grants: &dyn Grants,
        domain: u16,
        segments: &[Segment],
        now: Instant,
    ) -> Option<Taken> {
        let mut pages = Vec::with_capacity(segments.len());
        let mut buffers = Vec::with_capacity(segments.len());
        for segment in segments {
            let Some((page, buffer)) = self.take_one(grants, domain, segment, now) else {
                drop(buffers);
                self.put(pages, now);
                return None;
            };
            pages.push((segment.gref(), page));
            buffers.push(buffer);
        }
        Some((pages, buffers))
    }

    fn take_one(
        &mut self,
        grants: &dyn Grants,
        domain: u16,
        segment: &Segment,
        now: Instant,
    ) -> Option<(Arc<DataPages>, Buffer)> {
        let mut page = match self.unused.remove(&segment.gref()) {
            Some((page, _)) => page,
            None if self.is_full(now) => return None,
            None => {
                let pages = grants.map(domain, &[segment.gref()], Access::ReadWrite);
                Arc::new(DataPages::from(pages.ok()?))
            }
        };
        let (at, len) = (usize::from(segment.offset()), usize::from(segment.len()));
        let buffer = DataPages::lend(&mut page, at, len)?;
        self.used = self.used.saturating_add(1);
        Some((page, buffer))
    }

    fn is_full(&mut self, now: Instant) -> bool {
        let is_full =
            |table: &Self| table.unused.len().saturating_add(table.used) >= MAX_PERSISTENT;
        if is_full(self) && self.scanned.is_none_or(|then| then + SCAN_PERIOD <= now) {
            self.scanned = Some(now);
            self.purge(now);
        }
        is_full(self)
    }

    /// Puts pages back. One that was mapped twice is unmapped.
    fn put(&mut self, pages: Vec<(u32, Arc<DataPages>)>, now: Instant) {
        self.used = self.used.saturating_sub(pages.len());
        for (reference, page) in pages {
            self.unused.insert(reference, (page, now));
        }
    }

    fn purge(&mut self, now: Instant) {
        self.unused.retain(|_, (_, used)| *used + UNUSED > now);
    }
}

/// Memory of our own, or of the image, that only data of this frontend was ever in.
struct Pool {
    shared: Option<Arc<SharedMemory>>,
    free: [Vec<Arc<Block>>; SIZES],
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

    /// Takes memory for a number of bytes, and returns a buffer of that length in it.
    fn take(&mut self, len: usize) -> Result<(Arc<Block>, Buffer), DataError> {
        let pages = len.div_ceil(PAGE_SIZE).max(1).next_power_of_two();
        let size = pages.trailing_zeros() as usize;
        let kept = self.free.get_mut(size).and_then(Vec::pop);
        let mut memory = match kept {
            Some(memory) => {
                self.pages = self.pages.saturating_sub(pages);
                memory
            }
            None => Arc::new(Block::new(self.allocate(pages)?)),
        };
        let buffer = Block::lend(&mut memory, 0, len);
        let buffer = buffer.ok_or_else(invalid)?;
        Ok((memory, buffer))
    }

    fn allocate(&self, pages: usize) -> Result<Buffer, DataError> {
        let len = pages.saturating_mul(PAGE_SIZE);
        if let Some(shared) = &self.shared {
            return shared.allocate(len).map_err(|_| no_memory());
        }
        let mut pages = Arc::new(DataPages::from(Pages::anonymous(pages)?));
        Ok(DataPages::lend(&mut pages, 0, len).ok_or_else(invalid)?)
    }

    fn put(&mut self, memory: Arc<Block>) {
        let pages = memory.len() / PAGE_SIZE;
        let kept = self.pages.saturating_add(pages);
        let size = pages.trailing_zeros() as usize;
        if kept > MAX_POOL_PAGES {
            return;
        }
        if let Some(free) = self.free.get_mut(size) {
            free.push(memory);
            self.pages = kept;
        }
    }

    /// Frees all memory that no request uses.
    fn purge(&mut self) {
        self.free = Default::default();
        self.pages = 0;
    }
}
