// SPDX-License-Identifier: GPL-2.0-only

//! Grants: memory of a domain that another domain may use.
//!
//! A domain has a table of *grant entries*; an entry names a page, a domain that may use it, and
//! whether it may write. The other domain uses the number of the entry, the *grant reference*. A
//! free reference that belongs to this code is *reserved*.
//!
//! The side that owns the memory (for disks, the frontend) uses:
//! - [`GrantReserve`]: reserved references, so that starting an I/O cannot fail for lack of them,
//! - [`GrantedPage`]: a page of this domain that stays granted for a long time,
//! - [`Granted`]: pages of another owner, such as those of a block request, granted for one I/O.
//!
//! The side that uses the memory (the backend) has:
//! - [`map`]: maps foreign pages into this domain's address space,
//! - [`copy`]: has Xen copy between foreign pages and pages of this domain.
//!
//! | type | C |
//! |---|---|
//! | [`GrantReserve`] | `gnttab_alloc_grant_references()`, `gnttab_claim_grant_reference()` |
//! | [`GrantedPage`], [`Granted`] | `gnttab_grant_foreign_access_ref()`, `gnttab_try_end_foreign_access()` |
//! | [`map::Mapper`], [`map::MappedPage`] | `gnttab_map_refs()`, `gnttab_unmap_refs()` |
//! | [`map::PageCache`] | `struct gnttab_page_cache` |
//! | [`copy::Copier`] | `struct gnttab_copy`, `gnttab_batch_copy()` |
//!
//! The side that owns the memory relies on one rule (XSA-396): *access ends only when Xen reports
//! that*. Ending a grant fails while the other domain has the page mapped, and the page must not be
//! reused then. Such a page is put on the kernel's list of deferred grants, which the kernel tries
//! to end periodically; a block request with such a page is not completed.
//!
//! C header: [`include/xen/grant_table.h`](srctree/include/xen/grant_table.h)

pub mod copy;
pub mod map;

use core::mem::ManuallyDrop;

use kernel::{
    error::to_result,
    fmt,
    page::PAGE_SIZE,
    prelude::*, //
};

use crate::{
    base::page::{
        DataOwner,
        Page,
        PageOwner,
        PageSlice,
        PageSliceMut, //
    },
    ratelimited, //
};

use super::DomId;

/// The end of a private list of references (`GNTTAB_LIST_END` of `grant-table.c`).
const LIST_END: bindings_ext::grant_ref_t = u32::MAX;

/// The access of the other domain to a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrantAccess {
    /// Read only: the data of a disk write.
    ReadOnly,
    /// Read and write: the data of a disk read, a ring.
    ReadWrite,
}

/// A reference to a page of this domain, for the other domain.
///
/// It is plain data: knowing the number gives no access.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GrantRef(u32);

impl GrantRef {
    pub(crate) const fn from_raw(reference: u32) -> Self {
        Self(reference)
    }

    /// Returns the number, for a ring or for xenstore.
    pub const fn value(self) -> u32 {
        self.0
    }
}

/// A reference from the other domain.
///
/// It is untrusted data, which Xen checks when it is used.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct ForeignRef(pub u32);

/// The status of a grant operation that failed (`GNTST_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GrantStatus(i16);

impl GrantStatus {
    /// The frame is paged out: try again later, from a thread.
    pub const EAGAIN: Self = Self(bindings_ext::GNTST_eagain as i16);

    pub(crate) const OKAY: Self = Self(bindings_ext::GNTST_okay as i16);

    pub(crate) const fn from_raw(status: i16) -> Self {
        Self(status)
    }

    /// Returns the status as a number: negative, or positive if Xen did not reach the operation.
    pub const fn value(self) -> i16 {
        self.0
    }

    /// Returns the errno for this status: `EAGAIN` for a page that is not in memory, `ENOSPC` if no
    /// more mappings are possible, `EFAULT` if the reference is invalid.
    pub fn to_error(self) -> Error {
        match self {
            Self::EAGAIN => EAGAIN,
            _ if self.is_no_space() => ENOSPC,
            _ => EFAULT,
        }
    }

