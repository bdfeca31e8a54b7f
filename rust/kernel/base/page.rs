// SPDX-License-Identifier: GPL-2.0-only

//! Bytes of a page that may change at any time.
//!
//! The pages of a block request belong to a file or a process, and a page that is shared with
//! another domain can be changed by that domain. No Rust reference to such bytes may exist, because
//! they can change between two reads. The types here denote a range of such bytes, and copy ranges
//! with the C functions that the kernel uses for that.
//!
//! - [`Page`]: a page of this domain.
//! - [`PageSlice`]: bytes that may be read.
//! - [`PageSliceMut`]: bytes that may also be written. A request that *writes* to a disk has only
//!   [`PageSlice`]s: its pages may be the kernel's zero page.
//! - [`PageOwner`]: an owner that keeps such pages from being freed or reused.

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    bindings,
    page::{
        self,
        PAGE_SIZE, //
    },
};

/// A page of this domain, for bytes.
///
/// A [`kernel::page::Page`] may also be borrowed from a vector and hold typed values. Writing
/// arbitrary bytes there would be unsound, hence this type.
///
/// # Invariants
///
/// The page was allocated for this, and contains only bytes.
pub struct Page(page::Page);

impl Page {
    /// Allocates a page, which is zeroed only if `flags` have `__GFP_ZERO`.
    pub fn alloc_page(flags: Flags) -> Result<Self, AllocError> {
        // INVARIANT: It is new.
        page::Page::alloc_page(flags).map(Self)
    }

    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut bindings::page {
        self.0.as_ptr()
    }
}

/// A range of bytes in one page, which may be read.
///
/// The contents may change at any time. Two reads of the same byte need not agree.
///
/// # Invariants
///
/// - `page` points to a page that is neither freed nor reused during `'a`.
/// - `offset + len <= PAGE_SIZE`.
#[derive(Clone, Copy)]
pub struct PageSlice<'a> {
    page: NonNull<bindings::page>,
    offset: usize,
    len: usize,
    _page: PhantomData<&'a Page>,
}

// SAFETY: Pages belong to no thread, and all access is by copies that may race.
unsafe impl Send for PageSlice<'_> {}

// SAFETY: As above.
unsafe impl Sync for PageSlice<'_> {}

impl<'a> PageSlice<'a> {
    /// Returns `len` bytes of `page` from `offset` on, or [`None`] if they exceed the page.
    #[inline]
    pub fn new(page: &'a Page, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > PAGE_SIZE {
            return None;
        }
        // INVARIANT: `page` lives during `'a`, and the range was checked.
        Some(Self {
            page: NonNull::new(page.as_ptr())?,
            offset,
            len,
            _page: PhantomData,
        })
    }

    /// Returns `len` bytes of `page` from `offset` on.
    ///
    /// # Safety
    ///
    /// The type invariants of [`PageSlice`] hold for the arguments.
    #[inline]
    pub(crate) unsafe fn from_raw(
        page: NonNull<bindings::page>,
        offset: usize,
        len: usize,
    ) -> Self {
        // INVARIANT: As the caller promises.
        Self {
            page,
            offset,
            len,
            _page: PhantomData,
        }
    }

    /// Returns the page, for the other modules of this crate.
    #[inline]
    pub(crate) fn page(&self) -> NonNull<bindings::page> {
        self.page
    }

    /// Returns the offset of the bytes in their page.
    #[inline]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Returns the number of bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns `true` if there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns `len` of these bytes, from `offset` on, or [`None`] if there are fewer.
    #[inline]
    pub fn get(&self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // INVARIANT: The new range lies within the old one.
        Some(Self {
            offset: self.offset.wrapping_add(offset),
            len,
            ..*self
        })
    }

    /// Copies the bytes up to the shorter length of both sides, and returns their number.
    pub fn read(&self, dst: &mut [u8]) -> usize {
        let len = self.len.min(dst.len());
        // SAFETY: By the type invariants the source is within a page that lives; `dst` has `len`
        // bytes.
        unsafe {
            bindings_ext::memcpy_from_page(
                dst.as_mut_ptr().cast(),
                self.page.as_ptr(),
                self.offset,
                len,
            )
        };
        len
    }
}

