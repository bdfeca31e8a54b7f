// SPDX-License-Identifier: GPL-2.0-only

//! Owned requests, with their state in the type.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use core::{
    marker::PhantomData,
    mem,
    ptr::NonNull, //
};

use kernel::{
    bindings,
    sync::Arc, //
};

use crate::base::page::{
    DataOwner,
    PageOwner,
    PageSlice,
    PageSliceMut, //
};

use super::{
    operations,
    BlkStatus,
    Operations, //
};

/// `BLK_STS_RESOURCE`: blk-mq queues the request again soon.
const RESOURCE: bindings::blk_status_t = 9;

mod private {
    pub trait Sealed {}
}

/// The state of a request. Sealed: [`Queued`], [`InFlight`] or [`Completed`].
pub trait State: private::Sealed {}

/// The state of a request that blk-mq offers to the driver, during a call of
/// [`Operations::queue_rq`].
///
/// `'q` is that call. It is invariant, so a request of one call can be neither kept nor returned by
/// another call.
pub struct Queued<'q>(PhantomData<fn(&'q ()) -> &'q ()>);

/// The state of a request that the driver has started; its timeout is running.
pub struct InFlight(());

/// The state of a request that the device has completed, in [`Operations::complete`], which ends
/// it.
pub struct Completed(());

impl private::Sealed for Queued<'_> {}
impl private::Sealed for InFlight {}
impl private::Sealed for Completed {}
impl State for Queued<'_> {}
impl State for InFlight {}
impl State for Completed {}

/// The operation of a request (`REQ_OP_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Reads sectors.
    Read,
    /// Writes sectors.
    Write,
    /// Makes all data of completed writes durable.
    Flush,
    /// Discards sectors: their contents are no longer needed.
    Discard,
    /// Erases sectors: their contents must not be readable afterwards.
    SecureErase,
    /// Writes zeroes to sectors.
    WriteZeroes,
    /// Any other operation, as a number of `enum req_op`. End it with [`BlkStatus::NOTSUPP`].
    Other(u8),
}

/// The identity of a request of a tag set.
///
/// After this request has ended, the same id can identify another request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestId {
    /// The hardware queue.
    pub hw_queue: u32,
    /// The tag in that hardware queue.
    pub tag: u32,
}

impl RequestId {
    /// Reads the id of a request that another CPU may be ending.
    ///
    /// # Safety
    ///
    /// The caller holds a reference to the request (`rq->ref`), as blk-mq does when it calls back
    /// for a timeout or in an iteration.
    pub(super) unsafe fn of_shared(rq: *mut bindings::request) -> Self {
        // SAFETY: The request is valid and `mq_hctx` set until its last reference is dropped. `tag`
        // may be written by a requeue at the same time, hence the volatile read of one word.
        unsafe {
            Self {
                hw_queue: (*(*rq).mq_hctx).queue_num,
                tag: (&raw const (*rq).tag).read_volatile() as u32,
            }
        }
    }
}

/// An owned request, in state `S`.
///
/// See the [module](super) for the states. Dropping it ends it with [`BlkStatus::IOERR`].
///
/// # Invariants
///
/// - The pointer is to a request of a disk of `T`. It is followed by a `T::RequestData`,
///   initialised by `Operations` of `T`.
/// - The driver owns the request, from `queue_rq` until the request has ended. Only the holder of
///   this value ends it, requeues it, or uses its driver data.
/// - In state `InFlight` and `Completed`, it was started; in state `Queued` it was not.
pub struct Request<T: Operations, S: State> {
    rq: NonNull<bindings::request>,
    _operations: PhantomData<T>,
    _state: PhantomData<S>,
}

// SAFETY: A request is bound to no thread, and may be ended in any context. The driver's data moves
// with it.
unsafe impl<T: Operations, S: State> Send for Request<T, S> where T::RequestData: Send {}

// SAFETY: Shared access only reads fields that do not change while the driver owns the request, and
// the driver's data.
unsafe impl<T: Operations, S: State> Sync for Request<T, S> where T::RequestData: Sync {}

