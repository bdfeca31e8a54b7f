// SPDX-License-Identifier: GPL-2.0-only

//! Module parameters, with the names of `xen-blkback` and the same effect by default.

use kernel_ext::base::module_param::module_params;

use blkif::{
    negotiate::BackLimits,
    ring::MAX_PAGE_ORDER, //
};

module_params! {
    /// Largest number of unused pages that a ring keeps to map grants to. With
    /// `max_persistent_grants`, it also sets the guarantee for pages in flight, see
    /// [`domain`](crate::domain).
    pub(crate) static MAX_BUFFER_PAGES("max_buffer_pages", 0o644): i32 = 1024,
        "Maximum number of free pages to keep in each ring";

    /// Largest number of persistent grants that a ring keeps mapped.
    pub(crate) static MAX_PERSISTENT_GRANTS("max_persistent_grants", 0o644): i32 = 1056,
        "Maximum number of grants to keep mapped in each ring";

    /// Time after which an unused persistent grant is unmapped; 0 means never.
    pub(crate) static PERSISTENT_GRANT_UNUSED_SECONDS("persistent_grant_unused_seconds", 0o644):
        u32 = 60,
        "Seconds after which an unused persistent grant is unmapped; 0: never";

    /// Largest number of rings of a frontend; 0 means one for each CPU that is online.
    pub(crate) static MAX_QUEUES("max_queues", 0o644): u32 = 0,
        "Maximum number of rings of a disk; 0: one for each CPU that is online";

    /// Largest size of a ring.
    pub(crate) static MAX_RING_PAGE_ORDER("max_ring_page_order", 0o444): i32 = 4,
        "Maximum size of a ring, as the binary logarithm of the number of its pages";

    /// `true` if persistent grants are offered.
    pub(crate) static FEATURE_PERSISTENT("feature_persistent", 0o644): bool = true,
        "Offer persistent grants to frontends";

    /// Time for which a ring keeps no unused pages after memory was short.
    pub(crate) static BUFFER_SQUEEZE_DURATION_MS("buffer_squeeze_duration_ms", 0o644): u32 = 10,
        "Milliseconds for which no free pages are kept after memory was short";

    /// Not 0 if statistics of each ring are logged every ten seconds.
    pub(crate) static LOG_STATS("log_stats", 0o644): u32 = 0,
        "Print statistics of each ring every 10 seconds";
}

/// Returns the limits for the choice of a frontend, from the current parameters.
pub(crate) fn limits() -> BackLimits {
    let queues = match MAX_QUEUES.get() {
        0 => kernel_ext::base::cpu::online(),
        queues => queues,
    };
    BackLimits {
        max_ring_page_order: u32::try_from(MAX_RING_PAGE_ORDER.get())
            .unwrap_or(0)
            .min(MAX_PAGE_ORDER),
        max_queues: queues.max(1),
        persistent: FEATURE_PERSISTENT.get(),
    }
}
