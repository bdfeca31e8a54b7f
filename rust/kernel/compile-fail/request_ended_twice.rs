// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! Ending a request consumes it, so it cannot be ended twice.

use kernel_ext::block::mq::*;

fn twice<T: Operations>(rq: Request<T, InFlight>) {
    rq.end(BlkStatus::OK);
    rq.end(BlkStatus::OK);
}