/// A range of bytes in one page, which may be read and written.
///
/// # Invariants
///
/// The owner may write to the page: it is not a page that the kernel keeps read-only or with fixed
/// content.
#[derive(Clone, Copy)]
pub struct PageSliceMut<'a>(PageSlice<'a>);

impl<'a> PageSliceMut<'a> {
    /// Returns `len` bytes of `page` from `offset` on, or [`None`] if they exceed the page.
    #[inline]
    pub fn new(page: &'a Page, offset: usize, len: usize) -> Option<Self> {
        // INVARIANT: By that of `Page`, the page contains only bytes.
        Some(Self(PageSlice::new(page, offset, len)?))
    }

    /// Makes `slice` writable.
    ///
    /// # Safety
    ///
    /// The type invariant of [`PageSliceMut`] holds for `slice`.
    #[inline]
    pub(crate) unsafe fn from_slice(slice: PageSlice<'a>) -> Self {
        // INVARIANT: As the caller promises.
        Self(slice)
    }

    /// Returns the offset of the bytes in their page.
    #[inline]
    pub fn offset(&self) -> usize {
        self.0.offset()
    }

    /// Returns the same bytes, only for reading.
    pub fn as_slice(&self) -> PageSlice<'a> {
        self.0
    }

    /// Returns the number of bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns `true` if there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns `len` of these bytes, from `offset` on, or [`None`] if there are fewer.
    #[inline]
    pub fn get(&self, offset: usize, len: usize) -> Option<Self> {
        // INVARIANT: The bytes are a part of writable ones.
        Some(Self(self.0.get(offset, len)?))
    }

    /// Copies the bytes up to the shorter length of both sides, and returns their number.
    pub fn write(&self, src: &[u8]) -> usize {
        let len = self.len().min(src.len());
        // SAFETY: By the type invariants the destination is within a page that lives and may be
        // written; `src` has `len` bytes.
        unsafe {
            bindings_ext::memcpy_to_page(
                self.0.page.as_ptr(),
                self.0.offset,
                src.as_ptr().cast(),
                len,
            )
        };
        len
    }

    /// Copies the bytes up to the shorter length of both sides, and returns their number.
    ///
    /// If the two overlap, the result is a mix of the old bytes.
    #[inline]
    pub fn copy_from(&self, src: PageSlice<'_>) -> usize {
        let len = self.len().min(src.len);
        if len == PAGE_SIZE {
            // `copy_highpage` copies a page in the fastest way of the processor.
            //
            // SAFETY: Ranges of this length are whole pages, which live by the type invariants; the
            // destination may be written.
            unsafe { bindings_ext::copy_highpage(self.0.page.as_ptr(), src.page.as_ptr()) };
            return len;
        }
        // SAFETY: By the type invariants both ranges are within pages that live, and the
        // destination may be written.
        unsafe {
            bindings_ext::memcpy_page(
                self.0.page.as_ptr(),
                self.0.offset,
                src.page.as_ptr(),
                src.offset,
                len,
            )
        };
        len
    }
}

/// An owner that keeps pages from being freed or reused while others have access to them.
///
/// A block request owns the pages of its data until it ends. Code that gives another domain access
/// to such pages takes the owner by value, and returns it when the other domain has unmapped them.
///
/// # Safety
///
/// - The pages of [`Self::slices`] stay allocated, and are not reused, until the owner is dropped
///   or passed by value to one of its own functions. Moving the owner changes nothing.
/// - Every call of [`Self::slices`] yields the same ranges in the same order.
/// - If [`Self::writable`] returns true, all ranges may be written.
pub unsafe trait PageOwner {
    /// Returns `true` if the bytes may be written.
    fn writable(&self) -> bool;

    /// Returns the bytes, in order.
    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_;
}

/// A [`PageOwner`] that has data of its user, apart from the pages.
///
/// # Safety
///
/// No use of the data that [`Self::data_mut`] returns affects the pages or their ownership.
pub unsafe trait DataOwner: PageOwner {
    /// The data of the user.
    type Data;

    /// Returns the data of the user.
    fn data_mut(&mut self) -> &mut Self::Data;
}

// SAFETY: A `Page` is freed when it is dropped, and not before; its bytes mean nothing to others.
unsafe impl PageOwner for Page {
    fn writable(&self) -> bool {
        true
    }

    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_ {
        PageSlice::new(self, 0, PAGE_SIZE).into_iter()
    }
}