    /// Returns `true` if Xen has no space for another mapping, which is not an error of the caller
    /// or the other domain.
    ///
    /// The table of the pages that a domain has mapped (its *maptrack*), or that of an IOMMU, is
    /// full. The status for each depends on the version of Xen.
    pub fn is_no_space(self) -> bool {
        matches!(
            i32::from(self.0),
            bindings_ext::GNTST_no_device_space | bindings_ext::GNTST_no_space
        )
    }
}

impl fmt::Display for GrantStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match i32::from(self.0) {
            0 => "okay",
            bindings_ext::GNTST_general_error => "general error",
            bindings_ext::GNTST_bad_domain => "bad domain",
            bindings_ext::GNTST_bad_gntref => "bad grant reference",
            bindings_ext::GNTST_bad_handle => "bad handle",
            bindings_ext::GNTST_bad_virt_addr => "bad virtual address",
            bindings_ext::GNTST_bad_dev_addr => "bad device address",
            bindings_ext::GNTST_no_device_space => "no more mappings possible",
            bindings_ext::GNTST_permission_denied => "permission denied",
            bindings_ext::GNTST_bad_page => "bad page",
            bindings_ext::GNTST_bad_copy_arg => "copy crosses a page boundary",
            bindings_ext::GNTST_address_too_big => "address too big",
            bindings_ext::GNTST_eagain => "page is not in memory",
            bindings_ext::GNTST_no_space => "no space for one more mapping",
            _ => return write!(f, "status {}", self.0),
        };
        f.write_str(name)
    }
}

/// Reserved references, which do not grant any page yet.
///
/// # Invariants
///
/// `head` is the head of a private list of `len` free references, made by
/// `gnttab_alloc_grant_references` or empty.
pub struct GrantReserve {
    head: bindings_ext::grant_ref_t,
    len: usize,
}

impl GrantReserve {
    /// Creates a reserve without references.
    pub const fn empty() -> Self {
        // INVARIANT: The empty list.
        Self {
            head: LIST_END,
            len: 0,
        }
    }

    /// Reserves `count` references.
    ///
    /// Fails with `ENOSPC` if the grant table is full.
    ///
    /// Context: any.
    #[inline]
    pub fn new(count: u16) -> Result<Self> {
        if count == 0 {
            return Ok(Self::empty());
        }
        Self::alloc(count)
    }

    /// Reserves `count` references, at least one.
    fn alloc(count: u16) -> Result<Self> {
        let mut reserve = Self::empty();
        // SAFETY: `head` is valid for a write.
        to_result(unsafe {
            bindings_ext::gnttab_alloc_grant_references(count, &mut reserve.head)
        })?;
        // INVARIANT: `head` is the list that the call has made.
        reserve.len = count.into();
        Ok(reserve)
    }

    /// Returns the number of references left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns `true` if no reference is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reserves more references, until there are `count`.
    pub fn fill(&mut self, count: u16) -> Result {
        let missing = usize::from(count).saturating_sub(self.len);
        let mut more = Self::new(missing as u16)?;
        while let Some(reference) = more.claim() {
            self.release(reference);
        }
        Ok(())
    }

    /// Takes a reference from the list, which the caller has to grant, or to put back by
    /// [`Self::release`].
    fn claim(&mut self) -> Option<bindings_ext::grant_ref_t> {
        if self.len == 0 {
            return None;
        }
        // SAFETY: By the type invariant the list is private to us and not empty.
        let reference = unsafe { bindings_ext::gnttab_claim_grant_reference(&mut self.head) };
        // INVARIANT: One less, in the list and in the number.
        self.len = self.len.wrapping_sub(1);
        u32::try_from(reference).ok()
    }

    /// Puts back a reference that [`Self::claim`] has taken, and that grants no page.
    fn release(&mut self, reference: bindings_ext::grant_ref_t) {
        // SAFETY: By the type invariant the list is private to us. What `claim` gives is ours, and
        // was not granted.
        unsafe { bindings_ext::gnttab_release_grant_reference(&mut self.head, reference) };
        // INVARIANT: One more, in the list and in the number.
        self.len = self.len.wrapping_add(1);
    }

