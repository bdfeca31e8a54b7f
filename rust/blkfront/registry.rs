// SPDX-License-Identifier: GPL-2.0-only

//! The disks that there are, removed ones included.
//!
//! A disk that was removed stays until its last opener has gone, and another one can get its name in
//! the meantime. That one has other device numbers, so nothing takes it for the old one. But file
//! systems also have directories in sysfs and procfs by the name of their disk: a second file system
//! of that name cannot be mounted, and the attempt ends with a stack trace in the log. So the new
//! disk refuses exclusive openers for as long as the old one has some.
//!
//! The lock is taken under the `open_mutex` of a disk, so no disk is dropped under it.

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

/// What can be open for exclusive use.
pub(crate) trait Claimed: Send + Sync {
    /// Returns `true` if it is open for exclusive use now.
    fn is_claimed(&self) -> bool;
}

/// Which of the disks of one name it is: a later one has a higher number.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Serial(u64);

impl Serial {
    /// Returns a number that no other disk has.
    pub(crate) fn new() -> Self {
        static NEXT: Atomic<u64> = Atomic::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

struct Entry {
    name: DiskName,
    serial: Serial,
    disk: Arc<dyn Claimed>,
}

static DISKS: GlobalMutex<KVec<Entry>> = GlobalMutex::new(KVec::new());

/// A disk that is registered as long as this lives.
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
            // A static is not dropped: leave no memory behind.
            *disks = KVec::new();
        }
    }
}

/// Returns `true` if a disk that had this name earlier is still open for exclusive use.
pub(crate) fn has_claimed_predecessor(name: DiskName, serial: Serial) -> bool {
    DISKS
        .lock()
        .iter()
        .any(|entry| entry.name == name && entry.serial < serial && entry.disk.is_claimed())
}
