// SPDX-License-Identifier: GPL-2.0-only

//! Open block devices.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use core::ptr::NonNull;

use kernel::{
    bindings,
    error::{
        from_err_ptr,
        to_result, //
    },
    ffi,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

// The holder of all claims of all modules that link this crate, so that one module can claim a
// device that another one has claimed. Only its address matters. It is the address of a variable of
// the kernel, because a variable of a module is freed with the module; no other code claims devices
// for it.
use bindings_ext::xen_domain_type as HOLDER;

/// Number of attempts to empty a page cache to which other tasks write.
const FORGET_TRIES: usize = 3;

/// Number of bios that a device can have in flight even if memory is short.
const RESERVED_BIOS: ffi::c_uint = 2;

/// The number of a block device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DeviceNumber(bindings::dev_t);

impl DeviceNumber {
    /// Creates a device number, or returns `None` if the major exceeds 12 bits or the minor 20
    /// bits.
    pub fn new(major: u32, minor: u32) -> Option<Self> {
        (major < 1 << 12 && minor < 1 << Self::MINOR_BITS)
            .then_some(Self(major << Self::MINOR_BITS | minor))
    }

    const MINOR_BITS: u32 = bindings::MINORBITS;

    /// Returns the major number.
    pub fn major(&self) -> u32 {
        self.0 >> Self::MINOR_BITS
    }

    /// Returns the minor number.
    pub fn minor(&self) -> u32 {
        self.0 & ((1 << Self::MINOR_BITS) - 1)
    }
}

/// The mode in which a block device is opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Only reading.
    ReadOnly,
    /// Reading and writing. Opening a read-only device fails with `EACCES`.
    ReadWrite,
}

/// Tells whether a block device is opened exclusively.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Claim {
    /// The device is opened exclusively, which fails if another holder has it open exclusively.
    Exclusive,
    /// The device is opened even if it is open exclusively.
    None,
}

/// The discards that a block device supports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiscardSupport {
    /// Preferred size and alignment in bytes.
    pub granularity: u32,
    /// Offset in bytes of the first aligned position.
    pub alignment: u32,
    /// Largest number of sectors that the device discards at once.
    pub max_sectors: u32,
    /// `true` if the device supports secure erase.
    pub secure: bool,
}

/// An open block device, with a reserve of bios for I/O on it.
///
/// The last reference must be dropped in process context.
///
/// # Invariants
///
/// - `file` is an open block device, owned.
/// - `bios` is an initialised bio set. The owner of a bio of the set has a reference to this until
///   the bio is freed.
#[pin_data(PinnedDrop)]
pub struct BlockDevice {
    file: File,
    access: Access,
    #[pin]
    pub(super) bios: Opaque<bindings::bio_set>,
}

// SAFETY: The functions below may be called from any thread.
unsafe impl Send for BlockDevice {}
// SAFETY: As above, and at the same time: the block layer has its own locks.
unsafe impl Sync for BlockDevice {}

/// The open file of a block device.
///
/// # Invariants
///
/// Points to a file of a block device, owned.
struct File(NonNull<bindings::file>);

impl File {
    fn open(number: DeviceNumber, access: Access, claim: Claim) -> Result<Self> {
        // `BLK_OPEN_READ` and `BLK_OPEN_WRITE`.
        let mode = match access {
            Access::ReadOnly => 1,
            Access::ReadWrite => 3,
        };
        let holder = match claim {
            Claim::None => core::ptr::null(),
            Claim::Exclusive => &raw const HOLDER,
        };
        // SAFETY: Any number is allowed. The holder, if any, is only compared with others.
        let file = from_err_ptr(unsafe {
            bindings::bdev_file_open_by_dev(
                number.0,
                mode,
                holder.cast_mut().cast(),
                core::ptr::null(),
            )
        })?;
        // INVARIANT: Opened just now.
        NonNull::new(file).map(Self).ok_or(ENODEV)
    }

