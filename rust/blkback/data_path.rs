// SPDX-License-Identifier: GPL-2.0-only

//! The data path: moves data between the frontend's pages and the disk (`xen_blkbk_map()`,
//! `xen_blkbk_unmap()`).
//!
//! A [`DataPath`] uses the cheapest of three ways:
//!
//! - *Persistent grants*: if the frontend uses them, its pages stay mapped, see
//!   [`PersistentGrants`]. A page in that table, which no request uses, is called *cached*.
//! - *Grant copy*: Xen copies the data of a small request between the frontend's pages and pages of
//!   this domain. One hypercall does that for several requests, and there is nothing to unmap.
//! - *Mapping*: the pages of a large request are mapped with one hypercall, and unmapped together
//!   with those of other requests before the responses are published.
//!
//! The segments of an indirect request are copied to private memory before they are checked, so
//! that the frontend cannot change them in between.

use kernel::{
    fmt,
    page::PAGE_SIZE,
    prelude::*,
    str::CStr,
    sync::{
        aref::ARef,
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

use kernel_ext::{
    base::{
        jiffies::{
            self,
            Jiffies, //
        },
        page::{
            Page,
            PageSlice,
            PageSliceMut, //
        },
    },
    ratelimited,
    xen::{
        grant::{
            copy::{
                Batch,
                Copier,
                CopyError, //
            },
            map::{
                MapError,
                MappedPage,
                Mapper,
                PageCache, //
            },
            ForeignRef,
            GrantAccess, //
        },
        xenbus,
        DomId, //
    },
};

use blkif::{
    backoff::{
        self,
        Backoff, //
    },
    request::{
        DiskLimits,
        Extent,
        InvalidRequest,
        Segment,
        Unfetched, //
    },
    wire::{
        Status,
        WireSegment,
        SEGMENTS_PER_INDIRECT_PAGE, //
    },
};

use crate::{
    disk::{
        MAX_REQUEST_PAGES,
        MAX_REQUEST_SEGMENTS, //
    },
    domain::{
        Domain,
        PageKind,
        QuotaShare, //
    },
    params::{
        MAX_BUFFER_PAGES,
        MAX_PERSISTENT_GRANTS,
        PERSISTENT_GRANT_UNUSED_SECONDS, //
    },
    pending_req::{
        PendingReq,
        ReqList,
        ReqOp, //
    },
    persistent::PersistentGrants, //
};

/// Largest number of segments of a request whose data is copied.
const COPIED_SEGMENTS: usize = 8;

/// Largest number of copies in one hypercall.
const COPIES: usize = 256;

/// Time for which a copy is retried while the frontend's page is paged out: as long as Linux
/// retries to map such a page.
const PAGED_OUT_TIMEOUT_MS: u32 = 32_000;

/// Size of a segment in an indirect page, in bytes.
const SEGMENT_BYTES: usize = 8;

/// Number of segments that are read from an indirect page at a time.
const SEGMENTS_AT_ONCE: usize = 32;

/// The reason why the data of a request is not accessible.
#[derive(Debug)]
pub(crate) enum DataError {
    /// The fetched segments are not valid.
    Refused(InvalidRequest),
    /// The frontend's pages cannot be mapped.
    Map(MapError),
    /// The indirect pages cannot be copied.
    Copy(CopyError),
    /// The quota of the domain for pages in flight is used up.
    Quota,
    /// An operation of this domain has failed, usually for lack of memory.
    Local(Error),
}

impl DataError {
    /// Returns `true` if the request may succeed when other requests, of this queue or of others,
    /// have completed.
    pub(crate) fn is_shortage(&self) -> bool {
        match self {
            DataError::Quota => true,
            DataError::Local(error) => *error == ENOMEM,
            DataError::Map(error) => error.is_shortage(),
            DataError::Refused(_) | DataError::Copy(_) => false,
        }
    }

    /// Returns `true` if Xen refuses further mappings, because the maptrack of this domain is full.
    pub(crate) fn lacks_mappings(&self) -> bool {
        matches!(self, DataError::Map(MapError::Refused(_, status)) if status.is_no_space())
    }

    /// Returns the status of the response.
    pub(crate) fn status(&self) -> Status {
        match self {
            DataError::Refused(refusal) => refusal.status(),
            DataError::Map(_) | DataError::Copy(_) => Status::Error,
            DataError::Quota | DataError::Local(_) => Status::Error,
        }
    }
}

impl fmt::Display for DataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DataError::Refused(refusal) => write!(f, "{refusal}"),
            DataError::Map(MapError::Refused(_, status)) if status.is_no_space() => f.write_str(
                "Xen allows no more mappings: raise gnttab_max_maptrack_frames (dom0) or \
                 max_maptrack_frames, or lower max_persistent_grants",
            ),
            DataError::Map(MapError::Refused(reference, status)) => {
                f.write_fmt(fmt!("grant {} cannot be mapped: {status}", reference.0))
            }
            DataError::Map(MapError::TooMany) => f.write_str("too many pages to map"),
            DataError::Map(MapError::NoPage(error)) => {
                write!(f, "no page to map to: {error:?}")
            }
            DataError::Copy(CopyError::Refused(index, status)) => {
                f.write_fmt(fmt!("Xen refuses to copy page {index}: {status}"))
            }
            DataError::Copy(CopyError::Hypercall(error)) => {
                write!(f, "cannot copy: {error:?}")
            }
            DataError::Quota => {
                f.write_str("the pages of the domain are used up: raise max_buffer_pages")
            }
            DataError::Local(error) => write!(f, "cannot prepare the request: {error:?}"),
        }
    }
}

