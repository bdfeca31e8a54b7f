// SPDX-License-Identifier: GPL-2.0-only

//! Crashes: `rblkd` ends between any two steps, and the next one finds what is left.
//!
//! Attaching a disk is: the toolstack creates the directory (Initialising), `rblkd` records the
//! disk (`Starting`), starts its process, records that (`Opening`), the process opens the image and
//! links the guest to it (InitWait, later Connected), and `rblkd` records that (`Running`).
//! Detaching is the reverse.
//!
//! * A model tries all combinations of a record, a process and a state that the next `rblkd` can
//!   find.
//! * An `rblkd` in a process of its own is killed at each point between two steps.

use super::tests::{supervisor, DISK};
use super::*;
use crate::crash;
use crate::options::tests::options;
use crate::process::tests::PROGRAM;
use crate::process::Process;
use api::Phase;
use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command as Program, ExitStatus};
use std::thread;
use xen_user::fake::Host;
use xen_user::xenstore::Nodes;

const STATE: &str = "backend/vbd3/5/51712/state";
const DEADLINE: Duration = Duration::from_secs(60);

/// The record that is left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Left {
    /// None: the disk has just been attached, or is gone.
    Nothing,
    /// A process was about to be started.
    Starting,
    /// A process was started, and has ended meanwhile.
    Dead,
    /// A process was started, and has the image open.
    Alive,
    /// A process was started, and opens the image.
    Opening,
    /// A process was started, and was not recorded.
    Unrecorded,
    /// The disk was refused.
    Failed,
}

const LEFT: [Left; 7] = [
    Left::Nothing,
    Left::Starting,
    Left::Dead,
    Left::Alive,
    Left::Opening,
    Left::Unrecorded,
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
        replaced: None,
        phase,
    }
}

/// Leaves what an `rblkd` that was killed has left. Returns the process that runs.
fn leave(run: &RunDir, left: Left) -> Option<Process> {
    let process = || Process::start(Path::new(PROGRAM), run, DISK, "serve", &[]).unwrap();
    let running = |process: &Process| {
        let (pid, start_time) = process.opening().process().unwrap();
        Phase::Running { pid, start_time }
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
        Left::Opening => {
            let process = process();
            (process.opening(), Some(process))
        }
        Left::Unrecorded => (Phase::Starting, Some(process())),
        Left::Failed => {
            let cause = "no file".to_owned();
            (Phase::Failed { cause }, None)
        }
    };
    run.write_record(&record(phase)).unwrap();
    alive
}

