// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! The path of the other side can change after a callback, so it has to be copied.

use kernel::{
    device::Core,
    prelude::*, //
};

use kernel_ext::xen::xenbus::Device;

fn misuse(device: &Device<Core<'_>>) -> Result<&'static CStr> {
    device.otherend()
}
