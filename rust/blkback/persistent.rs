// SPDX-License-Identifier: GPL-2.0-only

//! Pages of a frontend that stay mapped between requests.
//!
//! A frontend that uses persistent grants copies its data to and from pages that it has granted for
//! good, always the same ones, so it is enough to map them once. A [`Table`] holds those that no
//! request uses now. A request takes its pages out and owns them; afterwards they go back. So a page
//! is never unmapped under a request, and nothing has to be counted. Its place is kept meanwhile.
//!
//! The number of pages is limited by the table's [`Share`]. At the limit, a page that comes back takes
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

use crate::domain::Share;

/// After so long without use a page gives way to another one.
const GIVES_WAY_MS: u32 = 1000;

/// Places that are looked at for a page that gives way. The next look goes on behind them.
const LOOKS: usize = 32;

/// Lists of a table, at most.
const MAX_LISTS: usize = 1 << 16;

/// No place.
const NONE: u32 = u32::MAX;

/// Mapped pages, found by their grant references.
///
/// All links are indices of `places`.
pub(crate) struct Table {
    places: KVec<Place>,
    /// First place of each list; the low bits of a reference select the list. The number of lists is
    /// a power of two.
    lists: KVec<u32>,
    /// First of the places that are in no list.
    free: u32,
    /// Number of places that are in a list.
    used: usize,
    /// Number of pages.
    len: usize,
    /// Where the next look for an unused page begins.
    hand: usize,
    share: Share,
}

/// Where a page is while no request uses it.
struct Place {
    reference: ForeignRef,
    /// Next place of the same list, or next free one.
    next: u32,
    /// `None` while a request uses it.
    page: Option<MappedPage>,
    /// When it was put here.
    since: Jiffies,
}

