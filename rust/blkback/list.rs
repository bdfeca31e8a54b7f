// SPDX-License-Identifier: GPL-2.0-only

//! Singly linked list of requests, whose links are in the requests: adding one needs no allocation.
//!
//! C header: [`include/linux/llist.h`](srctree/include/linux/llist.h), without its atomics.

use core::mem;

use kernel::prelude::*;

/// An element of a [`List`].
pub(crate) trait Linked: Sized {
    /// Returns the rest of the list behind this element.
    fn next(&self) -> &List<Self>;

    /// Returns the rest of the list behind this element, to change it.
    fn next_mut(&mut self) -> &mut List<Self>;
}

/// A list, used as a stack.
pub(crate) struct List<R: Linked>(Option<KBox<R>>);

impl<R: Linked> List<R> {
    /// Creates an empty list.
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    /// Returns `true` if the list is empty.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Adds an element at the front.
    #[inline]
    pub(crate) fn push(&mut self, mut element: KBox<R>) {
        element.next_mut().set_first(self.0.take());
        self.set_first(Some(element));
    }

    /// Removes the element at the front: the one that was added last.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<KBox<R>> {
        let mut element = self.0.take()?;
        self.set_first(element.next_mut().0.take());
        Some(element)
    }

    /// Sets the first element of an empty list. (The list behind an element that is in no list is
    /// empty.)
    ///
    /// An assignment would call the destructor of the old value, here several times for each
    /// request, because the compiler does not see that there is no old value.
    #[inline]
    fn set_first(&mut self, first: Option<KBox<R>>) {
        mem::forget(mem::replace(&mut self.0, first));
    }

    /// Returns the elements from the front to the back.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &R> {
        core::iter::successors(self.0.as_deref(), |element| element.next().0.as_deref())
    }

    /// Takes all elements, leaving an empty list.
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        Self(self.0.take())
    }
}

impl<R: Linked> Drop for List<R> {
    /// Frees one element after the other, without recursion: a list may be longer than the stack.
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}
