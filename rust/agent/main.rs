// SPDX-License-Identifier: GPL-2.0-only

//! `rblkd`: starts, adopts and restarts the processes that serve disks. See the crate `agent`.

#![forbid(unsafe_code)]

use agent::options::TapOptions;
use agent::server::Server;
use agent::supervisor::Supervisor;
use api::RunDir;
use clap::Parser;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use xen_user::xenstore::Xenstore;

/// Serves disks of Xen guests from images, with a process rblktap for each disk
#[derive(Debug, Parser)]
#[command(name = "rblkd", version)]
struct Args {
    /// Directory of sockets and records
    #[arg(long, value_name = "DIR", default_value = RunDir::DEFAULT)]
    run_dir: PathBuf,
    /// The program that serves a disk
    #[arg(long, value_name = "FILE", default_value = "/usr/libexec/rblktap")]
    program: PathBuf,
    #[command(flatten)]
    options: TapOptions,
}

fn run(args: Args) -> Result<(), String> {
    let run = RunDir::new(args.run_dir);
    let dir = run.path().display().to_string();
    let store = Xenstore::open().map_err(|error| {
        let path = Xenstore::PATH;
        format!("{path}: {error}; run rblkd as root in a domain of Xen with xenfs mounted")
    })?;
    let supervisor = Supervisor::new(store, run.clone(), args.program, args.options);
    let (supervisor, commands) = supervisor.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => format!("another rblkd uses {dir}; stop it first"),
        _ => format!("{dir}: {error}"),
    })?;
    Server::start(run, commands).map_err(|error| format!("the socket in {dir}: {error}"))?;
    // Without systemd there is no one to notify.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    supervisor
        .run()
        .map_err(|error| format!("xenstore: {error}; start rblkd again"))
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rblkd: {error}");
            ExitCode::FAILURE
        }
    }
}