impl<T: Operations, S: State> Request<T, S> {
    /// Takes ownership of a request.
    ///
    /// # Safety
    ///
    /// The type invariants hold for `rq`, and the caller gives up the ownership.
    pub(super) unsafe fn from_raw(rq: NonNull<bindings::request>) -> Self {
        // INVARIANT: As the caller promises.
        Self {
            rq,
            _operations: PhantomData,
            _state: PhantomData,
        }
    }

    /// Gives up the ownership without ending the request.
    pub(super) fn into_raw(self) -> NonNull<bindings::request> {
        let rq = self.rq;
        mem::forget(self);
        rq
    }

    fn as_raw(&self) -> *mut bindings::request {
        self.rq.as_ptr()
    }

    fn cmd_flags(&self) -> u32 {
        // SAFETY: By the type invariants the request is valid, and the field does not change.
        unsafe { (*self.as_raw()).cmd_flags }
    }

    /// Returns the operation.
    #[inline]
    pub fn op(&self) -> Op {
        let op = self.cmd_flags() & ((1 << bindings::REQ_OP_BITS) - 1);
        match op {
            bindings::req_op_REQ_OP_READ => Op::Read,
            bindings::req_op_REQ_OP_WRITE => Op::Write,
            bindings::req_op_REQ_OP_FLUSH => Op::Flush,
            bindings::req_op_REQ_OP_DISCARD => Op::Discard,
            bindings::req_op_REQ_OP_SECURE_ERASE => Op::SecureErase,
            bindings::req_op_REQ_OP_WRITE_ZEROES => Op::WriteZeroes,
            op => Op::Other(op as u8),
        }
    }

    /// Returns the first sector, in units of 512 bytes.
    ///
    /// A flush has none: all bits are set then.
    #[inline]
    pub fn sector(&self) -> u64 {
        // SAFETY: By the type invariants the request is valid, and the field does not change.
        unsafe { (*self.as_raw()).__sector }
    }

    /// Returns the length in bytes, for an operation without data that of the range.
    ///
    /// A flush has length 0.
    #[inline]
    pub fn bytes(&self) -> u32 {
        // SAFETY: By the type invariants the request is valid, and the field does not change.
        unsafe { (*self.as_raw()).__data_len }
    }

    /// Returns the number of segments under the queue's limits, 0 for requests without data.
    #[inline]
    pub fn nr_segments(&self) -> u16 {
        if self.has_data() {
            // SAFETY: By the type invariants the request is valid, and the field does not change.
            unsafe { (*self.as_raw()).nr_phys_segments }
        } else {
            0
        }
    }

    /// Returns the hardware queue and the tag.
    #[inline]
    pub fn id(&self) -> RequestId {
        // SAFETY: By the type invariants the request is valid; both fields do not change while the
        // driver owns it.
        unsafe {
            RequestId {
                hw_queue: (*(*self.as_raw()).mq_hctx).queue_num,
                tag: (*self.as_raw()).tag as u32,
            }
        }
    }

    /// Returns the driver's data of the disk.
    ///
    /// The reference is independent of the request: the disk may be freed as soon as the request
    /// has ended.
    pub fn queue_data(&self) -> Arc<T::QueueData> {
        // SAFETY: By the type invariants the request is valid, and its disk is not removed before
        // it ends.
        unsafe { operations::queue_data::<T>((*self.as_raw()).q) }.into()
    }

    fn has_data(&self) -> bool {
        matches!(self.op(), Op::Read | Op::Write)
    }

