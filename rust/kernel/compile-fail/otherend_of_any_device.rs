// SPDX-License-Identifier: GPL-2.0-only
// error: E0599

//! The path of the other side can be read only in callbacks.

use kernel::sync::aref::ARef;

use kernel_ext::xen::xenbus::Device;

fn misuse(device: &ARef<Device>) -> bool {
    device.otherend().is_ok()
}
