// SPDX-License-Identifier: GPL-2.0-only

//! Disks.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use core::{
    marker::PhantomData,
    ptr, //
};

use kernel::{
    bindings,
    device::Device,
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    ffi::{
        c_int,
        c_uint,
        c_ulong, //
    },
    fmt::{
        self,
        Write, //
    },
    prelude::*,
    static_lock_class,
    str::NullTerminatedFormatter,
    sync::{
        atomic::{
            Atomic,
            Full, //
        },
        rcu,
        Arc,
        ArcBorrow, //
    },
    types::ForeignOwnable, //
};

use crate::{
    base::{
        module_ref::ModuleRef,
        this_module::this_module, //
    },
    block::major::Minors, //
};

use super::{
    OpenMode,
    Operations,
    QueueLimits,
    TagSet, //
};

/// The largest capacity, in sectors, whose number of bytes fits into 64 bits.
const MAX_SECTORS: u64 = i64::MAX as u64 >> 9;

/// The geometry of a disk, for programs that read it (`HDIO_GETGEO`).
pub struct Geometry {
    /// Heads.
    pub heads: u8,
    /// Number of sectors per track.
    pub sectors: u8,
    /// Cylinders.
    pub cylinders: u16,
}

/// A description of a disk to create.
///
/// Without [`Self::device_numbers`] the block layer chooses a device number.
pub struct GenDiskBuilder {
    limits: QueueLimits,
    minors: Option<Minors>,
    capacity: u64,
    read_only: bool,
    flags: c_uint,
    state: c_ulong,
}

impl GenDiskBuilder {
    /// Creates a description of a disk with these limits and no capacity.
    pub fn new(limits: QueueLimits) -> Self {
        Self {
            limits,
            minors: None,
            capacity: 0,
            read_only: false,
            flags: 0,
            state: 0,
        }
    }

    /// Sets the device numbers: the disk has the first of these minors, and its partitions those
    /// that follow.
    ///
    /// They are released when the disk is dropped. Linux identifies a file system by the device
    /// number of its disk, as do the openers of the disk: so keep a removed disk until it has no
    /// [openers](GenDisk::openers).
    pub fn device_numbers(mut self, minors: Minors) -> Self {
        self.minors = Some(minors);
        self
    }

    /// Sets the capacity, in sectors of 512 bytes.
    pub fn capacity(mut self, sectors: u64) -> Self {
        self.capacity = sectors;
        self
    }

    /// Sets the disk read-only.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Marks the medium as removable.
    pub fn removable(mut self, removable: bool) -> Self {
        self.flags &= !bindings::GENHD_FL_REMOVABLE;
        if removable {
            self.flags |= bindings::GENHD_FL_REMOVABLE;
        }
        self
    }

    /// Disables the scan for partitions (`GD_SUPPRESS_PART_SCAN`).
    ///
    /// User space can still add them.
    pub fn no_partition_scan(mut self) -> Self {
        self.state |= 1 << bindings::GD_SUPPRESS_PART_SCAN;
        self
    }

    /// Creates the disk, which is not visible before [`GenDisk::add`].
    ///
    /// Fails with `EINVAL` if the name is empty or longer than 31 bytes, or if a number is out of
    /// range, and with `ENODEV` if the module is being unloaded.
    ///
    /// Context: sleeps.
    pub fn build<T: Operations>(
        mut self,
        name: fmt::Arguments<'_>,
        tag_set: Arc<TagSet<T>>,
        queue_data: Arc<T::QueueData>,
    ) -> Result<GenDisk<T>> {
        self.limits.check()?;
        if self.capacity > MAX_SECTORS {
            return Err(EINVAL);
        }

        let module = ModuleRef::new()?;
        let queue_data = queue_data.into_foreign();
        // SAFETY: The tag set is valid, by its invariants, and the limits are initialised. The data
        // is as the invariants of `TagSet` require.
        let disk = from_err_ptr(unsafe {
            bindings::__blk_mq_alloc_disk(
                tag_set.as_raw(),
                self.limits.as_raw(),
                queue_data,
                static_lock_class!().as_ptr(),
            )
        })
        .inspect_err(|_| {
            // SAFETY: There is no disk, so the data is not borrowed.
            drop(unsafe { Arc::<T::QueueData>::from_foreign(queue_data) });
        })?;

        // INVARIANT: The disk was created for this tag set, with this data, and was not added.
        let mut disk = GenDisk {
            disk,
            queue_data,
            tag_set,
            minors: None,
            added: Atomic::new(NOT_ADDED),
            quiesced: Atomic::new(0),
            _module: module,
        };

        // SAFETY: The disk is valid by the type invariants. No other code uses it before it is
        // added.
        let raw = unsafe { &mut *disk.disk };
        raw.fops = FileOperations::<T>::build();
        raw.private_data = queue_data;
        raw.flags |= self.flags as c_int;
        raw.state |= self.state;
        if let Some(minors) = self.minors {
            raw.major = minors.major().try_into()?;
            raw.first_minor = minors.first().try_into()?;
            raw.minors = minors.count().try_into()?;
            disk.minors = Some(minors);
        }
        NullTerminatedFormatter::new(&mut raw.disk_name)
            .ok_or(EINVAL)?
            .write_fmt(name)?;
        if raw.disk_name.first() == Some(&0) {
            return Err(EINVAL);
        }

        // SAFETY: By the type invariants the disk is valid.
        unsafe { bindings::set_capacity(disk.disk, self.capacity) };
        if self.read_only {
            disk.set_read_only(true);
        }
        Ok(disk)
    }
}

