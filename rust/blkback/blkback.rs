// SPDX-License-Identifier: GPL-2.0

//! blkback.

use kernel::prelude::*;

module! {
    type: Module,
    name: "rblkback",
    authors: ["The rblkif developers"],
    description: "blkback",
    license: "GPL",
}

struct Module;

impl kernel::Module for Module {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Module)
    }
}
