// SPDX-License-Identifier: GPL-2.0-only

//! The mode of completion of requests.

use kernel_ext::block::mq::Op;

/// The mode of completion of requests: the parameter `mode`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// 0: it is done in `queue_rq`.
    Now,
    /// 1: it is done in `complete`.
    Complete,
    /// 2: it is done by a work item, in a batch with others.
    Later,
    /// 3: it stays in flight until the parameter changes, it times out or the disk goes. If the
    /// parameter becomes 4 then, it fails; else it is done.
    Keep,
    /// 4: it fails.
    Fail,
    /// 5: it is refused, and offered again by blk-mq.
    Reject,
    /// 6: it is requeued, and offered again after a kick.
    Requeue,
    /// 7: it is refused as something that the disk cannot do.
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
