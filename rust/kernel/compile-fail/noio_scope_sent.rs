// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! The flag belongs to the thread, so the scope cannot be sent to another one.

use kernel_ext::base::memalloc::NoioScope;

fn needs_send<T: Send>(_: T) {}

fn give_away() {
    needs_send(NoioScope::new());
}
