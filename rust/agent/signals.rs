// SPDX-License-Identifier: GPL-2.0-only

//! Signals: SIGTERM and SIGINT end `rblkd`, SIGHUP has it read its configuration again.
//!
//! The end needs no work for disks: each step is recorded when it is done, and the processes that
//! serve disks do not depend on `rblkd`. An end by SIGTERM differs from one by SIGKILL only in the
//! exit status. A guest that is paused is resumed by the next `rblkd`.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;
use std::process;
use std::thread;

/// Starts the thread that takes signals.
pub fn start(mut reload: impl FnMut() + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                match signal {
                    SIGHUP => reload(),
                    _ => end(),
                }
            }
        })?;
    Ok(())
}

fn end() -> ! {
    api::message!("ending; disks are served as before, and the next rblkd adopts their processes");
    // Without systemd there is no one to notify.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    process::exit(0)
}
