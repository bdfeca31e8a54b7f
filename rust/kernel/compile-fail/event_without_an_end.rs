// SPDX-License-Identifier: GPL-2.0-only
// error: E0053

//! A handler returns how the event ends.

use kernel_ext::xen::events::Handler;

struct Misuse;

impl Handler for Misuse {
    fn handle(&self) {}
}
