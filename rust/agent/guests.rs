// SPDX-License-Identifier: GPL-2.0-only

//! Guests whose storage does not answer are paused, and resumed when it does.
//!
//! A guest that waits long for a write may report it, drop the disk from a RAID array, or be fenced
//! by its cluster. One that is paused does not notice. `rblktap` retries its requests meanwhile.
//!
//! A guest is recorded as paused before `xl pause` is called, so that a later `rblkd` resumes it.
//! Xen counts pauses: the guest stays paused if an administrator has paused it too. A guest stays
//! paused while no `rblkd` runs; one whose configuration has no `pause-after` resumes it.

use crate::events::Journal;
use crate::storage::has_ended;
use crate::threads::in_threads;
use api::{socket, DiskCommand, DiskId, DiskStatus, EventKind, Record, RunDir};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Time between two checks of all disks.
const PERIOD: Duration = Duration::from_secs(5);

/// Limit for the answer of a process.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Limit for `xl`.
const XL_TIMEOUT: Duration = Duration::from_secs(30);

/// Pauses and resumes guests.
pub struct Guests {
    run: RunDir,
    /// The program `xl`.
    xl: PathBuf,
    /// The age of a request at which its guest is paused.
    limit: Duration,
    /// Limit for `xl`.
    xl_timeout: Duration,
    journal: Arc<Journal>,
    /// The time of the last answer of each disk's process.
    answered: BTreeMap<DiskId, Instant>,
    /// The guests that cannot be paused.
    refused: BTreeSet<u16>,
}

impl Guests {
    /// Names what is needed to pause a guest with a request that is as old as `limit`.
    pub fn new(run: RunDir, xl: PathBuf, limit: Duration, journal: Arc<Journal>) -> Self {
        Self {
            run,
            xl,
            limit,
            xl_timeout: XL_TIMEOUT,
            journal,
            answered: BTreeMap::new(),
            refused: BTreeSet::new(),
        }
    }

    /// Resumes the guests that an earlier `rblkd` has paused, in a thread: none is paused any more.
    pub fn resume_all(self) -> io::Result<()> {
        let thread = thread::Builder::new().name("guests".to_owned());
        thread.spawn(move || loop {
            let paused = self.run.paused_guests();
            let left = paused.unwrap_or_default().into_iter();
            let left = left.filter(|domid| !self.try_resume(*domid, "rblkd pauses no guests"));
            if left.count() == 0 {
                return;
            }
            thread::sleep(PERIOD);
        })?;
        Ok(())
    }

    /// Starts a thread that examines the disks every 5 seconds.
    pub fn start(mut self) -> io::Result<()> {
        let thread = thread::Builder::new().name("guests".to_owned());
        thread.spawn(move || loop {
            if let Err(error) = self.check() {
                api::message!("guests that wait for storage: {error}; it is tried again");
            }
            thread::sleep(PERIOD);
        })?;
        Ok(())
    }

    /// Pauses the guests with requests that are too old, and resumes those without.
    fn check(&mut self) -> io::Result<()> {
        let records = self.run.records()?;
        let paused = self.run.paused_guests()?;
        let waits = self.waits(&records, &paused);
        for domid in paused.iter().filter(|domid| !waits.contains_key(domid)) {
            self.try_resume(*domid, "none of its disks is known");
        }
        for (domid, (wait, disk)) in waits {
            match (paused.contains(&domid), wait >= self.limit) {
                (false, true) => self.try_pause(disk, wait),
                (true, false) => drop(self.try_resume(domid, "its storage answers")),
                (true, true) | (false, false) => {}
            }
        }
        Ok(())
    }

    /// Returns the longest wait of each guest with disks, and the disk.
    fn waits(
        &mut self,
        records: &[Record],
        paused: &BTreeSet<u16>,
    ) -> BTreeMap<u16, (Duration, DiskId)> {
        let disks: BTreeSet<DiskId> = records.iter().map(|record| record.disk).collect();
        self.answered.retain(|disk, _| disks.contains(disk));
        let mut waits = BTreeMap::new();
        for (disk, status) in self.ask(records) {
            let wait = self.wait_of(disk, status, paused.contains(&disk.domid));
            let longest = waits.entry(disk.domid).or_insert((wait, disk));
            *longest = (*longest).max((wait, disk));
        }
        self.refused.retain(|domid| waits.contains_key(domid));
        waits
    }

