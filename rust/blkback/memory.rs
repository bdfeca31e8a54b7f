// SPDX-License-Identifier: GPL-2.0

//! Moving data between the frontend's memory and the disk.
//!
//! There are several ways to get at the frontend's pages, and a [`Mover`] takes the cheapest:
//!
//! - *map*: the pages of the whole request are mapped with one hypercall, the disk works on them,
//!   and they are unmapped together with those of other requests before their answers are shown.
//! - *copy*: the pages of segments of an indirect request are copied to private memory, where they
//!   can be looked at without the frontend changing them meanwhile.

use crate::params::MAX_BUFFER_PAGES;
use crate::transfer::Transfer;
use crate::transfer::Work;
use blkif::request::DiskLimits;
use blkif::request::Refusal;
use blkif::request::Segment;
use blkif::request::Unfetched;
use blkif::wire::Status;
use blkif::wire::WireSegment;
use blkif::wire::SEGMENTS_PER_INDIRECT_PAGE;
use kernel::fmt;
use kernel::page::Page;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel_ext::base::page::PageSliceMut;
use kernel_ext::xen::grant::copy::Copier;
use kernel_ext::xen::grant::copy::CopyError;
use kernel_ext::xen::grant::map::MapError;
use kernel_ext::xen::grant::map::MappedPage;
use kernel_ext::xen::grant::map::Mapper;
use kernel_ext::xen::grant::map::PageCache;
use kernel_ext::xen::grant::Access;
use kernel_ext::xen::grant::ForeignRef;
use kernel_ext::xen::DomId;

/// The pages of a transfer, one for each segment.
pub(crate) type Memory = KVec<MappedPage>;

/// Bytes of a segment in a page of segments.
const SEGMENT_BYTES: usize = 8;

/// Why the data of a request cannot be had.
#[derive(Debug)]
pub(crate) enum Problem {
    /// The segments, once fetched, are not valid.
    Refused(Refusal),
    /// The frontend's pages could not be mapped.
    Map(MapError),
    /// The pages of segments could not be copied.
    Copy(CopyError),
    /// There is no memory, or a limit of our own was hit.
    Own(Error),
}

impl Problem {
    /// Whether it may work when other transfers have ended.
    pub(crate) fn is_shortage(&self) -> bool {
        matches!(self, Problem::Own(_) | Problem::Map(MapError::NoSpace(_)))
    }

    pub(crate) fn status(&self) -> Status {
        match self {
            Problem::Refused(refusal) => refusal.status(),
            Problem::Map(_) | Problem::Copy(_) | Problem::Own(_) => Status::Error,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Refused(refusal) => write!(f, "{refusal}"),
            Problem::Map(MapError::Refused(reference, status)) => {
                f.write_fmt(fmt!("grant {} cannot be mapped: {status}", reference.0))
            }
            Problem::Map(MapError::NoSpace(error)) => {
                write!(f, "no page to map to: {error:?}")
            }
            Problem::Copy(CopyError::Refused(index, status)) => f.write_fmt(fmt!(
                "page {index} of the segments cannot be copied: {status}"
            )),
            Problem::Copy(CopyError::Hypercall(error)) => {
                write!(f, "pages of segments cannot be copied: {error:?}")
            }
            Problem::Own(error) => write!(f, "no memory: {error:?}"),
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Problem::Own(error)
    }
}

impl From<kernel::alloc::AllocError> for Problem {
    fn from(_: kernel::alloc::AllocError) -> Self {
        Problem::Own(ENOMEM)
    }
}

/// What a queue needs to move data. One for each thread.
pub(crate) struct Mover {
    domain: DomId,
    /// Addresses to map to.
    cache: Pin<KBox<PageCache>>,
    mapper: Mapper,
    copier: Copier,
    /// Private copy of a page of segments.
    descriptors: Page,
    /// References of the request that is being mapped.
    references: KVec<ForeignRef>,
    /// Pages of transfers that have ended, to be unmapped together.
    ended: KVec<MappedPage>,
    /// Addresses that are never freed.
    at_least: u32,
}

impl Mover {
    /// For requests of `domain` with up to `segments` segments. One such request can always be
    /// mapped, if no other one is.
    pub(crate) fn new(domain: DomId, segments: usize) -> Result<Self> {
        let cache = KBox::pin_init(PageCache::new(), GFP_KERNEL)?;
        cache.fill(segments)?;
        Ok(Self {
            domain,
            cache,
            mapper: Mapper::new(segments)?,
            copier: Copier::new(1)?,
            descriptors: Page::alloc_page(GFP_KERNEL)?,
            references: KVec::with_capacity(segments, GFP_KERNEL)?,
            ended: KVec::with_capacity(segments, GFP_KERNEL)?,
            at_least: u32::try_from(segments).unwrap_or(u32::MAX),
        })
    }

