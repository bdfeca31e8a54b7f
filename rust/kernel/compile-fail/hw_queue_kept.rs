// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! A hardware queue may be freed when the call for it has returned.

use kernel_ext::block::mq::*;

fn keep<T: Operations>(hw_queue: HwQueue<'_, T>) -> HwQueue<'static, T> {
    hw_queue
}