    /// Asks the processes of all disks, several at a time: some may not answer.
    fn ask(&self, records: &[Record]) -> Vec<(DiskId, Option<DiskStatus>)> {
        in_threads(records, |record| {
            let path = self.run.control_socket(record.disk);
            let status = socket::command(&path, DiskCommand::Stats, ANSWER_TIMEOUT);
            (record.disk, status.ok())
        })
    }

    /// Returns how long a disk has waited for its storage.
    ///
    /// A disk whose process has answered once, and does not any more, waits too: its successor may
    /// fail to open the image.
    fn wait_of(&mut self, disk: DiskId, status: Option<DiskStatus>, is_paused: bool) -> Duration {
        match status {
            Some(status) => {
                self.answered.insert(disk, Instant::now());
                oldest(&status)
            }
            None => match self.answered.get(&disk) {
                Some(time) => time.elapsed(),
                None if is_paused => self.limit,
                None => Duration::ZERO,
            },
        }
    }

    /// Pauses a guest. A failure does not keep others from being paused.
    fn try_pause(&mut self, disk: DiskId, wait: Duration) {
        if let Err(error) = self.pause(disk, wait) {
            let domid = disk.domid;
            api::message!("guest {domid} waits for storage and cannot be paused: {error}");
            self.refused.insert(domid);
        }
    }

    fn pause(&mut self, disk: DiskId, wait: Duration) -> io::Result<()> {
        let domid = disk.domid;
        if self.refused.contains(&domid) {
            return Ok(());
        }
        self.run.set_paused(domid, true)?;
        if let Err(error) = self.xl(&["pause", &domid.to_string()]) {
            // An xl that was killed may have paused the guest, so it is resumed later.
            if error.kind() != io::ErrorKind::TimedOut {
                self.run.set_paused(domid, false)?;
            }
            return Err(error);
        }
        let seconds = wait.as_secs();
        self.report(
            disk,
            format!("guest {domid} is paused: the storage of {disk} has not answered for {seconds} seconds"),
        );
        Ok(())
    }

    /// Resumes a guest. Returns `false` if that has failed and is tried again.
    fn try_resume(&self, domid: u16, why: &str) -> bool {
        let resumed = self.resume(domid, why);
        if let Err(error) = &resumed {
            api::message!("guest {domid} is not resumed: {error}; it is tried again");
        }
        resumed.is_ok()
    }

    /// Resumes a guest. A failure is final if the guest runs, or is gone.
    ///
    /// It runs if an administrator has resumed it, or an earlier `rblkd` that was killed before it
    /// recorded that.
    fn resume(&self, domid: u16, why: &str) -> io::Result<()> {
        if let Err(error) = self.xl(&["unpause", &domid.to_string()]) {
            if self.is_paused(domid)? {
                return Err(error);
            }
            return self.run.set_paused(domid, false);
        }
        self.run.set_paused(domid, false)?;
        let text = format!("guest {domid} is resumed: {why}");
        api::message!("{text}");
        self.journal.add(None, EventKind::Storage, text);
        Ok(())
    }

    fn report(&self, disk: DiskId, text: String) {
        api::message!("{text}");
        self.journal.add(Some(disk), EventKind::Storage, text);
    }

    /// Returns `true` if a guest is paused, and `false` if there is none.
    fn is_paused(&self, domid: u16) -> io::Result<bool> {
        let list = self.xl(&["list"])?;
        Ok(list.lines().any(|guest| is_paused_in(guest, domid)))
    }

