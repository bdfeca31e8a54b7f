// SPDX-License-Identifier: GPL-2.0-only

//! Pages of a frontend that stay mapped between requests.
//!
//! A frontend that uses persistent grants copies its data to and from pages that it has granted for
//! good, always the same ones, so it is enough to map them once. A [`PersistentGrants`] holds those that no
//! request uses now. A request takes its pages out and owns them; afterwards they go back. So a page
//! is never unmapped under a request, and nothing has to be counted. Its place is kept meanwhile.
//!
//! The number of pages is limited by the table's [`QuotaShare`]. At the limit, a page that comes back takes
//! the place of one that was unused for a while; if there is none, it does not stay. Otherwise, with a
//! set of pages slightly too large, each of them would be unmapped just before it is needed again.

use kernel::prelude::*;

use kernel_ext::{
    base::jiffies::{
        self,
        Jiffies, //
    },
    xen::grant::{
        map::MappedPage,
        ForeignRef, //
    },
};

use crate::domain::QuotaShare;

/// After so long without use a page gives way to another one.
const EVICT_AGE_MS: u32 = 1000;

/// Places that are looked at for a page that gives way. The next look goes on behind them.
const SCAN_LIMIT: usize = 32;

/// Lists of a table, at most.
const MAX_BUCKETS: usize = 1 << 16;

/// No place.
const NONE: u32 = u32::MAX;

/// Mapped pages, found by their grant references.
///
/// All links are indices of `entries`.
pub(crate) struct PersistentGrants {
    entries: KVec<Entry>,
    /// First place of each list; the low bits of a reference select the list. The number of lists is
    /// a power of two.
    buckets: KVec<u32>,
    /// First of the places that are in no list.
    free: u32,
    /// Number of places that are in a list.
    used: usize,
    /// Number of pages.
    len: usize,
    /// Where the next look for an unused page begins.
    clock_hand: usize,
    quota: QuotaShare,
}

/// Where a page is while no request uses it.
struct Entry {
    reference: ForeignRef,
    /// Next place of the same list, or next free one.
    next: u32,
    /// `None` while a request uses it.
    page: Option<MappedPage>,
    /// When it was put here.
    since: Jiffies,
}

impl PersistentGrants {
    /// For as many pages as `quota` has, which may be `usual` ones.
    pub(crate) fn new(quota: QuotaShare, usual: usize) -> Result<Self> {
        let buckets = usual.min(MAX_BUCKETS).next_power_of_two();
        Ok(Self {
            entries: KVec::new(),
            buckets: KVec::from_elem(NONE, buckets, GFP_KERNEL)?,
            free: NONE,
            used: 0,
            len: 0,
            clock_hand: 0,
            quota,
        })
    }

    /// Whether there is no page.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of pages.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes out the page of a reference. Either it comes back, or [`Self::remove_entry`] is called.
    #[inline]
    pub(crate) fn take(&mut self, reference: ForeignRef) -> Option<MappedPage> {
        let index = self.find(reference)?;
        let page = self.entry(index)?.page.take()?;
        self.len = self.len.wrapping_sub(1);
        Some(page)
    }

    /// Puts in a page that is not used any more. What has no place now is given back, to be
    /// unmapped: this page or another one.
    #[inline]
    pub(crate) fn insert(&mut self, page: MappedPage) -> Option<MappedPage> {
        match self.find(page.reference()) {
            Some(index) if self.quota.try_reserve(self.len.wrapping_add(1)) => {
                self.store_page(index, page)
            }
            found => self.insert_slow(found, page),
        }
    }

    /// As [`Self::insert`], if no place was found for the page, or there is no room for one more.
    fn insert_slow(&mut self, found: Option<u32>, page: MappedPage) -> Option<MappedPage> {
        let reference = page.reference();
        let Some(index) = found.or_else(|| self.add_entry(reference)) else {
            return Some(page);
        };
        if self.entry(index).is_none_or(|entry| entry.page.is_some()) {
            // It was mapped twice.
            return Some(page);
        }
        if self.quota.try_reserve(self.len.wrapping_add(1)) {
            return self.store_page(index, page);
        }
        let unused = self.scan_unused(SCAN_LIMIT, jiffies::msecs_to_jiffies(EVICT_AGE_MS));
        if unused.is_none() {
            self.remove_entry(reference);
            return Some(page);
        }
        let spare = self.store_page(index, page);
        unused.or(spare)
    }

