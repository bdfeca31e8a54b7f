// SPDX-License-Identifier: GPL-2.0-only

//! `tap-ctl`, as Xen's hotplug script `block-tap` calls it.
//!
//! libxl runs `block-tap` for each disk with `backendtype=tap` and without `script=`, when the
//! state is InitWait. `rblkd` has attached the disk by then, so that nothing is left to start: the
//! calls tell the script what has happened. In the order of `block-tap` of Xen 4.20:
//!
//! | call | what it does |
//! |---|---|
//! | `list -t aio -f /path` | prints `pid=P minor=M state=0 args=aio:/path` if the disk is served; then the script checks in xenstore that no other guest uses the image, and is done |
//! | `allocate` | prints `/run/blktap-control/tapdisk/tapdisk-M` |
//! | `spawn` | prints the process, or 0 if the disk was refused |
//! | `attach -p P -m M` | nothing |
//! | `open -p P -m M -a aio:/path` | prints why the disk was refused, and fails |
//! | `close`, `detach`, `free` | nothing |
//! | `destroy -p P -m M` | waits until nothing is left of the disk |
//!
//! P is the pid of `rblktap`, M is the virtual device number. The calls of `block-tap` have the
//! variable `XENBUS_PATH`. Without it, only `list` works, and lists all disks.

use crate::exit::{self, Error};
use crate::outcome;
use api::{DiskId, Failure, FailureKind, Record, RunDir};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Tells Xen's hotplug script block-tap about disks that rblkd serves
#[derive(Debug, Parser)]
#[command(name = "tap-ctl", version)]
pub struct TapCtl {
    /// Directory of the backend in xenstore
    #[arg(long, global = true, env = "XENBUS_PATH")]
    xenbus_path: Option<String>,
    /// Directory of records
    #[arg(long, global = true, value_name = "DIR", default_value = RunDir::DEFAULT)]
    run_dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Lists disks
    List {
        /// Only those with a pid
        #[arg(short)]
        pid: Option<u32>,
        /// Only those with a minor
        #[arg(short)]
        minor: Option<u32>,
        /// Only those with a type of image
        #[arg(short = 't')]
        image_type: Option<String>,
        /// Only those with an image
        #[arg(short)]
        file: Option<String>,
    },
    /// Prints the path of the device of a disk
    Allocate,
    /// Prints the pid of the process of a disk
    Spawn,
    /// Does nothing
    Attach(Device),
    /// Fails if a disk is not served
    Open {
        #[command(flatten)]
        device: Device,
        /// Type and path of the image
        #[arg(short)]
        args: String,
    },
    /// Does nothing
    Close(Device),
    /// Does nothing
    Detach(Device),
    /// Does nothing
    Free {
        /// The minor
        #[arg(short)]
        minor: u32,
    },
    /// Waits until nothing is left of a disk
    Destroy(Device),
}

/// A disk, as the script remembers it.
#[derive(Debug, Args)]
struct Device {
    /// The pid
    #[arg(short)]
    pid: u32,
    /// The minor
    #[arg(short)]
    minor: u32,
}

/// Runs a call.
pub fn run(args: &TapCtl) -> Result<(), Error> {
    exit::print(&output(args)?)?;
    Ok(())
}

/// Returns what a call prints.
fn output(args: &TapCtl) -> Result<String, Failure> {
    let run = RunDir::new(&args.run_dir);
    match &args.command {
        Command::List {
            pid,
            minor,
            image_type,
            file,
        } => {
            let own = args.xenbus_path.as_deref().map(outcome::disk_of);
            let own = own.and_then(Result::ok);
            if let Some(own) = own {
                outcome::await_outcome(&run, own);
            }
            let is_listed = |record: &Record, found: u32| {
                let (scheme, path) = image(record);
                pid.is_none_or(|pid| pid == found)
                    && minor.is_none_or(|minor| minor == record.disk.devid)
                    && image_type.as_ref().is_none_or(|image| image == scheme)
                    && file.as_ref().is_none_or(|file| file == path)
            };
            list(&run, own, is_listed)
        }
        Command::Allocate => {
            let minor = disk(args)?.devid;
            Ok(format!("/run/blktap-control/tapdisk/tapdisk-{minor}\n"))
        }
        Command::Spawn => {
            let attached = outcome::await_attached(&run, disk(args)?);
            Ok(format!("{}\n", attached.map_or(0, |(_, pid)| pid)))
        }
        Command::Open { .. } => {
            outcome::await_attached(&run, disk(args)?)?;
            Ok(String::new())
        }
        Command::Destroy(_) => {
            outcome::await_detached(&run, disk(args)?)?;
            Ok(String::new())
        }
        Command::Attach(_) | Command::Close(_) | Command::Detach(_) | Command::Free { .. } => {
            Ok(String::new())
        }
    }
}

