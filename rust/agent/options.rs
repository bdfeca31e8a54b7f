// SPDX-License-Identifier: GPL-2.0-only

//! The options of the processes that serve disks.

use api::{defaults, socket, DiskAnswer, DiskCommand, DiskId, Quota, RunDir};
use clap::{value_parser, Args, ValueEnum};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Limit for the answer of a process.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of tries to reach a process that is being started, and the delay between them.
const TRIES: u32 = 40;
const DELAY: Duration = Duration::from_secs(1);

/// The options of the processes that serve disks.
#[derive(Args, Clone, Debug)]
pub struct TapOptions {
    /// Pages of 4 KiB that the data of a domain's requests may use, on all disks
    #[arg(
        long,
        value_name = "N",
        default_value = defaults::PAGES,
        value_parser = value_parser!(u32).range(1..)
    )]
    pub domain_pages: u32,
    /// Requests of a domain that may be in flight, on all disks
    #[arg(
        long,
        value_name = "N",
        default_value = defaults::REQUESTS,
        value_parser = value_parser!(u32).range(1..)
    )]
    pub domain_requests: u32,
    /// Action for a write for which the storage has no space
    #[arg(long, value_name = "ACTION", default_value = defaults::NO_SPACE)]
    pub no_space: NoSpace,
    /// Time for which requests are tried again after an error that may pass, in seconds
    #[arg(long, value_name = "N", default_value = defaults::RETRY_SECONDS)]
    pub retry_seconds: u32,
    /// When a request that does not complete is reported, in seconds
    #[arg(long, value_name = "N", default_value = defaults::STUCK_SECONDS)]
    pub stuck_seconds: u32,
    /// Directory of the passphrases of LUKS containers, as NAME.key
    #[arg(long, value_name = "DIR", default_value = defaults::KEY_DIR)]
    pub key_dir: String,
    /// The process of a disk runs as user and group N + DOMAIN
    #[arg(
        long,
        value_name = "N",
        default_value = defaults::UID_BASE,
        value_parser = value_parser!(u32).range(1..0x7fff_0000)
    )]
    pub uid_base: u32,
    /// The number of times that the share of each domain's disks has changed.
    #[arg(skip)]
    changes: Arc<Mutex<BTreeMap<u16, u64>>>,
}

/// The action for a write for which the storage has no space.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum NoSpace {
    /// Try it again, as after an error that may pass
    Wait,
    /// Fail it
    Fail,
}

impl TapOptions {
    /// Returns what a disk may use if its domain has `count` disks.
    fn quota(&self, count: usize) -> Quota {
        let domain = Quota {
            pages: self.domain_pages,
            requests: self.domain_requests,
        };
        domain.share(count)
    }

    /// Returns the options for the process of a disk, one of `count` disks of its domain.
    pub fn arguments(&self, count: usize) -> Vec<String> {
        let quota = self.quota(count);
        let no_space = match self.no_space {
            NoSpace::Wait => "wait",
            NoSpace::Fail => "fail",
        };
        [
            ("--pages", quota.pages.to_string()),
            ("--requests", quota.requests.to_string()),
            ("--no-space", no_space.to_owned()),
            ("--retry-seconds", self.retry_seconds.to_string()),
            ("--stuck-seconds", self.stuck_seconds.to_string()),
            ("--key-dir", self.key_dir.clone()),
            ("--uid-base", self.uid_base.to_string()),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }

    /// Tells the processes of a domain what each of its disks may use, in a thread. One that was
    /// started for an earlier share ends.
    pub fn share_quota(&self, run: &RunDir, domid: u16, disks: Vec<DiskId>) {
        let change = self.change(domid, 1);
        let (run, options, quota) = (run.clone(), self.clone(), self.quota(disks.len()));
        let thread = thread::Builder::new().name("quota".to_owned());
        let started = thread.spawn(move || {
            for disk in disks {
                tell(&run, disk, quota, || options.change(domid, 0) == change);
            }
        });
        if let Err(error) = started {
            api::message!("no thread for the quotas of disks: {error}");
        }
    }

    /// Returns the number of the last change of a domain's share, after having added `added`.
    fn change(&self, domid: u16, added: u64) -> u64 {
        // A number is whole after each statement.
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let change = changes.entry(domid).or_default();
        *change = change.wrapping_add(added);
        *change
    }
}

/// Tells a process what its disk may use, while that is the latest. One that is being started is
/// tried again.
fn tell(run: &RunDir, disk: DiskId, quota: Quota, is_latest: impl Fn() -> bool) {
    for _ in 0..TRIES {
        if !is_latest() {
            return;
        }
        let command = DiskCommand::SetQuota(quota);
        let told: Result<DiskAnswer, _> =
            socket::command(&run.control_socket(disk), command, ANSWER_TIMEOUT);
        // A disk without a record is gone, and one that has failed gets its quota at the next
        // start.
        let record = run.read_record(disk).ok().flatten();
        let has_process = record.is_some_and(|record| record.phase.pid().is_some());
        if told.is_ok() || !has_process {
            return;
        }
        thread::sleep(DELAY);
    }
    api::message!("{disk}: the process does not answer; it keeps its quota");
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use api::socket::{answer_command, read_command};
    use api::{Phase, Record};
    use clap::Parser;
    use std::os::unix::net::UnixListener;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: TapOptions,
    }

    /// Returns the options that a command line sets.
    pub(crate) fn options(line: &[&str]) -> TapOptions {
        let words = ["rblkd"].iter().chain(line);
        Line::try_parse_from(words).unwrap().options
    }

    #[test]
    fn each_process_gets_its_share() {
        let options = options(&["--domain-pages", "100", "--no-space", "fail"]);
        let line = options.arguments(3).join(" ");
        assert!(line.starts_with("--pages 33 --requests 682 --no-space fail --retry-seconds 60"));
        assert!(line.ends_with("--key-dir /etc/cryptsetup-keys.d --uid-base 1895825408"));
        assert!(options.arguments(0).contains(&"100".to_owned()));
    }

    #[test]
    fn running_processes_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let disk: DiskId = "5/51712".parse().unwrap();
        run.write_record(&Record {
            disk,
            name: "xvda".to_owned(),
            domain: None,
            image: "aio:/a".to_owned(),
            restarts: 0,
            replaced: None,
            phase: Phase::Running {
                pid: 1,
                start_time: 1,
            },
        })
        .unwrap();
        let listener = UnixListener::bind(run.control_socket(disk)).unwrap();
        // The second disk has no record.
        let disks = vec![disk, "5/51728".parse().unwrap()];
        options(&["--domain-pages", "100"]).share_quota(&run, disk.domid, disks);
        let (stream, _) = listener.accept().unwrap();
        let command = read_command(&stream).unwrap().unwrap();
        let quota = Quota {
            pages: 50,
            requests: 1024,
        };
        assert_eq!(command, DiskCommand::SetQuota(quota));
        answer_command(&stream, Ok(DiskAnswer::Quota(quota)));
        // Another share has been computed meanwhile.
        listener.set_nonblocking(true).unwrap();
        tell(&run, disk, quota, || false);
        assert!(listener.accept().is_err());
    }
}
