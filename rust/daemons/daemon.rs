// SPDX-License-Identifier: GPL-2.0-only

//! One process that a test starts, stops and kills.

use rustix::process::{kill_process, Pid, Signal};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The limit of each step of a daemon: ten times what it takes on a machine that does nothing else.
pub const LIMIT: Duration = Duration::from_secs(90);

/// A daemon. It is killed when it is dropped.
pub struct Daemon {
    program: String,
    args: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    /// Starts a program, whose output is added to `log`.
    pub fn start<S: Into<String>>(
        program: &str,
        args: impl IntoIterator<Item = S>,
        log: &Path,
    ) -> Self {
        let mut daemon = Self {
            program: program.to_owned(),
            args: args.into_iter().map(Into::into).collect(),
            log: log.to_owned(),
            child: None,
        };
        daemon.restart();
        daemon
    }

    /// Starts the program again, with the same arguments, unless it runs.
    pub fn restart(&mut self) {
        if self.child.is_some() {
            return;
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .unwrap();
        let child = Command::new(&self.program)
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.child = Some(child.unwrap_or_else(|error| panic!("{}: {error}", self.program)));
    }

    /// Returns `true` unless the process was killed by this and not started again.
    pub fn is_started(&self) -> bool {
        self.child.is_some()
    }

    /// Kills the process and waits for its end.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Stops the process, which then does not answer, until [`Self::thaw`].
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets the process continue.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap();
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    /// Panics if the process has ended.
    pub fn check(&mut self) {
        let status = self
            .child
            .as_mut()
            .and_then(|child| child.try_wait().unwrap());
        if let Some(status) = status {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            panic!("{} {:?}: {status}\n{log}", self.program, self.args);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command to its end and returns its output. Panics if it fails.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {text}{errors}"
    );
    text
}

/// Waits until `done` returns `true`. Panics after 90 seconds.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "timeout: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}