/// Values of `GenDisk::added`.
const NOT_ADDED: i32 = 0;
const ADDING: i32 = 1;
const ADDED: i32 = 2;
const REMOVING: i32 = 3;
const REMOVED: i32 = 4;

/// A disk of the driver `T`.
///
/// Dropping it [removes](Self::remove) it from the system, and waits for the requests in flight:
/// the driver has to end them. Openers that still have the disk open get errors from then on. All
/// functions may sleep, unless their context says otherwise.
///
/// It holds a reference to the module, so a leaked disk keeps the module loaded. A module has to
/// drop its disks before its exit, because the exit is not called while there are disks.
///
/// # Invariants
///
/// - `disk` points to a disk that was created for `tag_set`, with `queue_data` as its data and its
///   queue's. One reference to it is owned.
/// - `queue_data` came from `Arc::into_foreign`, and is taken back when this is dropped, after the
///   disk was removed.
/// - `added` is [`ADDED`] if and only if it was added to the system and its removal has not begun.
///   It is [`REMOVED`] only after the removal has ended.
/// - `quiesced` is 1 if and only if this object has quiesced the queue.
/// - `_module` keeps the module, whose functions the block layer calls for the disk.
pub struct GenDisk<T: Operations> {
    disk: *mut bindings::gendisk,
    queue_data: *mut kernel::ffi::c_void,
    tag_set: Arc<TagSet<T>>,
    /// Released after the disk is dropped.
    minors: Option<Minors>,
    added: Atomic<i32>,
    quiesced: Atomic<i32>,
    /// Dropped last.
    _module: ModuleRef,
}

// SAFETY: By the type invariants this owns a reference to a disk, which may be removed by any
// thread, and an `Arc` of `T::QueueData`, which is `Send` and `Sync`.
unsafe impl<T: Operations> Send for GenDisk<T> {}

// SAFETY: The functions of the block layer that take a disk or its queue here may be called by
// several threads at once; `added` and `quiesced` guard the operations that must be done once. Data
// is only shared.
unsafe impl<T: Operations> Sync for GenDisk<T> {}

impl<T: Operations> GenDisk<T> {
    /// Adds the disk to the system, below `parent`, and scans it for partitions: the driver has to
    /// serve requests before this returns.
    ///
    /// Fails with `EBUSY` if this was called before.
    pub fn add(&self, parent: Option<&Device>) -> Result {
        let parent = parent.map_or(ptr::null_mut(), |parent| {
            // `Device` is a transparent wrapper.
            ptr::from_ref(parent).cast_mut().cast::<bindings::device>()
        });

        self.added
            .cmpxchg(NOT_ADDED, ADDING, Full)
            .map_err(|_| EBUSY)?;
        // SAFETY: By the type invariants the disk is valid, and was not added. The parent is valid,
        // and the disk takes a reference to it.
        to_result(unsafe { bindings::device_add_disk(parent, self.disk, ptr::null_mut()) })?;
        // INVARIANT: It was added above. After a failure the value stays `ADDING`, so this cannot
        // be called again.
        self.added.store(ADDED, kernel::sync::atomic::Release);
        Ok(())
    }

