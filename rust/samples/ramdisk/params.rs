// SPDX-License-Identifier: GPL-2.0-only

//! Module parameters.

use kernel_ext::base::module_param::module_params;

module_params! {
    /// Size of the disk.
    pub(crate) static SIZE_MIB("size_mib", 0o644): u32 = 16, "Size of the disk in MiB";
    /// The largest size of the disk.
    pub(crate) static MAX_MIB("max_mib", 0o444): u32 = 64, "Largest size of the disk in MiB";
    /// Hardware queues.
    pub(crate) static QUEUES("queues", 0o444): u32 = 1, "Number of hardware queues";
    /// Requests in flight.
    pub(crate) static DEPTH("depth", 0o444): u32 = 32, "Number of requests in flight in a hardware queue";
    /// Block size.
    pub(crate) static BLOCK_SIZE("block_size", 0o444): u32 = 512, "Logical block size in bytes";
    /// The mode of completion, see [`Mode`](crate::mode::Mode).
    pub(crate) static MODE("mode", 0o644): u32 = 0,
        "0: done at once, 1: by complete, 2: by a work item, 3: kept, 4: fail, 5: reject, 6: requeue, 7: refuse";
    /// The operations to which `mode` applies, as a mask.
    pub(crate) static ONLY("only", 0o644): u32 = u32::MAX,
        "Bits of operations treated so; 1: read, 2: write, 4: flush, 8: discard, 16: others";
    /// Number of requests that are completed normally before `mode` applies to one.
    pub(crate) static EVERY("every", 0o644): u32 = 1, "Treat each n-th request so; the others are done at once";
    /// Time limit of a request.
    pub(crate) static TIMEOUT_MS("timeout_ms", 0o444): u32 = 30_000, "Timeout of a request in ms";
    /// Set if the disk has a write cache.
    pub(crate) static WRITE_CACHE("write_cache", 0o444): bool = true, "Ask for flushes";
    /// Set if the disk supports FUA.
    pub(crate) static FUA("fua", 0o444): bool = false, "Ask for FUA";
    /// The unit of discards.
    pub(crate) static DISCARD_GRANULARITY("discard_granularity", 0o444): u32 = 0, "Unit of discards in bytes";
    /// The start of the first unit.
    pub(crate) static DISCARD_ALIGNMENT("discard_alignment", 0o444): u32 = 0,
        "Where the first unit of discards starts, in bytes";
    /// Set if the disk supports secure erase.
    pub(crate) static SECURE_ERASE("secure_erase", 0o444): bool = false,
        "Can erase securely: leaves ones, where a discard leaves zeroes";
    /// Set if the disk is read-only.
    pub(crate) static READ_ONLY("read_only", 0o444): bool = false, "The disk can only be read";
    /// The kind of memory that the module leaks.
    pub(crate) static LOSE("lose", 0o444): u32 = 0, "Allocations to lose, for kmemleak to find";
    /// Removes the disk.
    pub(crate) static GONE("gone", 0o644): bool = false, "The disk is pulled out";
}