impl Table {
    /// For as many pages as `share` has, which may be `usual` ones.
    pub(crate) fn new(share: Share, usual: usize) -> Result<Self> {
        let lists = usual.min(MAX_LISTS).next_power_of_two();
        Ok(Self {
            places: KVec::new(),
            lists: KVec::from_elem(NONE, lists, GFP_KERNEL)?,
            free: NONE,
            used: 0,
            len: 0,
            hand: 0,
            share,
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

    /// Takes out the page of a reference. Either it comes back, or [`Self::forget`] is called.
    #[inline]
    pub(crate) fn take(&mut self, reference: ForeignRef) -> Option<MappedPage> {
        let index = self.find(reference)?;
        let page = self.place(index)?.page.take()?;
        self.len = self.len.wrapping_sub(1);
        Some(page)
    }

    /// Puts in a page that is not used any more. What has no place now is given back, to be
    /// unmapped: this page or another one.
    #[inline]
    pub(crate) fn put(&mut self, page: MappedPage) -> Option<MappedPage> {
        match self.find(page.reference()) {
            Some(index) if self.share.covers(self.len.wrapping_add(1)) => self.fill(index, page),
            found => self.put_anew(found, page),
        }
    }

    /// As [`Self::put`], if no place was found for the page, or there is no room for one more.
    fn put_anew(&mut self, found: Option<u32>, page: MappedPage) -> Option<MappedPage> {
        let reference = page.reference();
        let Some(index) = found.or_else(|| self.add(reference)) else {
            return Some(page);
        };
        if self.place(index).is_none_or(|place| place.page.is_some()) {
            // It was mapped twice.
            return Some(page);
        }
        if self.share.covers(self.len.wrapping_add(1)) {
            return self.fill(index, page);
        }
        let unused = self.take_unused_of(LOOKS, jiffies::msecs_to_jiffies(GIVES_WAY_MS));
        if unused.is_none() {
            self.forget(reference);
            return Some(page);
        }
        let spare = self.fill(index, page);
        unused.or(spare)
    }

    /// Puts a page to its place. It comes back if there is one already: it was mapped twice.
    #[inline]
    fn fill(&mut self, index: u32, page: MappedPage) -> Option<MappedPage> {
        match self.place(index) {
            Some(place) if place.page.is_none() => {
                place.page = Some(page);
                place.since = jiffies::now();
                self.len = self.len.wrapping_add(1);
                None
            }
            _ => Some(page),
        }
    }

    /// A page that was taken out does not come back.
    pub(crate) fn forget(&mut self, reference: ForeignRef) {
        let mut before = NONE;
        let mut index = self.first(reference);
        while let Some(place) = self.place(index) {
            let next = place.next;
            if place.reference == reference {
                self.unlink(before, index);
                return;
            }
            before = index;
            index = next;
        }
    }

    /// Takes out a page, if there are more than the table should have now.
    pub(crate) fn take_excess(&mut self) -> Option<MappedPage> {
        if self.share.excess(self.len) == 0 {
            return None;
        }
        self.take_unused(0)
    }

    /// Takes out a page that was unused for at least so long.
    pub(crate) fn take_unused(&mut self, time: Jiffies) -> Option<MappedPage> {
        self.take_unused_of(self.places.len(), time)
    }

    /// Gives back what is there for more pages than there are.
    pub(crate) fn rest(&mut self) {
        if self.used == 0 {
            self.places = KVec::new();
            self.free = NONE;
        }
        self.share.keep(self.len);
    }

    /// As [`Self::take_unused`], looking at so many places.
    fn take_unused_of(&mut self, places: usize, time: Jiffies) -> Option<MappedPage> {
        for _ in 0..places {
            if self.hand >= self.places.len() {
                self.hand = 0;
            }
            let place = self.places.get(self.hand)?;
            self.hand = self.hand.wrapping_add(1);
            if place.page.is_some() && jiffies::since(place.since) >= time {
                let reference = place.reference;
                let page = self.take(reference);
                self.forget(reference);
                return page;
            }
        }
        None
    }

    /// The place of a reference.
    #[inline]
    fn find(&mut self, reference: ForeignRef) -> Option<u32> {
        let mut index = self.first(reference);
        loop {
            let place = self.place(index)?;
            if place.reference == reference {
                return Some(index);
            }
            index = place.next;
        }
    }

    /// Makes a place for a reference that has none, if there is memory.
    fn add(&mut self, reference: ForeignRef) -> Option<u32> {
        if self.free == NONE {
            self.grow()?;
        }
        let (index, next) = (self.free, self.first(reference));
        let place = self.place(index)?;
        place.reference = reference;
        let free = core::mem::replace(&mut place.next, next);
        self.free = free;
        *self.list(reference)? = index;
        self.used = self.used.wrapping_add(1);
        Some(index)
    }

    /// Adds a free place, if there is memory.
    fn grow(&mut self) -> Option<()> {
        let index = u32::try_from(self.places.len()).ok()?;
        let place = Place {
            reference: ForeignRef(0),
            next: self.free,
            page: None,
            since: 0,
        };
        self.places.push(place, GFP_NOWAIT).ok()?;
        self.free = index;
        Some(())
    }

    /// Takes a place without a page out of its list: the one after `before`.
    fn unlink(&mut self, before: u32, index: u32) {
        let free = self.free;
        let Some(place) = self.place(index) else {
            return;
        };
        let reference = place.reference;
        let next = core::mem::replace(&mut place.next, free);
        self.free = index;
        self.used = self.used.wrapping_sub(1);
        if let Some(place) = self.place(before) {
            place.next = next;
        } else if let Some(first) = self.list(reference) {
            *first = next;
        }
    }

    #[inline]
    fn place(&mut self, index: u32) -> Option<&mut Place> {
        self.places.get_mut(index as usize)
    }

    /// The first place of a reference's list.
    #[inline]
    fn first(&mut self, reference: ForeignRef) -> u32 {
        self.list(reference).map_or(NONE, |first| *first)
    }

    /// The link to the first place of a reference's list.
    #[inline]
    fn list(&mut self, reference: ForeignRef) -> Option<&mut u32> {
        let mask = self.lists.len().wrapping_sub(1);
        self.lists.get_mut(reference.0 as usize & mask)
    }
}