    /// Removes the disk from the system (`del_gendisk`).
    ///
    /// New openers are refused first. Then file systems on the disk and its page cache are written
    /// back, while the driver serves requests as before. After that all new requests fail. After
    /// [`Self::mark_dead`] nothing is written back. Waits for the requests in flight, which the
    /// driver has to end.
    ///
    /// Does nothing if the disk was not added, or if this was called before; that call may still be
    /// running, see [`Self::is_removed`].
    pub fn remove(&self) {
        if self.added.cmpxchg(ADDED, REMOVING, Full).is_err() {
            return;
        }
        // SAFETY: By the type invariants the disk was added, and no other call removes it: only one
        // call gets from `ADDED` to `REMOVING`.
        unsafe { bindings::del_gendisk(self.disk) };
        if let Some(minors) = &self.minors {
            minors.set_removed();
        }
        // INVARIANT: The removal has ended.
        self.added.store(REMOVED, kernel::sync::atomic::Release);
    }

    /// Returns `true` if the disk was removed.
    ///
    /// It may still be open.
    ///
    /// Context: any.
    pub fn is_removed(&self) -> bool {
        self.added.load(kernel::sync::atomic::Acquire) == REMOVED
    }

    /// Returns `true` if the disk, or a partition of it, is open for exclusive use: mounted, used
    /// as swap space, or part of another device.
    ///
    /// Context: any.
    pub fn is_claimed(&self) -> bool {
        // SAFETY: By the type invariants the disk is valid, and so is its whole device. The number
        // may change at any time.
        unsafe { (&raw const (*(*self.disk).part0).bd_holders).read_volatile() != 0 }
    }

    /// Returns `true` if the disk, or a partition of it, is open for exclusive use by a holder that
    /// is not notified of the removal of the disk: swap, or another device.
    ///
    /// A file system is notified, and syncs.
    ///
    /// The result is not defined while a claim is being made or released.
    ///
    /// Context: any.
    pub fn has_unaware_holder(&self) -> bool {
        // SAFETY: By the type invariants the disk is valid.
        unsafe { bindings_ext::disk_has_unaware_holder(self.disk) }
    }

    /// Returns the hardware queues and requests of this disk.
    pub fn tag_set(&self) -> &Arc<TagSet<T>> {
        &self.tag_set
    }

