// SPDX-License-Identifier: GPL-2.0-only

//! Module parameters of the backend.

use kernel_ext::base::module_param::module_params;

module_params! {
    /// The device to bind to.
    pub(crate) static DEVICE("device", 0o644): u32 = 51728,
        "Virtual device number of the one device to take";
    /// The [`Misbehaviour`](crate::misbehaviour::Misbehaviour).
    pub(crate) static MISBEHAVIOUR("misbehaviour", 0o644): u32 = 0,
        "0: nothing; 1, 2, 3: status of a write, a write, a flush; 4, 5, 6: id, id twice, operation; 7, 8: too many, too few responses; 9: keep pages; 10: silence; 11: peek; 12: lose an event; 13: miss an event; 14: lag";
    /// Keeps pages of ended connections mapped.
    pub(crate) static HOARD("hoard", 0o644): bool = false, "Keep the pages of connections that have ended mapped";
    /// Number of ended connections whose pages are mapped.
    pub(crate) static HOARDED("hoarded", 0o444): u32 = 0, "Connections that have ended and are mapped";
    /// Number of requests that got no response.
    pub(crate) static IGNORED("ignored", 0o444): u32 = 0, "Requests that got no response";
    /// Offers barriers in place of flushes.
    pub(crate) static BARRIER("barrier", 0o644): bool = false, "Offer a barrier, and no flush";
}
