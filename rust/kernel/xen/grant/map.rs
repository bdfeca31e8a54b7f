// SPDX-License-Identifier: GPL-2.0-only

//! Mapping the pages of another domain.
//!
//! A page of another domain is mapped to a page of this kernel that has no memory of its own; a
//! [`PageCache`] has such pages. A [`Mapper`] maps and unmaps many pages with one hypercall. The
//! result is a list of [`MappedPage`]s: owned values, each of which is unmapped once. During an
//! I/O, the I/O owns its pages ([`PageOwner`]), so they cannot be unmapped.
//!
//! Other parts of the kernel may use a page for longer than the I/O, for instance a network card
//! that sends it. Such a page is *busy*. [`Mapper::unmap`] leaves busy pages in the list, for the
//! caller to try later.

use core::{
    mem::ManuallyDrop,
    ptr::NonNull, //
};

use kernel::{
    bindings,
    error::to_result,
    page::PAGE_SIZE,
    prelude::*,
    types::Opaque, //
};

use crate::{
    base::page::{
        PageOwner,
        PageSlice,
        PageSliceMut, //
    },
    ratelimited,
    xen::DomId, //
};

use super::{
    ForeignRef,
    GrantAccess,
    GrantStatus, //
};

/// The status of an operation before Xen has reached it.
const NOT_REACHED: i16 = 1;

/// Largest number of waits of [`BUSY_SLEEP_MS`] for busy pages.
const BUSY_TRIES: usize = 500;
const BUSY_SLEEP_MS: u32 = 20;

/// Pages without memory of their own (`struct gnttab_page_cache`).
///
/// # Invariants
///
/// - `inner` is initialised and does not move.
/// - Its pages come from `gnttab_page_cache_get`; nothing is mapped there, and they are not used.
#[pin_data(PinnedDrop)]
pub struct PageCache {
    #[pin]
    inner: Opaque<bindings_ext::gnttab_page_cache>,
}

// SAFETY: The cache has its own lock.
unsafe impl Send for PageCache {}
// SAFETY: As above.
unsafe impl Sync for PageCache {}

impl PageCache {
    /// Creates an empty cache, which allocates pages when they are needed and keeps them.
    pub fn new() -> impl PinInit<Self> {
        // INVARIANT: Initialised here, without pages.
        pin_init!(Self {
            inner <- Opaque::ffi_init(|inner| {
                // SAFETY: `inner` is valid for writes, and stays where it is.
                unsafe { bindings_ext::gnttab_page_cache_init(inner) }
            }),
        })
    }

    /// Frees all but `keep` pages.
    ///
    /// Context: may sleep.
    pub fn shrink(&self, keep: u32) {
        // SAFETY: By the type invariants all pages in the cache may be freed.
        unsafe { bindings_ext::gnttab_page_cache_shrink(self.inner.get(), keep) };
    }

    /// Allocates pages until the cache has at least `count`, so that taking `count` pages cannot
    /// fail.
    ///
    /// Context: may sleep.
    pub fn fill(&self, count: usize) -> Result {
        let mut pages = KVec::with_capacity(count, GFP_KERNEL)?;
        let mut result = Ok(());
        while result.is_ok() && pages.len() < count {
            // There is space, see above.
            result = self
                .get()
                .map(|page| drop(pages.push_within_capacity(page.as_ptr())));
        }
        self.put(&mut pages);
        result
    }

    /// Takes a page, or allocates one if the cache is empty, which may sleep.
    ///
    /// The page belongs to the caller alone, and has an address of its own.
    fn get(&self) -> Result<NonNull<bindings::page>> {
        let mut page = core::ptr::null_mut();
        // SAFETY: By the type invariant; `page` is valid for a write.
        to_result(unsafe { bindings_ext::gnttab_page_cache_get(self.inner.get(), &mut page) })?;
        NonNull::new(page).ok_or(ENOMEM)
    }

    /// Puts back pages that [`Self::get`] of any cache has returned.
    ///
    /// Nothing is mapped there any more, and they are not used.
    fn put(&self, pages: &mut [*mut bindings::page]) {
        if pages.is_empty() {
            return;
        }
        // SAFETY: By the type invariants, which hold for these pages too, as said above.
        unsafe {
            bindings_ext::gnttab_page_cache_put(
                self.inner.get(),
                pages.as_mut_ptr(),
                pages.len() as u32,
            )
        };
    }
}

#[pinned_drop]
impl PinnedDrop for PageCache {
    fn drop(self: Pin<&mut Self>) {
        self.shrink(0);
    }
}