    #[inline]
    fn bdev(&self) -> *mut bindings::block_device {
        // SAFETY: By the type invariant.
        unsafe { bindings::file_bdev(self.0.as_ptr()) }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // Not `bdev_fput`, which has the file closed by a work item that all kernel threads share:
        // a device that does not respond would delay all others there.
        //
        // SAFETY: By the type invariant, and it is not used after this.
        unsafe { bindings::__fput_sync(self.0.as_ptr()) };
    }
}

impl BlockDevice {
    /// Opens a device.
    ///
    /// If it is claimed, no file system can be mounted from it and it cannot be part of another
    /// device meanwhile. Modules that link this crate may open it again.
    ///
    /// Fails with `ENXIO` if there is no such device, `EACCES` if it is read-only, `ENOMEDIUM` if
    /// the drive is empty, and `EBUSY` if another holder has it open exclusively.
    ///
    /// Context: may sleep.
    pub fn open(number: DeviceNumber, access: Access, claim: Claim) -> Result<Arc<Self>> {
        let file = File::open(number, access, claim)?;
        let device = try_pin_init!(Self {
            // INVARIANT: The file is open, the set initialised.
            file,
            access,
            bios <- Opaque::try_ffi_init(|bios: *mut bindings::bio_set| {
                // SAFETY: `bios` is memory for a set; a set starts as zeroes.
                unsafe { bios.write_bytes(0, 1) };
                let flags = bindings::BIOSET_NEED_BVECS | bindings::BIOSET_PERCPU_CACHE;
                // SAFETY: The set stays in place, since it is pinned.
                to_result(unsafe { bindings::bioset_init(bios, RESERVED_BIOS, 0, flags as ffi::c_int) })
            }),
        });
        Arc::pin_init(device, GFP_KERNEL)
    }

    #[inline]
    pub(super) fn bdev(&self) -> *mut bindings::block_device {
        self.file.bdev()
    }

    /// Returns the mode in which the device was opened.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Returns the size in sectors of 512 bytes.
    ///
    /// Changes when the device is resized.
    #[inline]
    pub fn sectors(&self) -> u64 {
        // SAFETY: By the type invariant, the device is open; also for all functions below.
        unsafe { bindings_ext::bdev_nr_sectors(self.bdev()) }
    }

