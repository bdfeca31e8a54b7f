// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! What a thread knows about itself is for itself.

use kernel_ext::base::kthread::Current;

fn needs_sync<T: Sync>(_: &T) {}

fn misuse(thread: &Current) {
    needs_sync(thread);
}
