// SPDX-License-Identifier: GPL-2.0-only

//! Hardware queues for which blk-mq calls the driver.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

use kernel::{
    bindings,
    sync::ArcBorrow,
    types::ForeignOwnable, //
};

use super::Operations;

/// The hardware queue for which blk-mq calls the driver, during that call.
///
/// # Invariants
///
/// The pointer is to a hardware queue of a disk of `T`; both were initialised, and stay so during
/// `'q`.
pub struct HwQueue<'q, T: Operations> {
    hctx: NonNull<bindings::blk_mq_hw_ctx>,
    _call: PhantomData<&'q T>,
}

impl<'q, T: Operations> HwQueue<'q, T> {
    /// # Safety
    ///
    /// The type invariants hold for `hctx`.
    pub(super) unsafe fn from_raw(hctx: NonNull<bindings::blk_mq_hw_ctx>) -> Self {
        // INVARIANT: As the caller promises.
        Self {
            hctx,
            _call: PhantomData,
        }
    }

    /// Returns the index of this hardware queue.
    #[inline]
    pub fn index(&self) -> u32 {
        // SAFETY: By the type invariants the hardware queue is valid; the field does not change.
        unsafe { (*self.hctx.as_ptr()).queue_num }
    }

    /// Returns the driver's data of this hardware queue.
    #[inline]
    pub fn data(&self) -> <T::HwQueueData as ForeignOwnable>::Borrowed<'q> {
        // SAFETY: By the type invariants the hardware queue is initialised, so `driver_data` comes
        // from `into_foreign` and is taken back only after `'q`. It is never borrowed mutably.
        unsafe { T::HwQueueData::borrow((*self.hctx.as_ptr()).driver_data) }
    }

    /// Returns the driver's data of the disk.
    #[inline]
    pub fn queue_data(&self) -> ArcBorrow<'q, T::QueueData> {
        // SAFETY: By the type invariants the disk is initialised, so its queue's `queuedata` is an
        // `Arc` that is dropped only after `'q`.
        unsafe { super::operations::queue_data::<T>((*self.hctx.as_ptr()).queue) }
    }

    /// Stops the hardware queue: blk-mq queues no requests to it until
    /// [`GenDisk::start_stopped_hw_queues`](super::GenDisk::start_stopped_hw_queues).
    pub fn stop(&self) {
        // SAFETY: By the type invariants the hardware queue is valid.
        unsafe { bindings::blk_mq_stop_hw_queue(self.hctx.as_ptr()) };
    }
}
