// SPDX-License-Identifier: GPL-2.0

//! blkfront.

use kernel::prelude::*;

module! {
    type: Module,
    name: "rblkfront",
    authors: ["The rblkif developers"],
    description: "blkfront",
    license: "GPL",
}

struct Module;

impl kernel::Module for Module {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Module)
    }
}
