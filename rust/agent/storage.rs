// SPDX-License-Identifier: GPL-2.0-only

//! Storage domains: checks that storage answers.
//!
//! A storage domain has an image that is read every 10 seconds by a process of its own, `rblk
//! storage probe`, through the same engine as a disk. A process may hang with its storage, even in
//! a state in which it cannot be killed; `rblkd` does not, and starts no second one meanwhile.

use crate::events::{now, Journal};
use api::{EventKind, StorageChange, StorageState, StorageStatus};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{kill_process_group, test_kill_process_group};
use rustix::process::{pidfd_open, Pid, PidfdFlags, Signal};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Time from the start of a check to that of the next one, and limit for its answer.
const PERIOD: Duration = Duration::from_secs(10);

/// Time between two looks at the processes of a check that were killed.
const GROUP_PERIOD: Duration = Duration::from_secs(1);

/// Time after which storage is slow.
const SLOW: Duration = Duration::from_secs(2);

/// The time for which states are kept, in seconds.
const KEPT_SECONDS: u64 = 24 * 60 * 60;

/// The greatest number of states that are kept of a domain.
const KEPT: usize = 1000;

/// The greatest length of the message of a check, in bytes.
const MAX_MESSAGE: u64 = 4096;

/// The program that checks domains, and the receiver of their changes.
#[derive(Clone)]
pub struct Probe {
    /// The program `rblk`.
    pub program: PathBuf,
    /// The receiver of changes.
    pub journal: Arc<Journal>,
}

/// The storage domains.
///
/// Context: used by all threads.
#[derive(Default)]
pub struct Storages(Mutex<BTreeMap<String, Domain>>);

/// A storage domain.
struct Domain {
    status: StorageStatus,
    /// Tells the domain from an earlier one of that name.
    key: Arc<()>,
}

/// The thread that checks a domain.
struct Checker {
    storages: Arc<Storages>,
    probe: Probe,
    name: String,
    image: String,
    key: Arc<()>,
}

impl Storages {
    /// Returns the states of all domains.
    pub fn status(&self) -> Vec<StorageStatus> {
        let domains = self.lock();
        domains
            .values()
            .map(|domain| domain.status.clone())
            .collect()
    }

    /// Checks these domains, and no others. One whose image has not changed keeps its state.
    pub fn configure(self: &Arc<Self>, wanted: &[(String, String)], probe: &Probe) {
        let mut domains = self.lock();
        domains.retain(|name, domain| {
            let mut wanted = wanted.iter();
            wanted.any(|(other, image)| other == name && *image == domain.status.image)
        });
        for (name, image) in wanted {
            if domains.contains_key(name) {
                continue;
            }
            let domain = Domain::new(name, image);
            let checker = Checker {
                storages: self.clone(),
                probe: probe.clone(),
                name: name.clone(),
                image: image.clone(),
                key: domain.key.clone(),
            };
            let thread = thread::Builder::new().name("storage".to_owned());
            match thread.spawn(move || checker.run()) {
                Ok(_) => drop(domains.insert(name.clone(), domain)),
                Err(error) => api::message!("storage {name}: no thread checks it: {error}"),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Domain>> {
        // A state is whole after each statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Domain {
    fn new(name: &str, image: &str) -> Self {
        Self {
            status: StorageStatus {
                name: name.to_owned(),
                image: image.to_owned(),
                state: StorageState::Unknown,
                since: now(),
                cause: None,
                latency_ms: None,
                checks: 0,
                failures: 0,
                history: Vec::new(),
            },
            key: Arc::new(()),
        }
    }

    /// Takes a new state. Returns `true` if it is another one.
    fn set(&mut self, state: StorageState, cause: Option<String>, time: u64) -> bool {
        let status = &mut self.status;
        status.cause = cause;
        if status.state == state {
            return false;
        }
        let (since, before) = (status.since, status.state);
        status.history.push(StorageChange {
            since,
            state: before,
        });
        let kept = |change: &StorageChange| change.since.saturating_add(KEPT_SECONDS) > time;
        let old = status.history.len().saturating_sub(KEPT);
        status.history.drain(..old);
        status.history.retain(kept);
        (status.since, status.state) = (time, state);
        true
    }
}

impl Checker {
    fn run(self) {
        while self.is_wanted() {
            let began = Instant::now();
            if let Err(error) = self.check() {
                let program = self.probe.program.display();
                self.report(StorageState::Down, Some(format!("{program}: {error}")));
            }
            thread::sleep(PERIOD.saturating_sub(began.elapsed()));
        }
    }

    /// Returns `true` unless the configuration has changed.
    fn is_wanted(&self) -> bool {
        let domains = self.storages.lock();
        let domain = domains.get(&self.name);
        domain.is_some_and(|domain| Arc::ptr_eq(&domain.key, &self.key))
    }

    fn check(&self) -> io::Result<()> {
        let child = Command::new(&self.probe.program)
            .args(["storage", "probe", "--"])
            .arg(&self.image)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let began = Instant::now();
        if !has_ended(&child, SLOW)? {
            self.report(StorageState::Slow, Some(silence(SLOW)));
        }
        if !has_ended(&child, PERIOD.saturating_sub(began.elapsed()))? {
            self.report(StorageState::Down, Some(silence(PERIOD)));
            let group = Pid::from_child(&child);
            // It fails only if all processes have ended meanwhile.
            let _ = kill_process_group(group, Signal::KILL);
            self.finish(child, began)?;
            // Those of QEMU, which parse an image, may outlive the one that has started them.
            while self.is_wanted() && test_kill_process_group(group).is_ok() {
                thread::sleep(GROUP_PERIOD);
            }
            return Ok(());
        }
        self.finish(child, began)
    }

    /// Takes the result of a check. One that has been reported as down stays so.
    ///
    /// Context: waits for the end of the process, which may hang in the kernel.
    fn finish(&self, mut child: Child, began: Instant) -> io::Result<()> {
        let status = child.wait()?;
        let took = began.elapsed();
        self.count(took, status.success());
        if status.code().is_none() && took >= PERIOD {
            return Ok(());
        }
        if !status.success() {
            let cause = message(&mut child).unwrap_or_else(|| format!("the check ended: {status}"));
            self.report(StorageState::Down, Some(cause));
        } else if took < SLOW {
            self.report(StorageState::Up, None);
        } else {
            let cause = format!("a check took {} ms", took.as_millis());
            self.report(StorageState::Slow, Some(cause));
        }
        Ok(())
    }

    fn count(&self, took: Duration, succeeded: bool) {
        if let Some(domain) = self.storages.lock().get_mut(&self.name) {
            let status = &mut domain.status;
            status.latency_ms = u64::try_from(took.as_millis()).ok();
            status.checks = status.checks.saturating_add(1);
            status.failures = status.failures.saturating_add(u64::from(!succeeded));
        }
    }

    fn report(&self, state: StorageState, cause: Option<String>) {
        if !self.is_wanted() {
            return;
        }
        let text = match &cause {
            Some(cause) => format!("storage {}: {}: {cause}", self.name, name(state)),
            None => format!("storage {}: {}", self.name, name(state)),
        };
        let mut domains = self.storages.lock();
        let changed = domains
            .get_mut(&self.name)
            .is_some_and(|domain| domain.set(state, cause, now()));
        drop(domains);
        if changed {
            api::message!("{text}");
            self.probe.journal.add(None, EventKind::Storage, text);
        }
    }
}

/// Returns the name of a state.
fn name(state: StorageState) -> &'static str {
    match state {
        StorageState::Unknown => "unknown",
        StorageState::Up => "up",
        StorageState::Slow => "slow",
        StorageState::Down => "down",
    }
}

fn silence(time: Duration) -> String {
    format!("no answer for {} seconds", time.as_secs())
}

/// Waits for the end of a process for up to `timeout`. Returns `true` if it has ended.
pub(crate) fn has_ended(child: &Child, timeout: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let fd: BorrowedFd<'_> = pidfd.as_fd();
    let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&timeout),
    )? > 0)
}

