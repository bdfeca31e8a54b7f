// SPDX-License-Identifier: GPL-2.0-only

//! A RAM disk that tests `kernel_ext::block` without Xen.
//!
//! The disk is `/dev/rblk0`. Parameters choose how each request is completed, see [`Mode`]. Writable
//! ones (`size_mib`, `gone`, the end of mode 3) take effect when the disk is opened the next time, for
//! instance by `blockdev --getsz`. The module can be unloaded after `gone` has removed the disk.
//! `lose` leaks memory, which the leak check of the tests must find.

#![deny(unsafe_code)]

mod disk;
mod mode;
mod store;

use kernel::prelude::*;

use kernel_ext::base::{
    kthread::{
        KThread,
        KThreadOptions, //
    },
    module_param::module_params, //
};

use crate::disk::Control;

module! {
    type: Ramdisk,
    name: "rblk_ramdisk",
    authors: ["The rblkif developers"],
    description: "RAM disk to test the block layer of rblkif",
    license: "GPL",
}

module_params! {
    /// Size of the disk.
    static SIZE_MIB("size_mib", 0o644): u32 = 16, "Size of the disk in MiB";
    /// The largest size of the disk.
    static MAX_MIB("max_mib", 0o444): u32 = 64, "Largest size of the disk in MiB";
    /// Hardware queues.
    static QUEUES("queues", 0o444): u32 = 1, "Number of hardware queues";
    /// Requests in flight.
    static DEPTH("depth", 0o444): u32 = 32, "Number of requests in flight in a hardware queue";
    /// Block size.
    static BLOCK_SIZE("block_size", 0o444): u32 = 512, "Logical block size in bytes";
    /// The mode of completion, see [`Mode`].
    static MODE("mode", 0o644): u32 = 0,
        "0: done at once, 1: by complete, 2: by a work item, 3: kept, 4: fail, 5: reject, 6: requeue, 7: refuse";
    /// The operations to which `mode` applies, as a mask.
    static ONLY("only", 0o644): u32 = u32::MAX,
        "Bits of operations treated so; 1: read, 2: write, 4: flush, 8: discard, 16: others";
    /// Number of requests that are completed normally before `mode` applies to one.
    static EVERY("every", 0o644): u32 = 1, "Treat each n-th request so; the others are done at once";
    /// Time limit of a request.
    static TIMEOUT_MS("timeout_ms", 0o444): u32 = 30_000, "Time-out of a request in ms";
    /// Set if the disk has a write cache.
    static WRITE_CACHE("write_cache", 0o444): bool = true, "Ask for flushes";
    /// Set if the disk supports FUA.
    static FUA("fua", 0o444): bool = false, "Ask for FUA";
    /// The unit of discards.
    static DISCARD_GRANULARITY("discard_granularity", 0o444): u32 = 0, "Unit of discards in bytes";
    /// The start of the first unit.
    static DISCARD_ALIGNMENT("discard_alignment", 0o444): u32 = 0,
        "Where the first unit of discards starts, in bytes";
    /// Set if the disk supports secure erase.
    static SECURE_ERASE("secure_erase", 0o444): bool = false,
        "Can erase securely: leaves ones, where a discard leaves zeroes";
    /// Set if the disk is read-only.
    static READ_ONLY("read_only", 0o444): bool = false, "The disk can only be read";
    /// The kind of memory that the module leaks.
    static LOSE("lose", 0o444): u32 = 0, "Allocations to lose, for kmemleak to find";
    /// Removes the disk.
    static GONE("gone", 0o644): bool = false, "The disk is pulled out";
}

/// The module: one disk with a thread. Both hold the module until the disk is removed.
struct Ramdisk {
    _thread: KThread,
}

impl kernel::Module for Ramdisk {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let control = Control::new()?;
        Control::make_disk(&control)?;
        let runner = control.clone();
        // Nothing fails after this: a module whose `init` fails is freed whatever references there are.
        let thread = KThread::spawn(fmt!("rblk0"), KThreadOptions::default(), move |current| {
            runner.run(current);
        })
        .inspect_err(|_| control.remove())?;
        if let Err(error) = control.add_disk() {
            pr_err!("rblk0: not added: {:?}\n", error);
            thread.stop();
        }
        for number in 0..LOSE.get() {
            if let Ok(lost) = KBox::new([number; 16], GFP_KERNEL) {
                KBox::leak(lost);
            }
        }
        Ok(Self { _thread: thread })
    }
}
