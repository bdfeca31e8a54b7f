// SPDX-License-Identifier: GPL-2.0-only

//! Lists of requests.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use core::{
    marker::PhantomData,
    mem,
    ptr::{
        self,
        NonNull, //
    }, //
};

use kernel::bindings;

use super::{
    HwQueue,
    Operations,
    Queued,
    Request,
    State, //
};

/// A list of owned requests, which needs no memory because each request has a link.
///
/// Dropping the list drops the requests, which ends them with an error.
///
/// # Invariants
///
/// `list` is a list of requests for each of which the invariants of [`Request`] hold; it owns them.
pub struct RequestList<T: Operations, S: State> {
    list: bindings::rq_list,
    _requests: PhantomData<Request<T, S>>,
}

impl<T: Operations, S: State> RequestList<T, S> {
    /// Creates an empty list.
    #[inline]
    pub const fn new() -> Self {
        // INVARIANT: The empty list.
        Self {
            list: bindings::rq_list {
                head: ptr::null_mut(),
                tail: ptr::null_mut(),
            },
            _requests: PhantomData,
        }
    }

    /// Takes all requests of a list, which is empty afterwards.
    ///
    /// # Safety
    ///
    /// `list` is a list of requests, for which the invariants of [`Request`] hold; the caller gives
    /// up their ownership.
    pub(super) unsafe fn take_raw(list: &mut bindings::rq_list) -> Self {
        let mut taken = Self::new();
        // INVARIANT: As the caller promises.
        mem::swap(&mut taken.list, list);
        taken
    }

    /// Gives up the ownership of all requests without ending them.
    pub(super) fn into_raw(mut self) -> bindings::rq_list {
        mem::replace(&mut self.list, Self::new().list)
    }

    /// Returns `true` if the list is empty.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.list.head.is_null()
    }

    /// Adds a request at the end.
    #[inline]
    pub fn push(&mut self, rq: Request<T, S>) {
        let rq = rq.into_raw().as_ptr();
        // SAFETY: The request was owned, so its link has no other user; so is the last one of the
        // list by the type invariant.
        //
        // INVARIANT: The list owns it now.
        unsafe {
            (*rq).__bindgen_anon_1.rq_next = ptr::null_mut();
            match NonNull::new(self.list.tail) {
                Some(last) => (*last.as_ptr()).__bindgen_anon_1.rq_next = rq,
                None => self.list.head = rq,
            }
        }
        self.list.tail = rq;
    }

    /// Removes and returns the first request.
    #[inline]
    pub fn pop(&mut self) -> Option<Request<T, S>> {
        let rq = NonNull::new(self.list.head)?;
        // SAFETY: By the type invariant the request is valid and its link is that of the list.
        self.list.head = unsafe { (*rq.as_ptr()).__bindgen_anon_1.rq_next };
        if self.list.head.is_null() {
            self.list.tail = ptr::null_mut();
        }
        // SAFETY: The list has owned it, and does not any more.
        Some(unsafe { Request::from_raw(rq) })
    }

    /// Moves all requests of another list to the end of this one.
    #[inline]
    pub fn append(&mut self, other: Self) {
        let other = other.into_raw();
        if other.head.is_null() {
            return;
        }
        match NonNull::new(self.list.tail) {
            // SAFETY: The last request is owned, by the type invariant.
            Some(last) => unsafe { (*last.as_ptr()).__bindgen_anon_1.rq_next = other.head },
            None => self.list.head = other.head,
        }
        // INVARIANT: The requests move with the links between them.
        self.list.tail = other.tail;
    }
}

impl<'q, T: Operations> RequestList<T, Queued<'q>> {
    /// Removes and returns the first requests that are for the same hardware queue, with that
    /// queue.
    ///
    /// # Safety
    ///
    /// blk-mq offers the requests in a call that lasts during `'q`.
    pub(super) unsafe fn take_run(&mut self) -> Option<(HwQueue<'q, T>, Self)> {
        let first = NonNull::new(self.list.head)?;
        let mut last = first;
        // SAFETY: All requests of the list are valid and ours by the type invariant, and their
        // links are those of the list. The hardware queue of a request does not change, and stays
        // as long as blk-mq offers the request.
        unsafe {
            let hctx = (*first.as_ptr()).mq_hctx;
            while let Some(next) = NonNull::new((*last.as_ptr()).__bindgen_anon_1.rq_next) {
                if (*next.as_ptr()).mq_hctx != hctx {
                    break;
                }
                last = next;
            }
            let rest = (*last.as_ptr()).__bindgen_anon_1.rq_next;
            (*last.as_ptr()).__bindgen_anon_1.rq_next = ptr::null_mut();
            let mut run = Self::new();
            // INVARIANT: Two lists, each with its own requests.
            run.list = bindings::rq_list {
                head: first.as_ptr(),
                tail: last.as_ptr(),
            };
            self.list.head = rest;
            if rest.is_null() {
                self.list.tail = ptr::null_mut();
            }
            Some((HwQueue::from_raw(NonNull::new(hctx)?), run))
        }
    }
}

impl<T: Operations, S: State> Default for RequestList<T, S> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Operations, S: State> Drop for RequestList<T, S> {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}
