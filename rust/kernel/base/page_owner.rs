// SPDX-License-Identifier: GPL-2.0-only

//! Owners of pages that consist of other owners.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use super::page::{
    PageOwner,
    PageSlice, //
};

/// No page: for operations without data.
// SAFETY: There is nothing to keep.
unsafe impl PageOwner for () {
    fn writable(&self) -> bool {
        true
    }

    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_ {
        core::iter::empty()
    }
}

/// The pages of several owners, in order.
// SAFETY: The owners keep the promise, and stay owned by the vector.
unsafe impl<T: PageOwner> PageOwner for KVec<T> {
    fn writable(&self) -> bool {
        self.iter().all(|owner| owner.writable())
    }

    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_ {
        self.iter().flat_map(|owner| owner.slices())
    }
}

/// Shared pages, which stay until the last reference is dropped.
// SAFETY: The owner inside keeps the promise, and is not dropped while there is a reference. It
// cannot be moved out meanwhile.
unsafe impl<T: PageOwner> PageOwner for Arc<T> {
    fn writable(&self) -> bool {
        (**self).writable()
    }

    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_ {
        (**self).slices()
    }
}

/// The pages of two owners, in order.
// SAFETY: Both keep the promise, and stay owned by the pair.
unsafe impl<A: PageOwner, B: PageOwner> PageOwner for (A, B) {
    fn writable(&self) -> bool {
        self.0.writable() && self.1.writable()
    }

    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_ {
        Iterator::chain(self.0.slices(), self.1.slices())
    }
}
