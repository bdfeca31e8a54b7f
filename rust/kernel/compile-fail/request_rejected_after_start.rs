// SPDX-License-Identifier: GPL-2.0-only
// error: E0599

//! A request that is in flight cannot be rejected.

use kernel_ext::block::mq::*;

fn regret<T: Operations>(rq: Request<T, Queued<'_>>) {
    let _ = rq.start().reject();
}
