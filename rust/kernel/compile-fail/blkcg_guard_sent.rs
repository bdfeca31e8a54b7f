// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! A [`BlkcgGuard`] must be dropped by the thread that has created it.

use kernel_ext::base::{
    blkcg::{
        BlkcgCss,
        BlkcgGuard, //
    },
    kthread::Current, //
};

fn needs_send<T: Send>(_: T) {}

fn give_away(thread: &Current, group: &BlkcgCss) {
    let charged: BlkcgGuard<'_> = thread.charge(group);
    needs_send(charged);
}