    /// Returns the memory of a read or a write, as segments within one page each.
    ///
    /// Empty for all other operations.
    #[inline]
    pub fn segments(&self) -> Segments<'_> {
        let bio = if self.has_data() {
            // SAFETY: By the type invariants the request is valid, and the field does not change.
            unsafe { (*self.as_raw()).bio }
        } else {
            core::ptr::null_mut()
        };
        // SAFETY: By the type invariants only the holder ends the request. It keeps its bios, and
        // these their pages, until it ends. Ending takes it by value, which the borrow excludes.
        unsafe { Segments::new(bio) }
    }

    /// Returns the memory to which a read copies its data.
    ///
    /// Empty for all other operations.
    ///
    /// The segments are those of [`Self::segments`].
    #[inline]
    pub fn segments_mut(&mut self) -> impl Iterator<Item = PageSliceMut<'_>> + '_ {
        let segments = match self.op() {
            Op::Read => self.segments(),
            // SAFETY: A null bio is valid.
            _ => unsafe { Segments::new(core::ptr::null_mut()) },
        };
        // SAFETY: The pages of a read may be written.
        segments.map(|slice| unsafe { PageSliceMut::from_slice(slice) })
    }

    fn data_ptr(&self) -> *mut T::RequestData {
        // SAFETY: By the type invariants the driver's data is behind the request.
        unsafe { self.as_raw().add(1).cast() }
    }

    /// Returns the driver's data of this request.
    ///
    /// It is unchanged since the previous request with the same tag.
    #[inline]
    pub fn data(&self) -> &T::RequestData {
        // SAFETY: By the type invariants it is initialised, and only the holder uses it.
        unsafe { &*self.data_ptr() }
    }

    /// Returns the driver's data as [`Self::data`], mutably.
    #[inline]
    pub fn data_mut(&mut self) -> &mut T::RequestData {
        // SAFETY: By the type invariants it is initialised, and only the holder uses it.
        unsafe { &mut *self.data_ptr() }
    }

    /// Returns the memory like [`Self::segments`], and the driver's data of the request, mutably.
    #[inline]
    pub fn segments_and_data(&mut self) -> (Segments<'_>, &mut T::RequestData) {
        let data = self.data_ptr();
        // SAFETY: As in `data_mut`. `segments` reads the request and its bios, not the data of the
        // driver, which is behind the request.
        (self.segments(), unsafe { &mut *data })
    }

    /// Returns the memory like [`Self::segments_mut`], and the driver's data of the request.
    #[inline]
    pub fn segments_mut_and_data(
        &mut self,
    ) -> (
        impl Iterator<Item = PageSliceMut<'_>> + '_,
        &mut T::RequestData,
    ) {
        let data = self.data_ptr();
        // SAFETY: As in `segments_and_data`.
        (self.segments_mut(), unsafe { &mut *data })
    }

    /// Ends the whole request with this status.
    ///
    /// Context: any.
    #[inline]
    pub fn end(self, status: BlkStatus) {
        let rq = self.into_raw();
        // SAFETY: By the type invariants the driver owned the request, and no other code ends it.
        unsafe { bindings::blk_mq_end_request(rq.as_ptr(), status.as_raw()) };
    }
}

impl<T: Operations, S: State> Drop for Request<T, S> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the driver owned the request, and no other code ends it.
        unsafe { bindings::blk_mq_end_request(self.as_raw(), BlkStatus::IOERR.as_raw()) };
    }
}

impl<'q, T: Operations> Request<T, Queued<'q>> {
    /// Starts the request, and its timeout.
    ///
    /// Allocate all resources before: a request that is in flight can only be ended or requeued.
    #[inline]
    pub fn start(self) -> Request<T, InFlight> {
        let rq = self.into_raw();
        // SAFETY: By the type invariants the driver owns the request; a queued one was not started.
        unsafe { bindings::blk_mq_start_request(rq.as_ptr()) };
        // SAFETY: The ownership moves; the request was started above.
        unsafe { Request::from_raw(rq) }
    }

    /// Rejects the request: blk-mq queues it again after a short time.
    pub fn reject(self) -> Rejected<'q, T> {
        Rejected(self)
    }
}

/// A request that [`Operations::queue_rq`] has rejected.
pub struct Rejected<'q, T: Operations>(Request<T, Queued<'q>>);

impl<T: Operations> Rejected<'_, T> {
    /// Returns the request to blk-mq, and the status by which blk-mq queues it again.
    pub(super) fn into_status(self) -> bindings::blk_status_t {
        let _ = self.0.into_raw();
        RESOURCE
    }
}

