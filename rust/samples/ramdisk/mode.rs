// SPDX-License-Identifier: GPL-2.0-only

//! The mode of completion of requests.

use kernel_ext::block::mq::Op;

/// The mode of completion of requests: the parameter `mode`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// 0: requests are completed in `queue_rq`.
    Now,
    /// 1: requests are completed in `complete`.
    Complete,
    /// 2: requests are completed by the thread, in a batch.
    Later,
    /// 3: requests stay in flight until the parameter changes, they time out or the disk is
    /// removed. If the parameter becomes 4, they fail, otherwise they are completed.
    Keep,
    /// 4: requests fail.
    Fail,
    /// 5: requests are rejected, and blk-mq queues them again.
    Reject,
    /// 6: requests are requeued, and queued again after a kick.
    Requeue,
    /// 7: requests end with `BLK_STS_NOTSUPP`.
    Refuse,
}

impl Mode {
    /// Returns the mode with this number; unknown numbers are [`Mode::Now`].
    pub(crate) fn new(number: u32) -> Self {
        match number {
            1 => Self::Complete,
            2 => Self::Later,
            3 => Self::Keep,
            4 => Self::Fail,
            5 => Self::Reject,
            6 => Self::Requeue,
            7 => Self::Refuse,
            _ => Self::Now,
        }
    }
}

/// Returns `true` if the parameter `only` has the bit of an operation.
pub(crate) fn concerns(only: u32, op: Op) -> bool {
    let bit = match op {
        Op::Read => 1,
        Op::Write => 2,
        Op::Flush => 4,
        Op::Discard | Op::SecureErase => 8,
        Op::WriteZeroes | Op::Other(_) => 16,
    };
    only & bit != 0
}
