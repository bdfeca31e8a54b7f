// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! The pages of a request that has ended belong to another owner.

use kernel_ext::block::mq::*;

fn late<T: Operations>(rq: Request<T, InFlight>) -> u32 {
    rq.end(BlkStatus::OK);
    rq.bytes()
}
