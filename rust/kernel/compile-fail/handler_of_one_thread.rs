// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! An interrupt handler must be `Send` and `Sync`.

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