    /// Returns the driver's data.
    pub fn queue_data(&self) -> ArcBorrow<'_, T::QueueData> {
        // SAFETY: By the type invariants this is an `Arc`, which is taken back when `self` is
        // dropped.
        unsafe { Arc::<T::QueueData>::borrow(self.queue_data) }
    }

    fn queue(&self) -> *mut bindings::request_queue {
        // SAFETY: By the type invariants the disk is valid; its queue stays the same.
        unsafe { (*self.disk).queue }
    }

    /// Returns the capacity in sectors of 512 bytes.
    ///
    /// Context: any.
    pub fn capacity(&self) -> u64 {
        // SAFETY: By the type invariants the disk is valid.
        unsafe { bindings_ext::get_capacity(self.disk) }
    }

    /// Sets the capacity in sectors of 512 bytes, and notifies user space if it has changed.
    ///
    /// Fails with `EINVAL` if the capacity is too large.
    pub fn set_capacity_and_notify(&self, sectors: u64) -> Result {
        if sectors > MAX_SECTORS {
            return Err(EINVAL);
        }
        // SAFETY: By the type invariants the disk is valid.
        unsafe { bindings::set_capacity_and_notify(self.disk, sectors) };
        Ok(())
    }

    /// Sets or clears the write protection of the disk.
    pub fn set_read_only(&self, read_only: bool) {
        // SAFETY: By the type invariants the disk is valid.
        unsafe { bindings::set_disk_ro(self.disk, read_only) };
    }

    /// Changes the limits.
    ///
    /// The queue is not frozen, so requests within the old limits may still come: the driver has to
    /// serve them. Limits that `change` does not set stay the same. Fails with `EBUSY` if another
    /// task is changing the limits, for which it may wait for requests in flight.
    pub fn try_update_limits(&self, change: impl FnOnce(&mut QueueLimits)) -> Result {
        let mut limits = QueueLimits::new();
        // SAFETY: By the type invariants the queue is valid. The limits are valid for a write, and
        // of the type of the queue's. If it is started, the update ends below.
        let started =
            unsafe { bindings_ext::queue_limits_try_start_update(self.queue(), limits.as_raw()) };
        if !started {
            return Err(EBUSY);
        }
        change(&mut limits);

        if let Err(error) = limits.check() {
            // SAFETY: The update was started above.
            unsafe { bindings_ext::queue_limits_cancel_update(self.queue()) };
            return Err(error);
        }
        // SAFETY: The update was started above.
        to_result(unsafe { bindings::queue_limits_commit_update(self.queue(), limits.as_raw()) })
    }

    /// Marks the disk as dead: requests that are not in flight yet fail, and so do later ones.
    ///
    /// The driver has to end the requests in flight.
    pub fn mark_dead(&self) {
        // SAFETY: By the type invariants the disk is valid.
        unsafe { bindings::blk_mark_disk_dead(self.disk) };
    }

    /// Returns the number of openers of the disk and its partitions.
    ///
    /// A disk that was removed cannot be opened again.
    ///
    /// Context: any.
    pub fn openers(&self) -> u32 {
        // SAFETY: By the type invariants the disk is valid.
        unsafe { bindings_ext::disk_openers(self.disk) }
    }

    /// Stops calls of [`Operations::queue_rq`], and waits until running calls have returned.
    ///
    /// Requests in flight stay in flight.
    ///
    /// Does nothing if the queue is quiesced. Callers of this and [`Self::unquiesce`] in several
    /// threads have to order the calls.
    pub fn quiesce(&self) {
        // INVARIANT: The value changes with the state of the queue.
        if self.quiesced.xchg(1, Full) == 0 {
            // SAFETY: By the type invariants the queue is valid.
            unsafe { bindings::blk_mq_quiesce_queue(self.queue()) };
        }
    }

    /// Allows calls of [`Operations::queue_rq`] again, and runs the queue, if it is quiesced.
    pub fn unquiesce(&self) {
        // INVARIANT: The value changes with the state of the queue.
        if self.quiesced.xchg(0, Full) == 1 {
            // SAFETY: By the type invariants the queue is valid, and was quiesced once.
            unsafe { bindings::blk_mq_unquiesce_queue(self.queue()) };
        }
    }

    /// Makes blk-mq queue the requests again that were [requeued](super::Request::requeue).
    ///
    /// Context: any.
    pub fn kick_requeue_list(&self) {
        // SAFETY: By the type invariants the queue is valid.
        unsafe { bindings::blk_mq_kick_requeue_list(self.queue()) };
    }

    /// Starts the hardware queues that were [stopped](super::HwQueue::stop).
    ///
    /// Context: any.
    pub fn start_stopped_hw_queues(&self) {
        // SAFETY: By the type invariants the queue is valid.
        unsafe { bindings::blk_mq_start_stopped_hw_queues(self.queue(), true) };
    }
}

impl<T: Operations> Drop for GenDisk<T> {
    fn drop(&mut self) {
        // The removal waits for requests, which have to reach the driver for that.
        self.unquiesce();
        self.start_stopped_hw_queues();
        self.kick_requeue_list();
        self.remove();
        // The removal has waited for this work, but it may have been queued again since. Nothing
        // can queue it any more, because that takes a shared reference.
        //
        // SAFETY: By the type invariants the queue is valid; the work was initialised with it.
        unsafe { bindings::cancel_delayed_work_sync(&raw mut (*self.queue()).requeue_work) };

        // Openers that still have the disk open can call the file operations, which find no data
        // from now on. The RCU grace period waits for calls that have found the data, and for calls
        // of `queue_rq` that have ended the last request and still run.
        //
        // SAFETY: By the type invariants the disk is valid; the field is only read by the file
        // operations, as one word.
        unsafe { (&raw mut (*self.disk).private_data).write_volatile(ptr::null_mut()) };
        // SAFETY: `synchronize_rcu` requires a context that may sleep, as `put_disk` does.
        unsafe { bindings::synchronize_rcu() };

        // SAFETY: By the type invariants this is our reference.
        unsafe { bindings::put_disk(self.disk) };

        // SAFETY: By the type invariants this came from `into_foreign`. blk-mq no longer uses it:
        // the disk was removed or, if it was never added, freed. File operations have taken a
        // reference of their own, or find no data.
        drop(unsafe { Arc::<T::QueueData>::from_foreign(self.queue_data) });
    }
}

/// The file operations of a disk of `T`.
///
/// They can be called for a disk that was removed, by openers from before the removal. The opener
/// holds a reference to the module, but the driver's data may not exist any more.
struct FileOperations<T: Operations>(PhantomData<T>);

