// SPDX-License-Identifier: GPL-2.0-only

//! The outcome of the attachment of a disk, which hotplug scripts wait for.
//!
//! They run when the state is InitWait. By then, or a little later if the image takes long to open,
//! `rblkd` records the process that has the image open, or why there is none.

use api::{DiskId, Failure, FailureKind, Phase, Record, RunDir};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use xen_user::xenstore::Nodes;

/// Limit for `rblkd`, which refuses a disk whose image is not open after 30 seconds. libxl kills
/// the script after 40 seconds.
const OPEN_LIMIT: Duration = Duration::from_secs(35);

/// Limit for the first record.
const RECORD_LIMIT: Duration = Duration::from_secs(5);

/// Limit for the end of a process whose disk has been detached.
const DETACH_LIMIT: Duration = Duration::from_secs(10);

/// Time between two looks at the record.
const POLL: Duration = Duration::from_millis(20);

/// Returns the disk that libxl's variable `XENBUS_PATH` names.
pub fn disk_of(path: &str) -> Result<DiskId, Failure> {
    let backend = path.rsplit_once("backend/").map(|(_, backend)| backend);
    match backend.and_then(|backend| backend.split_once('/')) {
        Some(("vbd3", disk)) => disk.parse().map_err(|cause| invalid(path, cause)),
        Some(_) => Err(invalid(path, "the disk is not served by rblkd".to_owned())),
        None => Err(invalid(path, "it names no backend".to_owned())),
    }
}

fn invalid(path: &str, cause: String) -> Failure {
    Failure::new(
        FailureKind::InvalidCall,
        format!("XENBUS_PATH is {path:?}: {cause}"),
        "use backendtype=tap in the disk's configuration",
    )
}

/// Waits until a disk has been attached. Returns its record and its process.
pub fn await_attached(run: &RunDir, disk: DiskId) -> Result<(Record, u32), Failure> {
    let began = Instant::now();
    loop {
        let record = read(run, disk)?;
        let limit = match record {
            Some(_) => OPEN_LIMIT,
            None => RECORD_LIMIT,
        };
        match record.as_ref().map(|record| &record.phase) {
            Some(Phase::Failed { cause }) => {
                return Err(refused(cause));
            }
            Some(Phase::Running { pid, .. }) => {
                let pid = *pid;
                return record
                    .map(|record| (record, pid))
                    .ok_or_else(|| unknown(disk));
            }
            _ if began.elapsed() < limit => thread::sleep(POLL),
            _ => return Err(unknown(disk)),
        }
    }
}

/// Waits until a disk has been attached or refused, if it is being attached.
pub fn await_outcome(run: &RunDir, disk: DiskId) {
    if let Ok(Some(_)) = run.read_record(disk) {
        // The caller reads the outcome in the record.
        let _ = await_attached(run, disk);
    }
}

/// Returns the failure for a recorded reason, which has the form "cause; remedy" if it has a
/// remedy.
fn refused(reason: &str) -> Failure {
    let (cause, remedy) = reason
        .rsplit_once("; ")
        .unwrap_or((reason, "see the messages of rblkd"));
    Failure::new(FailureKind::Failed, cause, remedy)
}

/// Returns the reason that `rblkd` has written to xenstore for a disk that it could not record.
pub fn reported(nodes: &mut impl Nodes, disk: DiskId) -> Option<Failure> {
    let node = format!("error/backend/vbd3/{disk}/error");
    let reason = nodes.read_text(&node).ok().flatten()?;
    Some(refused(&reason))
}

fn unknown(disk: DiskId) -> Failure {
    Failure::new(
        FailureKind::NoAnswer,
        format!("rblkd does not serve disk {disk}"),
        "check that rblkd runs",
    )
}

/// Waits until no process has anything of a disk that has been detached.
pub fn await_detached(run: &RunDir, disk: DiskId) -> Result<(), Failure> {
    let deadline = Instant::now() + DETACH_LIMIT;
    while read(run, disk)?.is_some_and(|record| is_served(&record)) {
        if Instant::now() >= deadline {
            return Err(Failure::new(
                FailureKind::NoAnswer,
                format!("disk {disk} is still served"),
                "check that rblkd runs, and see rblk disk list",
            ));
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// Returns `true` if a process serves a disk or is about to. A record may outlive its process while
/// no `rblkd` runs.
fn is_served(record: &Record) -> bool {
    match record.phase.pid() {
        Some(pid) => Path::new(&format!("/proc/{pid}")).exists(),
        None => record.phase == Phase::Starting,
    }
}

fn read(run: &RunDir, disk: DiskId) -> Result<Option<Record>, Failure> {
    run.read_record(disk).map_err(|error| {
        let cause = format!("the record of disk {disk}: {error}");
        Failure::new(FailureKind::Failed, cause, "check that you are root")
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const DISK: DiskId = DiskId {
        domid: 5,
        devid: 51712,
    };

    /// Records that a disk is served, or why it is not.
    pub(crate) fn record(run: &RunDir, disk: DiskId, phase: Phase) {
        run.write_record(&Record {
            disk,
            name: "xvda".to_owned(),
            domain: None,
            image: "aio:/srv/a.img".to_owned(),
            restarts: 0,
            replaced: None,
            phase,
        })
        .unwrap();
    }

    #[test]
    fn the_path_names_the_disk() {
        for path in [
            "backend/vbd3/5/51712",
            "/local/domain/0/backend/vbd3/5/51712",
        ] {
            assert_eq!(disk_of(path), Ok(DISK));
        }
        for path in ["", "backend/vbd/5/51712", "backend/vbd3/5", "backend/vbd3"] {
            assert!(disk_of(path).is_err(), "{path}");
        }
    }

    #[test]
    fn an_attachment_ends_with_a_process_or_a_reason() {
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
        assert_eq!(await_attached(&run, DISK).unwrap().1, 7);
        let opening = Phase::Opening {
            pid: 7,
            start_time: 1,
        };
        let late = run.clone();
        record(&run, DISK, opening);
        let script = thread::spawn(move || await_attached(&late, DISK).unwrap().1);
        thread::sleep(POLL);
        let phase = |pid| Phase::Running { pid, start_time: 1 };
        record(&run, DISK, phase(8));
        assert_eq!(script.join().unwrap(), 8);
        await_outcome(&run, DISK);
        let cause = "no file; create it".to_owned();
        record(&run, DISK, Phase::Failed { cause });
        assert_eq!(
            await_attached(&run, DISK).unwrap_err().text.cause,
            "no file"
        );
        await_detached(&run, DISK).unwrap();
        record(&run, DISK, phase(u32::MAX));
        await_detached(&run, DISK).unwrap();
        run.remove(DISK).unwrap();
        await_outcome(&run, DISK);
        await_detached(&run, DISK).unwrap();
    }
}