/// Lets the next `rblkd` work for at least a few steps, until something is so. Its time passes
/// `speed` times as fast.
fn settle(supervisor: &mut Supervisor, speed: u32, what: &str, mut is_so: impl FnMut() -> bool) {
    const STEPS: u32 = 20;
    let began = Instant::now();
    for step in 0.. {
        if step >= STEPS && is_so() {
            break;
        }
        assert!(began.elapsed() < DEADLINE, "{what}");
        supervisor.step(began + began.elapsed() * speed).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
}

/// Returns the process that the record names, if it runs.
fn recorded(run: &RunDir) -> Option<Process> {
    let record = run.read_record(DISK).unwrap()?;
    let (pid, start_time) = record.phase.process()?;
    Process::adopt(pid, start_time)
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
    let was_served = matches!(left, Left::Dead | Left::Alive);
    if was_served && state.is_some() {
        let pid = run.read_record(DISK).unwrap().unwrap().phase.pid();
        let node = "backend/vbd3/5/51712/kthread-pid";
        store.write(node, &pid.unwrap().to_string()).unwrap();
    }
    let (mut next, _commands) = supervisor(&host, &dir);
    let is_forgotten = || run.records().unwrap().is_empty();
    match state {
        // It is undone. A process that runs ends by itself, and is killed if it does not.
        None => settle(&mut next, 100, &what, is_forgotten),
        Some("6") if before.is_none() => settle(&mut next, 1, &what, is_forgotten),
        // No process has ever served it.
        Some("5") if before.is_none() && !was_served => {
            settle(&mut next, 1, &what, is_forgotten);
            assert_eq!(store.read_text(STATE).unwrap().as_deref(), Some("6"));
        }
        // It is completed, by the process that runs if there is one.
        Some(_) => {
            settle(&mut next, 1, &what, || recorded(&run).is_some());
            let after = recorded(&run).unwrap();
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

/// The variable that names the directory of the `rblkd` that is killed.
const RUN_DIR: &str = "RBLKD_RUN_DIR";

/// The points at which an `rblkd` that serves a disk is killed.
const SERVING: [&str; 5] = [
    "recorded",
    "started",
    "process recorded",
    "announced",
    "open recorded",
];

/// The points at which an `rblkd` that refuses a disk is killed.
const REFUSING: [&str; 5] = [
    "error written",
    "refusal recorded",
    "refused",
    "closed",
    "forgotten",
];

/// The program of the process that is killed. Its xenstore is the standard input, and its time
/// passes ten times as fast.
#[test]
#[ignore = "the next tests start it"]
fn the_rblkd_that_is_killed() {
    let socket = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned();
    let store = Xenstore::from_fd(socket.unwrap());
    let run = RunDir::new(env::var_os(RUN_DIR).unwrap());
    let (mut supervisor, _commands) =
        Supervisor::new(store, run, PROGRAM.into(), options(&[])).unwrap();
    let began = Instant::now();
    while began.elapsed() < DEADLINE {
        supervisor.step(began + began.elapsed() * 10).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
}

/// A host with a disk.
struct Crash {
    host: Host,
    dir: tempfile::TempDir,
    store: Xenstore,
}

impl Crash {
    fn new(image: &str) -> Self {
        let host = Host::new();
        let mut store = host.xenstore().unwrap();
        store.write("backend/vbd3/5/51712/params", image).unwrap();
        store.write(STATE, "1").unwrap();
        Self {
            host,
            dir: tempfile::tempdir().unwrap(),
            store,
        }
    }

    fn run(&self) -> RunDir {
        RunDir::new(self.dir.path())
    }

    fn state(&mut self) -> Option<String> {
        self.store.read_text(STATE).unwrap()
    }

    /// Starts an `rblkd` that is killed at a point.
    fn start(&self, point: &str) -> Child {
        let socket = self.host.xenstore().unwrap();
        Program::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "supervisor::crash_tests::the_rblkd_that_is_killed",
            ])
            .args(["--ignored", "--nocapture"])
            .env(crash::VARIABLE, point)
            .env(RUN_DIR, self.dir.path())
            .stdin(socket.fd().try_clone_to_owned().unwrap())
            .spawn()
            .unwrap()
    }

    /// Lets a process that opens the image have opened it.
    fn open(&mut self) {
        let record = self.run().read_record(DISK).unwrap();
        let phase = record.map(|record| record.phase);
        if let Some(Phase::Opening { pid, .. }) = phase {
            let node = "backend/vbd3/5/51712/kthread-pid";
            self.store.write(node, &pid.to_string()).unwrap();
        }
    }

    /// Plays the toolstack, which detaches a disk that was refused.
    fn detach_refused(&mut self) {
        if self.state().as_deref() == Some("2") {
            self.store.write(STATE, "5").unwrap();
        }
    }

    /// Waits for the end of an `rblkd`, and does something meanwhile.
    fn end(&mut self, mut rblkd: Child, meanwhile: impl Fn(&mut Self)) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = rblkd.try_wait().unwrap() {
                return status;
            }
            if Instant::now() >= deadline {
                rblkd.kill().unwrap();
            }
            meanwhile(self);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets the next `rblkd` work until something is so.
    fn next(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let (mut next, _commands) = supervisor(&self.host, &self.dir);
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "{what}");
            next.step(Instant::now()).unwrap();
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Returns the number of processes that serve disks of the directory.
    fn processes(&self) -> usize {
        let dir = self.dir.path().as_os_str().as_encoded_bytes();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let lines = pids.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        lines
            .filter(|line| line.split(|byte| *byte == 0).any(|word| word == dir))
            .count()
    }
}

#[test]
fn a_disk_is_served_by_one_process_after_a_kill_at_any_point() {
    for point in SERVING {
        let mut crash = Crash::new("serve");
        let rblkd = crash.start(point);
        let status = crash.end(rblkd, |crash| {
            if point == "open recorded" {
                crash.open();
            }
        });
        assert_eq!(status.signal(), Some(9), "{point}");
        crash.next(point, |crash| {
            crash.open();
            let record = crash.run().read_record(DISK).unwrap();
            record.is_some_and(|record| record.phase.is_running())
        });
        crash.next(point, |crash| crash.processes() == 1);
        recorded(&crash.run()).unwrap().kill();
    }
}

#[test]
fn a_refusal_is_completed_after_a_kill_at_any_point() {
    for point in REFUSING {
        let mut crash = Crash::new("fail:no file");
        let rblkd = crash.start(point);
        let status = crash.end(rblkd, |crash| {
            if ["closed", "forgotten"].contains(&point) {
                crash.detach_refused();
            }
        });
        assert_eq!(status.signal(), Some(9), "{point}");
        crash.next(point, |crash| {
            crash.detach_refused();
            let records = crash.run().records().unwrap();
            crash.state().as_deref() == Some("6") && records.is_empty()
        });
        crash.next(point, |crash| crash.processes() == 0);
    }
}