    /// Puts a page to its place. It comes back if there is one already: it was mapped twice.
    #[inline]
    fn store_page(&mut self, index: u32, page: MappedPage) -> Option<MappedPage> {
        match self.entry(index) {
            Some(entry) if entry.page.is_none() => {
                entry.page = Some(page);
                entry.since = jiffies::now();
                self.len = self.len.wrapping_add(1);
                None
            }
            _ => Some(page),
        }
    }

    /// A page that was taken out does not come back.
    pub(crate) fn remove_entry(&mut self, reference: ForeignRef) {
        let mut before = NONE;
        let mut index = self.bucket_head(reference);
        while let Some(entry) = self.entry(index) {
            let next = entry.next;
            if entry.reference == reference {
                self.unlink(before, index);
                return;
            }
            before = index;
            index = next;
        }
    }

    /// Takes out a page, if there are more than the table should have now.
    pub(crate) fn take_excess(&mut self) -> Option<MappedPage> {
        if self.quota.over_quota(self.len) == 0 {
            return None;
        }
        self.take_unused(0)
    }

    /// Takes out a page that was unused for at least so long.
    pub(crate) fn take_unused(&mut self, time: Jiffies) -> Option<MappedPage> {
        self.scan_unused(self.entries.len(), time)
    }

    /// Gives back what is there for more pages than there are.
    pub(crate) fn trim(&mut self) {
        if self.used == 0 {
            self.entries = KVec::new();
            self.free = NONE;
        }
        self.quota.trim(self.len);
    }

    /// As [`Self::take_unused`], looking at so many places.
    fn scan_unused(&mut self, entries: usize, time: Jiffies) -> Option<MappedPage> {
        for _ in 0..entries {
            if self.clock_hand >= self.entries.len() {
                self.clock_hand = 0;
            }
            let entry = self.entries.get(self.clock_hand)?;
            self.clock_hand = self.clock_hand.wrapping_add(1);
            if entry.page.is_some() && jiffies::since(entry.since) >= time {
                let reference = entry.reference;
                let page = self.take(reference);
                self.remove_entry(reference);
                return page;
            }
        }
        None
    }

    /// The place of a reference.
    #[inline]
    fn find(&mut self, reference: ForeignRef) -> Option<u32> {
        let mut index = self.bucket_head(reference);
        loop {
            let entry = self.entry(index)?;
            if entry.reference == reference {
                return Some(index);
            }
            index = entry.next;
        }
    }

    /// Makes a place for a reference that has none, if there is memory.
    fn add_entry(&mut self, reference: ForeignRef) -> Option<u32> {
        if self.free == NONE {
            self.grow()?;
        }
        let (index, next) = (self.free, self.bucket_head(reference));
        let entry = self.entry(index)?;
        entry.reference = reference;
        let free = core::mem::replace(&mut entry.next, next);
        self.free = free;
        *self.bucket(reference)? = index;
        self.used = self.used.wrapping_add(1);
        Some(index)
    }

    /// Adds a free place, if there is memory.
    fn grow(&mut self) -> Option<()> {
        let index = u32::try_from(self.entries.len()).ok()?;
        let entry = Entry {
            reference: ForeignRef(0),
            next: self.free,
            page: None,
            since: 0,
        };
        self.entries.push(entry, GFP_NOWAIT).ok()?;
        self.free = index;
        Some(())
    }

    /// Takes a place without a page out of its list: the one after `before`.
    fn unlink(&mut self, before: u32, index: u32) {
        let free = self.free;
        let Some(entry) = self.entry(index) else {
            return;
        };
        let reference = entry.reference;
        let next = core::mem::replace(&mut entry.next, free);
        self.free = index;
        self.used = self.used.wrapping_sub(1);
        if let Some(entry) = self.entry(before) {
            entry.next = next;
        } else if let Some(bucket_head) = self.bucket(reference) {
            *bucket_head = next;
        }
    }

    #[inline]
    fn entry(&mut self, index: u32) -> Option<&mut Entry> {
        self.entries.get_mut(index as usize)
    }

    /// The first place of a reference's list.
    #[inline]
    fn bucket_head(&mut self, reference: ForeignRef) -> u32 {
        self.bucket(reference)
            .map_or(NONE, |bucket_head| *bucket_head)
    }

    /// The link to the first place of a reference's list.
    #[inline]
    fn bucket(&mut self, reference: ForeignRef) -> Option<&mut u32> {
        let mask = self.buckets.len().wrapping_sub(1);
        self.buckets.get_mut(reference.0 as usize & mask)
    }
}
