// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! What an interrupt calls must be ready for other threads.

use core::cell::Cell;

use kernel_ext::xen::events::{
    Eoi,
    Handler, //
};

struct Misuse(Cell<u32>);

impl Handler for Misuse {
    fn handle(&self) -> Eoi {
        self.0.set(1);
        Eoi::Done
    }
}
