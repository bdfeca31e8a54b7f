// SPDX-License-Identifier: GPL-2.0

//! echo_back.

use kernel::prelude::*;

module! {
    type: Module,
    name: "rblk_echo_back",
    authors: ["The rblkif developers"],
    description: "echo_back",
    license: "GPL",
}

struct Module;

impl kernel::Module for Module {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Module)
    }
}