    /// Grants a page to `domain`.
    ///
    /// Fails with `ENOSPC` if no reference is left.
    ///
    /// # Safety
    ///
    /// The page is valid, and is not reused until the grant has been ended with success.
    pub(super) unsafe fn grant(
        &mut self,
        domain: DomId,
        page: *mut kernel::bindings::page,
        access: GrantAccess,
    ) -> Result<GrantRef> {
        let reference = self.claim().ok_or(ENOSPC)?;
        let readonly = access == GrantAccess::ReadOnly;
        // SAFETY: `claim` gives a reference that is ours and free, by the type invariant; `page` is
        // valid by the requirements of this function.
        unsafe {
            bindings_ext::gnttab_grant_foreign_access_ref(
                reference,
                domain.value(),
                bindings_ext::xen_page_to_gfn(page),
                readonly.into(),
            )
        };
        Ok(GrantRef(reference))
    }
}

impl Drop for GrantReserve {
    #[inline]
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: By the type invariant the list is ours.
            unsafe { bindings_ext::gnttab_free_grant_references(self.head) };
        }
    }
}

/// Ends a grant if the other domain no longer uses it, and frees its reference.
///
/// # Safety
///
/// The reference is ours and granted; if this returns `true`, it is no longer ours.
pub(super) unsafe fn try_end(reference: GrantRef) -> bool {
    // SAFETY: By the requirements of this function.
    unsafe { bindings_ext::gnttab_try_end_foreign_access(reference.0) != 0 }
}

/// A page of this domain that is granted to another domain.
///
/// Its content can change at any time if the access is [`GrantAccess::ReadWrite`]; it can only be
/// copied out. Dropping it ends the grant and frees the page; while the other domain uses the page,
/// both stay on the kernel's list of deferred grants.
///
/// # Invariants
///
/// - `reference` is ours and grants `page`.
/// - `page` is owned. It is freed or moved out only after the grant has ended.
pub struct GrantedPage {
    page: ManuallyDrop<Page>,
    reference: GrantRef,
}

impl GrantedPage {
    /// Grants `page` to `domain`, with a reference of `reserve`.
    ///
    /// The other domain can read the whole page, so it must have been zeroed, or contain data for
    /// that domain only.
    ///
    /// Fails with `ENOSPC` if the reserve is empty; the page is freed then.
    pub fn new(
        reserve: &mut GrantReserve,
        domain: DomId,
        page: Page,
        access: GrantAccess,
    ) -> Result<Self> {
        // SAFETY: The page is valid, and goes to the `GrantedPage` below, which keeps it until the
        // grant has ended, by the type invariant. If this fails, there is no grant.
        let reference = unsafe { reserve.grant(domain, page.as_ptr(), access) }?;
        // INVARIANT: As granted just above.
        Ok(Self {
            page: ManuallyDrop::new(page),
            reference,
        })
    }

    /// Returns the reference, for the other domain.
    #[inline]
    pub fn reference(&self) -> GrantRef {
        self.reference
    }

    /// Returns `len` bytes of the page from `offset` on, to copy from; `None` if they exceed the
    /// page.
    #[inline]
    pub fn slice(&self, offset: usize, len: usize) -> Option<PageSlice<'_>> {
        PageSlice::new(&self.page, offset, len)
    }

    /// Returns `len` bytes of the page from `offset` on, to copy to; `None` if they exceed the
    /// page.
    #[inline]
    pub fn slice_mut(&self, offset: usize, len: usize) -> Option<PageSliceMut<'_>> {
        PageSliceMut::new(&self.page, offset, len)
    }

    /// Ends the grant and returns the page, unless the other domain still uses it.
    pub fn try_end(self) -> Result<Page, Self> {
        // SAFETY: By the type invariant. If it is ended, it is not ended again: `self` goes below.
        if !unsafe { try_end(self.reference) } {
            return Err(self);
        }
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used after this.
        Ok(unsafe { ManuallyDrop::take(&mut this.page) })
    }
}

impl Drop for GrantedPage {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours, and so is the page, which the call
        // takes over and frees as soon as the grant could be ended.
        unsafe { bindings_ext::gnttab_end_foreign_access(self.reference.0, self.page.as_ptr()) };
    }
}

