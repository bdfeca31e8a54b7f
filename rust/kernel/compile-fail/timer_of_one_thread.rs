// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! A timer callback must be `Send` and `Sync`.

use core::cell::Cell;

use kernel_ext::base::{
    jiffies::Jiffies,
    timer::TimerCallback, //
};

struct Misuse(Cell<u32>);

impl TimerCallback for Misuse {
    fn expired(&self) -> Option<Jiffies> {
        self.0.set(1);
        None
    }
}