/// A mapped page of another domain.
///
/// Its content can change at any time; it can only be copied. Dropping it unmaps the page, or leaks
/// it if it is busy. So unmap pages by [`Mapper::unmap`], and call [`Self::wait_until_unused`]
/// before the remaining ones are dropped.
///
/// # Invariants
///
/// - `page` came from a [`PageCache`] and is owned.
/// - `handle` is a mapping of a foreign frame to that page, with `access`, which no other code
///   uses. The mapping exists until this is dropped or consumed by a [`Mapper`].
pub struct MappedPage {
    page: NonNull<bindings::page>,
    handle: bindings_ext::grant_handle_t,
    reference: ForeignRef,
    access: GrantAccess,
}

// SAFETY: A mapping belongs to no thread.
unsafe impl Send for MappedPage {}
// SAFETY: All access to the page is by copies that may race.
unsafe impl Sync for MappedPage {}

impl MappedPage {
    /// Returns the reference that is mapped: the key of a persistent grant.
    #[inline]
    pub fn reference(&self) -> ForeignRef {
        self.reference
    }

    /// Returns the access of the mapping.
    #[inline]
    pub fn access(&self) -> GrantAccess {
        self.access
    }

    /// Returns `len` bytes of the page from `offset` on, to copy from; `None` if they exceed the
    /// page.
    #[inline]
    pub fn slice(&self, offset: usize, len: usize) -> Option<PageSlice<'_>> {
        self.whole().get(offset, len)
    }

    /// Returns `len` bytes of the page from `offset` on, to copy to; `None` if they exceed the
    /// page, or if it is mapped read-only.
    #[inline]
    pub fn slice_mut(&self, offset: usize, len: usize) -> Option<PageSliceMut<'_>> {
        if self.access == GrantAccess::ReadOnly {
            return None;
        }
        // SAFETY: By the type invariant the page is mapped for writing.
        Some(unsafe { PageSliceMut::from_slice(self.slice(offset, len)?) })
    }

    fn whole(&self) -> PageSlice<'_> {
        // SAFETY: By the type invariants the page is ours, mapped, and stays so while `self` is
        // borrowed.
        unsafe { PageSlice::from_raw(self.page, 0, PAGE_SIZE) }
    }

    /// Waits until none of the pages is in use elsewhere, for at most ten seconds in total.
    ///
    /// Context: may sleep.
    pub fn wait_until_unused(pages: &[Self]) {
        for _ in 0..BUSY_TRIES {
            if !pages.iter().any(Self::is_busy) {
                break;
            }
            // SAFETY: Just sleeps.
            unsafe { bindings::msleep(BUSY_SLEEP_MS) };
        }
    }

    /// Returns `true` if the page is still in use elsewhere.
    #[inline]
    pub fn is_busy(&self) -> bool {
        // SAFETY: The page is valid by the type invariant.
        unsafe { bindings_ext::page_count(self.page.as_ptr()) > 1 }
    }
}

// SAFETY: By the type invariants the page stays mapped, and has no other owner, until the
// `MappedPage` is dropped or passed to a `Mapper`. It can be written if it is mapped for that.
unsafe impl PageOwner for MappedPage {
    fn writable(&self) -> bool {
        self.access == GrantAccess::ReadWrite
    }

    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_ {
        core::iter::once(self.whole())
    }
}

impl Drop for MappedPage {
    fn drop(&mut self) {
        if self.is_busy() {
            ratelimited!(pr_err!(
                "grant {}: still in use after its I/O: leaking the page\n",
                self.reference.0
            ));
            return;
        }
        let mut op = unmap_op(self);
        let mut page = self.page.as_ptr();
        // SAFETY: By the type invariant the mapping is ours; the page is not used, and the handle
        // is not used after this.
        unsafe {
            unmap_refs(
                core::slice::from_mut(&mut op),
                core::slice::from_mut(&mut page),
            )
        };
        if is_unmapped(&op) {
            // SAFETY: By the type invariants the page came from `gnttab_alloc_pages`, by way of a
            // cache, and is ours. It is unmapped.
            unsafe { bindings_ext::gnttab_free_pages(1, &mut page) };
        }
    }
}

/// Returns the operation that unmaps `page`.
fn unmap_op(page: &MappedPage) -> bindings_ext::gnttab_unmap_grant_ref {
    let mut op = bindings_ext::gnttab_unmap_grant_ref {
        status: NOT_REACHED,
        ..Default::default()
    };
    // SAFETY: The page is valid by the invariants of `MappedPage`, and has an address of its own as
    // all pages of a `PageCache` have.
    unsafe {
        bindings_ext::gnttab_set_unmap_op(
            &mut op,
            page.page.as_ptr(),
            bindings_ext::GNTMAP_host_map,
            page.handle,
        )
    };
    op
}