impl From<Error> for DataError {
    fn from(error: Error) -> Self {
        DataError::Local(error)
    }
}

impl From<kernel::alloc::AllocError> for DataError {
    fn from(_: kernel::alloc::AllocError) -> Self {
        DataError::Local(ENOMEM)
    }
}

/// Requests whose data is copied with one hypercall.
pub(crate) struct CopyBatch {
    reqs: ReqList,
    len: usize,
}

impl CopyBatch {
    /// Creates an empty batch.
    pub(crate) const fn new() -> Self {
        Self {
            reqs: ReqList::new(),
            len: 0,
        }
    }

    /// Returns `true` if the batch has no request.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.reqs.is_empty()
    }

    /// Adds a request.
    ///
    /// Returns `true` if the batch is full then.
    #[inline]
    #[must_use = "a full batch has to be taken"]
    pub(crate) fn push(&mut self, req: KBox<PendingReq>) -> bool {
        self.reqs.push(req);
        self.len = self.len.wrapping_add(1);
        self.len >= COPIES / COPIED_SEGMENTS
    }

    /// Takes the requests of the batch.
    #[inline]
    pub(crate) fn take(&mut self) -> ReqList {
        self.len = 0;
        self.reqs.take()
    }
}

/// Resources of grant copies.
struct GrantCopy {
    copier: Copier,
    /// Pages of this domain that data is copied to or from. They were zeroed, and have held data of
    /// this frontend only, so a frontend cannot read data of another one.
    buffers: KVec<Page>,
    /// Private copy of an indirect page.
    indirect_page: Page,
}

impl GrantCopy {
    fn new() -> Result<Self> {
        Ok(Self {
            copier: Copier::new(COPIES)?,
            buffers: KVec::with_capacity(COPIES, GFP_KERNEL)?,
            indirect_page: Page::alloc_page(GFP_KERNEL)?,
        })
    }

