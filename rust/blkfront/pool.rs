// SPDX-License-Identifier: GPL-2.0-only

//! A pool of pages that stay granted to the backend and are reused (persistent grants).
//!
//! Bounced data and the segments of indirect requests are in such pages. A queue starts with the
//! pages for one request of any size, so that one request can always proceed, and allocates more
//! when they are needed. Pages that were idle for a while are freed, down to the initial number.
//!
//! `struct grant` and `rinfo->grants` of `xen-blkfront.c` have this role.

use kernel::{
    alloc::{
        flags::__GFP_NOWARN,
        Flags, //
    },
    prelude::*, //
};

use kernel_ext::{
    base::page::Page,
    xen::{
        grant::{
            GrantAccess,
            GrantReserve,
            GrantedPage, //
        },
        DomId, //
    },
};

use crate::shortage;

/// Granted pages that no request uses.
pub(crate) struct Pool {
    pages: KVVec<GrantedPage>,
    /// Number of pages that trimming leaves in the pool.
    min: usize,
    /// Lowest number of pages since the last scan for idle pages.
    low_watermark: usize,
}

/// Number of pages that are freed at once.
pub(crate) const TRIM_BATCH: usize = 64;

impl Pool {
    /// Creates a pool without pages and without space for any.
    pub(crate) const fn empty() -> Self {
        Self {
            pages: KVVec::new(),
            min: 0,
            low_watermark: 0,
        }
    }

    /// Creates a pool with space for `max` pages, and allocates `min` of them.
    ///
    /// Context: sleeps.
    pub(crate) fn new(domain: DomId, min: usize, max: usize) -> Result<Self> {
        let mut pages = KVVec::with_capacity(max.max(min), GFP_KERNEL)?;
        for _ in 0..min {
            // There is space for them.
            let _ = pages.push_within_capacity(new_page(domain, GFP_KERNEL)?);
        }
        Ok(Self {
            pages,
            min,
            low_watermark: min,
        })
    }

    /// Moves pages to `to` until it has `count` or the pool is empty.
    #[inline]
    pub(crate) fn fill(&mut self, to: &mut KVec<GrantedPage>, count: usize) {
        if to.len() >= count {
            return;
        }
        while to.len() < count {
            let Some(page) = self.pages.pop() else { break };
            if to.push_within_capacity(page).is_err() {
                break;
            }
        }
        self.low_watermark = self.low_watermark.min(self.pages.len());
    }

    /// Puts pages into the pool.
    ///
    /// Pages for which the pool has no room are freed.
    #[inline]
    pub(crate) fn put(&mut self, from: &mut KVec<GrantedPage>) {
        if from.is_empty() {
            return;
        }
        if shortage::is_active() {
            self.free_excess(from);
        }
        while let Some(page) = from.pop() {
            let _ = self.pages.push_within_capacity(page);
        }
    }

    /// Frees pages of `from` that would exceed the minimum, except those that the backend has
    /// mapped.
    #[cold]
    fn free_excess(&mut self, from: &mut KVec<GrantedPage>) {
        while self.pages.len() >= self.min {
            let Some(page) = from.pop() else { break };
            if let Err(page) = page.try_end() {
                let _ = self.pages.push_within_capacity(page);
            }
        }
    }

    /// Removes up to [`TRIM_BATCH`] pages.
    pub(crate) fn take_batch(&mut self) -> [Option<GrantedPage>; TRIM_BATCH] {
        core::array::from_fn(|_| self.pages.pop())
    }

    /// Removes up to [`TRIM_BATCH`] idle pages, those first that were unused for the longest time:
    /// the backend is least likely to have those mapped.
    pub(crate) fn take_idle(&mut self) -> [Option<GrantedPage>; TRIM_BATCH] {
        let count = self.low_watermark.saturating_sub(self.min).min(TRIM_BATCH);
        if count <= self.pages.len() {
            self.pages.rotate_left(count);
        }
        self.low_watermark = self.low_watermark.saturating_sub(count);
        core::array::from_fn(|index| {
            if index < count {
                self.pages.pop()
            } else {
                None
            }
        })
    }

    /// Puts back a page that the backend still has mapped.
    pub(crate) fn put_back(&mut self, page: GrantedPage) {
        let _ = self.pages.push_within_capacity(page);
    }

    /// Restarts the count of idle pages.
    ///
    /// Returns `true` if the pool is above its minimum.
    pub(crate) fn restart_watermark(&mut self) -> bool {
        self.low_watermark = self.pages.len();
        self.low_watermark > self.min
    }
}

/// Allocates pages and adds them to `to` until it has `count`.
///
/// Fails during a shortage of grants.
///
/// Context: any.
pub(crate) fn grow(domain: DomId, to: &mut KVec<GrantedPage>, count: usize) -> Result {
    while to.len() < count {
        if shortage::is_active() {
            return Err(ENOSPC);
        }
        let page = new_page(domain, GFP_ATOMIC | __GFP_NOWARN)?;
        to.push_within_capacity(page).map_err(|_| ENOSPC)?;
    }
    Ok(())
}

/// Allocates and grants a page.
///
/// It is zeroed, because the backend can read it.
fn new_page(domain: DomId, flags: Flags) -> Result<GrantedPage> {
    let mut reserve = GrantReserve::new(1)?;
    let page = Page::alloc_page(flags | __GFP_ZERO)?;
    GrantedPage::new(&mut reserve, domain, page, GrantAccess::ReadWrite)
}
