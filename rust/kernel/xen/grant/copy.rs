// SPDX-License-Identifier: GPL-2.0-only

//! Letting Xen copy between pages of another domain and our own.
//!
//! For little data this is cheaper than to map a page: there is no address space to change, and the
//! other domain's pages are never seen by anybody else. Many copies are made by one hypercall.
//!
//! The hypercall is made by this module itself: `gnttab_batch_copy` stops the kernel when it fails,
//! and sleeps for long when a page of the other domain is not in memory.

use core::marker::PhantomData;

use kernel::{
    error::to_result,
    page::PAGE_SIZE,
    prelude::*, //
};

use crate::{
    base::page::{
        PageSlice,
        PageSliceMut, //
    },
    xen::DomId, //
};

use super::{
    ForeignRef,
    GrantStatus, //
};

/// The status of an operation before Xen has reached it.
const NOT_REACHED: i16 = 1;

/// Memory for copies, made once; one for each thread that copies.
pub struct Copier {
    ops: KVec<bindings_ext::gnttab_copy>,
}

// SAFETY: The addresses in the operations mean nothing between two batches.
unsafe impl Send for Copier {}
// SAFETY: There is nothing to do with a shared reference.
unsafe impl Sync for Copier {}

impl Copier {
    /// Creates a copier for up to `capacity` copies at once.
    pub fn new(capacity: usize) -> Result<Self> {
        Ok(Self {
            ops: KVec::with_capacity(capacity, GFP_KERNEL)?,
        })
    }

    /// Starts a batch, with no copy in it.
    pub fn batch(&mut self) -> Batch<'_> {
        self.ops.clear();
        Batch {
            ops: &mut self.ops,
            _pages: PhantomData,
        }
    }
}

/// Copies to be made at once. Nothing happens before [`Batch::run`].
///
/// # Invariants
///
/// The local side of each operation is within a page that lives during `'a`, and that may be
/// written if it is the destination.
pub struct Batch<'a> {
    ops: &'a mut KVec<bindings_ext::gnttab_copy>,
    _pages: PhantomData<PageSliceMut<'a>>,
}

impl<'a> Batch<'a> {
    /// Returns the number of copies.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Returns `true` if there are no copies.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Adds a copy of `to.len()` bytes at `offset` in a page of `domain`, to our memory.
    ///
    /// `EINVAL`: that leaves the page. `ENOSPC`: the batch is full.
    pub fn read(
        &mut self,
        domain: DomId,
        reference: ForeignRef,
        offset: usize,
        to: PageSliceMut<'a>,
    ) -> Result {
        let source = foreign(domain, reference, offset, to.len())?;
        self.push(
            source,
            local(to.as_slice()),
            to.len(),
            bindings_ext::GNTCOPY_source_gref,
        )
    }

    /// Adds a copy of `from`, to `offset` in a page of `domain`.
    ///
    /// `EINVAL`: that leaves the page. `ENOSPC`: the batch is full.
    pub fn write(
        &mut self,
        domain: DomId,
        reference: ForeignRef,
        offset: usize,
        from: PageSlice<'a>,
    ) -> Result {
        let dest = foreign(domain, reference, offset, from.len())?;
        self.push(
            local(from),
            dest,
            from.len(),
            bindings_ext::GNTCOPY_dest_gref,
        )
    }

    fn push(
        &mut self,
        source: bindings_ext::gnttab_copy_gnttab_copy_ptr,
        dest: bindings_ext::gnttab_copy_gnttab_copy_ptr,
        len: usize,
        flags: u32,
    ) -> Result {
        let op = bindings_ext::gnttab_copy {
            source,
            dest,
            len: len as u16,
            flags: flags as u16,
            status: NOT_REACHED,
        };
        // INVARIANT: The local side comes from a slice that lives during `'a`; `read` gives a
        // writable one.
        self.ops.push_within_capacity(op).map_err(|_| ENOSPC)
    }

    /// Makes all copies. Does not sleep.
    ///
    /// The result is that of the first copy that failed, with its place in the batch; the others
    /// are made nevertheless. If it can be tried again, because a page is not in memory, the result
    /// is [`GrantStatus::EAGAIN`], whatever else has failed.
    pub fn run(&mut self) -> Result<(), CopyError> {
        // SAFETY: By the type invariant Xen reads and writes only memory that lives and may be
        // written; what it does in the other domain is checked by its grants.
        let result = to_result(unsafe {
            bindings_ext::gnttab_copy_op(self.ops.as_mut_ptr(), self.ops.len() as u32)
        });
        result.map_err(CopyError::Hypercall)?;
        let mut result = Ok(());
        for (index, op) in self.ops.iter().enumerate() {
            match GrantStatus::from_raw(op.status) {
                GrantStatus::OKAY => {}
                status @ GrantStatus::EAGAIN => return Err(CopyError::Refused(index, status)),
                status => result = result.and(Err(CopyError::Refused(index, status))),
            }
        }
        result
    }
}

/// Why a batch did not work.
#[derive(Clone, Copy, Debug)]
pub enum CopyError {
    /// Xen did not look at the batch.
    Hypercall(Error),
    /// The copy at this place in the batch was refused.
    Refused(usize, GrantStatus),
}

impl CopyError {
    /// Returns `true` if a page of the other domain is not in memory now, so that the batch can be
    /// run again later.
    pub fn is_paged_out(&self) -> bool {
        matches!(self, CopyError::Refused(_, GrantStatus::EAGAIN))
    }
}

impl From<CopyError> for Error {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Hypercall(error) => error,
            CopyError::Refused(_, status) => status.to_error(),
        }
    }
}

/// Returns the foreign side of a copy.
fn foreign(
    domain: DomId,
    reference: ForeignRef,
    offset: usize,
    len: usize,
) -> Result<bindings_ext::gnttab_copy_gnttab_copy_ptr> {
    if offset.checked_add(len).is_none_or(|end| end > PAGE_SIZE) {
        return Err(EINVAL);
    }
    let mut ptr = bindings_ext::gnttab_copy_gnttab_copy_ptr {
        domid: domain.value(),
        offset: offset as u16,
        ..Default::default()
    };
    // SAFETY: A field of plain data in a union that was all zero.
    *unsafe { ptr.u.ref_.as_mut() } = reference.0;
    Ok(ptr)
}

/// Returns our side of a copy.
fn local(slice: PageSlice<'_>) -> bindings_ext::gnttab_copy_gnttab_copy_ptr {
    let mut ptr = bindings_ext::gnttab_copy_gnttab_copy_ptr {
        domid: DomId::SELF.value(),
        offset: slice.offset() as u16,
        ..Default::default()
    };
    // SAFETY: The page is valid, by the invariant of `PageSlice`.
    let frame = unsafe { bindings_ext::xen_page_to_gfn(slice.page().as_ptr()) };
    // SAFETY: A field of plain data in a union that was all zero.
    *unsafe { ptr.u.gmfn.as_mut() } = frame;
    ptr
}
