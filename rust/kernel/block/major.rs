// SPDX-License-Identifier: GPL-2.0-only

//! Ownership of a block major number, and of the minors of single disks.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    str::CStrExt,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        global_lock, //
    }, //
};

/// Number of minors of a major in Linux.
const MINORS: u32 = 1 << 20;

global_lock! {
    // SAFETY: `Minors` use it, and there are some only after `Major::register` has initialised it,
    // by their invariant; `Minors::reserve` looks at `STATE` first.
    unsafe(uninit) static RESERVED: Mutex<KVec<Range>> = KVec::new();
}

/// Minors that are reserved.
struct Range {
    first: u32,
    count: u32,
    /// `true` if the disk that has them was removed.
    removed: bool,
}

/// Values of `STATE`.
const UNUSED: i32 = 0;
const STARTING: i32 = 1;
const READY: i32 = 2;

/// The state of `RESERVED`: it is initialised when this is `READY`, and stays so.
static STATE: Atomic<i32> = Atomic::new(UNUSED);

/// A registered block major number, released when dropped.
///
/// # Invariants
///
/// `major` is registered under `name` by us.
pub struct Major {
    major: u32,
    name: &'static CStr,
}

impl Major {
    /// Registers `major`, which must not be 0, under the name that `/proc/devices` shows.
    ///
    /// Fails with `EBUSY` if another driver has registered it, or if this module has registered a
    /// major before.
    pub fn register(major: u32, name: &'static CStr) -> Result<Self> {
        if major == 0 {
            return Err(EINVAL);
        }
        STATE.cmpxchg(UNUSED, STARTING, Full).map_err(|_| EBUSY)?;
        // SAFETY: Only the first call gets here, as `STATE` is never `UNUSED` again.
        unsafe { RESERVED.init() };
        STATE.store(READY, Release);

        // SAFETY: `name` is `'static`; there is no probe function.
        to_result(unsafe { bindings::__register_blkdev(major, name.as_char_ptr(), None) })?;
        // INVARIANT: Registered above.
        Ok(Self { major, name })
    }

    /// Returns the number.
    pub fn number(&self) -> u32 {
        self.major
    }
}

impl Drop for Major {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this undoes our registration.
        unsafe { bindings::unregister_blkdev(self.major, self.name.as_char_ptr()) };
    }
}

/// Minors of this module's major, reserved in the module until dropped.
///
/// # Invariants
///
/// `RESERVED` is initialised and contains them.
pub struct Minors {
    major: u32,
    first: u32,
    count: u32,
}

impl Minors {
    /// Reserves `count` minors from `first` on, of the `major` that the module has registered.
    ///
    /// Fails with `EBUSY` if another disk has one of them, `EOPENSTALE` if all disks that have one
    /// of them were removed and are still open, `EINVAL` if there are no such minors, and `ENODEV`
    /// if no major was registered.
    pub fn reserve(major: u32, first: u32, count: u32) -> Result<Self> {
        let end = first.checked_add(count).ok_or(EINVAL)?;
        if count == 0 || end > MINORS {
            return Err(EINVAL);
        }
        if STATE.load(Acquire) != READY {
            return Err(ENODEV);
        }

        let mut reserved = RESERVED.lock();
        let shares =
            |range: &&Range| first < range.first.wrapping_add(range.count) && range.first < end;
        if let Some(range) = reserved
            .iter()
            .filter(shares)
            .min_by_key(|range| range.removed)
        {
            return Err(if range.removed { EOPENSTALE } else { EBUSY });
        }
        let range = Range {
            first,
            count,
            removed: false,
        };
        reserved.push(range, GFP_KERNEL)?;
        // INVARIANT: `STATE` is `READY`, and they were added just now.
        Ok(Self {
            major,
            first,
            count,
        })
    }

    /// Records that the disk that has the minors was removed: only its openers still use them.
    pub(super) fn set_removed(&self) {
        let mut reserved = RESERVED.lock();
        for range in reserved
            .iter_mut()
            .filter(|range| range.first == self.first)
        {
            range.removed = true;
        }
    }

    /// Returns the major.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// Returns the first of the minors.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// Returns the number of minors.
    pub fn count(&self) -> u32 {
        self.count
    }
}

impl Drop for Minors {
    fn drop(&mut self) {
        let mut reserved = RESERVED.lock();
        reserved.retain(|range| range.first != self.first);
        if reserved.is_empty() {
            // A static is not dropped when the module is unloaded, so free its memory.
            *reserved = KVec::new();
        }
    }
}
