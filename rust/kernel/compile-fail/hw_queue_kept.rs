// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! A hardware queue can go when the call that is for it has returned.

use kernel_ext::block::mq::*;

fn keep<T: Operations>(hw_queue: HwQueue<'_, T>) -> HwQueue<'static, T> {
    hw_queue
}
