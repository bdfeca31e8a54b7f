// SPDX-License-Identifier: GPL-2.0

//! Pages of a frontend that stay mapped between requests.
//!
//! A frontend that uses persistent grants copies its data to and from pages that it has granted for
//! good, always the same ones, so it is enough to map them once. A [`Table`] holds those that no
//! request uses now. A request takes its pages out and owns them; afterwards they go back. So a page
//! is never unmapped under a request, and nothing has to be counted.
//!
//! The number of pages is limited by the table's [`Share`]. At the limit, a page that comes back takes
//! the place of the one that was unused for longest, but only if that was for a while: otherwise,
//! with a set of pages slightly too large, each of them would be unmapped just before it is needed
//! again.

use crate::domain::Share;
use kernel::prelude::*;
use kernel_ext::base::jiffies;
use kernel_ext::base::jiffies::Jiffies;
use kernel_ext::xen::grant::map::MappedPage;
use kernel_ext::xen::grant::ForeignRef;

/// After so long without use a page gives way to another one.
const GIVES_WAY_MS: u32 = 1000;

/// Lists of a table, at most.
const MAX_LISTS: usize = 1 << 16;

/// No place.
const NONE: u32 = u32::MAX;

/// Mapped pages, found by their grant references and ordered by age.
///
/// All links are indices of `places`.
pub(crate) struct Table {
    places: KVec<Place>,
    /// First place of each list; the low bits of a reference select the list. The number of lists is
    /// a power of two.
    lists: KVec<u32>,
    /// First of the places without a page.
    free: u32,
    oldest: u32,
    youngest: u32,
    /// Number of pages.
    len: usize,
    share: Share,
}

/// Where a page may be.
struct Place {
    page: Option<MappedPage>,
    /// When it was put here.
    since: Jiffies,
    /// Next place of the same list, or next free one.
    next: u32,
    older: u32,
    younger: u32,
}

impl Table {
    /// For as many pages as `share` has, which may be `usual` ones.
    pub(crate) fn new(share: Share, usual: usize) -> Result<Self> {
        let lists = usual.min(MAX_LISTS).next_power_of_two();
        Ok(Self {
            places: KVec::new(),
            lists: KVec::from_elem(NONE, lists, GFP_KERNEL)?,
            free: NONE,
            oldest: NONE,
            youngest: NONE,
            len: 0,
            share,
        })
    }

    /// Whether there is no page.
    pub(crate) fn is_empty(&self) -> bool {
        self.oldest == NONE
    }

    /// Number of pages.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes out the page of a reference.
    pub(crate) fn take(&mut self, reference: ForeignRef) -> Option<MappedPage> {
        let mut before = NONE;
        let mut index = *self.list(reference)?;
        loop {
            let place = self.place(index)?;
            let next = place.next;
            if place
                .page
                .as_ref()
                .is_some_and(|page| page.reference() == reference)
            {
                self.unlink(reference, before, next)?;
                return self.vacate(index);
            }
            before = index;
            index = next;
        }
    }

    /// Puts in a page that is not used any more. What has no place now is given back, to be
    /// unmapped: this page or another one.
    pub(crate) fn put(&mut self, page: MappedPage) -> Option<MappedPage> {
        if self.holds(page.reference()) {
            return Some(page);
        }
        let evicted = if self.share.covers(self.len.wrapping_add(1)) {
            None
        } else {
            match self.take_unused(jiffies::msecs_to_jiffies(GIVES_WAY_MS)) {
                Some(oldest) => Some(oldest),
                None => return Some(page),
            }
        };
        if self.free == NONE && !self.grow() {
            return Some(page);
        }
        match self.fill(page) {
            Ok(()) => evicted,
            // There is a free place, see above.
            Err(page) => Some(page),
        }
    }

    /// Takes out the page that was unused for longest, if there are more than the table should have
    /// now.
    pub(crate) fn take_excess(&mut self) -> Option<MappedPage> {
        if self.share.excess(self.len) == 0 {
            return None;
        }
        self.take_unused(0)
    }

    /// Gives back what is there for more pages than there are.
    pub(crate) fn rest(&mut self) {
        if self.is_empty() {
            self.places = KVec::new();
            self.free = NONE;
        }
        self.share.keep(self.len);
    }

    /// Takes out the page that was unused for longest, if that was for at least so long.
    pub(crate) fn take_unused(&mut self, time: Jiffies) -> Option<MappedPage> {
        let place = self.place(self.oldest)?;
        let unused = jiffies::since(place.since) >= time;
        let reference = place.page.as_ref()?.reference();
        unused.then(|| self.take(reference))?
    }

    fn holds(&mut self, reference: ForeignRef) -> bool {
        let mut index = self.list(reference).map_or(NONE, |first| *first);
        while let Some(place) = self.place(index) {
            if place
                .page
                .as_ref()
                .is_some_and(|page| page.reference() == reference)
            {
                return true;
            }
            index = place.next;
        }
        false
    }

    /// Adds a free place, if there is memory.
    fn grow(&mut self) -> bool {
        let index = u32::try_from(self.places.len()).unwrap_or(NONE);
        if index == NONE {
            return false;
        }
        let place = Place {
            page: None,
            since: 0,
            next: self.free,
            older: NONE,
            younger: NONE,
        };
        let grown = self.places.push(place, GFP_NOWAIT).is_ok();
        if grown {
            self.free = index;
        }
        grown
    }

    /// Puts a page to a free place.
    fn fill(&mut self, page: MappedPage) -> Result<(), MappedPage> {
        let reference = page.reference();
        let (index, youngest) = (self.free, self.youngest);
        let Some(first) = self.list(reference).copied() else {
            return Err(page);
        };
        let Some(place) = self.place(index) else {
            return Err(page);
        };
        let free = core::mem::replace(&mut place.next, first);
        place.page = Some(page);
        place.since = jiffies::now();
        place.older = youngest;
        place.younger = NONE;
        self.free = free;
        self.youngest = index;
        self.len = self.len.wrapping_add(1);
        match self.place(youngest) {
            Some(place) => place.younger = index,
            None => self.oldest = index,
        }
        if let Some(first) = self.list(reference) {
            *first = index;
        }
        Ok(())
    }

    /// Takes a place out of the list of a reference: the one after `before`.
    fn unlink(&mut self, reference: ForeignRef, before: u32, next: u32) -> Option<()> {
        match self.place(before) {
            Some(place) => place.next = next,
            None => *self.list(reference)? = next,
        }
        Some(())
    }

    /// Makes a place free that is in no list any more.
    fn vacate(&mut self, index: u32) -> Option<MappedPage> {
        let free = self.free;
        let place = self.place(index)?;
        let page = place.page.take();
        let (older, younger) = (place.older, place.younger);
        place.next = free;
        self.free = index;
        if page.is_some() {
            self.len = self.len.wrapping_sub(1);
        }
        match self.place(older) {
            Some(place) => place.younger = younger,
            None => self.oldest = younger,
        }
        match self.place(younger) {
            Some(place) => place.older = older,
            None => self.youngest = older,
        }
        page
    }

    #[inline]
    fn place(&mut self, index: u32) -> Option<&mut Place> {
        self.places.get_mut(index as usize)
    }

    /// The link to the first place of a reference's list.
    #[inline]
    fn list(&mut self, reference: ForeignRef) -> Option<&mut u32> {
        let mask = self.lists.len().wrapping_sub(1);
        self.lists.get_mut(reference.0 as usize & mask)
    }
}
