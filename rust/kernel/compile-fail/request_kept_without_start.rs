// SPDX-License-Identifier: GPL-2.0-only
// error: lifetime may not live long enough

//! A request that was not accepted is gone when the call that offers it returns.

use kernel_ext::block::mq::*;

fn keep<T: Operations>(offered: Request<T, Queued<'_>>) -> Request<T, Queued<'static>> {
    offered
}
