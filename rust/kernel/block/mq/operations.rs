// SPDX-License-Identifier: GPL-2.0-only

//! The callbacks of a driver.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

use kernel::{
    bindings,
    error::{
        from_result,
        VTABLE_DEFAULT_ERROR, //
    },
    ffi::{
        c_int,
        c_uint,
        c_void, //
    },
    prelude::*,
    sync::{
        Arc,
        ArcBorrow, //
    },
    types::ForeignOwnable, //
};

use super::{
    Completed,
    Geometry,
    HwQueue,
    Queued,
    Rejected,
    Request,
    RequestId,
    RequestList, //
};

/// The callbacks of a driver: `struct blk_mq_ops` and `struct block_device_operations`.
///
/// `queue_rq`, `queue_rqs` and `commit_rqs` must not sleep. The file operations may.
#[vtable]
pub trait Operations: Sized + 'static {
    /// The driver's data of a disk.
    type QueueData: Send + Sync;

    /// The driver's data of a hardware queue.
    type HwQueueData: ForeignOwnable + Send + Sync;

    /// The driver's data of a request. It is created with the tag set, once for each request that
    /// can be in flight, and reused.
    type RequestData: Send;

    /// Creates the data of a request of hardware queue `hw_queue`.
    fn new_request_data(hw_queue: u32) -> Result<Self::RequestData>;

    /// Creates the data of hardware queue `hw_queue` of a disk.
    fn new_hw_queue_data(
        queue_data: ArcBorrow<'_, Self::QueueData>,
        hw_queue: u32,
    ) -> Result<Self::HwQueueData>;

    /// Takes a request: [starts](Request::start) and stores it, ends it, or rejects it.
    ///
    /// If `last` is false, more requests or a call of [`Self::commit_rqs`] follow at once, so the
    /// driver need not notify the device before.
    fn queue_rq<'q>(
        hw_queue: HwQueue<'q, Self>,
        rq: Request<Self, Queued<'q>>,
        last: bool,
    ) -> Result<(), Rejected<'q, Self>>;

    /// Takes several requests for a hardware queue, and notifies the device of all of them.
    ///
    /// Requests that it returns are queued again, one by one.
    fn queue_rqs<'q>(
        _hw_queue: HwQueue<'q, Self>,
        _requests: RequestList<Self, Queued<'q>>,
    ) -> RequestList<Self, Queued<'q>> {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called when no more requests follow, although the last one was queued with `last` false.
    fn commit_rqs(_hw_queue: HwQueue<'_, Self>) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Ends a request that was passed to [`Request::complete`].
    ///
    /// Context: softirq, or that of the call of [`Request::complete`].
    fn complete(rq: Request<Self, Completed>);

    /// Called when a request is in flight for longer than the tag set's timeout, and again after
    /// each further timeout.
    ///
    /// The request stays in flight, and may be ending on another CPU at this moment.
    ///
    /// Context: process.
    fn timed_out(_queue_data: ArcBorrow<'_, Self::QueueData>, _id: RequestId) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called when the disk or a partition of it is opened, but not while the disk is being
    /// removed.
    fn open(_queue_data: ArcBorrow<'_, Self::QueueData>, _mode: OpenMode) -> Result {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Called when an opener has closed the disk or a partition of it, but not after the disk was
    /// dropped.
    fn release(_queue_data: ArcBorrow<'_, Self::QueueData>) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Handles an ioctl that the block layer does not handle.
    ///
    /// `arg` is a number, or an address in the memory of the caller. The data there has the same
    /// layout for 32-bit programs.
    ///
    /// Fails with `ENOTTY` if the driver does not handle it either.
    fn ioctl(_queue_data: ArcBorrow<'_, Self::QueueData>, _cmd: u32, _arg: usize) -> Result<c_int> {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Returns the geometry for programs that read it.
    fn getgeo(_queue_data: ArcBorrow<'_, Self::QueueData>, _capacity: u64) -> Result<Geometry> {
        build_error!(VTABLE_DEFAULT_ERROR)
    }
}

/// The mode in which a disk is opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenMode {
    /// `true` if the opener may write.
    pub write: bool,
    /// `true` if the opener requires exclusive access: a mount, for instance.
    pub exclusive: bool,
}

impl OpenMode {
    pub(super) fn from_raw(mode: bindings::blk_mode_t) -> Self {
        /// `BLK_OPEN_WRITE`.
        const WRITE: bindings::blk_mode_t = 1 << 1;
        /// `BLK_OPEN_EXCL`.
        const EXCLUSIVE: bindings::blk_mode_t = 1 << 2;

        Self {
            write: mode & WRITE != 0,
            exclusive: mode & EXCLUSIVE != 0,
        }
    }
}

/// Returns the driver's data of a disk.
///
/// # Safety
///
/// `queue` is the queue of a disk that was created for a `TagSet<T>`, and is not removed during
/// `'a`.
pub(super) unsafe fn queue_data<'a, T: Operations>(
    queue: *mut bindings::request_queue,
) -> ArcBorrow<'a, T::QueueData> {
    // SAFETY: By the invariants of `TagSet`, `queuedata` comes from `into_foreign` and is taken
    // back only when the disk was removed.
    unsafe { Arc::<T::QueueData>::borrow((*queue).queuedata) }
}

/// The functions that blk-mq calls, for the driver `T`.
///
/// Only a [`TagSet<T>`](super::TagSet) has them: "a disk of `T`" below is a disk that was created
/// for such a tag set.
pub(super) struct OperationsVTable<T: Operations>(PhantomData<T>);

impl<T: Operations> OperationsVTable<T> {
    /// # Safety
    ///
    /// For blk-mq, as an RCU reader: `hctx` is an initialised hardware queue of a disk of `T`, and
    /// `bd` points to a request of it that was not started, and that the driver owns from now on.
    unsafe extern "C" fn queue_rq(
        hctx: *mut bindings::blk_mq_hw_ctx,
        bd: *const bindings::blk_mq_queue_data,
    ) -> bindings::blk_status_t {
        // SAFETY: By the requirements of this function. `exit_hctx`, and the removal of the disk,
        // wait for RCU readers before they drop data.
        let hw_queue = unsafe { HwQueue::from_raw(NonNull::new_unchecked(hctx)) };
        // SAFETY: By the requirements of this function; the data of the request was made by
        // `init_request`.
        let rq = unsafe { Request::from_raw(NonNull::new_unchecked((*bd).rq)) };
        // SAFETY: By the requirements of this function.
        let last = unsafe { (*bd).last };

        match T::queue_rq(hw_queue, rq, last) {
            Ok(()) => bindings::BLK_STS_OK as bindings::blk_status_t,
            // The lifetime of `rq` is that of this call, so a rejected request is this one.
            Err(rejected) => rejected.into_status(),
        }
    }

    /// # Safety
    ///
    /// For blk-mq, as an RCU reader: `requests` is a list of requests of a disk of `T`, which have
    /// tags and were not started. The driver owns those that it takes out.
    unsafe extern "C" fn queue_rqs(requests: *mut bindings::rq_list) {
        // SAFETY: By the requirements of this function the list is valid, and its requests are ours
        // from now on; their data was made by `init_request`.
        let mut offered = unsafe { RequestList::<T, Queued<'_>>::take_raw(&mut *requests) };
        let mut left = RequestList::new();
        // SAFETY: By the requirements of this function; hardware queues stay as in `queue_rq`.
        while let Some((hw_queue, run)) = unsafe { offered.take_run() } {
            // The lifetime of the requests is that of this call, so the returned requests are some
            // of them.
            left.append(T::queue_rqs(hw_queue, run));
        }
        // SAFETY: As above. Those that are left go back to blk-mq.
        unsafe { *requests = left.into_raw() };
    }

    /// # Safety
    ///
    /// For blk-mq, as an RCU reader: `hctx` is an initialised hardware queue of a disk of `T`.
    unsafe extern "C" fn commit_rqs(hctx: *mut bindings::blk_mq_hw_ctx) {
        // SAFETY: By the requirements of this function; the hardware queue stays as in `queue_rq`.
        T::commit_rqs(unsafe { HwQueue::from_raw(NonNull::new_unchecked(hctx)) });
    }

    /// # Safety
    ///
    /// For blk-mq: `rq` is a request that [`Request::complete`] has passed on.
    unsafe extern "C" fn complete(rq: *mut bindings::request) {
        // SAFETY: By the requirements of this function. `Request::complete` gave up the ownership
        // of a started request, and it comes back here.
        T::complete(unsafe { Request::from_raw(NonNull::new_unchecked(rq)) });
    }

    /// # Safety
    ///
    /// For blk-mq: `rq` is a request of a disk of `T`. blk-mq holds a reference to it, and one to
    /// the queue.
    unsafe extern "C" fn timeout(rq: *mut bindings::request) -> bindings::blk_eh_timer_return {
        // SAFETY: By the requirements of this function; the removal of the disk waits for holders
        // of a reference to the queue.
        let (queue_data, id) = unsafe { (queue_data::<T>((*rq).q), RequestId::of_shared(rq)) };
        T::timed_out(queue_data, id);
        bindings::blk_eh_timer_return_BLK_EH_RESET_TIMER
    }

    /// # Safety
    ///
    /// For blk-mq: `hctx` is a new hardware queue of a disk of `T`, which has its data already.
    unsafe extern "C" fn init_hctx(
        hctx: *mut bindings::blk_mq_hw_ctx,
        _set_data: *mut c_void,
        index: c_uint,
    ) -> c_int {
        from_result(|| {
            // SAFETY: By the requirements of this function; a disk that is being created is not
            // removed yet.
            let queue_data = unsafe { queue_data::<T>((*hctx).queue) };
            let data = T::new_hw_queue_data(queue_data, index)?;
            // SAFETY: By the requirements of this function `hctx` is valid, and has no other user
            // yet.
            unsafe { (*hctx).driver_data = data.into_foreign() };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// For blk-mq: `init_hctx` succeeded for `hctx`, which is no longer used.
    unsafe extern "C" fn exit_hctx(hctx: *mut bindings::blk_mq_hw_ctx, _index: c_uint) {
        // A call of `queue_rq` may have ended the last request that the removal waited for, and
        // still run. It is an RCU reader.
        //
        // SAFETY: `synchronize_rcu` requires a context that may sleep, and blk-mq frees hardware
        // queues in such a context.
        unsafe { bindings::synchronize_rcu() };
        // SAFETY: `init_hctx` made the pointer, and it is no longer borrowed.
        drop(unsafe { T::HwQueueData::from_foreign((*hctx).driver_data) });
    }

    /// # Safety
    ///
    /// For blk-mq: `rq` is a new request, followed by space for `T::RequestData`.
    unsafe extern "C" fn init_request(
        _set: *mut bindings::blk_mq_tag_set,
        rq: *mut bindings::request,
        hw_queue: c_uint,
        _numa_node: c_int,
    ) -> c_int {
        const {
            assert!(
                align_of::<T::RequestData>() <= align_of::<bindings::request>(),
                "data of a request is aligned as the request is"
            );
        }

        from_result(|| {
            let data = T::new_request_data(hw_queue)?;
            // SAFETY: By the requirements of this function there is space behind the request, which
            // is aligned as checked above.
            unsafe { rq.add(1).cast::<T::RequestData>().write(data) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// For blk-mq: `init_request` succeeded for `rq`, which is no longer used.
    unsafe extern "C" fn exit_request(
        _set: *mut bindings::blk_mq_tag_set,
        rq: *mut bindings::request,
        _hw_queue: c_uint,
    ) {
        // SAFETY: `init_request` initialised it, and it is no longer used.
        unsafe { core::ptr::drop_in_place(rq.add(1).cast::<T::RequestData>()) };
    }

    const VTABLE: bindings::blk_mq_ops = bindings::blk_mq_ops {
        queue_rq: Some(Self::queue_rq),
        queue_rqs: if T::HAS_QUEUE_RQS {
            Some(Self::queue_rqs)
        } else {
            None
        },
        commit_rqs: if T::HAS_COMMIT_RQS {
            Some(Self::commit_rqs)
        } else {
            None
        },
        get_budget: None,
        put_budget: None,
        set_rq_budget_token: None,
        get_rq_budget_token: None,
        timeout: if T::HAS_TIMED_OUT {
            Some(Self::timeout)
        } else {
            None
        },
        poll: None,
        complete: Some(Self::complete),
        init_hctx: Some(Self::init_hctx),
        exit_hctx: Some(Self::exit_hctx),
        init_request: Some(Self::init_request),
        exit_request: Some(Self::exit_request),
        cleanup_rq: None,
        busy: None,
        map_queues: None,
        #[cfg(CONFIG_BLK_DEBUG_FS)]
        show_rq: None,
    };

    pub(super) const fn build() -> &'static bindings::blk_mq_ops {
        &Self::VTABLE
    }
}