/// Returns the disk that the script is about.
fn disk(args: &TapCtl) -> Result<DiskId, Failure> {
    match &args.xenbus_path {
        Some(path) => outcome::disk_of(path),
        None => Err(Failure::new(
            FailureKind::InvalidCall,
            "XENBUS_PATH is not set",
            "attach disks with xl block-attach, and see them with rblk disk list",
        )),
    }
}

/// Splits an image into type and path. One without a type has the type `aio`.
fn image(record: &Record) -> (&str, &str) {
    record
        .image
        .split_once(':')
        .unwrap_or(("aio", &record.image))
}

/// Lists the disks that are served: the script's own, or all if there is no script.
fn list(
    run: &RunDir,
    own: Option<DiskId>,
    is_listed: impl Fn(&Record, u32) -> bool,
) -> Result<String, Failure> {
    let records = run.records().map_err(|error| {
        let cause = format!("{}: {error}", run.path().display());
        Failure::new(FailureKind::NoAnswer, cause, "check that rblkd runs")
    })?;
    let lines = records.iter().filter_map(|record| {
        let pid = record.phase.pid().filter(|_| record.phase.is_running())?;
        let is_own = own.is_none_or(|own| own == record.disk);
        (is_own && is_listed(record, pid)).then(|| {
            let (scheme, path) = image(record);
            let minor = record.disk.devid;
            format!("pid={pid} minor={minor} state=0 args={scheme}:{path}\n")
        })
    });
    Ok(lines.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::tests::{record, DISK};
    use api::Phase;

    /// Calls `tap-ctl` as `block-tap` does for [`DISK`].
    fn call(run: &RunDir, line: &str) -> Result<String, Failure> {
        let dir = run.path().display();
        let path = "backend/vbd3/5/51712";
        let line = format!("tap-ctl --run-dir {dir} --xenbus-path {path} {line}");
        output(&TapCtl::try_parse_from(line.split(' ')).unwrap())
    }

    #[test]
    fn the_script_finds_a_disk_that_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        record(
            &run,
            DISK,
            Phase::Running {
                pid: 7,
                start_time: 1,
            },
        );
        let other = DiskId { domid: 9, ..DISK };
        record(
            &run,
            other,
            Phase::Running {
                pid: 8,
                start_time: 1,
            },
        );
        let line = |pid| format!("pid={pid} minor=51712 state=0 args=aio:/srv/a.img\n");
        assert_eq!(call(&run, "list -t aio -f /srv/a.img"), Ok(line(7)));
        assert_eq!(call(&run, "list -p 7 -m 51712"), Ok(line(7)));
        for other in [
            "list -t vhd -f /srv/a.img",
            "list -t aio -f /b",
            "list -p 8",
        ] {
            assert_eq!(call(&run, other), Ok(String::new()), "{other}");
        }
    }

    #[test]
    fn all_disks_are_listed_without_the_script() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        for (domid, pid) in [(5, 7), (9, 8)] {
            let start_time = 1;
            let phase = Phase::Running { pid, start_time };
            record(&run, DiskId { domid, ..DISK }, phase);
        }
        let pids = |found: &str| list(&run, None, |_, pid| found.contains(&pid.to_string()));
        assert_eq!(pids("7 8").unwrap().lines().count(), 2);
        assert_eq!(pids("8").unwrap().lines().count(), 1);
    }

    #[test]
    fn the_script_is_told_why_a_disk_was_refused() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let cause = "no file".to_owned();
        record(&run, DISK, Phase::Failed { cause });
        assert_eq!(call(&run, "list -t aio -f /srv/a.img"), Ok(String::new()));
        let path = "/run/blktap-control/tapdisk/tapdisk-51712\n";
        assert_eq!(call(&run, "allocate"), Ok(path.to_owned()));
        assert_eq!(call(&run, "spawn"), Ok("0\n".to_owned()));
        assert_eq!(call(&run, "attach -p 0 -m 51712"), Ok(String::new()));
        let failure = call(&run, "open -p 0 -m 51712 -a aio:/srv/a.img").unwrap_err();
        assert_eq!(failure.text.cause, "no file");
        assert_eq!(call(&run, "detach -p 0 -m 51712"), Ok(String::new()));
        assert_eq!(call(&run, "free -m 51712"), Ok(String::new()));
        run.remove(DISK).unwrap();
        assert_eq!(call(&run, "destroy -p 0 -m 51712"), Ok(String::new()));
    }

    #[test]
    fn without_the_script_there_is_no_disk_to_start() {
        let args = TapCtl {
            xenbus_path: None,
            run_dir: PathBuf::from("/nonexistent"),
            command: Command::Spawn,
        };
        assert_eq!(output(&args).unwrap_err().kind, FailureKind::InvalidCall);
    }
}
