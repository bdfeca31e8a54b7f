// SPDX-License-Identifier: GPL-2.0-only

//! Persistent grants: pages of a frontend that stay mapped between requests
//! (`struct persistent_gnt`).
//!
//! A frontend that uses persistent grants copies its data to and from pages that stay granted. It
//! always uses the same ones, so it is enough to map them once. [`PersistentGrants`] has those that
//! no request uses. A request takes its pages out and owns them; they are put back when it has
//! completed. So a page is never unmapped while a request uses it, and no use count is needed. Its
//! entry stays in the table meanwhile.
//!
//! The number of pages is limited by a [`QuotaShare`]. At the limit, a page that is put back
//! replaces one that was unused for a while; if there is none, it is rejected. If a page that was
//! used recently could be replaced, then with a set of pages slightly larger than the limit each
//! page would be unmapped just before it is needed again.

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

/// Time without use after which a page may be replaced.
const REPLACE_AGE_MS: u32 = 1000;

/// Number of entries that are scanned for a page to replace.
///
/// The next scan starts behind them.
const SCAN_LIMIT: usize = 32;

/// Largest number of buckets.
const MAX_BUCKETS: usize = 1 << 16;

/// Index that marks the end of a chain of entries.
const NONE: u32 = u32::MAX;

/// A hash table of mapped pages by grant reference.
///
/// All links are indices into `entries`.
pub(crate) struct PersistentGrants {
    entries: KVec<Entry>,
    /// First entry of each bucket; the low bits of a reference select the bucket. The number of
    /// buckets is a power of two.
    buckets: KVec<u32>,
    /// First of the entries that are in no bucket.
    free: u32,
    /// Number of entries that are in a bucket.
    used: usize,
    /// Number of cached pages.
    len: usize,
    /// Start of the next scan for unused pages.
    next_scan: usize,
    quota: QuotaShare,
}

/// The entry of a page that is cached or used by a request.
struct Entry {
    reference: ForeignRef,
    /// Next entry of the same bucket, or next free entry.
    next: u32,
    /// `None` while a request uses the page.
    page: Option<MappedPage>,
    /// Time at which the page was put into the table.
    since: Jiffies,
}

impl PersistentGrants {
    /// Creates a table limited by `quota`, with buckets for `expected` pages.
    pub(crate) fn new(quota: QuotaShare, expected: usize) -> Result<Self> {
        let buckets = expected.min(MAX_BUCKETS).next_power_of_two();
        Ok(Self {
            entries: KVec::new(),
            buckets: KVec::from_elem(NONE, buckets, GFP_KERNEL)?,
            free: NONE,
            used: 0,
            len: 0,
            next_scan: 0,
            quota,
        })
    }

    /// Returns `true` if no page is cached.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the number of cached pages.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes out the page of a reference.
    ///
    /// The caller has to put it back, or to call [`Self::remove_entry`].
    #[inline]
    pub(crate) fn take(&mut self, reference: ForeignRef) -> Option<MappedPage> {
        let index = self.find(reference)?;
        let page = self.entry(index)?.page.take()?;
        self.len = self.len.wrapping_sub(1);
        Some(page)
    }

    /// Puts back a page that is no longer used.
    ///
    /// Returns the page to unmap, if there is one: this page or the one that it replaces.
    #[inline]
    pub(crate) fn insert(&mut self, page: MappedPage) -> Option<MappedPage> {
        match self.find(page.reference()) {
            Some(index) if self.quota.try_reserve(self.len.wrapping_add(1)) => {
                self.store_page(index, page)
            }
            found => self.insert_slow(found, page),
        }
    }

    /// Puts back a page that has no entry, or any page while the number of pages is at its limit.
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
        let unused = self.scan_unused(SCAN_LIMIT, jiffies::msecs_to_jiffies(REPLACE_AGE_MS));
        if unused.is_none() {
            self.remove_entry(reference);
            return Some(page);
        }
        let rejected = self.store_page(index, page);
        unused.or(rejected)
    }

    /// Stores a page in its entry.
    ///
    /// Returns it if the entry has a page: it was mapped twice.
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

    /// Removes the entry of a page that was taken out and is not put back.
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

    /// Takes out a page if there is a shortage and the queue has more than its guarantee.
    pub(crate) fn take_excess(&mut self) -> Option<MappedPage> {
        if self.quota.over_guarantee(self.len) == 0 {
            return None;
        }
        self.take_unused(0)
    }

    /// Takes out a page that was not used for `time`.
    pub(crate) fn take_unused(&mut self, time: Jiffies) -> Option<MappedPage> {
        self.scan_unused(self.entries.len(), time)
    }

    /// Frees the entries if no page is cached or used by a request, and returns quota that is not
    /// needed.
    pub(crate) fn trim(&mut self) {
        if self.used == 0 {
            self.entries = KVec::new();
            self.free = NONE;
        }
        self.quota.trim(self.len);
    }

    /// Takes out a page that was not used for `time`, out of the next `entries` entries.
    fn scan_unused(&mut self, entries: usize, time: Jiffies) -> Option<MappedPage> {
        for _ in 0..entries {
            if self.next_scan >= self.entries.len() {
                self.next_scan = 0;
            }
            let entry = self.entries.get(self.next_scan)?;
            self.next_scan = self.next_scan.wrapping_add(1);
            if entry.page.is_some() && jiffies::since(entry.since) >= time {
                let reference = entry.reference;
                let page = self.take(reference);
                self.remove_entry(reference);
                return page;
            }
        }
        None
    }

    /// Returns the entry of a reference.
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

    /// Adds an entry for a reference that has none, if there is memory.
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

    /// Allocates a free entry, if there is memory.
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

    /// Removes an entry without a page from its bucket, in which it comes after `before`.
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
        } else if let Some(head) = self.bucket(reference) {
            *head = next;
        }
    }

    #[inline]
    fn entry(&mut self, index: u32) -> Option<&mut Entry> {
        self.entries.get_mut(index as usize)
    }

    /// Returns the first entry of a reference's bucket.
    #[inline]
    fn bucket_head(&mut self, reference: ForeignRef) -> u32 {
        self.bucket(reference).map_or(NONE, |head| *head)
    }

    /// Returns the link to the first entry of a reference's bucket.
    #[inline]
    fn bucket(&mut self, reference: ForeignRef) -> Option<&mut u32> {
        let mask = self.buckets.len().wrapping_sub(1);
        self.buckets.get_mut(reference.0 as usize & mask)
    }
}
