// SPDX-License-Identifier: GPL-2.0-only

//! `rblkd`: starts, adopts and restarts the processes that serve disks. See the crate `agent`.

#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]

use agent::config::{self, Config};
use agent::events::Journal;
use agent::guests::Guests;
use agent::host::Startup;
use agent::options::TapOptions;
use agent::process;
use agent::server::{self, Server};
use agent::signals;
use agent::storage::{Probe, Storages};
use agent::supervisor::Supervisor;
use agent::volumes::Volumes;
use api::RunDir;
use clap::Parser;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
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
    /// The program that checks storage
    #[arg(long, value_name = "FILE", default_value = "/usr/bin/rblk")]
    probe: PathBuf,
    /// The program that pauses and resumes guests
    #[arg(long, value_name = "FILE", default_value = "/usr/sbin/xl")]
    xl: PathBuf,
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT)]
    config: PathBuf,
    #[command(flatten)]
    options: TapOptions,
}

/// Applies the configuration to what is running.
struct Applier {
    path: PathBuf,
    run: RunDir,
    storages: Arc<Storages>,
    probe: Probe,
}

impl Applier {
    fn apply(&self, config: &Config) -> Result<(), String> {
        let group = config.group.as_deref().map(group).transpose()?;
        server::allow_group(&self.run, group).map_err(|error| format!("the socket: {error}"))?;
        self.storages.configure(&config.storages, &self.probe);
        Ok(())
    }

    /// Reads the configuration again. If it is not valid, the one before stays in effect.
    fn reload(&self) {
        let applied = Config::read(&self.path).and_then(|config| self.apply(&config));
        match applied {
            Ok(()) => api::message!("{} was read again", self.path.display()),
            Err(error) => api::message!("{error}; the configuration stays as it was"),
        }
    }
}

fn group(name: &str) -> Result<u32, String> {
    const FILE: &str = "/etc/group";
    let text = fs::read_to_string(FILE).map_err(|error| format!("{FILE}: {error}"))?;
    config::group_number(&text, name)
        .ok_or_else(|| format!("there is no group {name}; create it with groupadd --system {name}"))
}

fn open_xenstore() -> Result<Xenstore, String> {
    Xenstore::open().map_err(|error| {
        let path = Xenstore::PATH;
        format!("{path}: {error}; run rblkd as root in a domain of Xen with xenfs mounted")
    })
}

/// Returns why the directory of records cannot be used.
fn unusable(dir: &Path, error: &io::Error) -> String {
    let dir = dir.display();
    match error.kind() {
        io::ErrorKind::WouldBlock => format!("another rblkd uses {dir}; stop it first"),
        io::ErrorKind::PermissionDenied => {
            format!("{dir}: {error}; run rblkd as root, and have root own the directory")
        }
        io::ErrorKind::StorageFull => format!("{dir}: {error}; make room in its file system"),
        _ => format!("{dir}: {error}"),
    }
}

/// Pauses guests whose storage does not answer, if the configuration says so. Otherwise resumes
/// those that an earlier `rblkd` has paused.
fn watch_guests(
    config: &Config,
    run: &RunDir,
    xl: PathBuf,
    journal: &Arc<Journal>,
) -> Result<(), String> {
    let seconds = config.pause_after.unwrap_or(u32::MAX);
    let limit = Duration::from_secs(seconds.into());
    let guests = Guests::new(run.clone(), xl, limit, journal.clone());
    let started = match config.pause_after {
        Some(_) => guests.start(),
        None => guests.resume_all(),
    };
    started.map_err(|error| format!("guests: {error}"))
}

fn run(mut args: Args) -> Result<(), String> {
    let mut startup = Startup::new();
    let run = RunDir::new(args.run_dir);
    let config = startup.step("configuration", || Config::read(&args.config))?;
    if config.pause_after.is_some() {
        // A guest that is paused never gets an error.
        args.options.retry_seconds = u32::MAX;
    }
    let store = startup.step("xenstore", open_xenstore)?;
    let supervisor = startup.step("records and processes", || {
        let supervisor = Supervisor::new(store, run.clone(), args.program, args.options);
        supervisor.map_err(|error| unusable(run.path(), &error))
    });
    let (supervisor, commands) = supervisor?;
    let storages = Arc::new(Storages::default());
    let applier = Applier {
        path: args.config,
        run: run.clone(),
        storages: storages.clone(),
        probe: Probe {
            program: args.probe,
            journal: supervisor.journal().clone(),
        },
    };
    let socket = |error| format!("the socket in {}: {error}", run.path().display());
    let listener = startup.step("socket", || Server::bind(&run).map_err(socket))?;
    startup.step("storage", || applier.apply(&config))?;
    watch_guests(&config, &run, args.xl, supervisor.journal())?;
    process::limit_logs(run.clone()).map_err(|error| format!("messages: {error}"))?;
    let volumes = Volumes::new(run.clone());
    volumes
        .start()
        .map_err(|error| format!("volumes: {error}"))?;
    signals::start(move || applier.reload()).map_err(|error| format!("signals: {error}"))?;
    let host = startup.finish(supervisor.journal().clone(), storages);
    api::message!("{} disks", supervisor.disks());
    Server::start(listener, run.clone(), commands, host).map_err(socket)?;
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
            api::message!("rblkd: {error}");
            ExitCode::FAILURE
        }
    }
}