    /// Returns the logical block size in bytes: a power of two, at least 512.
    pub fn logical_block_size(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_logical_block_size(self.bdev()) }
    }

    /// Returns the physical block size in bytes.
    pub fn physical_block_size(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_physical_block_size(self.bdev()) }
    }

    /// Returns `true` if the device has a write cache, so that written data is durable only after a
    /// flush.
    pub fn write_cache(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_write_cache(self.bdev()) }
    }

    /// Returns `true` if the device is read-only now, even if it was opened for writing.
    pub fn read_only(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_read_only(self.bdev()) }
    }

    /// Returns `true` if the device is a CD-ROM drive.
    pub fn is_cdrom(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_is_cdrom(self.bdev()) }
    }

    /// Returns the sequence number of the disk, which is not reused, unlike its device number.
    ///
    /// The disk gets it when it is created, and another one when its medium changes.
    pub fn disk_sequence(&self) -> u64 {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_diskseq(self.bdev()) }
    }

    /// Returns `true` if the medium can be removed.
    pub fn is_removable(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_is_removable(self.bdev()) }
    }

    /// Returns the discards that the device supports, if any.
    pub fn discard(&self) -> Option<DiscardSupport> {
        let bdev = self.bdev();
        // SAFETY: By the type invariant; for all four.
        unsafe {
            let max_sectors = bindings_ext::bdev_max_discard_sectors(bdev);
            (max_sectors != 0).then(|| DiscardSupport {
                max_sectors,
                granularity: bindings_ext::bdev_discard_granularity(bdev),
                alignment: bindings::bdev_discard_alignment(bdev),
                secure: bindings_ext::bdev_max_secure_erase_sectors(bdev) != 0,
            })
        }
    }

    /// Writes back the page cache of the device and empties it, so that I/O that bypasses the cache
    /// is coherent with it.
    ///
    /// Returns `false` if pages are left because they are in use: those were clean at the last
    /// attempt.
    ///
    /// This covers the page caches of the device, of its partitions, and of the disk that it is a
    /// partition of. It does not cover devices that are built on this one.
    ///
    /// Context: may sleep for a long time.
    pub fn sync_and_forget_cache(&self) -> Result<bool> {
        let bdev = self.bdev();
        let mut empty = self.empties_partitions()?;
        // SAFETY: By the type invariant.
        let disk = unsafe { bindings_ext::bdev_disk_of_partition(bdev) };
        if !disk.is_null() {
            // SAFETY: By the type invariant; the disk is there as long as its partition is open.
            empty &= unsafe { sync_and_forget(disk, range_on_disk(bdev)) }?;
        }
        // SAFETY: By the type invariant.
        empty &= unsafe { sync_and_forget(bdev, (0, i64::MAX)) }?;
        Ok(empty)
    }

    fn empties_partitions(&self) -> Result<bool> {
        let mut number = 0;
        let mut empty = true;
        loop {
            // SAFETY: By the type invariant; `number` is valid for a write.
            let partition =
                unsafe { bindings_ext::bdev_next_cached_partition(self.bdev(), &mut number) };
            if partition == 0 {
                return Ok(empty);
            }
            match File::open(DeviceNumber(partition), Access::ReadOnly, Claim::None) {
                // SAFETY: The partition is open.
                Ok(file) => empty &= unsafe { sync_and_forget(file.bdev(), (0, i64::MAX)) }?,
                // The partition was removed meanwhile, with its cache.
                Err(error) if error == ENXIO => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Returns the range of a partition on its disk: its first byte and its last one.
///
/// # Safety
///
/// The partition is open.
unsafe fn range_on_disk(partition: *mut bindings::block_device) -> (i64, i64) {
    // SAFETY: By the requirements of this function; the start of a partition never changes.
    let first = unsafe { (*partition).bd_start_sect } << bindings::SECTOR_SHIFT;
    // SAFETY: By the requirements of this function.
    let length = unsafe { bindings_ext::bdev_nr_sectors(partition) } << bindings::SECTOR_SHIFT;
    let last = first.saturating_add(length.saturating_sub(1));
    (first as i64, last as i64)
}

/// Writes back a range of a device's page cache, given by its first byte and its last one, and
/// empties it.
///
/// Returns `false` if pages are left because they are in use.
///
/// # Safety
///
/// The device is open, or a partition of it is.
unsafe fn sync_and_forget(
    bdev: *mut bindings::block_device,
    (first, last): (i64, i64),
) -> Result<bool> {
    for _ in 0..FORGET_TRIES {
        // SAFETY: By the requirements of this function.
        to_result(unsafe { bindings::sync_blockdev_range(bdev, first, last) })?;
        // Drops pages from the lists of the CPUs, and all pages that are not in use.
        //
        // SAFETY: As above.
        unsafe { bindings::invalidate_bdev(bdev) };
        // Unmaps mapped pages, and fails if pages are in use.
        //
        // SAFETY: As above; the mapping exists as long as the device.
        let left = to_result(unsafe {
            bindings::invalidate_inode_pages2_range(
                (*bdev).bd_mapping,
                (first >> bindings::PAGE_SHIFT) as ffi::c_ulong,
                (last >> bindings::PAGE_SHIFT) as ffi::c_ulong,
            )
        });
        match left {
            Ok(()) => return Ok(true),
            // Pages are in use, or were written to again.
            Err(error) if error == EBUSY => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

#[pinned_drop]
impl PinnedDrop for BlockDevice {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants. This was the last reference, so no bio of the set is
        // left.
        unsafe { bindings::bioset_exit(self.bios.get()) };
    }
}
