// SPDX-License-Identifier: GPL-2.0-only

//! `block-rblk`: the hotplug script of a disk with `script=block-rblk`.
//!
//! libxl calls it as `block-rblk add` and `block-rblk remove`, with the directory of the backend in
//! `XENBUS_PATH`. `add` says how the attachment has ended: it writes `physical-device-path` and
//! `hotplug-status`, or `hotplug-error`, which `xl` prints. `physical-device-path` is the NBD
//! socket that a device model opens. See `docs/misc/block-scripts.txt` of Xen.

use crate::exit::{io_failure, Error};
use crate::outcome;
use api::{DiskId, Failure, FailureKind, RunDir};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use xen_user::xenstore::{Nodes, Xenstore};

/// Hotplug script of disks that rblkd serves, called by libxl
#[derive(Debug, Parser)]
#[command(name = "block-rblk", version)]
pub struct BlockRblk {
    /// Directory of the backend in xenstore
    #[arg(long, env = "XENBUS_PATH")]
    xenbus_path: String,
    /// Directory of records
    #[arg(long, value_name = "DIR", default_value = RunDir::DEFAULT)]
    run_dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Command {
    /// A disk has been attached
    Add,
    /// A disk has been detached
    Remove,
}

/// Runs the script.
pub fn run(args: &BlockRblk) -> Result<(), Error> {
    let run = RunDir::new(&args.run_dir);
    let disk = outcome::disk_of(&args.xenbus_path);
    match args.command {
        Command::Add => {
            let mut store = Xenstore::open().map_err(|error| io_failure(Xenstore::PATH, &error))?;
            Ok(add(&run, &mut store, &args.xenbus_path, disk)?)
        }
        Command::Remove => Ok(outcome::await_detached(&run, disk?)?),
    }
}

/// Waits for the end of the attachment and writes how it has ended.
fn add(
    run: &RunDir,
    nodes: &mut impl Nodes,
    dir: &str,
    disk: Result<DiskId, Failure>,
) -> Result<(), Failure> {
    let result = disk.and_then(|disk| {
        let attached = outcome::await_attached(run, disk);
        attached.map_err(|failure| match failure.kind {
            FailureKind::NoAnswer => outcome::reported(nodes, disk).unwrap_or(failure),
            _ => failure,
        })
    });
    let (node, value, status) = match &result {
        Ok((record, _)) => {
            let path = run.nbd_socket(record.disk).display().to_string();
            ("physical-device-path", path, "connected")
        }
        Err(failure) => ("hotplug-error", failure.to_string(), "error"),
    };
    let mut write = |node, value| {
        let path = format!("{dir}/{node}");
        let written = nodes.write(&path, value);
        written.map_err(|error| io_failure(path, &error))
    };
    write(node, &value)?;
    write("hotplug-status", status)?;
    result.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::tests::{record, DISK};
    use api::Phase;
    use xen_user::fake::Host;

    const DIR: &str = "backend/vbd3/5/51712";

    #[test]
    fn add_writes_how_the_attachment_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let mut store = Host::new().xenstore().unwrap();
        let cause = "/a does not exist; create it".to_owned();
        record(&run, DISK, Phase::Failed { cause });
        add(&run, &mut store, DIR, Ok(DISK)).unwrap_err();
        let mut read = |node| store.read_text(&format!("{DIR}/{node}")).unwrap().unwrap();
        assert_eq!(read("hotplug-status"), "error");
        assert_eq!(read("hotplug-error"), "/a does not exist; create it");
        record(
            &run,
            DISK,
            Phase::Running {
                pid: 7,
                start_time: 1,
            },
        );
        add(&run, &mut store, DIR, Ok(DISK)).unwrap();
        let mut read = |node| store.read_text(&format!("{DIR}/{node}")).unwrap().unwrap();
        assert_eq!(read("hotplug-status"), "connected");
        assert!(read("physical-device-path").ends_with("/5-51712.nbd"));
    }

    #[test]
    fn the_reason_of_a_disk_without_a_record_is_in_xenstore() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Host::new().xenstore().unwrap();
        let reason =
            "/run/rblk/5-51712.json: No space left on device; make room in its file system";
        store.write(&format!("error/{DIR}/error"), reason).unwrap();
        add(&RunDir::new(dir.path()), &mut store, DIR, Ok(DISK)).unwrap_err();
        let error = store.read_text(&format!("{DIR}/hotplug-error")).unwrap();
        assert_eq!(error.as_deref(), Some(reason));
    }

    #[test]
    fn another_kind_of_disk_is_an_error_in_xenstore() {
        let run = RunDir::new("/nonexistent");
        let mut store = Host::new().xenstore().unwrap();
        let dir = "backend/vbd/5/51712";
        add(&run, &mut store, dir, outcome::disk_of(dir)).unwrap_err();
        let error = store
            .read_text(&format!("{dir}/hotplug-error"))
            .unwrap()
            .unwrap();
        assert!(error.contains("use backendtype=tap"), "{error}");
    }
}
