// SPDX-License-Identifier: GPL-2.0-only

//! `rblk`, `tap-ctl` and `block-rblk`: see the crate `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(std::env::args_os())
}