/// The references of a [`Granted`]: memory that is allocated once and reused for each I/O.
pub type References = KVec<GrantRef>;

/// Pages of an owner `S`, granted to another domain for as long as this exists.
///
/// The owner is inside and is returned only when Xen reports that the other domain has unmapped all
/// pages ([`Granted::try_end`]). So a block request cannot be ended while a backend could still
/// write to its memory. If a `Granted` is dropped while the other domain uses a page, the owner is
/// leaked, because another domain could write to the memory.
///
/// # Invariants
///
/// - Each of `references` is ours and grants a page of `owner`. All other grants made here have
///   ended.
/// - `owner` is dropped or moved out only when no reference is left.
pub struct Granted<S: PageOwner> {
    owner: ManuallyDrop<S>,
    references: ManuallyDrop<References>,
}

impl<S: PageOwner> Granted<S> {
    /// Grants the page of each slice of `owner` to `domain`, in order, with a reference for each.
    ///
    /// The grants are read-only unless `access` is `ReadWrite` and the owner's memory is writable.
    ///
    /// `references` is cleared; it is not reallocated. Fails with `ENOSPC` if its capacity is too
    /// small, or if `reserve` has too few references, and returns all arguments.
    pub fn new(
        owner: S,
        access: GrantAccess,
        domain: DomId,
        reserve: &mut GrantReserve,
        mut references: References,
    ) -> Result<Self, (Error, S, References)> {
        references.clear();
        let count = owner.slices().count();
        if count > references.capacity() || count > reserve.len() {
            return Err((ENOSPC, owner, references));
        }
        let access = if owner.writable() {
            access
        } else {
            GrantAccess::ReadOnly
        };

        for slice in owner.slices() {
            // SAFETY: By the promise of `PageOwner` the page stays with the owner. That is inside
            // of the `Granted` below until the grant has ended, by the type invariant; this
            // function does not return early, because there are references and space for all
            // slices.
            let granted = unsafe { reserve.grant(domain, slice.page().as_ptr(), access) };
            let Ok(reference) = granted else { break };
            // The capacity was checked above.
            let _ = references.push_within_capacity(reference);
        }
        // INVARIANT: As granted just above.
        Ok(Self {
            owner: ManuallyDrop::new(owner),
            references: ManuallyDrop::new(references),
        })
    }

    /// Returns the owner of the pages.
    pub fn owner(&self) -> &S {
        &self.owner
    }

    /// Returns the data that the owner stores with the pages.
    #[inline]
    pub fn data_mut(&mut self) -> &mut S::Data
    where
        S: DataOwner,
    {
        self.owner.data_mut()
    }

    /// Returns the references, one for each slice of the owner, in order.
    pub fn references(&self) -> &[GrantRef] {
        &self.references
    }

    /// Ends the grants and returns the owner, unless the other domain still uses a page.
    ///
    /// Then the other grants have ended, and the caller can try again.
    pub fn try_end(mut self) -> Result<(S, References), Self> {
        if !self.end_all() {
            return Err(self);
        }
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used after these two.
        let owner = unsafe { ManuallyDrop::take(&mut this.owner) };
        // SAFETY: As above.
        let references = unsafe { ManuallyDrop::take(&mut this.references) };
        Ok((owner, references))
    }

    /// Ends the grants that can be ended.
    ///
    /// Returns `true` if none is left.
    fn end_all(&mut self) -> bool {
        // INVARIANT: Those that have ended are removed.
        self.references.retain(|reference| {
            // SAFETY: By the type invariant; if it has ended, it is removed.
            !unsafe { try_end(*reference) }
        });
        self.references.is_empty()
    }
}

impl<S: PageOwner> Drop for Granted<S> {
    fn drop(&mut self) {
        if self.end_all() {
            // SAFETY: Dropped once, here, after the last grant on its pages has ended.
            unsafe { ManuallyDrop::drop(&mut self.owner) };
            // SAFETY: Dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.references) };
        } else {
            ratelimited!(pr_warn!(
                "the other domain still maps {} granted pages: leaking them\n",
                self.references.len()
            ));
        }
    }
}

const _: () = assert!(PAGE_SIZE == 4096, "one page is one grant");
