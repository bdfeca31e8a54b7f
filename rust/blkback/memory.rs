// SPDX-License-Identifier: GPL-2.0-only

//! Moving data between the frontend's memory and the disk.
//!
//! There are several ways to get at the frontend's pages, and a [`Mover`] takes the cheapest:
//!
//! - *Stay mapped*: if the frontend uses persistent grants, its pages are kept in a [`Table`].
//! - *Copy*: the data of a small request is copied between the frontend's pages and our own. One
//!   hypercall does it for several requests, and there is nothing to unmap.
//! - *Map*: the pages of a large request are mapped with one hypercall, and unmapped together with
//!   those of other requests before their answers are shown.
//!
//! The segments of an indirect request are copied to private memory before they are looked at, so
//! that the frontend cannot change them in between.

use kernel::{
    fmt,
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc,
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
            Access,
            ForeignRef, //
        },
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
        Refusal,
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
        MAX_PAGES,
        MAX_SEGMENTS, //
    },
    domain::{
        Domain,
        Share, //
    },
    params::{
        MAX_BUFFER_PAGES,
        MAX_PERSISTENT_GRANTS,
        PERSISTENT_GRANT_UNUSED_SECONDS, //
    },
    persistent::Table,
    transfer::{
        Chain,
        Transfer,
        Work, //
    },
};

/// The pages of a transfer, one for each segment: those of the frontend, mapped, or our own.
pub(crate) type Memory = (KVec<MappedPage>, KVec<Page>);

/// A request with at most so many segments is copied.
const COPIED_SEGMENTS: usize = 8;

/// Copies in one hypercall.
const COPIES: usize = 256;

/// How long copies are tried again while pages are not in memory over there: as long as Linux waits
/// when it maps such a page.
const PAGED_OUT_MS: u32 = 32_000;

/// Bytes of a segment in a page of segments.
const SEGMENT_BYTES: usize = 8;

