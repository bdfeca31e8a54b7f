// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! A request is ended by value: there is nothing left to end.

use kernel_ext::block::mq::*;

fn twice<T: Operations>(rq: Request<T, InFlight>) {
    rq.end(BlkStatus::OK);
    rq.end(BlkStatus::OK);
}
