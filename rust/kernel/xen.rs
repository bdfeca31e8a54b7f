// SPDX-License-Identifier: GPL-2.0-only

//! Xen: communication with drivers in other domains.
//!
//! A split driver has a *frontend* in one domain and a *backend* in another. They find each other
//! and negotiate in [`xenstore`], a tree of small strings that a daemon stores; the kernel creates
//! a device for each side ([`xenbus`]). Then they share memory: the frontend *grants* pages, and
//! the backend maps or copies them ([`grant`]); the pages with the requests are the *ring*
//! ([`ring`]). They notify each other through *event channels* ([`events`]).
//!
//! Data from the other domain is untrusted until it is checked. Memory safety does not depend on
//! it: Xen checks grant references and ports, shared memory is only copied, by words or bytes, and
//! shared memory is freed only when Xen reports that the other domain has unmapped it.
//!
//! C headers: [`include/xen`](srctree/include/xen)

pub mod events;
pub mod grant;
pub mod ring;
pub mod xenbus;
pub mod xenstore;

use kernel::fmt;

/// The number of a domain.
///
/// Comes from a bound device ([`xenbus::Device::otherend_id`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DomId(u16);

impl DomId {
    /// The domain that this kernel runs in, as grant operations name it (`DOMID_SELF`).
    pub(crate) const SELF: Self = Self(bindings_ext::DOMID_SELF as u16);

    /// No domain (`DOMID_INVALID`): pages granted to it are accessible to no domain.
    pub const NONE: Self = Self(bindings_ext::DOMID_INVALID as u16);

    pub(crate) const fn from_raw(id: u16) -> Self {
        Self(id)
    }

    /// Returns the number, for messages and hypercalls.
    pub const fn value(self) -> u16 {
        self.0
    }
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Returns `true` if this kernel runs on Xen.
pub fn is_xen_domain() -> bool {
    // SAFETY: Only reads a variable that is set at boot.
    unsafe { bindings_ext::xen_domain() }
}

/// Returns `true` if this kernel runs on virtual hardware, and not as a PV guest.
///
/// Such a guest can have emulated devices, and a PV device can be the same disk as one of these.
pub fn is_hvm_domain() -> bool {
    // SAFETY: Only reads a variable that is set at boot.
    unsafe { bindings_ext::xen_hvm_domain() }
}

/// Returns `true` if disks of other domains may be used.
///
/// They may not if the kernel command line has `xen_nopv`, or if emulated disks are used instead
/// (`xen_emul_unplug`).
pub fn has_pv_disks() -> bool {
    // SAFETY: Only reads variables that are set at boot.
    unsafe { bindings_ext::xen_has_pv_disk_devices() }
}

/// Returns `true` if emulated disks were not unplugged and exist beside those of other domains.
pub fn has_pv_and_emulated_disks() -> bool {
    // SAFETY: Only reads variables that are set at boot.
    unsafe { bindings_ext::xen_has_pv_and_legacy_disk_devices() }
}
