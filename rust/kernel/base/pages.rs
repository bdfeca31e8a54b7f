// SPDX-License-Identifier: GPL-2.0

//! Owners of pages, made of other owners.

use super::page::PageOwner;
use super::page::PageSlice;
use kernel::prelude::*;

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

/// One of two things.
pub enum Either<A, B> {
    /// The first.
    Left(A),
    /// The second.
    Right(B),
}

impl<A, B, T> Iterator for Either<A, B>
where
    A: Iterator<Item = T>,
    B: Iterator<Item = T>,
{
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match self {
            Either::Left(iter) => iter.next(),
            Either::Right(iter) => iter.next(),
        }
    }
}

// SAFETY: Whichever owner it is keeps the promise.
unsafe impl<A: PageOwner, B: PageOwner> PageOwner for Either<A, B> {
    fn writable(&self) -> bool {
        match self {
            Either::Left(owner) => owner.writable(),
            Either::Right(owner) => owner.writable(),
        }
    }

    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_ {
        match self {
            Either::Left(owner) => Either::Left(owner.slices()),
            Either::Right(owner) => Either::Right(owner.slices()),
        }
    }
}
