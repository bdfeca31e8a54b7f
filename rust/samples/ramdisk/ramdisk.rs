// SPDX-License-Identifier: GPL-2.0

//! ramdisk.

use kernel::prelude::*;

module! {
    type: Module,
    name: "rblk_ramdisk",
    authors: ["The rblkif developers"],
    description: "ramdisk",
    license: "GPL",
}

struct Module;

impl kernel::Module for Module {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Module)
    }
}
