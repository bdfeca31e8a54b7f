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

// In whose name devices are claimed: that of all modules that link this crate, so that one can
// claim what another one has. Only its address counts, which is of a variable of the kernel, as one
// of a module goes with it; nothing else in the kernel claims devices for this address.
use bindings_ext::xen_domain_type as HOLDER;

/// Number of attempts to empty a page cache that others write to.
const FORGET_TRIES: usize = 3;

/// Bios that a device can always have in flight, however short memory is.
const RESERVED_BIOS: ffi::c_uint = 2;

/// The number of a block device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DeviceNumber(bindings::dev_t);

impl DeviceNumber {
    /// Creates a number, or returns `None` if one of the two is too large: 12 bits and 20 bits.
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
    /// Reading alone.
    ReadOnly,
    /// Reading and writing. To open a read-only device so fails with `EACCES`.
    ReadWrite,
}

/// Says whether others may have a block device exclusively while it is open.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Claim {
    /// Others may not, and the device is not opened if it has another exclusive opener.
    Exclusive,
    /// It is opened whoever has it.
    None,
}

/// The discards that a block device supports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiscardSupport {
    /// Preferred size and alignment in bytes.
    pub granularity: u32,
    /// Offset in bytes of the first aligned position.
    pub alignment: u32,
    /// Sectors that the device discards at once.
    pub max_sectors: u32,
    /// The device can also make the data unrecoverable.
    pub secure: bool,
}

/// An open block device, with a reserve of bios for I/O on it.
///
/// The last reference must be dropped in process context.
///
/// # Invariants
///
/// - `file` is an open block device, owned.
/// - `bios` is an initialised bio set. Whoever takes a bio of it keeps a reference to this until
///   the bio has gone back.
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
        // SAFETY: Any number may be asked for. The holder, if any, is only compared with others.
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
        // Not `bdev_fput`, which leaves the rest to a work item that all kernel threads share:
        // there a device that does not answer would keep all others waiting.
        //
        // SAFETY: By the type invariant, and it is not used after this.
        unsafe { bindings::__fput_sync(self.0.as_ptr()) };
    }
}

impl BlockDevice {
    /// Opens a device. May sleep.
    ///
    /// If it is claimed, only this module can have it exclusively at the same time: no file system
    /// can be mounted from it, and it can be part of no other device. This module may open it
    /// again.
    ///
    /// `ENXIO`: there is none. `EACCES`: it is read-only. `ENOMEDIUM`: the drive is empty. `EBUSY`:
    /// it has another exclusive opener.
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

    /// Returns the mode in which it was opened.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Returns the size in sectors of 512 bytes. Changes when the device is resized.
    #[inline]
    pub fn sectors(&self) -> u64 {
        // SAFETY: By the type invariant, the device is open. So for all below.
        unsafe { bindings_ext::bdev_nr_sectors(self.bdev()) }
    }

    /// Returns the unit of I/O in bytes: a power of two, at least 512.
    pub fn logical_block_size(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_logical_block_size(self.bdev()) }
    }

    /// Returns the unit in bytes that the device can write without reading first.
    pub fn physical_block_size(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_physical_block_size(self.bdev()) }
    }

    /// Returns `true` if what was written is durable only after a flush.
    pub fn write_cache(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_write_cache(self.bdev()) }
    }

    /// Returns `true` if the device refuses writes, whatever it was opened for.
    pub fn read_only(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_read_only(self.bdev()) }
    }

    /// Returns `true` if the device is a CD-ROM drive.
    pub fn is_cdrom(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings_ext::bdev_is_cdrom(self.bdev()) }
    }

    /// Returns the kernel's count of disks when this one was made, or got another medium. Numbers
    /// are used again, this one is not.
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
    /// is coherent with it. Returns `false` if pages are left because they are in use: those were
    /// clean at the last attempt. May sleep for long.
    ///
    /// The cache of the device is meant, those of its partitions, and that of the disk whose
    /// partition it is. What was written to a device that is made of this one is not seen here.
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
                // It has gone meanwhile, and its cache too.
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
    // SAFETY: By the requirements of this function; where it begins never changes.
    let first = unsafe { (*partition).bd_start_sect } << bindings::SECTOR_SHIFT;
    // SAFETY: By the requirements of this function.
    let length = unsafe { bindings_ext::bdev_nr_sectors(partition) } << bindings::SECTOR_SHIFT;
    let last = first.saturating_add(length.saturating_sub(1));
    (first as i64, last as i64)
}

/// Writes back a range of a device's page cache, given by its first byte and its last one, and
/// forgets it. Returns `false` if pages are left because they are in use.
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
        // Drops what CPUs hold of it, and all that is not in use.
        //
        // SAFETY: As above.
        unsafe { bindings::invalidate_bdev(bdev) };
        // Unmaps what is mapped, and says what is in use.
        //
        // SAFETY: As above; the mapping is there as long as the device is.
        let left = to_result(unsafe {
            bindings::invalidate_inode_pages2_range(
                (*bdev).bd_mapping,
                (first >> bindings::PAGE_SHIFT) as ffi::c_ulong,
                (last >> bindings::PAGE_SHIFT) as ffi::c_ulong,
            )
        });
        match left {
            Ok(()) => return Ok(true),
            // In use, or written to again.
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
