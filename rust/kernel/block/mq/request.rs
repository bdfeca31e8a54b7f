// SPDX-License-Identifier: GPL-2.0-only

//! Requests, owned by typestate.
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

/// `BLK_STS_RESOURCE`: blk-mq tries again on its own, soon.
const RESOURCE: bindings::blk_status_t = 9;

mod private {
    pub trait Sealed {}
}

/// The state of a request. Sealed: [`Queued`], [`InFlight`] or [`Completed`].
pub trait State: private::Sealed {}

/// blk-mq offers the request to the driver, during one call of [`Operations::queue_rq`].
///
/// `'q` is that call. It is invariant, so a request of one call can be neither kept nor given as
/// the answer to another.
pub struct Queued<'q>(PhantomData<fn(&'q ()) -> &'q ()>);

/// The driver has the request. Its time runs.
pub struct InFlight(());

/// The device is done with the request. [`Operations::complete`] has it, and ends it.
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
    /// Read sectors.
    Read,
    /// Write sectors.
    Write,
    /// Have everything on stable storage that was written by requests that have ended.
    Flush,
    /// The contents of the sectors are of no interest any more.
    Discard,
    /// The contents of the sectors must not be readable any more.
    SecureErase,
    /// Have the sectors read as zeroes.
    WriteZeroes,
    /// Anything else, as the number of `enum req_op`. End it with [`BlkStatus::NOTSUPP`].
    Other(u8),
}

/// Names a request of a tag set, without being one.
///
/// The same id names another request as soon as this one has ended.
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
    /// for a time-out or from an iteration.
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

/// A request that the holder owns, in state `S`.
///
/// See the [module](super) for what the states are. Dropping it ends it with
/// [`BlkStatus::IOERR`].
///
/// # Invariants
///
/// - The pointer is to a request of a disk of `T`. Behind it lies a `T::RequestData`, initialised
///   by `Operations` of `T`.
/// - The driver owns the request: between `queue_rq` and the end of the request. Only the
///   holder of this value ends it, requeues it, or uses its driver data.
/// - In state `InFlight` and `Completed`, it was started; in state `Queued` it was not.
pub struct Request<T: Operations, S: State> {
    rq: NonNull<bindings::request>,
    _operations: PhantomData<T>,
    _state: PhantomData<S>,
}

// SAFETY: A request is bound to no thread, and may be ended in any context. The data of the driver
// goes with it.
unsafe impl<T: Operations, S: State> Send for Request<T, S> where T::RequestData: Send {}