/// Segments that are read from such a page at once.
const SEGMENTS_AT_ONCE: usize = 32;

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
    /// Whether it may work when other transfers have ended, of this queue or of others.
    pub(crate) fn is_shortage(&self) -> bool {
        match self {
            Problem::Own(error) => *error == ENOMEM,
            Problem::Map(error) => error.is_shortage(),
            Problem::Refused(_) | Problem::Copy(_) => false,
        }
    }

    /// Returns `true` if Xen lets this domain map no more pages of other domains.
    pub(crate) fn lacks_mappings(&self) -> bool {
        matches!(self, Problem::Map(MapError::Refused(_, status)) if status.is_no_space())
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
            Problem::Map(MapError::Refused(_, status)) if status.is_no_space() => f.write_str(
                "Xen allows no more mappings: raise gnttab_max_maptrack_frames (dom0) or \
                 max_maptrack_frames, or lower max_persistent_grants",
            ),
            Problem::Map(MapError::Refused(reference, status)) => {
                f.write_fmt(fmt!("grant {} cannot be mapped: {status}", reference.0))
            }
            Problem::Map(MapError::TooMany) => f.write_str("too many pages to map"),
            Problem::Map(MapError::NoPage(error)) => {
                write!(f, "no page to map to: {error:?}")
            }
            Problem::Copy(CopyError::Refused(index, status)) => {
                f.write_fmt(fmt!("copy {index} is refused: {status}"))
            }
            Problem::Copy(CopyError::Hypercall(error)) => {
                write!(f, "cannot copy: {error:?}")
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

/// What it takes to copy data, if the frontend does not use persistent grants.
struct Copies {
    copier: Copier,
    /// Pages of our own, to copy to. Only this frontend's data was ever in them.
    buffers: KVec<Page>,
    /// Private copy of a page of segments.
    descriptors: Page,
}

impl Copies {
    fn new() -> Result<Self> {
        Ok(Self {
            copier: Copier::new(COPIES)?,
            buffers: KVec::with_capacity(COPIES, GFP_KERNEL)?,
            descriptors: Page::alloc_page(GFP_KERNEL)?,
        })
    }

    /// Copies the beginning of a page of segments.
    fn fetch(
        &mut self,
        domain: DomId,
        reference: ForeignRef,
        len: usize,
    ) -> Result<PageSlice<'_>, Problem> {
        let copy = PageSliceMut::new(&self.descriptors, 0, len).ok_or(EINVAL)?;
        let mut batch = self.copier.batch();
        batch.read(domain, reference, 0, copy)?;
        run_patiently(&mut batch)?;
        Ok(PageSlice::new(&self.descriptors, 0, len).ok_or(EINVAL)?)
    }

    /// Takes a page of our own; makes one if there is none.
    fn take(&mut self) -> Result<Page> {
        match self.buffers.pop() {
            Some(page) => Ok(page),
            None => Ok(Page::alloc_page(GFP_NOWAIT | __GFP_ZERO)?),
        }
    }

    fn give_back(&mut self, own: &mut KVec<Page>) {
        while let Some(page) = own.pop() {
            // A page for which there is no place is freed.
            let _ = self.buffers.push_within_capacity(page);
        }
    }
}

/// What a queue needs to move data. One for each thread.
pub(crate) struct Mover {
    domain: DomId,
    /// Addresses to map to.
    cache: Pin<KBox<PageCache>>,
    mapper: Mapper,
    /// Pages that stay mapped, if the frontend uses persistent grants.
    table: Option<Table>,
    /// There is either this or a table.
    copies: Option<Copies>,
    /// References of the request that is being mapped, as far as the table did not have their pages.
    references: KVec<ForeignRef>,
    /// Where these pages belong among those of the request.
    places: KVec<u16>,
    /// A page of segments that was mapped.
    page: KVec<MappedPage>,
    /// Pages of transfers that have ended, to be unmapped together.
    ended: KVec<MappedPage>,
    /// Pages were unmapped, and nobody has looked yet whether there are too many addresses now.
    has_unmapped: bool,
    /// Pages that are mapped now, for requests or to stay.
    mapped_now: usize,
    /// How many there may be on their way, besides [`MAX_PAGES`] for one request.
    share: Share,
}

impl Mover {
    /// Creates what moves the data of requests of `domain`.
    ///
    /// It has addresses for [`MAX_PAGES`] pages, as many as one request uses at a time. So memory and
    /// budgets suffice for one request whatever others use, once pages that are kept mapped without
    /// use were given up. Mappings are Xen's, which may have none left.
    pub(crate) fn new(domain: &Arc<Domain>, persistent: bool) -> Result<Self> {
        let cache = KBox::pin_init(PageCache::new(), GFP_KERNEL)?;
        cache.fill(MAX_PAGES)?;
        let moving = usize::try_from(MAX_BUFFER_PAGES.get()).unwrap_or(0);
        let staying = usize::try_from(MAX_PERSISTENT_GRANTS.get()).unwrap_or(0);
        let (table, copies) = if persistent {
            let share = Share::new(domain, |domain| &domain.staying, staying);
            (Some(Table::new(share, staying)?), None)
        } else {
            (None, Some(Copies::new()?))
        };
        Ok(Self {
            domain: domain.id,
            cache,
            mapper: Mapper::new(MAX_SEGMENTS)?,
            table,
            copies,
            references: KVec::with_capacity(MAX_SEGMENTS, GFP_KERNEL)?,
            places: KVec::with_capacity(MAX_SEGMENTS, GFP_KERNEL)?,
            page: KVec::with_capacity(1, GFP_KERNEL)?,
            ended: KVec::with_capacity(MAX_PAGES, GFP_KERNEL)?,
            has_unmapped: false,
            mapped_now: 0,
            share: Share::new(
                domain,
                |domain| &domain.moving,
                moving.saturating_add(staying),
            ),
        })
    }

    /// Gets the segments of an indirect request, and checks them.
    pub(crate) fn fetch(
        &mut self,
        unfetched: &Unfetched<'_>,
        limits: &DiskLimits,
        segments: &mut KVec<Segment>,
    ) -> Result<Extent, Problem> {
        let mut checker = unfetched.checker(limits);
        let mut left = usize::from(unfetched.count());
        for gref in unfetched.grefs() {
            let here = left.min(SEGMENTS_PER_INDIRECT_PAGE);
            left = left.saturating_sub(here);
            self.read_segments(ForeignRef(*gref), here, |wire| {
                let segment = checker.push(wire).map_err(Problem::Refused)?;
                segments.push_within_capacity(segment).map_err(|_| ENOMEM)?;
                Ok(())
            })?;
        }
        checker.finish().map_err(Problem::Refused)
    }

    /// Passes on so many segments of a page of the frontend, each read once.
    fn read_segments(
        &mut self,
        reference: ForeignRef,
        segments: usize,
        take: impl FnMut(WireSegment) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        let len = segments.saturating_mul(SEGMENT_BYTES).min(PAGE_SIZE);
        if let Some(copies) = &mut self.copies {
            return for_each_segment(copies.fetch(self.domain, reference, len)?, take);
        }
        let kept = self.table.as_mut().and_then(|table| table.take(reference));
        let page = match kept {
            Some(page) => page,
            None => self.map_one(reference)?,
        };
        let result = match page.slice(0, len) {
            Some(segments) => for_each_segment(segments, take),
            None => Err(Problem::Own(EINVAL)),
        };
        self.put(page);
        result
    }

    /// Maps a page that is to stay.
    fn map_one(&mut self, reference: ForeignRef) -> Result<MappedPage, Problem> {
        self.references.clear();
        self.references
            .push_within_capacity(reference)
            .map_err(|_| ENOMEM)?;
        let mut page = core::mem::take(&mut self.page);
        let result = self.map_missing(Access::ReadOnly, &mut page);
        let mapped = page.pop();
        self.page = page;
        result?;
        Ok(mapped.ok_or(EINVAL)?)
    }

    /// Gets pages for a transfer's segments. If those are our own, the data has to be copied by
    /// [`Mover::copy`]: before the I/O for a write, after it for a read.
    pub(crate) fn bring(&mut self, transfer: &mut Transfer) -> Result<(), Problem> {
        let (_, job) = transfer.split_mut();
        let small = job.segments.len() <= COPIED_SEGMENTS && job.work != Work::Barrier;
        if small && self.copies.is_some() && self.take_buffers(transfer).is_ok() {
            return Ok(());
        }
        self.map(transfer)
    }

    /// Takes pages of our own for a transfer.
    fn take_buffers(&mut self, transfer: &mut Transfer) -> Result {
        let copies = self.copies.as_mut().ok_or(EINVAL)?;
        let ((_, own), job) = transfer.split_mut();
        own.reserve(job.segments.len(), GFP_NOWAIT)?;
        for _ in &job.segments {
            match copies.take() {
                Ok(page) => own.push_within_capacity(page).map_err(|_| ENOMEM)?,
                Err(error) => {
                    copies.give_back(own);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Copies the data of transfers between the frontend's pages and our own, with one hypercall.
    /// Those for which it does not work get an error as their result.
    pub(crate) fn copy(&mut self, transfers: &mut Chain) {
        if self.copy_all(transfers).is_ok() {
            return;
        }
        // One by one, to see which ones do not work. What is not in memory was waited for.
        let mut all = transfers.take();
        while let Some(mut transfer) = all.pop() {
            if let Err(problem) = self.copy_one(&transfer) {
                ratelimited!(pr_warn!("domain {}: {}\n", self.domain, problem));
                transfer.context.result = Err(EIO);
            }
            transfers.push(transfer);
        }
    }

    fn copy_all(&mut self, transfers: &Chain) -> Result<(), Problem> {
        let mut batch = self.copies.as_mut().ok_or(EINVAL)?.copier.batch();
        for transfer in transfers.iter() {
            add_copies(&mut batch, self.domain, transfer)?;
        }
        run_patiently(&mut batch)
    }

    fn copy_one(&mut self, transfer: &Transfer) -> Result<(), Problem> {
        let mut batch = self.copies.as_mut().ok_or(EINVAL)?.copier.batch();
        add_copies(&mut batch, self.domain, transfer)?;
        batch.run().map_err(Problem::Copy)
    }

    /// Maps the pages of a transfer's segments, as far as they are not mapped.
    fn map(&mut self, transfer: &mut Transfer) -> Result<(), Problem> {
        let ((pages, _), job) = transfer.split_mut();
        let access = match job.work {
            Work::Read => Access::ReadWrite,
            Work::Write | Work::Flush | Work::Barrier | Work::Discard { .. } => Access::ReadOnly,
        };
        let rest = self.take_first(&job.segments, access, pages);
        if rest.is_empty() {
            return Ok(());
        }
        let result = self.find(rest, access, pages).and_then(|found| {
            self.map_missing(access, pages)?;
            self.sort_in(pages, found);
            Ok(())
        });
        if result.is_err() {
            self.give_up(pages);
        }
        result
    }

    /// Moves the pages behind the first `found` ones to their places among them.
    fn sort_in(&self, pages: &mut [MappedPage], found: usize) {
        for (from, place) in (found..).zip(&self.places) {
            let Some(part) = pages.get_mut(usize::from(*place)..=from) else {
                continue;
            };
            // The last one becomes the first, the others keep their order.
            part.reverse();
            if let Some((_, others)) = part.split_first_mut() {
                others.reverse();
            }
        }
    }

    /// Takes the pages of the first segments, up to one that has not stayed mapped. Gives the segments
    /// that are left.
    fn take_first<'s>(
        &mut self,
        segments: &'s [Segment],
        access: Access,
        pages: &mut KVec<MappedPage>,
    ) -> &'s [Segment] {
        let mut rest = segments;
        while let Some((segment, others)) = rest.split_first() {
            let Some(page) = self.take_kept(ForeignRef(segment.gref()), access) else {
                break;
            };
            // There is space: the transfer was made for so many segments.
            let _ = pages.push_within_capacity(page);
            rest = others;
        }
        rest
    }

    /// Takes the pages of segments from the table. Those that are not there are in `references`, and
    /// in `places` where they belong. Gives the number of pages that there are then.
    fn find(
        &mut self,
        segments: &[Segment],
        access: Access,
        pages: &mut KVec<MappedPage>,
    ) -> Result<usize, Problem> {
        self.references.clear();
        self.places.clear();
        for (place, segment) in (pages.len() as u16..).zip(segments) {
            let reference = ForeignRef(segment.gref());
            let kept = match self.take_kept(reference, access) {
                Some(page) => pages.push_within_capacity(page).is_ok(),
                None => {
                    self.references.push_within_capacity(reference).is_ok()
                        && self.places.push_within_capacity(place).is_ok()
                }
            };
            if !kept {
                return Err(Problem::Own(ENOMEM));
            }
        }
        Ok(pages.len())
    }

    /// A page that has stayed mapped. One that was mapped for less than is needed now is mapped anew.
    #[inline]
    fn take_kept(&mut self, reference: ForeignRef, access: Access) -> Option<MappedPage> {
        let table = self.table.as_mut()?;
        let page = table.take(reference)?;
        if access == Access::ReadWrite && page.access() == Access::ReadOnly {
            table.forget(reference);
            self.unmap_later(page);
            return None;
        }
        Some(page)
    }

    /// Maps the pages of `references`, behind those in the list.
    fn map_missing(&mut self, access: Access, pages: &mut KVec<MappedPage>) -> Result<(), Problem> {
        let count = self.references.len();
        if count == 0 {
            return Ok(());
        }
        let mut result = self.try_map(count, access, pages);
        // Pages that have ended count until they are unmapped: for the budget, and for Xen.
        if result.as_ref().is_err_and(Problem::is_shortage) && self.flush() {
            result = self.try_map(count, access, pages);
        }
        result
    }

    /// Maps the pages of `references`, `count` of them, if the budget allows it.
    fn try_map(
        &mut self,
        count: usize,
        access: Access,
        pages: &mut KVec<MappedPage>,
    ) -> Result<(), Problem> {
        if !self.may_map(count) {
            return Err(Problem::Own(ENOMEM));
        }
        self.mapper
            .map(&self.cache, self.domain, &self.references, access, pages)
            .map_err(Problem::Map)?;
        self.mapped_now = self.mapped_now.wrapping_add(count);
        Ok(())
    }

    /// Whether the domain's budget allows so many more pages of requests on their way.
    fn may_map(&mut self, count: usize) -> bool {
        let pages = self.moving_now().saturating_add(count);
        self.share.covers(pages.saturating_sub(MAX_PAGES))
    }

    /// Pages of requests on their way.
    fn moving_now(&self) -> usize {
        let staying = self.table.as_ref().map_or(0, Table::len);
        self.mapped_now.saturating_sub(staying)
    }

    /// Gives up the pages of a transfer that has ended. `false`: somebody still uses them, the
    /// transfer must wait.
    ///
    /// They are gone only after [`Mover::flush`].
    pub(crate) fn release(&mut self, transfer: &mut Transfer) -> bool {
        let ((pages, own), _) = transfer.split_mut();
        // A page that stays mapped anyway may be busy: its frontend does not take it back.
        if self.table.is_none() && pages.iter().any(MappedPage::is_busy) {
            return false;
        }
        self.give_up(pages);
        if let Some(copies) = &mut self.copies {
            copies.give_back(own);
        }
        true
    }

    fn give_up(&mut self, pages: &mut KVec<MappedPage>) {
        while let Some(page) = pages.pop() {
            self.put(page);
        }
    }

    /// Keeps a page mapped, or has it unmapped by the next [`Mover::flush`].
    #[inline]
    fn put(&mut self, page: MappedPage) {
        let spare = match &mut self.table {
            Some(table) => table.put(page),
            None => Some(page),
        };
        if let Some(page) = spare {
            self.unmap_later(page);
        }
    }

    fn unmap_later(&mut self, page: MappedPage) {
        if self.ended.len() == self.ended.capacity() {
            self.flush();
        }
        if self.ended.push_within_capacity(page).is_err() {
            // All are busy, and there is no space: the page is unmapped by itself, once it is not.
            self.mapped_now = self.mapped_now.wrapping_sub(1);
        }
    }

    /// Unmaps the pages of the transfers that have ended. Must come before their answers are shown.
    /// Returns `true` if there were any that could be unmapped.
    pub(crate) fn flush(&mut self) -> bool {
        let before = self.ended.len();
        if before == 0 {
            return false;
        }
        self.mapper.unmap(&self.cache, &mut self.ended);
        let unmapped = before.wrapping_sub(self.ended.len());
        self.mapped_now = self.mapped_now.wrapping_sub(unmapped);
        self.has_unmapped = true;
        unmapped != 0
    }

    /// Unmaps pages that were not used for so long.
    fn forget_older(&mut self, time: Jiffies) {
        while let Some(page) = self
            .table
            .as_mut()
            .and_then(|table| table.take_unused(time))
        {
            self.unmap_later(page);
        }
        self.flush();
    }

    /// Gives back what other queues may need.
    pub(crate) fn share_with_others(&mut self) {
        while let Some(page) = self.table.as_mut().and_then(Table::take_excess) {
            self.unmap_later(page);
        }
        self.flush();
        if let Some(table) = &mut self.table {
            table.rest();
        }
        self.share.keep(self.moving_now().saturating_sub(MAX_PAGES));
    }

    /// Unmaps all pages that no request uses now. Returns `true` if there were any.
    pub(crate) fn forget_all(&mut self) -> bool {
        let before = self.mapped_now;
        self.forget_older(0);
        self.mapped_now != before
    }

    /// Gives back what is not needed now, because there is nothing to do; or all that can be spared,
    /// because memory is short.
    pub(crate) fn rest(&mut self, short: bool) {
        self.share_with_others();
        if short {
            self.shrink(0);
            if let Some(copies) = &mut self.copies {
                copies.buffers.clear();
            }
        } else if core::mem::take(&mut self.has_unmapped) {
            self.shrink(usize::try_from(MAX_BUFFER_PAGES.get()).unwrap_or(0));
        }
    }

    /// Frees the addresses that are free, but for so many, and for those that one request needs.
    fn shrink(&self, keep: usize) {
        let keep = keep.max(MAX_PAGES);
        self.cache.shrink(u32::try_from(keep).unwrap_or(u32::MAX));
    }

    /// Whether pages stay mapped when a transfer has ended.
    pub(crate) fn keeps_pages(&self) -> bool {
        self.table.is_some()
    }

    /// Unmaps the pages that stay mapped, but nobody has used them for as long as the parameter says.
    pub(crate) fn forget_unused(&mut self) {
        if let Some(time) = unused_time() {
            self.forget_older(time);
        }
    }

    /// After which time to call [`Self::forget_unused`], if there are such pages, or will be when the
    /// transfers `in_flight` have ended.
    pub(crate) fn unused_after(&self, in_flight: usize) -> Option<Jiffies> {
        let table = self.table.as_ref()?;
        if table.is_empty() && in_flight == 0 {
            return None;
        }
        unused_time()
    }
}

/// How long a page stays mapped without use, unless that is for ever.
fn unused_time() -> Option<Jiffies> {
    let seconds = PERSISTENT_GRANT_UNUSED_SECONDS.get();
    (seconds != 0).then(|| jiffies::msecs_to_jiffies(seconds.saturating_mul(1000)))
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.forget_older(0);
    }
}

/// Whether a chain of so many transfers can be copied at once, and one more.
pub(crate) fn can_add_copies(transfers: usize) -> bool {
    transfers < COPIES / COPIED_SEGMENTS
}

/// Makes the copies of a batch. Waits for pages of the frontend that are not in memory.
fn run_patiently(batch: &mut Batch<'_>) -> Result<(), Problem> {
    let sleep = |ms: u32| fsleep(Delta::from_millis(ms.into()));
    let delays = Backoff::new(1, 256);
    backoff::retry(delays, PAGED_OUT_MS, sleep, CopyError::is_paged_out, || {
        batch.run()
    })
    .map_err(Problem::Copy)
}

/// Adds the copies that a transfer needs.
fn add_copies<'a>(batch: &mut Batch<'a>, domain: DomId, transfer: &'a Transfer) -> Result {
    let (_, own) = transfer.data();
    for (segment, page) in transfer.context.segments.iter().zip(own) {
        let reference = ForeignRef(segment.gref());
        let (offset, len) = (usize::from(segment.offset()), usize::from(segment.len()));
        match transfer.context.work {
            Work::Read => {
                let from = PageSlice::new(page, offset, len).ok_or(EINVAL)?;
                batch.write(domain, reference, offset, from)?;
            }
            Work::Write | Work::Barrier | Work::Flush | Work::Discard { .. } => {
                let to = PageSliceMut::new(page, offset, len).ok_or(EINVAL)?;
                batch.read(domain, reference, offset, to)?;
            }
        }
    }
    Ok(())
}

/// Passes on the segments in a page of segments. They are copied from there, some at once, before they
/// are looked at: the page may be the frontend's.
fn for_each_segment(
    descriptors: PageSlice<'_>,
    mut take: impl FnMut(WireSegment) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let mut bytes = [0; SEGMENTS_AT_ONCE * SEGMENT_BYTES];
    let mut offset = 0usize;
    while offset < descriptors.len() {
        let len = bytes.len().min(descriptors.len().wrapping_sub(offset));
        let some = descriptors.get(offset, len).ok_or(EINVAL)?;
        let got = some.read(&mut bytes);
        for segment in bytes.chunks_exact(SEGMENT_BYTES).take(got / SEGMENT_BYTES) {
            take(wire_segment(segment))?;
        }
        offset = offset.wrapping_add(len);
    }
    Ok(())
}

/// A segment of [`SEGMENT_BYTES`] bytes.
fn wire_segment(bytes: &[u8]) -> WireSegment {
    let bytes = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    WireSegment::decode([bytes as u32, (bytes >> 32) as u32])
}
