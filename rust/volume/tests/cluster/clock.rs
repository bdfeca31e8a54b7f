// SPDX-License-Identifier: GPL-2.0-only

//! Processes whose clock is wrong, with libfaketime. Their timers are right, as on such a host.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// The variables with the difference in hours, and with the time at which the process was started.
const HOURS: &str = "CLOCK_HOURS";
const STARTED: &str = "CLOCK_STARTED";

/// More than the time that a process takes to start, in seconds.
const TOLERANCE: i64 = 600;

/// Has a process see a clock that is fast by some hours, or slow.
pub fn shift(command: &mut Command, hours: i64) {
    command
        .env("LD_PRELOAD", LIBRARY)
        .env("FAKETIME", format!("{hours:+}h"))
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("NO_FAKE_STAT", "1")
        .env(HOURS, hours.to_string())
        .env(STARTED, now().to_string());
}

/// Checks that this process has the clock that [`shift`] has asked for.
pub fn check() {
    let number = |name| std::env::var(name).map(|text| text.parse::<i64>().unwrap());
    if let (Ok(hours), Ok(started)) = (number(HOURS), number(STARTED)) {
        let difference = now() - started;
        let error = difference - hours * 3600;
        assert!(error.abs() < TOLERANCE, "{difference} s, not {hours} h");
    }
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs().try_into().unwrap()
}
