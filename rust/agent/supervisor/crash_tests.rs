// SPDX-License-Identifier: GPL-2.0-only

//! A model of crashes: `rblkd` ends between any two steps, and the next one finds what is left.
//!
//! Attaching a disk is: the toolstack creates the directory (Initialising), `rblkd` records the
//! disk (`Starting`), starts its process, records that (`Running`), and the process links the guest
//! to it (InitWait, later Connected). Detaching is the reverse. What the next `rblkd` finds is one
//! of the combinations of a record, a process and a state, all of which are tried here.
//!
//! A process whose number was not recorded is found by its command line, which the script that
//! plays `rblktap` cannot have: see the test of [`Process::find`].

use super::tests::{supervisor, DISK};
use super::*;
use crate::process::tests::PROGRAM;
use crate::process::Process;
use api::Phase;
use std::path::Path;
use xen_user::fake::Host;
use xen_user::xenstore::Nodes;

/// The record that is left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Left {
    /// None: the disk has just been attached, or is gone.
    Nothing,
    /// A process was about to be started.
    Starting,
    /// A process was started, and has ended meanwhile.
    Dead,
    /// A process was started, and runs.
    Alive,
    /// The disk was refused.
    Failed,
}

const LEFT: [Left; 5] = [
    Left::Nothing,
    Left::Starting,
    Left::Dead,
    Left::Alive,
    Left::Failed,
];

/// The states of the directory, `None` if it is gone.
const STATES: [Option<&str>; 6] = [None, Some("1"), Some("2"), Some("4"), Some("5"), Some("6")];

fn record(phase: Phase) -> Record {
    Record {
        disk: DISK,
        name: "xvda".to_owned(),
        domain: None,
        image: "serve".to_owned(),
        restarts: 0,
        phase,
    }
}

/// Leaves what an `rblkd` that was killed has left. Returns the process that runs.
fn leave(run: &RunDir, left: Left) -> Option<Process> {
    let process = || Process::start(Path::new(PROGRAM), run, DISK, "serve", &[]).unwrap();
    let running = |process: &Process| Phase::Running {
        pid: process.pid(),
        start_time: process.start_time(),
    };
    let (phase, alive) = match left {
        Left::Nothing => return None,
        Left::Starting => (Phase::Starting, None),
        Left::Dead => {
            let process = process();
            let phase = running(&process);
            process.kill();
            process.reason(run, DISK);
            (phase, None)
        }
        Left::Alive => {
            let process = process();
            (running(&process), Some(process))
        }
        Left::Failed => {
            let cause = "no file".to_owned();
            (Phase::Failed { cause }, None)
        }
    };
    run.write_record(&record(phase)).unwrap();
    alive
}

/// Lets the next `rblkd` work until nothing is due, at a time that is later by `later`.
fn settle(supervisor: &mut Supervisor, later: Duration) {
    for _ in 0..20 {
        supervisor.step(Instant::now() + later).unwrap();
    }
}

/// Returns the process that the record names, if it runs.
fn recorded(run: &RunDir) -> Option<Process> {
    match run.read_record(DISK).unwrap()?.phase {
        Phase::Running { pid, start_time } => Process::adopt(pid, start_time),
        Phase::Starting | Phase::Failed { .. } => None,
    }
}

fn check(left: Left, state: Option<&str>) {
    let what = format!("{left:?}, state {state:?}");
    let (host, dir) = (Host::new(), tempfile::tempdir().unwrap());
    let run = RunDir::new(dir.path());
    let mut store = host.xenstore().unwrap();
    if let Some(state) = state {
        store.write("backend/vbd3/5/51712/params", "serve").unwrap();
        store.write("backend/vbd3/5/51712/state", state).unwrap();
    }
    let before = leave(&run, left).map(|process| process.pid());
    let (mut next, _commands) = supervisor(&host, &dir);
    settle(&mut next, Duration::ZERO);
    let after = recorded(&run);
    match state {
        // It is undone. A process that runs ends by itself, and is killed if it does not.
        None => {
            if let Some(process) = after {
                settle(&mut next, Duration::from_secs(60));
                let deadline = Instant::now() + Duration::from_secs(60);
                while !process.has_ended() {
                    assert!(Instant::now() < deadline, "{what}");
                }
                settle(&mut next, Duration::from_secs(60));
            }
            assert!(run.records().unwrap().is_empty(), "{what}");
        }
        Some("6") if before.is_none() => {
            assert!(run.records().unwrap().is_empty(), "{what}");
        }
        // It is completed, by the process that runs if there is one.
        Some(_) => {
            let after = after.unwrap_or_else(|| panic!("no process: {what}"));
            assert!(before.is_none_or(|pid| pid == after.pid()), "{what}");
            after.kill();
        }
    }
}

#[test]
fn an_end_between_any_two_steps_is_completed_or_undone() {
    for left in LEFT {
        for state in STATES {
            check(left, state);
        }
    }
}
