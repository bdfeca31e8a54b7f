// SPDX-License-Identifier: GPL-2.0-only

//! Module parameters: names and defaults of `xen-blkback`.

use kernel_ext::base::module_param::module_params;

use blkif::{
    negotiate::BackLimits,
    ring::MAX_PAGE_ORDER, //
};

module_params! {
    /// Pages for mapping that a ring keeps when it does not need them.
    pub(crate) static MAX_BUFFER_PAGES("max_buffer_pages", 0o644): i32 = 1024,
        "Maximum number of free pages to keep in each ring";

    /// Persistent grants of a ring.
    pub(crate) static MAX_PERSISTENT_GRANTS("max_persistent_grants", 0o644): i32 = 1056,
        "Maximum number of grants to keep mapped in each ring";

    /// How long a persistent grant is kept that nobody uses; 0 is for ever.
    pub(crate) static PERSISTENT_GRANT_UNUSED_SECONDS("persistent_grant_unused_seconds", 0o644):
        u32 = 60,
        "Seconds after which an unused persistent grant is unmapped; 0: never";

    /// Rings that a frontend may have; 0 is one for each CPU.
    pub(crate) static MAX_QUEUES("max_queues", 0o644): u32 = 0,
        "Maximum number of rings of a disk; 0: one for each CPU that is online";

    /// Size of the rings that a frontend may have.
    pub(crate) static MAX_RING_PAGE_ORDER("max_ring_page_order", 0o444): i32 = 4,
        "Maximum size of a ring, as the binary logarithm of its pages";

    /// Whether persistent grants are offered.
    pub(crate) static FEATURE_PERSISTENT("feature_persistent", 0o644): bool = true,
        "Offer persistent grants to frontends";

    /// How long a ring keeps free pages when memory is short.
    pub(crate) static BUFFER_SQUEEZE_DURATION_MS("buffer_squeeze_duration_ms", 0o644): u32 = 10,
        "Milliseconds for which no free pages are kept after memory was short";

    /// Whether numbers are printed now and then.
    pub(crate) static LOG_STATS("log_stats", 0o644): u32 = 0,
        "Print statistics of each ring every 10 seconds";
}

/// What a frontend may choose, as the parameters are now.
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