    /// Copies the first `len` bytes of an indirect page.
    fn fetch(
        &mut self,
        domain: DomId,
        reference: ForeignRef,
        len: usize,
    ) -> Result<PageSlice<'_>, DataError> {
        let copy = PageSliceMut::new(&self.indirect_page, 0, len).ok_or(EINVAL)?;
        let mut batch = self.copier.batch();
        batch.read(domain, reference, 0, copy)?;
        run_with_retries(&mut batch)?;
        Ok(PageSlice::new(&self.indirect_page, 0, len).ok_or(EINVAL)?)
    }

    /// Takes a page of `buffers`, or allocates one.
    fn get_buffer(&mut self) -> Result<Page> {
        match self.buffers.pop() {
            Some(page) => Ok(page),
            None => Ok(Page::alloc_page(GFP_NOWAIT | __GFP_ZERO)?),
        }
    }

    /// Returns pages to `buffers`.
    fn put_buffers(&mut self, own: &mut KVec<Page>) {
        while let Some(page) = own.pop() {
            // A page for which there is no space is freed.
            let _ = self.buffers.push_within_capacity(page);
        }
    }
}

/// The data path of a queue.
pub(crate) struct DataPath {
    xbdev: ARef<xenbus::Device>,
    domain: DomId,
    /// Unused pages to which grants can be mapped; they have no memory of their own (`free_pages`
    /// of `struct xen_blkif_ring`).
    free_pages: Pin<KBox<PageCache>>,
    mapper: Mapper,
    /// Pages that stay mapped; `None` if the frontend does not use persistent grants.
    persistent_grants: Option<PersistentGrants>,
    /// `None` with persistent grants.
    grant_copy: Option<GrantCopy>,
    /// Grant references of the request being mapped whose pages are not cached.
    references: KVec<ForeignRef>,
    /// Positions of these pages among those of the request.
    positions: KVec<u16>,
    /// An indirect page that was mapped.
    indirect_page: KVec<MappedPage>,
    /// Pages of completed requests, to be unmapped together.
    to_unmap: KVec<MappedPage>,
    /// `true` if pages were unmapped since `free_pages` was last shrunk.
    has_unmapped: bool,
    /// Number of pages that are mapped, for requests or as persistent grants.
    mapped_now: usize,
    /// Share of the quota for pages in flight. The first [`MAX_REQUEST_PAGES`] pages, which are
    /// enough for one request, are not counted.
    quota: QuotaShare,
}

impl DataPath {
    /// Creates the data path of a queue of `domain`.
    ///
    /// It can map [`MAX_REQUEST_PAGES`] pages, as many as one request uses at a time. So there are
    /// always memory and quota for one request, once unused persistent grants have been unmapped.
    /// The maptrack may still be full, because it has other domains' pages too.
    pub(crate) fn new(
        xbdev: &ARef<xenbus::Device>,
        domain: &Arc<Domain>,
        persistent: bool,
    ) -> Result<Self> {
        let free_pages = KBox::pin_init(PageCache::new(), GFP_KERNEL)?;
        free_pages.fill(MAX_REQUEST_PAGES)?;
        let in_flight = usize::try_from(MAX_BUFFER_PAGES.get()).unwrap_or(0);
        let persistent_pages = usize::try_from(MAX_PERSISTENT_GRANTS.get()).unwrap_or(0);
        let (persistent_grants, grant_copy) = if persistent {
            let quota = QuotaShare::new(domain, PageKind::Persistent, persistent_pages);
            (Some(PersistentGrants::new(quota, persistent_pages)?), None)
        } else {
            (None, Some(GrantCopy::new()?))
        };
        Ok(Self {
            xbdev: xbdev.clone(),
            domain: domain.id,
            free_pages,
            mapper: Mapper::new(MAX_REQUEST_SEGMENTS)?,
            persistent_grants,
            grant_copy,
            references: KVec::with_capacity(MAX_REQUEST_SEGMENTS, GFP_KERNEL)?,
            positions: KVec::with_capacity(MAX_REQUEST_SEGMENTS, GFP_KERNEL)?,
            indirect_page: KVec::with_capacity(1, GFP_KERNEL)?,
            to_unmap: KVec::with_capacity(MAX_REQUEST_PAGES, GFP_KERNEL)?,
            has_unmapped: false,
            mapped_now: 0,
            quota: QuotaShare::new(
                domain,
                PageKind::InFlight,
                in_flight.saturating_add(persistent_pages),
            ),
        })
    }

