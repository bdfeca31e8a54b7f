// SPDX-License-Identifier: GPL-2.0-only

//! Pages that stay granted to the backend, and are used again and again.
//!
//! Data that is bounced, and the segments of indirect requests, stand in such pages. A queue starts
//! with as many as one request of any size needs, so that one can always proceed, and gets more as
//! they are needed. Those that nobody has needed for a while are *spare*, and are given back, but
//! for those of the start.

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
    /// As many as there always are.
    min: usize,
    /// How few there were since the last look for spare pages.
    low_watermark: usize,
}

/// Pages that are taken out at once to be given back.
pub(crate) const TRIM_BATCH: usize = 64;

impl Pool {
    /// No pages, and no room for any.
    pub(crate) const fn empty() -> Self {
        Self {
            pages: KVVec::new(),
            min: 0,
            low_watermark: 0,
        }
    }

    /// A pool with room for `max` pages, of which `min` are there from the start. Sleeps.
    pub(crate) fn new(domain: DomId, min: usize, max: usize) -> Result<Self> {
        let mut pages = KVVec::with_capacity(max.max(min), GFP_KERNEL)?;
        for _ in 0..min {
            // There is room for them.
            let _ = pages.push_within_capacity(new_page(domain, GFP_KERNEL)?);
        }
        Ok(Self {
            pages,
            min,
            low_watermark: min,
        })
    }

    /// Moves pages to `to` until that has `count`, as far as there are any.
    pub(crate) fn fill(&mut self, to: &mut KVec<GrantedPage>, count: usize) {
        while to.len() < count {
            let Some(page) = self.pages.pop() else { break };
            if to.push_within_capacity(page).is_err() {
                break;
            }
        }
        self.low_watermark = self.low_watermark.min(self.pages.len());
    }

    /// Takes pages back. Those for which there is no room are freed.
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

    /// Frees pages that another device needs more, but for those of the start and those that the
    /// backend uses.
    #[cold]
    fn free_excess(&mut self, from: &mut KVec<GrantedPage>) {
        while self.pages.len() >= self.min {
            let Some(page) = from.pop() else { break };
            if let Err(page) = page.try_end() {
                let _ = self.pages.push_within_capacity(page);
            }
        }
    }

    /// Takes out some pages.
    pub(crate) fn take_batch(&mut self) -> [Option<GrantedPage>; TRIM_BATCH] {
        core::array::from_fn(|_| self.pages.pop())
    }

    /// Takes out some spare pages: those that nobody has used for the longest time, which the
    /// backend has least reason to keep mapped.
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

    /// Takes back a spare page that the backend has mapped.
    pub(crate) fn put_back(&mut self, page: GrantedPage) {
        let _ = self.pages.push_within_capacity(page);
    }

    /// Begins to count anew how many pages are spare. Whether there are more pages than at the start.
    pub(crate) fn restart_watermark(&mut self) -> bool {
        self.low_watermark = self.pages.len();
        self.low_watermark > self.min
    }
}

/// Adds new pages to `to` until that has `count`, unless a device cannot connect for want of grants.
/// Does not sleep.
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

/// The backend can see what is in the page: it starts with zeroes.
fn new_page(domain: DomId, flags: Flags) -> Result<GrantedPage> {
    let mut reserve = GrantReserve::new(1)?;
    let page = Page::alloc_page(flags | __GFP_ZERO)?;
    GrantedPage::new(&mut reserve, domain, page, GrantAccess::ReadWrite)
}
