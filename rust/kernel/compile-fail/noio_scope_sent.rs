// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! The flag is one of the thread.

use kernel_ext::base::memalloc::NoioScope;

fn needs_send<T: Send>(_: T) {}

fn give_away() {
    needs_send(NoioScope::new());
}