/// Unmaps pages, and stores the result in the status of each operation.
///
/// # Safety
///
/// Both slices are of the same length; each operation comes from [`unmap_op`] for the page at the
/// same place, that page is not used, and its handle is not used again.
unsafe fn unmap_refs(
    ops: &mut [bindings_ext::gnttab_unmap_grant_ref],
    pages: &mut [*mut bindings::page],
) {
    // The result says less than the statuses.
    //
    // SAFETY: By the requirements of this function.
    let _ = unsafe {
        bindings_ext::gnttab_unmap_refs(
            ops.as_mut_ptr(),
            core::ptr::null_mut(),
            pages.as_mut_ptr(),
            ops.len() as u32,
        )
    };
}

/// Returns `true` if an operation of [`unmap_refs`] has succeeded.
///
/// If not, the state of the mapping is unknown, and the page has to be leaked.
fn is_unmapped(op: &bindings_ext::gnttab_unmap_grant_ref) -> bool {
    let status = GrantStatus::from_raw(op.status);
    if status != GrantStatus::OKAY {
        ratelimited!(pr_err!(
            "cannot unmap a grant: {}: leaking the page\n",
            status
        ));
    }
    status == GrantStatus::OKAY
}

/// Allocates `count` zeroed operations.
fn defaults<T: Default>(count: usize) -> Result<KVec<T>> {
    let mut ops = KVec::with_capacity(count, GFP_KERNEL)?;
    for _ in 0..count {
        ops.push(T::default(), GFP_KERNEL)?;
    }
    Ok(ops)
}

/// The reason why pages could not be mapped.
#[derive(Clone, Copy, Debug)]
pub enum MapError {
    /// There are more references than the capacity of the mapper or of the list.
    TooMany,
    /// There is no page to map to.
    NoPage(Error),
    /// Xen has refused to map this reference.
    Refused(ForeignRef, GrantStatus),
}

impl MapError {
    /// Returns `true` if mapping may succeed later, when memory or mappings were freed.
    pub fn is_shortage(&self) -> bool {
        match self {
            MapError::TooMany => false,
            MapError::NoPage(_) => true,
            MapError::Refused(_, status) => status.is_no_space(),
        }
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        match error {
            MapError::TooMany => EINVAL,
            MapError::NoPage(error) => error,
            MapError::Refused(_, status) => status.to_error(),
        }
    }
}

/// Maps and unmaps many pages with one hypercall.
///
/// It has the memory for the operations, which is allocated once for each thread that maps.
///
/// # Invariants
///
/// The three vectors have the same length, at least 1.
pub struct Mapper {
    map: KVec<bindings_ext::gnttab_map_grant_ref>,
    unmap: KVec<bindings_ext::gnttab_unmap_grant_ref>,
    pages: KVec<*mut bindings::page>,
}

// SAFETY: The pointers are not used between two calls.
unsafe impl Send for Mapper {}
// SAFETY: There is nothing to do with a shared reference.
unsafe impl Sync for Mapper {}

impl Mapper {
    /// Creates a mapper for up to `capacity` pages at once.
    pub fn new(capacity: usize) -> Result<Self> {
        let capacity = capacity.max(1);
        // INVARIANT: All of the same length.
        Ok(Self {
            map: defaults(capacity)?,
            unmap: defaults(capacity)?,
            pages: KVec::from_elem(core::ptr::null_mut(), capacity, GFP_KERNEL)?,
        })
    }

    /// Maps pages that `domain` has granted, and appends them to `list` in order: all, or none.
    ///
    /// The capacities of the mapper and of `list` must suffice; only pages that the cache lacks are
    /// allocated.
    ///
    /// Context: may sleep, for up to 32 s for each page that is not in memory in the other domain.
    pub fn map(
        &mut self,
        cache: &PageCache,
        domain: DomId,
        references: &[ForeignRef],
        access: GrantAccess,
        list: &mut KVec<MappedPage>,
    ) -> Result<(), MapError> {
        let before = list.len();
        if references.len() > self.pages.len()
            || references.len() > list.capacity().saturating_sub(before)
        {
            return Err(MapError::TooMany);
        }
        self.prepare(cache, domain, references, access)
            .map_err(MapError::NoPage)?;
        // The statuses say all.
        //
        // SAFETY: There are as many operations and pages as references, by `prepare` and the type
        // invariant; each maps to a page that came from `get`, so it is ours and has nothing
        // mapped.
        let _ = unsafe {
            bindings_ext::gnttab_map_refs(
                self.map.as_mut_ptr(),
                core::ptr::null_mut(),
                self.pages.as_mut_ptr(),
                references.len() as u32,
            )
        };
        let result = self.collect(cache, references, access, list);
        if result.is_err() {
            self.unmap_beyond(cache, list, before);
        }
        result
    }