    /// Runs a command of `xl`. Returns what it prints.
    ///
    /// The error is [`TimedOut`](io::ErrorKind::TimedOut) if it was killed.
    fn xl(&self, words: &[&str]) -> io::Result<String> {
        let mut child = Command::new(&self.xl)
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let in_time = has_ended(&child, self.xl_timeout).unwrap_or(false);
        if !in_time {
            child.kill()?;
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let (xl, words, status) = (self.xl.display(), words.join(" "), output.status);
        let kind = match in_time {
            true => io::ErrorKind::Other,
            false => io::ErrorKind::TimedOut,
        };
        Err(io::Error::new(kind, format!("{xl} {words}: {status}")))
    }
}

/// Returns `true` if a line of `xl list` is that of a guest, and says that it is paused.
fn is_paused_in(line: &str, domid: u16) -> bool {
    // Name, number, memory, CPUs, state, time.
    let mut words = line.split_whitespace().rev();
    let state = words.nth(1);
    let number = words.nth(2);
    number == Some(&domid.to_string()) && state.is_some_and(|state| state.contains('p'))
}

/// Returns the age of the oldest request of a disk.
fn oldest(status: &DiskStatus) -> Duration {
    let requests = status.queues.iter().filter_map(|queue| queue.oldest);
    let age = requests.map(|request| request.age_ms).max();
    Duration::from_millis(age.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::Phase;
    use serde_json::json;
    use std::fs;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};

    const DISK: DiskId = DiskId {
        domid: 5,
        devid: 51712,
    };
    const LIMIT: Duration = Duration::from_secs(10);

    /// A disk whose process answers with an age, in a directory with a program that plays `xl`.
    struct Rig {
        dir: tempfile::TempDir,
        run: RunDir,
        age_ms: Arc<AtomicU64>,
        guests: Guests,
    }

    impl Rig {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let run = RunDir::new(dir.path());
            let xl = dir.path().join("xl");
            let script = format!(
                "#!/bin/sh\ncd {}\n[ $1 != list ] || exec cat list\necho $* >> calls; [ ! -e fail ] && [ ! -e \"fail $2\" ]\n",
                dir.path().display()
            );
            fs::write(&xl, script).unwrap();
            fs::set_permissions(&xl, fs::Permissions::from_mode(0o755)).unwrap();
            run.write_record(&Record {
                disk: DISK,
                name: "xvda".to_owned(),
                domain: None,
                image: "aio:/a".to_owned(),
                restarts: 0,
                replaced: None,
                phase: Phase::Starting,
            })
            .unwrap();
            let age_ms = Arc::default();
            let guests = guests(&run, &xl);
            let rig = Self {
                dir,
                run,
                age_ms,
                guests,
            };
            rig.answer();
            rig
        }

        fn answer(&self) {
            let listener = UnixListener::bind(self.run.control_socket(DISK)).unwrap();
            let age_ms = self.age_ms.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let mut line = String::new();
                    BufReader::new(&stream).read_line(&mut line).unwrap();
                    let oldest = json!({"operation": "write", "sector": 0, "sectors": 8, "retries": 3,
                        "age_ms": age_ms.load(Ordering::Relaxed)});
                    let answer = json!({"pid": 7, "sectors": 8, "block_size": 512, "paused": false,
                        "queues": [{"in_flight": 1, "oldest": oldest, "paused": false}],
                        "quota": {"pages": 8, "requests": 4}, "counters": {}});
                    writeln!(stream, "{answer}").unwrap();
                }
            });
        }

        /// Has `xl list` print a state.
        fn list(&self, state: &str) {
            let text = format!("Name ID Mem VCPUs State Time(s)\nweb 5 192 1 {state} 8.1\n");
            fs::write(self.dir.path().join("list"), text).unwrap();
        }

        fn check(&mut self, age_ms: u64) -> String {
            self.age_ms.store(age_ms, Ordering::Relaxed);
            self.guests.check().unwrap();
            self.calls()
        }

        fn calls(&self) -> String {
            let calls = fs::read_to_string(self.dir.path().join("calls"));
            calls.unwrap_or_default().replace('\n', ";")
        }
    }

    fn guests(run: &RunDir, xl: &Path) -> Guests {
        Guests::new(run.clone(), xl.to_owned(), LIMIT, Arc::default())
    }

    #[test]
    fn a_guest_is_paused_and_resumed_once() {
        let mut rig = Rig::new();
        assert_eq!(rig.check(9_999), "");
        assert_eq!(rig.check(10_000), "pause 5;");
        assert_eq!(rig.check(15_000), "pause 5;");
        assert_eq!(rig.check(1), "pause 5;unpause 5;");
        assert_eq!(rig.check(2), "pause 5;unpause 5;");
        let events = rig.guests.journal.after(0, Duration::ZERO);
        let texts: Vec<&str> = events.iter().map(|event| event.text.as_str()).collect();
        assert_eq!(
            texts,
            [
                "guest 5 is paused: the storage of 5/51712 has not answered for 10 seconds",
                "guest 5 is resumed: its storage answers"
            ]
        );
    }

    #[test]
    fn a_later_agent_resumes_a_guest_when_its_disk_answers() {
        let mut rig = Rig::new();
        rig.check(20_000);
        rig.guests = guests(&rig.run, &rig.dir.path().join("xl"));
        let socket = rig.run.control_socket(DISK);
        let away = rig.dir.path().join("away");
        fs::rename(&socket, &away).unwrap();
        assert_eq!(rig.check(1), "pause 5;");
        fs::rename(&away, &socket).unwrap();
        assert_eq!(rig.check(1), "pause 5;unpause 5;");
    }

    #[test]
    fn a_guest_without_disks_is_resumed() {
        let mut rig = Rig::new();
        rig.check(20_000);
        rig.run.remove(DISK).unwrap();
        assert_eq!(rig.check(0), "pause 5;unpause 5;");
        assert!(rig.run.paused_guests().unwrap().is_empty());
    }

    #[test]
    fn guests_are_resumed_when_none_is_paused_any_more() {
        let mut rig = Rig::new();
        rig.check(20_000);
        guests(&rig.run, &rig.dir.path().join("xl"))
            .resume_all()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !rig.run.paused_guests().unwrap().is_empty() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(rig.calls(), "pause 5;unpause 5;");
    }

    #[test]
    fn a_guest_that_cannot_be_resumed_does_not_affect_others() {
        let mut rig = Rig::new();
        rig.check(20_000);
        // Guest 4 has no disk, and xl fails for it.
        rig.run.set_paused(4, true).unwrap();
        let list =
            "Name ID Mem VCPUs State Time(s)\nweb 5 192 1 -b---- 1.0\nhvm 4 9 1 --p--- 8.1\n";
        fs::write(rig.dir.path().join("list"), list).unwrap();
        fs::write(rig.dir.path().join("fail 4"), "").unwrap();
        assert_eq!(rig.check(0), "pause 5;unpause 4;unpause 5;");
        assert_eq!(rig.run.paused_guests().unwrap(), [4].into());
    }

    #[test]
    fn a_guest_that_may_have_been_paused_is_resumed() {
        let mut rig = Rig::new();
        rig.guests.xl_timeout = Duration::ZERO;
        // The xl that is killed may or may not have been run.
        rig.check(20_000);
        assert_eq!(rig.run.paused_guests().unwrap(), [5].into());
        rig.guests.xl_timeout = XL_TIMEOUT;
        assert!(rig.check(0).ends_with("unpause 5;"));
        assert!(rig.run.paused_guests().unwrap().is_empty());
    }

    #[test]
    fn a_guest_that_is_gone_is_forgotten() {
        let mut rig = Rig::new();
        rig.check(20_000);
        fs::write(rig.dir.path().join("fail"), "").unwrap();
        // xl list fails, too: it is not known whether the guest is gone.
        assert_eq!(rig.check(0), "pause 5;unpause 5;");
        assert_eq!(rig.run.paused_guests().unwrap(), [5].into());
        fs::write(rig.dir.path().join("list"), "Name ID\n").unwrap();
        assert_eq!(rig.check(0), "pause 5;unpause 5;unpause 5;");
        assert!(rig.run.paused_guests().unwrap().is_empty());
    }

    #[test]
    fn a_failure_to_pause_is_final_and_one_to_resume_is_not() {
        let mut rig = Rig::new();
        let fail = rig.dir.path().join("fail");
        fs::write(&fail, "").unwrap();
        assert_eq!(rig.check(20_000), "pause 5;");
        assert_eq!(rig.check(20_000), "pause 5;");
        assert!(rig.run.paused_guests().unwrap().is_empty());
        rig.run.set_paused(5, true).unwrap();
        rig.age_ms.store(0, Ordering::Relaxed);
        rig.list("--p---");
        rig.guests.check().unwrap();
        assert_eq!(rig.run.paused_guests().unwrap(), [5].into());
        fs::remove_file(fail).unwrap();
        assert_eq!(rig.check(0), "pause 5;unpause 5;unpause 5;");
    }

    #[test]
    fn a_guest_that_was_resumed_meanwhile_is_forgotten() {
        let mut rig = Rig::new();
        rig.check(20_000);
        fs::write(rig.dir.path().join("fail"), "").unwrap();
        rig.list("-b----");
        assert_eq!(rig.check(0), "pause 5;unpause 5;");
        assert!(rig.run.paused_guests().unwrap().is_empty());
    }

    #[test]
    fn a_disk_that_was_never_served_pauses_no_guest() {
        let mut rig = Rig::new();
        fs::remove_file(rig.run.control_socket(DISK)).unwrap();
        rig.guests.limit = Duration::from_millis(1);
        assert_eq!(rig.check(0), "");
        rig.answer();
        assert_eq!(rig.check(0), "");
        fs::remove_file(rig.run.control_socket(DISK)).unwrap();
        thread::sleep(Duration::from_millis(2));
        assert_eq!(rig.check(0), "pause 5;");
    }
}