    /// Fetches the segments of an indirect request into an empty list with space for them, and
    /// checks them.
    ///
    /// Context: the queue thread. Sleeps for up to 32 s for a page of the frontend that is paged
    /// out.
    pub(crate) fn fetch(
        &mut self,
        unfetched: &Unfetched<'_>,
        limits: &DiskLimits,
        segments: &mut KVec<Segment>,
    ) -> Result<Extent, DataError> {
        let mut checker = unfetched.checker(limits);
        let mut left = usize::from(unfetched.count());
        for gref in unfetched.grefs() {
            let here = left.min(SEGMENTS_PER_INDIRECT_PAGE);
            left = left.saturating_sub(here);
            self.read_segments(ForeignRef(*gref), here, |wire| {
                let segment = checker.push(wire).map_err(DataError::Refused)?;
                segments.push_within_capacity(segment).map_err(|_| ENOMEM)?;
                Ok(())
            })?;
        }
        checker.finish().map_err(DataError::Refused)
    }

    /// Calls `push` with each of the first `segments` segments of an indirect page, which is read
    /// once.
    fn read_segments(
        &mut self,
        reference: ForeignRef,
        segments: usize,
        push: impl FnMut(WireSegment) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let len = segments.saturating_mul(SEGMENT_BYTES).min(PAGE_SIZE);
        if let Some(grant_copy) = &mut self.grant_copy {
            return for_each_segment(grant_copy.fetch(self.domain, reference, len)?, push);
        }
        let cached = self
            .persistent_grants
            .as_mut()
            .and_then(|grants| grants.take(reference));
        let page = match cached {
            Some(page) => page,
            None => self.map_one(reference)?,
        };
        let result = match page.slice(0, len) {
            Some(segments) => for_each_segment(segments, push),
            None => Err(DataError::Local(EINVAL)),
        };
        self.put_mapped_page(page);
        result
    }

    /// Maps an indirect page.
    fn map_one(&mut self, reference: ForeignRef) -> Result<MappedPage, DataError> {
        self.references.clear();
        self.references
            .push_within_capacity(reference)
            .map_err(|_| ENOMEM)?;
        let mut page = core::mem::take(&mut self.indirect_page);
        let result = self.map_missing(GrantAccess::ReadOnly, &mut page);
        let mapped = page.pop();
        self.indirect_page = page;
        result?;
        Ok(mapped.ok_or(EINVAL)?)
    }

    /// Attaches pages for the segments of a request.
    ///
    /// If they are pages of this domain, the data has to be copied by [`DataPath::copy`]: before
    /// the I/O of a write, after that of a read.
    ///
    /// Context: the queue thread. Sleeps for up to 32 s for a page of the frontend that is paged
    /// out.
    pub(crate) fn attach_pages(&mut self, req: &mut PendingReq) -> Result<(), DataError> {
        let (_, ctx) = req.split_mut();
        let small = ctx.segments.len() <= COPIED_SEGMENTS && ctx.op != ReqOp::Barrier;
        if small && self.grant_copy.is_some() && self.attach_buffers(req).is_ok() {
            return Ok(());
        }
        self.map(req)
    }

