// SPDX-License-Identifier: GPL-2.0-only
// error: E0382

//! A request in a batch counts as ended.

use kernel_ext::block::mq::*;

fn late<T: Operations>(batch: &mut EndBatch, rq: Request<T, InFlight>) -> u32 {
    batch.end(rq, BlkStatus::OK);
    rq.bytes()
}