// SAFETY: Shared access only reads what does not change while the driver owns the request, and
// the data of the driver.
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

    /// Returns the first sector, in units of 512 bytes. A flush has none: all bits are set then.
    #[inline]
    pub fn sector(&self) -> u64 {
        // SAFETY: By the type invariants the request is valid, and the field does not change.
        unsafe { (*self.as_raw()).__sector }
    }

    /// Returns the length in bytes. For an operation without data, what it applies to. 0 for a
    /// flush.
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
    /// A reference of its own: as soon as the request has ended, the disk may go.
    pub fn queue_data(&self) -> Arc<T::QueueData> {
        // SAFETY: By the type invariants the request is valid, and its disk is not removed before
        // it ends.
        unsafe { operations::queue_data::<T>((*self.as_raw()).q) }.into()
    }

    fn has_data(&self) -> bool {
        matches!(self.op(), Op::Read | Op::Write)
    }

    /// Returns the data, in pieces of one page at most: what a write takes from, or a read puts
    /// into, memory. Empty for all other operations.
    #[inline]
    pub fn segments(&self) -> Segments<'_> {
        let bio = if self.has_data() {
            // SAFETY: By the type invariants the request is valid, and the field does not change.
            unsafe { (*self.as_raw()).bio }
        } else {
            core::ptr::null_mut()
        };
        // SAFETY: By the type invariants only the holder ends the request. It keeps its bios,
        // and these their pages, until it ends; that takes it by value, which the borrow excludes.
        unsafe { Segments::new(bio) }
    }

    /// Returns the memory that a read puts its data into. Empty for all other operations.
    ///
    /// The pieces are those of [`Self::segments`].
    #[inline]
    pub fn segments_mut(&mut self) -> impl Iterator<Item = PageSliceMut<'_>> + '_ {
        let segments = match self.op() {
            Op::Read => self.segments(),
            // SAFETY: No bio at all is valid.
            _ => unsafe { Segments::new(core::ptr::null_mut()) },
        };
        // SAFETY: The pages of a read are there to be written.
        segments.map(|slice| unsafe { PageSliceMut::from_slice(slice) })
    }

    fn data_ptr(&self) -> *mut T::RequestData {
        // SAFETY: By the type invariants the driver's data lies behind the request.
        unsafe { self.as_raw().add(1).cast() }
    }

    /// Returns the driver's data of this request. It is what the last user of the tag left in it.
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

    /// Returns the data as [`Self::segments`] gives it, and the driver's data of the request to be
    /// changed.
    #[inline]
    pub fn segments_and_data(&mut self) -> (Segments<'_>, &mut T::RequestData) {
        let data = self.data_ptr();
        // SAFETY: As in `data_mut`. `segments` reads the request and its bios, not the data of the
        // driver, which is behind the request.
        (self.segments(), unsafe { &mut *data })
    }

    /// Returns the memory as [`Self::segments_mut`] gives it, and the driver's data of the request.
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

    /// Gives the request back to blk-mq: all of it is done, or failed.
    ///
    /// Any context.
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
    /// Accepts the request. Its time starts to run.
    ///
    /// What can fail for lack of something should have been done before: a request that is in
    /// flight can only be ended or requeued.
    #[inline]
    pub fn start(self) -> Request<T, InFlight> {
        let rq = self.into_raw();
        // SAFETY: By the type invariants the driver owns the request; a queued one was not started.
        unsafe { bindings::blk_mq_start_request(rq.as_ptr()) };
        // SAFETY: The ownership goes over; the request was started above.
        unsafe { Request::from_raw(rq) }
    }

    /// Refuses the request for now. blk-mq offers it again after a short while.
    pub fn reject(self) -> Rejected<'q, T> {
        Rejected(self)
    }
}

/// A request that [`Operations::queue_rq`] refuses for now.
pub struct Rejected<'q, T: Operations>(Request<T, Queued<'q>>);

impl<T: Operations> Rejected<'_, T> {
    /// Leaves the request with blk-mq, and tells when to try again.
    pub(super) fn into_status(self) -> bindings::blk_status_t {
        let _ = self.0.into_raw();
        RESOURCE
    }
}

impl<T: Operations> Request<T, InFlight> {
    /// Completes the request by [`Operations::complete`], possibly on the CPU that submitted it
    /// (`blk_mq_complete_request()`). It may be called before this returns.
    ///
    /// Any context.
    pub fn complete(self) {
        let rq = self.into_raw();
        // SAFETY: By the type invariants the driver owns the request and started it.
        if !unsafe { bindings::blk_mq_complete_request_remote(rq.as_ptr()) } {
            // SAFETY: blk-mq leaves the request to us; it was started.
            T::complete(unsafe { Request::from_raw(rq) });
        }
    }

    /// Gives the request back to blk-mq as if it had never been offered. It is offered again after
    /// [`GenDisk::kick_requeue_list`](super::GenDisk::kick_requeue_list).
    ///
    /// Any context.
    pub fn requeue(self) {
        let rq = self.into_raw();
        // SAFETY: By the type invariants the driver owns the request and started it.
        unsafe { bindings::blk_mq_requeue_request(rq.as_ptr(), false) };
    }
}

impl<T: Operations> Request<T, Completed> {
    /// Requeues the request as [`Request::<T, InFlight>::requeue`].
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

// SAFETY: The driver's data of a request is in memory of its own behind it, and says nothing about
// the request's bios, nor who owns it.
unsafe impl<T: Operations> DataOwner for Request<T, InFlight> {
    type Data = T::RequestData;

    #[inline]
    fn data_mut(&mut self) -> &mut T::RequestData {
        Request::data_mut(self)
    }
}

/// The data of a request, in pieces of one page at most.
///
/// # Invariants
///
/// `bio` is null, or a bio with data that lives, and keeps its pages, during `'a`; so do the bios
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
        // SAFETY: `bio_data_next` gives a piece within one page. By the type invariants the bio
        // keeps it during `'a`.
        Some(unsafe { PageSlice::from_raw(page, bvec.bv_offset as usize, bvec.bv_len as usize) })
    }
}
