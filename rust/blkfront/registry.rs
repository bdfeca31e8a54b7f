// SPDX-License-Identifier: GPL-2.0-only

//! The registry of all disks of the guest, including removed disks that are still open.
//!
//! A removed disk exists until its last opener has closed it, and another disk can get its name in
//! the meantime. The new disk has other device numbers, so it is not mistaken for the old one. But
//! file systems also have directories in sysfs and procfs that are named after their disk: mounting
//! a file system of a second disk with that name fails with a stack trace in the log. So the new
//! disk refuses exclusive openers as long as the old one has any.
//!
//! Lock order: the `open_mutex` of a disk, then the lock of the registry. So no disk is dropped
//! while the registry is locked.

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
};

use kernel_ext::base::global_mutex::GlobalMutex;

use blkif::vdev::DiskName;

/// A disk that may be open for exclusive use.
pub(crate) trait Claimed: Send + Sync {
    /// Returns `true` if the disk is open for exclusive use.
    fn is_claimed(&self) -> bool;
}

/// A number that orders disks with the same name: later disks have higher numbers.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Serial(u64);

impl Serial {
    /// Returns a number that is higher than those of all earlier disks.
    pub(crate) fn new() -> Self {
        static NEXT: Atomic<u64> = Atomic::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// A disk in the registry.
struct Entry {
    name: DiskName,
    serial: Serial,
    disk: Arc<dyn Claimed>,
}

static DISKS: GlobalMutex<KVec<Entry>> = GlobalMutex::new(KVec::new());

/// The registration of a disk, which ends when it is dropped.
pub(crate) struct Registered {
    serial: Serial,
    /// Keeps the last reference from being dropped under the lock.
    _disk: Arc<dyn Claimed>,
}

impl Registered {
    /// Registers a disk.
    pub(crate) fn new(name: DiskName, serial: Serial, disk: Arc<dyn Claimed>) -> Result<Self> {
        let entry = Entry {
            name,
            serial,
            disk: disk.clone(),
        };
        DISKS.lock().push(entry, GFP_KERNEL)?;
        Ok(Self {
            serial,
            _disk: disk,
        })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut disks = DISKS.lock();
        disks.retain(|entry| entry.serial != self.serial);
        if disks.is_empty() {
            // A static is not dropped when the module is unloaded, so free its memory.
            *disks = KVec::new();
        }
    }
}

/// Returns `true` if an earlier disk of this name is still open for exclusive use.
pub(crate) fn has_claimed_predecessor(name: DiskName, serial: Serial) -> bool {
    DISKS
        .lock()
        .iter()
        .any(|entry| entry.name == name && entry.serial < serial && entry.disk.is_claimed())
}