    /// Gets the segments of an indirect request, and checks them.
    pub(crate) fn fetch(
        &mut self,
        unfetched: &Unfetched,
        limits: &DiskLimits,
        segments: &mut KVec<Segment>,
    ) -> Result<blkif::request::Extent, Problem> {
        let mut checker = unfetched.checker(limits);
        let mut left = usize::from(unfetched.count());
        for gref in unfetched.grefs() {
            let here = left.min(SEGMENTS_PER_INDIRECT_PAGE);
            left = left.saturating_sub(here);
            let words = self.copy_descriptors(ForeignRef(*gref), here)?;
            for index in 0..here {
                let mut bytes = [0; SEGMENT_BYTES];
                let offset = index.saturating_mul(SEGMENT_BYTES);
                words
                    .get(offset, SEGMENT_BYTES)
                    .ok_or(EINVAL)?
                    .as_slice()
                    .read(&mut bytes);
                let [a, b, c, d, e, f, g, h] = bytes;
                let wire = WireSegment::decode([
                    u32::from_le_bytes([a, b, c, d]),
                    u32::from_le_bytes([e, f, g, h]),
                ]);
                let segment = checker.push(wire).map_err(Problem::Refused)?;
                segments
                    .push_within_capacity(segment)
                    .map_err(|_| Problem::Own(ENOMEM))?;
            }
        }
        checker.finish().map_err(Problem::Refused)
    }

    /// Copies so many segments of a page of the frontend.
    fn copy_descriptors(
        &mut self,
        reference: ForeignRef,
        segments: usize,
    ) -> Result<PageSliceMut<'_>, Problem> {
        let len = segments.saturating_mul(SEGMENT_BYTES).min(PAGE_SIZE);
        let words = PageSliceMut::new(&self.descriptors, 0, len).ok_or(EINVAL)?;
        let mut batch = self.copier.batch();
        batch.read(self.domain, reference, 0, words)?;
        batch.run_sleeping().map_err(Problem::Copy)?;
        Ok(words)
    }

    /// Maps the pages of a transfer's segments.
    pub(crate) fn bring(&mut self, transfer: &mut Transfer) -> Result<(), Problem> {
        let access = match transfer.context.work {
            Work::Read => Access::ReadWrite,
            Work::Write | Work::Flush | Work::Barrier | Work::Discard { .. } => Access::ReadOnly,
        };
        self.references.clear();
        for segment in &transfer.context.segments {
            let reference = ForeignRef(segment.gref());
            self.references
                .push_within_capacity(reference)
                .map_err(|_| Problem::Own(ENOMEM))?;
        }
        if self.references.is_empty() {
            return Ok(());
        }
        self.mapper
            .map(
                &self.cache,
                self.domain,
                &self.references,
                access,
                transfer.data_mut(),
            )
            .map_err(Problem::Map)
    }

    /// Gives up the pages of a transfer that has ended. `false`: somebody still uses them, the
    /// transfer must wait.
    ///
    /// They are gone only after [`Mover::flush`].
    pub(crate) fn release(&mut self, transfer: &mut Transfer) -> bool {
        let pages = transfer.data_mut();
        if pages.iter().any(MappedPage::is_busy) {
            return false;
        }
        let space = self.ended.capacity().saturating_sub(self.ended.len());
        if pages.len() > space {
            self.flush();
        }
        while let Some(page) = pages.pop() {
            // There is space: no transfer has more pages than the list has places.
            let _ = self.ended.push_within_capacity(page);
        }
        true
    }

    /// Unmaps the pages of the transfers that have ended. Must come before their answers are shown.
    pub(crate) fn flush(&mut self) {
        if !self.ended.is_empty() {
            self.mapper.unmap(&self.cache, &mut self.ended);
        }
    }

    /// Frees addresses that are more than what is to be kept.
    pub(crate) fn shrink(&self) {
        let keep = u32::try_from(MAX_BUFFER_PAGES.get()).unwrap_or(0);
        self.cache.shrink(keep.max(self.at_least));
    }
}