impl<T: Operations> Request<T, InFlight> {
    /// Completes the request by [`Operations::complete`], possibly on the CPU that submitted it
    /// (`blk_mq_complete_request()`).
    ///
    /// [`Operations::complete`] may be called before this returns.
    ///
    /// Context: any.
    pub fn complete(self) {
        let rq = self.into_raw();
        // SAFETY: By the type invariants the driver owns the request and started it.
        if !unsafe { bindings::blk_mq_complete_request_remote(rq.as_ptr()) } {
            // SAFETY: blk-mq leaves the ownership to the driver; the request was started.
            T::complete(unsafe { Request::from_raw(rq) });
        }
    }

    /// Returns the request to blk-mq, which queues it again after
    /// [`GenDisk::kick_requeue_list`](super::GenDisk::kick_requeue_list).
    ///
    /// Context: any.
    pub fn requeue(self) {
        let rq = self.into_raw();
        // SAFETY: By the type invariants the driver owns the request and started it.
        unsafe { bindings::blk_mq_requeue_request(rq.as_ptr(), false) };
    }
}

impl<T: Operations> Request<T, Completed> {
    /// Requeues the request, like [`Request::<T, InFlight>::requeue`].
    pub fn requeue(self) {
        let rq = self.into_raw();
        // SAFETY: By the type invariants the driver owns the request and started it.
        unsafe { bindings::blk_mq_requeue_request(rq.as_ptr(), false) };
    }
}

// SAFETY: By the type invariants only the holder ends the request, which takes it by value; until
// then it keeps the pages of its bios, and these do not change. The pages of a read may be written.
unsafe impl<T: Operations> PageOwner for Request<T, InFlight> {
    fn writable(&self) -> bool {
        self.op() == Op::Read
    }

    fn slices(&self) -> impl Iterator<Item = PageSlice<'_>> + '_ {
        self.segments()
    }
}

// SAFETY: The driver's data is in separate memory behind the request, and does not affect the
// request's bios or its ownership.
unsafe impl<T: Operations> DataOwner for Request<T, InFlight> {
    type Data = T::RequestData;

    #[inline]
    fn data_mut(&mut self) -> &mut T::RequestData {
        Request::data_mut(self)
    }
}

/// The memory of a request, as segments within one page each.
///
/// # Invariants
///
/// `bio` is null, or a bio with data that exists, and keeps its pages, during `'a`; so do the bios
/// behind it. `iter` is a position in it.
pub struct Segments<'a> {
    bio: *mut bindings::bio,
    iter: bindings::bvec_iter,
    _request: PhantomData<&'a ()>,
}

impl Segments<'_> {
    /// # Safety
    ///
    /// `bio` is null or satisfies the type invariants.
    unsafe fn new(bio: *mut bindings::bio) -> Self {
        let iter = if bio.is_null() {
            bindings::bvec_iter::default()
        } else {
            // SAFETY: `bio` is valid.
            unsafe { (*bio).bi_iter }
        };
        // INVARIANT: As the caller promises; `iter` is the bio's start.
        Self {
            bio,
            iter,
            _request: PhantomData,
        }
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = PageSlice<'a>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        while self.iter.bi_size == 0 {
            if self.bio.is_null() {
                return None;
            }
            // SAFETY: By the type invariants `bio` is valid, and what follows it too.
            self.bio = unsafe { (*self.bio).bi_next };
            if self.bio.is_null() {
                return None;
            }
            // SAFETY: As above.
            self.iter = unsafe { (*self.bio).bi_iter };
        }

        // SAFETY: By the type invariants `bio` is valid and `iter` a position in it; bytes are
        // left.
        let bvec = unsafe { bindings_ext::bio_data_next(self.bio, &mut self.iter) };
        let page = NonNull::new(bvec.bv_page)?;
        // SAFETY: `bio_data_next` returns a range within one page. By the type invariants the bio
        // keeps it during `'a`.
        Some(unsafe { PageSlice::from_raw(page, bvec.bv_offset as usize, bvec.bv_len as usize) })
    }
}
