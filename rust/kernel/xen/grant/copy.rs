// SPDX-License-Identifier: GPL-2.0-only

//! Grant copy: Xen copies between pages of another domain and pages of this domain.
//!
//! For small data this is cheaper than mapping a page, because no page tables change, and no other
//! code has access to the other domain's pages. One hypercall makes many copies.
//!
//! This module makes the hypercall itself, because `gnttab_batch_copy()` stops the kernel when the
//! hypercall fails, and sleeps for a long time when a page of the other domain is not in memory.

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

/// Memory for the operations of copies, allocated once for each thread that copies.
pub struct Copier {
    ops: KVec<bindings_ext::gnttab_copy>,
}

// SAFETY: The addresses in the operations are not used between two batches.
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

    /// Starts an empty batch.
    pub fn batch(&mut self) -> Batch<'_> {
        self.ops.clear();
        Batch {
            ops: &mut self.ops,
            _pages: PhantomData,
        }
    }
}

/// Copies that [`Batch::run`] makes at once.
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

    /// Adds a copy of `to.len()` bytes at `offset` in a page of `domain` to `to`.
    ///
    /// Fails with `EINVAL` if the bytes exceed the page, and with `ENOSPC` if the batch is full.
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

    /// Adds a copy of `from` to `offset` in a page of `domain`.
    ///
    /// Fails with `EINVAL` if the bytes exceed the page, and with `ENOSPC` if the batch is full.
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

    /// Makes all copies.
    ///
    /// The error is that of the first copy that failed, with its index in the batch; all other
    /// copies are made nevertheless. If the batch can be run again, because a page is not in
    /// memory, the error is [`GrantStatus::EAGAIN`], even if other copies failed otherwise.
    ///
    /// Context: does not sleep.
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

/// The reason why a batch failed.
#[derive(Clone, Copy, Debug)]
pub enum CopyError {
    /// The hypercall failed.
    Hypercall(Error),
    /// Xen has refused the copy with this index in the batch.
    Refused(usize, GrantStatus),
}

impl CopyError {
    /// Returns `true` if a page of the other domain is not in memory now: the batch can be run
    /// again later.
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

/// Returns the operand of a copy in the other domain.
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

/// Returns the operand of a copy in this domain.
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