impl<T: Operations> FileOperations<T> {
    /// Calls `f` with the driver's data, or fails with `ENXIO` if the disk was removed.
    ///
    /// # Safety
    ///
    /// `disk` is a disk of `T`.
    unsafe fn with_data<R>(
        disk: *mut bindings::gendisk,
        f: impl FnOnce(ArcBorrow<'_, T::QueueData>) -> Result<R>,
    ) -> Result<R> {
        let data: Arc<T::QueueData> = {
            let _guard = rcu::read_lock();
            // SAFETY: As the caller promises, `disk` is valid; the field is written as one word.
            let data = unsafe { (&raw const (*disk).private_data).read_volatile() };
            if data.is_null() {
                return Err(ENXIO);
            }
            // SAFETY: By the invariants of `GenDisk` the pointer comes from `into_foreign`. The
            // code that takes it back clears the field first, and then waits for this RCU reader.
            unsafe { Arc::<T::QueueData>::borrow(data) }.into()
        };
        f(data.as_arc_borrow())
    }

    /// # Safety
    ///
    /// For the block layer: `disk` is a disk of `T`.
    unsafe extern "C" fn open(disk: *mut bindings::gendisk, mode: bindings::blk_mode_t) -> c_int {
        let mode = OpenMode::from_raw(mode);
        // SAFETY: As the caller promises.
        from_result(|| unsafe { Self::with_data(disk, |data| T::open(data, mode)).map(|()| 0) })
    }

    /// # Safety
    ///
    /// For the block layer: `disk` is a disk of `T`.
    unsafe extern "C" fn release(disk: *mut bindings::gendisk) {
        // A disk that was removed has nothing to release.
        //
        // SAFETY: As the caller promises.
        let _ = unsafe {
            Self::with_data(disk, |data| {
                T::release(data);
                Ok(())
            })
        };
    }

    /// # Safety
    ///
    /// For the block layer: `bdev` is a disk of `T` or a partition of one.
    unsafe extern "C" fn ioctl(
        bdev: *mut bindings::block_device,
        _mode: bindings::blk_mode_t,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_int {
        // SAFETY: As the caller promises.
        let result = unsafe { Self::with_data((*bdev).bd_disk, |data| T::ioctl(data, cmd, arg)) };
        result.unwrap_or_else(|error| error.to_errno())
    }

    /// # Safety
    ///
    /// For the block layer: `disk` is a disk of `T`, and `geo` valid for writes.
    unsafe extern "C" fn getgeo(
        disk: *mut bindings::gendisk,
        geo: *mut bindings::hd_geometry,
    ) -> c_int {
        from_result(|| {
            // SAFETY: As the caller promises, `disk` is valid.
            let capacity = unsafe { bindings_ext::get_capacity(disk) };
            // SAFETY: As the caller promises.
            let geometry = unsafe { Self::with_data(disk, |data| T::getgeo(data, capacity))? };
            let geo = geo.cast::<bindings_ext::hd_geometry>();
            // SAFETY: As the caller promises.
            unsafe {
                (*geo).heads = geometry.heads;
                (*geo).sectors = geometry.sectors;
                (*geo).cylinders = geometry.cylinders;
            }
            Ok(0)
        })
    }

    const TABLE: bindings::block_device_operations = bindings::block_device_operations {
        submit_bio: None,
        poll_bio: None,
        open: if T::HAS_OPEN { Some(Self::open) } else { None },
        release: if T::HAS_RELEASE {
            Some(Self::release)
        } else {
            None
        },
        ioctl: if T::HAS_IOCTL {
            Some(Self::ioctl)
        } else {
            None
        },
        // The argument of an ioctl of a driver is a number, or a pointer to data with the same
        // layout for 32-bit programs.
        #[cfg(CONFIG_COMPAT)]
        compat_ioctl: if T::HAS_IOCTL {
            Some(bindings::blkdev_compat_ptr_ioctl)
        } else {
            None
        },
        #[cfg(not(CONFIG_COMPAT))]
        compat_ioctl: None,
        check_events: None,
        unlock_native_capacity: None,
        getgeo: if T::HAS_GETGEO {
            Some(Self::getgeo)
        } else {
            None
        },
        set_read_only: None,
        free_disk: None,
        swap_slot_free_notify: None,
        report_zones: None,
        devnode: None,
        get_unique_id: None,
        owner: this_module().as_ptr(),
        pr_ops: ptr::null(),
        alternative_gpt_sector: None,
    };

    const fn build() -> &'static bindings::block_device_operations {
        &Self::TABLE
    }
}