/// Returns the last line that a process has written, without the word in front.
fn message(child: &mut Child) -> Option<String> {
    let mut text = String::new();
    let stderr = child.stderr.take()?;
    stderr.take(MAX_MESSAGE).read_to_string(&mut text).ok()?;
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.strip_prefix("error: ").unwrap_or(line).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    /// A program that plays `rblk storage probe`: the image says how.
    fn probe(dir: &Path) -> Probe {
        let program = dir.join("rblk");
        let script = "#!/bin/sh\ncase $4 in\nfail) echo 'error: no route; check the network' >&2; exit 1 ;;\n\
                      hang) sleep 600 & echo $! > ${0%/*}/child; wait ;;\nesac\n";
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Probe {
            program,
            journal: Arc::default(),
        }
    }

    fn wait_for(storages: &Storages, name: &str, state: StorageState) -> StorageStatus {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let status = storages.status();
            let found = status.iter().find(|status| status.name == name);
            match found {
                Some(found) if found.state == state => return found.clone(),
                _ => assert!(Instant::now() < deadline, "{status:?}"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn storage_that_hangs_does_not_hold_up_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let (probe, storages) = (probe(dir.path()), Arc::new(Storages::default()));
        let domain = |name: &str, image: &str| (name.to_owned(), image.to_owned());
        let wanted = [
            domain("a", "hang"),
            domain("b", "fail"),
            domain("c", "read"),
        ];
        storages.configure(&wanted, &probe);
        assert_eq!(wait_for(&storages, "c", StorageState::Up).cause, None);
        let failed = wait_for(&storages, "b", StorageState::Down);
        assert_eq!(failed.cause.as_deref(), Some("no route; check the network"));
        let slow = wait_for(&storages, "a", StorageState::Slow);
        assert_eq!(slow.cause.as_deref(), Some("no answer for 2 seconds"));
        let down = wait_for(&storages, "a", StorageState::Down);
        assert_eq!(down.history.len(), 2);
        // The process that the check has started is killed with it.
        let child = fs::read_to_string(dir.path().join("child")).unwrap();
        let stat = format!("/proc/{}/stat", child.trim());
        let deadline = Instant::now() + Duration::from_secs(60);
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(" Z ")) {
            assert!(Instant::now() < deadline, "{stat}");
            thread::sleep(Duration::from_millis(5));
        }
        let texts: Vec<String> = probe
            .journal
            .after(0, Duration::ZERO)
            .into_iter()
            .map(|event| event.text)
            .collect();
        assert!(texts.contains(&"storage c: up".to_owned()), "{texts:?}");
        storages.configure(&wanted[2..], &probe);
        assert_eq!(storages.status().len(), 1);
    }

    #[test]
    fn states_of_a_day_are_kept() {
        let mut domain = Domain::new("a", "/a");
        domain.status.since = 1000;
        assert!(domain.set(StorageState::Up, None, 2000));
        assert!(!domain.set(StorageState::Up, None, 3000));
        assert!(domain.set(StorageState::Down, Some("x".to_owned()), 4000));
        let times = |domain: &Domain| {
            let history = domain.status.history.iter();
            history.map(|change| change.since).collect::<Vec<_>>()
        };
        assert_eq!(
            (domain.status.since, times(&domain)),
            (4000, vec![1000, 2000])
        );
        domain.set(StorageState::Up, None, 1500 + KEPT_SECONDS);
        assert_eq!(times(&domain), [2000, 4000]);
    }
}
