// SPDX-License-Identifier: GPL-2.0-only
// error: E0599

//! The path of the other half is for callbacks alone.

use kernel::sync::aref::ARef;

use kernel_ext::xen::xenbus::Device;

fn misuse(device: &ARef<Device>) -> bool {
    device.otherend().is_ok()
}
