// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! A `Current` is only valid in its own thread.

use kernel_ext::base::kthread::Current;

fn needs_sync<T: Sync>(_: &T) {}

fn misuse(thread: &Current) {
    needs_sync(thread);
}
