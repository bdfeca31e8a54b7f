// SPDX-License-Identifier: GPL-2.0-only

//! Tag sets: the hardware queues and the requests that can be in flight.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use core::marker::PhantomData;

use kernel::{
    bindings,
    cpu::CpuId,
    error::to_result,
    prelude::*,
    time::Jiffies,
    types::Opaque, //
};

use crate::base::cpu;

use super::{
    operations::OperationsVTable,
    Operations, //
};

/// The parameters of a [`TagSet`].
pub struct TagSetParams {
    /// Number of hardware queues. blk-mq creates no more than there are CPUs: see
    /// [`TagSet::nr_hw_queues`].
    pub nr_hw_queues: u32,
    /// Number of requests that can be in flight in each.
    pub queue_depth: u32,
    /// Time after which a request times out, in jiffies. 0: 30 seconds.
    pub timeout: Jiffies,
    /// `true` if the disk has no I/O scheduler by default. Only disks with one hardware queue have
    /// one by default.
    pub no_scheduler: bool,
}

/// The hardware queues of disks of `T`, and the requests that can be in flight in them.
///
/// # Invariants
///
/// - `set` is initialised and valid, with the functions of `OperationsVTable<T>`: a
///   `T::RequestData` is behind each of its requests.
/// - The data of a queue that was created for it comes from `into_foreign` of an
///   `Arc<T::QueueData>`, and is taken back only after the disk was removed.
/// - Disks that were created for it own a reference to this.
#[pin_data(PinnedDrop)]
pub struct TagSet<T: Operations> {
    #[pin]
    set: Opaque<bindings::blk_mq_tag_set>,
    _operations: PhantomData<T>,
}

// SAFETY: The functions of blk-mq that are called here may be called by any thread. By the type
// invariants the tag set moves with the data of its requests, which is `Send`.
unsafe impl<T: Operations> Send for TagSet<T> {}

// SAFETY: As above, and at the same time: they only read fields that do not change, or read
// requests under the locks of blk-mq. Shared access gives no access to the data of requests.
unsafe impl<T: Operations> Sync for TagSet<T> {}

impl<T: Operations> TagSet<T> {
    /// Creates a tag set.
    ///
    /// Fails with `EINVAL` if the number of hardware queues or the depth is 0, or if the timeout is
    /// too large.
    ///
    /// Context: sleeps.
    pub fn new(params: TagSetParams) -> impl PinInit<Self, Error> {
        // INVARIANT: Initialised here; there are no disks.
        try_pin_init!(Self {
            set <- Opaque::try_ffi_init(move |set: *mut bindings::blk_mq_tag_set| {
                let flags = if params.no_scheduler {
                    bindings::BLK_MQ_F_NO_SCHED_BY_DEFAULT
                } else {
                    0
                };
                let init = bindings::blk_mq_tag_set {
                    ops: OperationsVTable::<T>::build(),
                    nr_maps: 1,
                    nr_hw_queues: params.nr_hw_queues,
                    queue_depth: params.queue_depth,
                    cmd_size: u32::try_from(size_of::<T::RequestData>())?,
                    numa_node: bindings::NUMA_NO_NODE,
                    timeout: u32::try_from(params.timeout)?,
                    flags,
                    ..pin_init::zeroed()
                };
                // SAFETY: `set` is valid for writes.
                unsafe { set.write(init) };
                // SAFETY: `set` was filled in as the function requires, and does not move, because
                // it is pinned.
                to_result(unsafe { bindings::blk_mq_alloc_tag_set(set) })
            }),
            _operations: PhantomData,
        })
    }

    pub(super) fn as_raw(&self) -> *mut bindings::blk_mq_tag_set {
        self.set.get()
    }

    /// Returns the number of hardware queues.
    pub fn nr_hw_queues(&self) -> u32 {
        // SAFETY: By the type invariant the set is valid; the field does not change.
        unsafe { (*self.as_raw()).nr_hw_queues }
    }

    /// Returns the number of requests that can be in flight in each hardware queue.
    pub fn queue_depth(&self) -> u32 {
        // SAFETY: By the type invariant the set is valid; the field does not change.
        unsafe { (*self.as_raw()).queue_depth }
    }

    /// Returns the first online CPU of those that use a hardware queue.
    pub fn cpu_of(&self, hw_queue: u32) -> Option<CpuId> {
        // SAFETY: By the type invariant the set is valid; its maps do not change.
        let map = unsafe { &(*self.as_raw()).map[bindings::hctx_type_HCTX_TYPE_DEFAULT as usize] };
        (0..kernel::cpu::nr_cpu_ids()).find_map(|number| {
            // SAFETY: blk-mq allocates an entry for each possible CPU number.
            let used = unsafe { *map.mq_map.add(number as usize) };
            let cpu = CpuId::from_u32(number)?;
            (used == hw_queue && cpu::is_online(cpu)).then_some(cpu)
        })
    }
}

#[pinned_drop]
impl<T: Operations> PinnedDrop for TagSet<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the set is valid, and there is no disk, because this was
        // the last reference.
        unsafe { bindings::blk_mq_free_tag_set(self.as_raw()) };
    }
}
