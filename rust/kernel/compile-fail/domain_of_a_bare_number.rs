// SPDX-License-Identifier: GPL-2.0-only
// error: E0624

//! The domain to share memory with is that of a device, not any number.

use kernel_ext::xen::DomId;

fn misuse() -> DomId {
    DomId::from_raw(0)
}
