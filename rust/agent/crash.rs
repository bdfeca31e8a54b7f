// SPDX-License-Identifier: GPL-2.0-only

//! Points between two steps, at which a test lets `rblkd` be killed.

use rustix::process::{getpid, kill_process, Signal};
use std::env;

/// The variable that names the point at which the process is killed.
pub const VARIABLE: &str = "RBLKD_CRASH";

/// Kills this process if it is to end at a point.
pub fn point(name: &str) {
    if env::var(VARIABLE).is_ok_and(|wanted| wanted == name) {
        // A process can always kill itself.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}
