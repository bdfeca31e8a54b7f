// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! Tasks that wait are linked to the place of the queue: it does not move.

use core::pin::Pin;

use kernel_ext::base::wait::WaitQueue;

fn misuse(queue: Pin<&mut WaitQueue>, other: Pin<&mut WaitQueue>) {
    core::mem::swap(queue.get_mut(), other.get_mut());
}