    /// Attaches pages of this domain to a request.
    fn attach_buffers(&mut self, req: &mut PendingReq) -> Result {
        let grant_copy = self.grant_copy.as_mut().ok_or(EINVAL)?;
        let ((_, own), ctx) = req.split_mut();
        own.reserve(ctx.segments.len(), GFP_NOWAIT)?;
        for _ in &ctx.segments {
            match grant_copy.get_buffer() {
                Ok(page) => own.push_within_capacity(page).map_err(|_| ENOMEM)?,
                Err(error) => {
                    grant_copy.put_buffers(own);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Copies the data of requests between the frontend's pages and those of this domain, with one
    /// hypercall.
    ///
    /// A request whose copy fails gets an error as its result. `name` is that of the queue.
    ///
    /// Context: the queue thread. Sleeps for up to 32 s for a page of the frontend that is paged
    /// out.
    pub(crate) fn copy(&mut self, name: &CStr, reqs: &mut ReqList) {
        if self.copy_all(reqs).is_ok() {
            return;
        }
        // Copy one by one, to find those that fail. `copy_all` has already waited for pages that
        // were paged out.
        let mut all = reqs.take();
        while let Some(mut req) = all.pop() {
            if let Err(error) = self.copy_one(&req) {
                ratelimited!(dev_warn!(
                    self.xbdev.as_ref(),
                    "{name}: a request has failed: its data cannot be copied: {error}\n"
                ));
                req.context.result = Err(EIO);
            }
            reqs.push(req);
        }
    }

    fn copy_all(&mut self, reqs: &ReqList) -> Result<(), DataError> {
        let mut batch = self.grant_copy.as_mut().ok_or(EINVAL)?.copier.batch();
        for req in reqs.iter() {
            add_copies(&mut batch, self.domain, req)?;
        }
        run_with_retries(&mut batch)
    }

    fn copy_one(&mut self, req: &PendingReq) -> Result<(), DataError> {
        let mut batch = self.grant_copy.as_mut().ok_or(EINVAL)?.copier.batch();
        add_copies(&mut batch, self.domain, req)?;
        batch.run().map_err(DataError::Copy)
    }

    /// Attaches the frontend's pages to a request, and maps those that are not cached.
    fn map(&mut self, req: &mut PendingReq) -> Result<(), DataError> {
        let ((pages, _), ctx) = req.split_mut();
        let access = match ctx.op {
            ReqOp::Read => GrantAccess::ReadWrite,
            ReqOp::Write | ReqOp::Flush | ReqOp::Barrier | ReqOp::Discard { .. } => {
                GrantAccess::ReadOnly
            }
        };
        let rest = self.take_cached_prefix(&ctx.segments, access, pages);
        if rest.is_empty() {
            return Ok(());
        }
        let result = self.lookup_missing(rest, access, pages).and_then(|cached| {
            self.map_missing(access, pages)?;
            self.merge_mapped(pages, cached);
            Ok(())
        });
        if result.is_err() {
            self.put_mapped_pages(pages);
        }
        result
    }

    /// Moves the pages behind the first `cached` ones to their positions.
    fn merge_mapped(&self, pages: &mut [MappedPage], cached: usize) {
        for (from, position) in (cached..).zip(&self.positions) {
            let Some(part) = pages.get_mut(usize::from(*position)..=from) else {
                continue;
            };
            // Rotates by one: the last page becomes the first, the others keep their order.
            part.reverse();
            if let Some((_, others)) = part.split_first_mut() {
                others.reverse();
            }
        }
    }

    /// Takes the cached pages of the first segments, up to the first one that is not cached.
    ///
    /// Returns the segments that are left.
    fn take_cached_prefix<'s>(
        &mut self,
        segments: &'s [Segment],
        access: GrantAccess,
        pages: &mut KVec<MappedPage>,
    ) -> &'s [Segment] {
        let mut rest = segments;
        while let Some((segment, others)) = rest.split_first() {
            let Some(page) = self.take_cached(ForeignRef(segment.gref()), access) else {
                break;
            };
            // There is space: the request was allocated for this number of segments.
            let _ = pages.push_within_capacity(page);
            rest = others;
        }
        rest
    }

    /// Takes the cached pages of segments, and collects the `references` and `positions` of the
    /// others.
    ///
    /// Returns the number of pages so far.
    fn lookup_missing(
        &mut self,
        segments: &[Segment],
        access: GrantAccess,
        pages: &mut KVec<MappedPage>,
    ) -> Result<usize, DataError> {
        self.references.clear();
        self.positions.clear();
        for (position, segment) in (pages.len() as u16..).zip(segments) {
            let reference = ForeignRef(segment.gref());
            let has_space = match self.take_cached(reference, access) {
                Some(page) => pages.push_within_capacity(page).is_ok(),
                None => {
                    self.references.push_within_capacity(reference).is_ok()
                        && self.positions.push_within_capacity(position).is_ok()
                }
            };
            if !has_space {
                return Err(DataError::Local(ENOMEM));
            }
        }
        Ok(pages.len())
    }

    /// Takes a cached page.
    ///
    /// A page that is mapped read-only and has to be written is unmapped instead.
    #[inline]
    fn take_cached(&mut self, reference: ForeignRef, access: GrantAccess) -> Option<MappedPage> {
        let grants = self.persistent_grants.as_mut()?;
        let page = grants.take(reference)?;
        if access == GrantAccess::ReadWrite && page.access() == GrantAccess::ReadOnly {
            grants.remove_entry(reference);
            self.queue_unmap(page);
            return None;
        }
        Some(page)
    }

    /// Maps the pages of `references`, and appends them to `pages`.
    fn map_missing(
        &mut self,
        access: GrantAccess,
        pages: &mut KVec<MappedPage>,
    ) -> Result<(), DataError> {
        let count = self.references.len();
        if count == 0 {
            return Ok(());
        }
        let mut result = self.try_map(count, access, pages);
        // Pages of completed requests count until they are unmapped, for the quota and for Xen.
        if result.as_ref().is_err_and(DataError::is_shortage) && self.unmap_queued() {
            result = self.try_map(count, access, pages);
        }
        result
    }

    /// Maps the `count` pages of `references`, if the quota allows it.
    fn try_map(
        &mut self,
        count: usize,
        access: GrantAccess,
        pages: &mut KVec<MappedPage>,
    ) -> Result<(), DataError> {
        if !self.try_reserve(count) {
            return Err(DataError::Quota);
        }
        self.mapper
            .map(
                &self.free_pages,
                self.domain,
                &self.references,
                access,
                pages,
            )
            .map_err(DataError::Map)?;
        self.mapped_now = self.mapped_now.wrapping_add(count);
        Ok(())
    }

    /// Returns `true` if the quota of the domain allows `count` more pages of requests in flight.
    fn try_reserve(&mut self, count: usize) -> bool {
        let pages = self.in_flight_pages().saturating_add(count);
        self.quota
            .try_reserve(pages.saturating_sub(MAX_REQUEST_PAGES))
    }

    /// Returns the number of pages of requests in flight.
    fn in_flight_pages(&self) -> usize {
        let cached = self
            .persistent_grants
            .as_ref()
            .map_or(0, PersistentGrants::len);
        self.mapped_now.saturating_sub(cached)
    }

    /// Releases the pages of a completed request: caches each, or queues it to be unmapped.
    ///
    /// Returns `false` if a page is still in use elsewhere, so that the request has to wait.
    ///
    /// The pages are unmapped by the next [`DataPath::unmap_queued`].
    pub(crate) fn put_pages(&mut self, req: &mut PendingReq) -> bool {
        let ((pages, own), _) = req.split_mut();
        // A busy page must not be unmapped. With persistent grants it stays mapped, so it does not
        // matter.
        if self.persistent_grants.is_none() && pages.iter().any(MappedPage::is_busy) {
            return false;
        }
        self.put_mapped_pages(pages);
        if let Some(grant_copy) = &mut self.grant_copy {
            grant_copy.put_buffers(own);
        }
        true
    }

    fn put_mapped_pages(&mut self, pages: &mut KVec<MappedPage>) {
        while let Some(page) = pages.pop() {
            self.put_mapped_page(page);
        }
    }

    /// Caches a page, or queues it for the next [`DataPath::unmap_queued`].
    #[inline]
    fn put_mapped_page(&mut self, page: MappedPage) {
        let rejected = match &mut self.persistent_grants {
            Some(grants) => grants.insert(page),
            None => Some(page),
        };
        if let Some(page) = rejected {
            self.queue_unmap(page);
        }
    }

    fn queue_unmap(&mut self, page: MappedPage) {
        if self.to_unmap.len() == self.to_unmap.capacity() {
            self.unmap_queued();
        }
        // If all are busy, there is still no space. If there is no memory for more, the push below
        // fails.
        let _ = self.to_unmap.reserve(1, GFP_NOWAIT);
        if self.to_unmap.push_within_capacity(page).is_err() {
            // Dropping the page unmaps it, or leaks it if it is busy.
            self.mapped_now = self.mapped_now.wrapping_sub(1);
        }
    }

    /// Unmaps the pages that were queued for that.
    ///
    /// Must be called before their responses are published. Returns `true` if a page was
    /// unmapped.
    pub(crate) fn unmap_queued(&mut self) -> bool {
        let before = self.to_unmap.len();
        if before == 0 {
            return false;
        }
        self.mapper.unmap(&self.free_pages, &mut self.to_unmap);
        let unmapped = before.wrapping_sub(self.to_unmap.len());
        self.mapped_now = self.mapped_now.wrapping_sub(unmapped);
        self.has_unmapped = true;
        unmapped != 0
    }

    /// Unmaps the cached pages that were not used for `time`.
    fn unmap_unused_for(&mut self, time: Jiffies) {
        while let Some(page) = self
            .persistent_grants
            .as_mut()
            .and_then(|grants| grants.take_unused(time))
        {
            self.queue_unmap(page);
        }
        self.unmap_queued();
    }

    /// Unmaps, during a shortage, the pages beyond the queue's guarantee, and returns quota that is
    /// not used.
    pub(crate) fn unmap_excess(&mut self) {
        while let Some(page) = self
            .persistent_grants
            .as_mut()
            .and_then(PersistentGrants::take_excess)
        {
            self.queue_unmap(page);
        }
        self.unmap_queued();
        if let Some(grants) = &mut self.persistent_grants {
            grants.trim();
        }
        self.quota
            .trim(self.in_flight_pages().saturating_sub(MAX_REQUEST_PAGES));
    }

    /// Unmaps all cached pages.
    ///
    /// Returns `true` if a page was unmapped.
    pub(crate) fn unmap_all_cached(&mut self) -> bool {
        let before = self.mapped_now;
        self.unmap_unused_for(0);
        self.mapped_now != before
    }

    /// Frees memory that an idle queue does not need, and if memory is `short`, all that it does
    /// not need to serve one request.
    pub(crate) fn trim(&mut self, short: bool) {
        self.unmap_excess();
        if short {
            self.shrink_free_pages(0);
            if let Some(grant_copy) = &mut self.grant_copy {
                grant_copy.buffers.clear();
            }
        } else if core::mem::take(&mut self.has_unmapped) {
            self.shrink_free_pages(usize::try_from(MAX_BUFFER_PAGES.get()).unwrap_or(0));
        }
    }

    /// Frees unused pages of `free_pages`, except `keep` of them and those that one request needs.
    fn shrink_free_pages(&self, keep: usize) {
        let keep = keep.max(MAX_REQUEST_PAGES);
        self.free_pages
            .shrink(u32::try_from(keep).unwrap_or(u32::MAX));
    }

    /// Returns `true` if pages stay mapped when a request has completed.
    pub(crate) fn uses_persistent_grants(&self) -> bool {
        self.persistent_grants.is_some()
    }

    /// Unmaps the persistent grants that were not used for the time in the module parameter
    /// `persistent_grant_unused_seconds`.
    pub(crate) fn purge_unused(&mut self) {
        if let Some(time) = unused_timeout() {
            self.unmap_unused_for(time);
        }
    }

    /// Returns the time after which to call [`Self::purge_unused`].
    ///
    /// Returns `None` if no page is cached or waits to be unmapped, and none will be when the
    /// `in_flight` requests have completed.
    pub(crate) fn purge_delay(&self, in_flight: usize) -> Option<Jiffies> {
        let grants = self.persistent_grants.as_ref()?;
        if grants.is_empty() && self.to_unmap.is_empty() && in_flight == 0 {
            return None;
        }
        unused_timeout()
    }
}

/// Returns the time for which an unused page stays mapped; `None` if there is no limit.
fn unused_timeout() -> Option<Jiffies> {
    let seconds = PERSISTENT_GRANT_UNUSED_SECONDS.get();
    (seconds != 0).then(|| jiffies::msecs_to_jiffies(seconds.saturating_mul(1000)))
}

impl Drop for DataPath {
    fn drop(&mut self) {
        self.unmap_unused_for(0);
        MappedPage::wait_until_unused(&self.to_unmap);
        self.unmap_queued();
    }
}

/// Runs the copies of a batch.
///
/// Tries again while a page of the frontend is paged out (`GNTST_eagain`).
fn run_with_retries(batch: &mut Batch<'_>) -> Result<(), DataError> {
    let sleep = |ms: u32| fsleep(Delta::from_millis(ms.into()));
    let delays = Backoff::new(1, 256);
    backoff::retry(
        delays,
        PAGED_OUT_TIMEOUT_MS,
        sleep,
        CopyError::is_paged_out,
        || batch.run(),
    )
    .map_err(DataError::Copy)
}

/// Adds the copies that a request needs.
fn add_copies<'a>(batch: &mut Batch<'a>, domain: DomId, req: &'a PendingReq) -> Result {
    let (_, own) = req.data();
    for (segment, page) in req.context.segments.iter().zip(own) {
        let reference = ForeignRef(segment.gref());
        let (offset, len) = (usize::from(segment.offset()), usize::from(segment.len()));
        match req.context.op {
            ReqOp::Read => {
                let from = PageSlice::new(page, offset, len).ok_or(EINVAL)?;
                batch.write(domain, reference, offset, from)?;
            }
            ReqOp::Write | ReqOp::Barrier | ReqOp::Flush | ReqOp::Discard { .. } => {
                let to = PageSliceMut::new(page, offset, len).ok_or(EINVAL)?;
                batch.read(domain, reference, offset, to)?;
            }
        }
    }
    Ok(())
}

/// Calls `push` with each segment of an indirect page.
///
/// Segments are copied from there before they are decoded, because the page may be mapped from the
/// frontend, which can change it.
fn for_each_segment(
    indirect_page: PageSlice<'_>,
    mut push: impl FnMut(WireSegment) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let mut bytes = [0; SEGMENTS_AT_ONCE * SEGMENT_BYTES];
    let mut offset = 0usize;
    while offset < indirect_page.len() {
        let len = bytes.len().min(indirect_page.len().wrapping_sub(offset));
        let some = indirect_page.get(offset, len).ok_or(EINVAL)?;
        let got = some.read(&mut bytes);
        for segment in bytes.chunks_exact(SEGMENT_BYTES).take(got / SEGMENT_BYTES) {
            push(wire_segment(segment))?;
        }
        offset = offset.wrapping_add(len);
    }
    Ok(())
}

/// Decodes a segment of [`SEGMENT_BYTES`] bytes.
fn wire_segment(bytes: &[u8]) -> WireSegment {
    let bytes = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    WireSegment::decode([bytes as u32, (bytes >> 32) as u32])
}
