// SPDX-License-Identifier: GPL-2.0-only
// error: E0599

//! A completed request can only be ended.

use kernel_ext::block::mq::*;

fn again<T: Operations>(rq: Request<T, Completed>) {
    rq.complete();
}
