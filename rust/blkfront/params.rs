// SPDX-License-Identifier: GPL-2.0-only

//! Module parameters: those of `xen-blkfront`, with its names and defaults, and three timeouts.

use kernel::prelude::*;

use kernel_ext::base::{
    cpu,
    module_param::module_params, //
};

use blkif::{
    negotiate::FrontLimits,
    ring::MAX_PAGE_ORDER,
    wire::DIRECT_SEGMENTS, //
};

module_params! {
    /// Largest number of segments of an indirect request.
    static MAX_INDIRECT_SEGMENTS("max_indirect_segments", 0o444): u32 = 32,
        "Maximum amount of segments in indirect requests (default is 32)";
    /// Largest number of rings of a disk.
    static MAX_QUEUES("max_queues", 0o444): u32 = 4,
        "Maximum number of hardware queues/rings used per virtual disk (default is 4)";
    /// Largest page order of a ring: it has `1 << order` pages.
    static MAX_RING_PAGE_ORDER("max_ring_page_order", 0o444): i32 = 0,
        "Maximum order of pages to be used for the shared ring (default is 0, at most 4)";
    /// `false`: data is always copied to pages that contain nothing else.
    static TRUSTED("trusted", 0o644): bool = true,
        "Is the backend trusted with the pages of requests? If not, all data is bounced (default is Y)";
    /// `true`: persistent grants are used if the backend offers them.
    static FEATURE_PERSISTENT("feature_persistent", 0o644): bool = true,
        "Use persistent grants if the backend supports them (default is Y)";
    /// Time without a response to requests in flight after which a disk that is detached is no
    /// longer written back, in seconds.
    static DETACH_TIMEOUT("detach_timeout", 0o644): u32 = 8,
        "Seconds without a response after which a detached disk is no longer written back (default is 8)";
    /// Time after which a request times out, in seconds.
    static IO_TIMEOUT("io_timeout", 0o644): u32 = 30,
        "Seconds after which the ring is checked for a request without a response; the connection is closed after ten times that; 0: checked every 30 seconds, never closed (default is 30)";
    /// Time for which a disk waits for a disconnected backend, in seconds.
    static RECONNECT_TIMEOUT("reconnect_timeout", 0o644): u32 = 300,
        "Seconds that a disk waits for a disconnected backend before it is removed and its requests fail (default is 300)";
}

/// Longest request timeout, in seconds: 12 days. Its milliseconds and jiffies fit into 32 bits.
const MAX_IO_TIMEOUT: u32 = 1 << 20;

/// Returns the request timeout of a new disk in milliseconds; 0 selects the default of the block
/// layer.
pub(crate) fn io_timeout_ms() -> u32 {
    IO_TIMEOUT.get().min(MAX_IO_TIMEOUT).saturating_mul(1_000)
}

/// Returns `true` if a connection is closed when requests get no response.
pub(crate) fn gives_up() -> bool {
    IO_TIMEOUT.get() != 0
}

/// Returns the time for which a disk waits for a disconnected backend, in milliseconds.
pub(crate) fn reconnect_timeout_ms() -> i64 {
    i64::from(RECONNECT_TIMEOUT.get()).saturating_mul(1_000)
}

/// Largest number of segments of a block request: as many as fit into the smallest ring without
/// indirect requests. A backend without indirect requests can replace one that had them, and a
/// request must still fit then.
const MAX_SEGMENTS: u32 = MAX_PARTS as u32 * DIRECT_SEGMENTS as u32;

/// Largest number of slots of a block request: all slots of the smallest ring.
pub(crate) const MAX_PARTS: usize = 32;

/// Replaces invalid values, so that sysfs shows the values that are used.
///
/// Context: once, when the module is loaded.
pub(crate) fn check() {
    let segments = MAX_INDIRECT_SEGMENTS.get();
    if segments > MAX_SEGMENTS {
        pr_info!("max_indirect_segments = {segments}: using {MAX_SEGMENTS}\n");
    }
    MAX_INDIRECT_SEGMENTS.set(max_segments().into());
    let order = MAX_RING_PAGE_ORDER.get();
    if !(0..=MAX_PAGE_ORDER as i32).contains(&order) {
        pr_info!("max_ring_page_order = {order}: using {MAX_PAGE_ORDER}\n");
        MAX_RING_PAGE_ORDER.set(MAX_PAGE_ORDER as i32);
    }
    let queues = MAX_QUEUES.get();
    let cpus = cpu::online();
    if queues > cpus {
        pr_info!("max_queues = {queues}: using {cpus}, the number of CPUs\n");
        MAX_QUEUES.set(cpus);
    }
}

/// Returns the offer that the parameters allow.
///
/// `trusted` is the device's node of that name.
pub(crate) fn front_limits(trusted: bool) -> FrontLimits {
    FrontLimits {
        max_ring_page_order: u32::try_from(MAX_RING_PAGE_ORDER.get()).unwrap_or(0),
        max_queues: MAX_QUEUES.get(),
        max_indirect_segments: max_segments().into(),
        persistent: FEATURE_PERSISTENT.get(),
        trusted: trusted && TRUSTED.get(),
    }
}

/// Returns the largest number of segments of a block request, with any backend.
pub(crate) fn max_segments() -> u16 {
    MAX_INDIRECT_SEGMENTS
        .get()
        .clamp(DIRECT_SEGMENTS as u32, MAX_SEGMENTS) as u16
}

/// Returns the time without a response to requests in flight after which a disk that is being
/// removed is no longer written back, in milliseconds.
pub(crate) fn detach_timeout_ms() -> i64 {
    i64::from(DETACH_TIMEOUT.get()).saturating_mul(1000)
}
