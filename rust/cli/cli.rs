// SPDX-License-Identifier: GPL-2.0-only

//! `rblk`: shows and controls disks that `rblktap` serves, their images, and volumes.
//!
//! One program has three names; the last part of `argv[0]` decides:
//!
//! | name | module | who calls it |
//! |---|---|---|
//! | `rblk` | [`args`], `disk`, `explain`, `host`, `metrics`, `check`, `image`, `volume` | the administrator |
//! | `tap-ctl` | [`tap_ctl`] | Xen's hotplug script `block-tap` |
//! | `block-rblk` | [`hotplug`] | libxl, as the hotplug script of a disk with `script=block-rblk` |

#![forbid(unsafe_code)]
#![deny(clippy::print_stdout)]
#![deny(missing_docs)]

pub mod args;
mod check;
mod disk;
mod exit;
mod explain;
mod host;
pub mod hotplug;
mod image;
mod metrics;
mod outcome;
mod table;
pub mod tap_ctl;
mod volume;

use api::RunDir;
use args::{Command, HostCommand, Rblk, StorageCommand};
use clap::{CommandFactory, Parser};
use exit::Error;
use hotplug::BlockRblk;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;
use tap_ctl::TapCtl;

/// Runs the program that `argv[0]` names and returns its exit status.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let name = args.first().map(Path::new).and_then(Path::file_name);
    let result = match name.and_then(OsStr::to_str) {
        Some("tap-ctl") => parse::<TapCtl>(args).and_then(|args| tap_ctl::run(&args)),
        Some("block-rblk") => parse::<BlockRblk>(args).and_then(|args| hotplug::run(&args)),
        _ => parse::<Rblk>(args).and_then(run_rblk),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn parse<T: Parser>(args: Vec<OsString>) -> Result<T, Error> {
    T::try_parse_from(args).map_err(Error::Usage)
}

fn run_rblk(args: Rblk) -> Result<(), Error> {
    let run = RunDir::new(args.run_dir);
    match args.command {
        Command::Disk { command } => disk::run(&run, &command, args.json),
        Command::Image { command } => image::run(&command, args.json),
        Command::Check => check::run(args.json),
        Command::Host {
            command: HostCommand::Status,
        } => host::status(&run, args.json),
        Command::Storage { command } => match command {
            StorageCommand::Status => host::storage(&run, args.json),
            StorageCommand::Probe { image } => host::probe(&image),
            StorageCommand::Volumes(command) => volume::run_storage(&command, args.json),
        },
        Command::Events { follow } => host::events(&run, follow, args.json),
        Command::Metrics => metrics::run(&run),
        Command::Volume { command } => volume::run_volume(&command, args.json),
        Command::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Rblk::command(), "rblk", &mut text);
            exit::print(&String::from_utf8_lossy(&text))
        }
        Command::Man { directory } => {
            clap_mangen::generate_to(Rblk::command(), &directory)
                .map_err(|error| exit::io_failure(directory.display(), &error))?;
            Ok(())
        }
    }
}