    /// Sets up one operation, with a page, for each reference.
    fn prepare(
        &mut self,
        cache: &PageCache,
        domain: DomId,
        references: &[ForeignRef],
        access: GrantAccess,
    ) -> Result {
        let flags = match access {
            GrantAccess::ReadOnly => bindings_ext::GNTMAP_host_map | bindings_ext::GNTMAP_readonly,
            GrantAccess::ReadWrite => bindings_ext::GNTMAP_host_map,
        };
        let places = self.map.iter_mut().zip(self.pages.iter_mut());
        for (index, (reference, (op, place))) in references.iter().zip(places).enumerate() {
            let page = match cache.get() {
                Ok(page) => page,
                Err(error) => {
                    cache.put(self.pages.get_mut(..index).unwrap_or_default());
                    return Err(error);
                }
            };
            *place = page.as_ptr();
            // SAFETY: `get` gives a page that is ours and has an address of its own.
            unsafe {
                bindings_ext::gnttab_set_map_op(
                    op,
                    page.as_ptr(),
                    flags,
                    reference.0,
                    domain.value(),
                )
            };
            op.status = NOT_REACHED;
        }
        Ok(())
    }

    /// Checks the status of each operation: adds mapped pages to `list`, and puts the others back
    /// to the cache.
    ///
    /// Returns the first error.
    fn collect(
        &mut self,
        cache: &PageCache,
        references: &[ForeignRef],
        access: GrantAccess,
        list: &mut KVec<MappedPage>,
    ) -> Result<(), MapError> {
        let mut result = Ok(());
        let places = self.map.iter().zip(self.pages.iter_mut());
        for (reference, (op, place)) in references.iter().zip(places) {
            let status = GrantStatus::from_raw(op.status);
            let Some(page) = NonNull::new(*place) else {
                continue;
            };
            if status == GrantStatus::OKAY {
                // INVARIANT: The hypercall has just mapped it, and the handle is ours alone.
                let page = MappedPage {
                    page,
                    handle: op.handle,
                    reference: *reference,
                    access,
                };
                // The capacity was checked by the caller.
                let _ = list.push_within_capacity(page);
            } else {
                cache.put(core::slice::from_mut(place));
                result = result.and(Err(MapError::Refused(*reference, status)));
            }
        }
        result
    }

    /// Unmaps the pages of `list` that are not busy, and puts them into `cache`.
    ///
    /// Busy ones stay at the front of the list.
    ///
    /// Context: any but hard interrupts; does not sleep.
    pub fn unmap(&mut self, cache: &PageCache, list: &mut KVec<MappedPage>) {
        let mut busy = 0usize;
        for index in 0..list.len() {
            if list.get(index).is_some_and(MappedPage::is_busy) {
                list.swap(busy, index);
                busy = busy.wrapping_add(1);
            }
        }
        self.unmap_beyond(cache, list, busy);
    }

    /// Unmaps all but the first `keep` pages.
    ///
    /// The others are not busy.
    fn unmap_beyond(&mut self, cache: &PageCache, list: &mut KVec<MappedPage>, keep: usize) {
        while list.len() > keep {
            let mut count = 0usize;
            for (op, place) in self.unmap.iter_mut().zip(self.pages.iter_mut()) {
                if list.len() <= keep {
                    break;
                }
                let Some(page) = list.pop() else { break };
                // The mapping ends here, not by `drop`.
                let page = ManuallyDrop::new(page);
                *op = unmap_op(&page);
                *place = page.page.as_ptr();
                count = count.wrapping_add(1);
            }
            let (Some(ops), Some(pages)) =
                (self.unmap.get_mut(..count), self.pages.get_mut(..count))
            else {
                return;
            };
            // SAFETY: Each operation was made just above for the page at the same place, which is
            // not busy and no longer has an owner.
            unsafe { unmap_refs(ops, pages) };
            for (op, page) in ops.iter().zip(pages) {
                if is_unmapped(op) {
                    cache.put(core::slice::from_mut(page));
                }
            }
        }
    }
}
