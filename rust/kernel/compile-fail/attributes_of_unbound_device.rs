// SPDX-License-Identifier: GPL-2.0-only
// error: E0308

//! Only a bound device can get attributes, because unbinding removes them.

use kernel::{
    device::Device,
    prelude::*,
    sync::Arc, //
};

use kernel_ext::base::sysfs;

static FILES: [sysfs::Attribute<u32>; 0] = [];

fn misuse(device: &Device, data: Arc<u32>) -> Result {
    sysfs::register(device, None, &FILES, data)
}
