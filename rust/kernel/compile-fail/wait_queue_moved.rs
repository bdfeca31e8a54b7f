// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! Waiting tasks are linked to the address of the queue, so it must not move.

use core::pin::Pin;

use kernel_ext::base::wait::WaitQueue;

fn misuse(queue: Pin<&mut WaitQueue>, other: Pin<&mut WaitQueue>) {
    core::mem::swap(queue.get_mut(), other.get_mut());
}
