// SPDX-License-Identifier: GPL-2.0-only

//! All disks: waits for events and updates the disks that they are about.

use crate::backend;
use crate::disk::{Context, Disk, Next, Outcome};
use crate::events::Journal;
use crate::options::TapOptions;
use api::{DiskId, Record, RunDir};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{flock, FlockOperation};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xen_user::xenstore::Xenstore;

/// Delay after an error before a disk is updated again.
const RETRY: Duration = Duration::from_secs(1);

/// A client's command for a disk.
pub enum Command {
    /// Its process is replaced by one that uses `image`, or the same image.
    Replace {
        /// The disk.
        disk: DiskId,
        /// The URI of the new image.
        image: Option<String>,
        /// Receives the outcome.
        outcome: Sender<Outcome>,
    },
}

/// Sends commands to a [`Supervisor`].
#[derive(Clone)]
pub struct Commands {
    sender: Sender<Command>,
    wakeup: Arc<UnixStream>,
}

impl Commands {
    /// Sends a command.
    pub fn send(&self, command: Command) -> io::Result<()> {
        let sent = self.sender.send(command);
        sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        (&*self.wakeup).write_all(&[0])
    }
}

/// A disk, and when it is updated even if nothing happens.
struct Entry {
    disk: Disk,
    due: Option<Instant>,
    /// The error of the last update, which is reported once.
    error: Option<String>,
}

/// All disks.
pub struct Supervisor {
    store: Xenstore,
    run: RunDir,
    program: PathBuf,
    options: TapOptions,
    disks: BTreeMap<DiskId, Entry>,
    /// The disks that could not be added, and the error, which is reported once. They are tried
    /// again.
    failed: BTreeMap<DiskId, String>,
    /// When they are tried again.
    retry_at: Option<Instant>,
    commands: Receiver<Command>,
    wakeup: UnixStream,
    journal: Arc<Journal>,
    /// Held by the one `rblkd` of a directory.
    _lock: File,
}

impl Supervisor {
    /// Watches xenstore, and adopts the disks of an earlier `rblkd`.
    pub fn new(
        mut store: Xenstore,
        run: RunDir,
        program: PathBuf,
        options: TapOptions,
    ) -> io::Result<(Self, Commands)> {
        fs::create_dir_all(run.path())?;
        fs::set_permissions(run.path(), fs::Permissions::from_mode(0o755))?;
        let lock = File::create(run.path().join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        store.watch(backend::ROOT, "disks")?;
        let disks = adopt(&run, &program)?;
        let (sender, commands) = channel();
        let (wakeup, wake) = UnixStream::pair()?;
        wakeup.set_nonblocking(true)?;
        let supervisor = Self {
            disks,
            failed: BTreeMap::new(),
            retry_at: None,
            store,
            run,
            program,
            options,
            commands,
            wakeup,
            journal: Arc::default(),
            _lock: lock,
        };
        let wakeup = Arc::new(wake);
        Ok((supervisor, Commands { sender, wakeup }))
    }

    /// Returns where it reports what happens to disks.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// Returns the number of disks.
    pub fn disks(&self) -> usize {
        self.disks.len()
    }

    /// Serves until xenstore cannot be used.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            if !self.step(Instant::now())? {
                self.wait()?;
            }
        }
    }

    /// Updates the disks that something has happened to. Returns `false` if there are none.
    fn step(&mut self, now: Instant) -> io::Result<bool> {
        let mut changed = self.take_events()?;
        changed.extend(self.take_commands());
        let disks = self.disks.iter();
        let due = disks.filter(|(_, entry)| entry.is_due(now));
        changed.extend(due.map(|(disk, _)| *disk));
        if self.retry_at.take_if(|time| *time <= now).is_some() {
            changed.extend(self.failed.keys());
        }
        for disk in &changed {
            self.update(*disk, now);
        }
        Ok(!changed.is_empty())
    }

    /// Takes the events of xenstore. Returns the disks that they are about.
    fn take_events(&mut self) -> io::Result<BTreeSet<DiskId>> {
        let mut changed = BTreeSet::new();
        while let Some(event) = self.store.next_event()? {
            match backend::disk_of(&event.path) {
                Some(disk) => drop(changed.insert(disk)),
                None => {
                    changed.extend(backend::disks(&mut self.store)?);
                    changed.extend(self.disks.keys());
                }
            }
        }
        Ok(changed)
    }

    fn take_commands(&mut self) -> Vec<DiskId> {
        let mut bytes = [0; 64];
        // What is left wakes it again.
        let _ = self.wakeup.read(&mut bytes);
        let mut changed = Vec::new();
        while let Ok(command) = self.commands.try_recv() {
            let Command::Replace {
                disk,
                image,
                outcome,
            } = command;
            changed.push(disk);
            let Some(entry) = self.disks.get_mut(&disk) else {
                // The client waits in vain for a sender that is dropped here, and is told.
                continue;
            };
            entry.disk.replace(image, outcome);
        }
        changed
    }

    /// Updates a disk. An error is reported, and it is tried again.
    fn update(&mut self, disk: DiskId, now: Instant) {
        let before = self.record(disk);
        let result = self.try_update(disk, now);
        let gone = matches!(result, Ok(Next::Forget));
        let after = self.record(disk).filter(|_| !gone);
        let end = (self.disks.get_mut(&disk)).and_then(|entry| entry.disk.take_end());
        self.journal
            .add_change(before.as_ref(), after.as_ref(), end);
        match result {
            Ok(Next::Wait(due)) => {
                self.failed.remove(&disk);
                if let Some(entry) = self.disks.get_mut(&disk) {
                    entry.due = due;
                    entry.error = None;
                }
            }
            Ok(Next::Forget) => {
                self.failed.remove(&disk);
                if self.disks.remove(&disk).is_some() {
                    self.share_quota(disk.domid, None);
                }
            }
            Err(error) => self.retry(disk, &error.to_string(), now),
        }
    }

    /// Has a disk updated again after an error.
    fn retry(&mut self, disk: DiskId, error: &str, now: Instant) {
        let known = match self.disks.get_mut(&disk) {
            Some(entry) => {
                self.failed.remove(&disk);
                entry.due = Some(now + RETRY);
                entry.error.replace(error.to_owned())
            }
            None => {
                self.retry_at.get_or_insert(now + RETRY);
                self.failed.insert(disk, error.to_owned())
            }
        };
        if known.as_deref() != Some(error) {
            api::message!("{disk}: {error}; it is tried again every second");
        }
    }

    /// Returns the disks of a domain.
    fn disks_of(&self, domid: u16) -> impl Iterator<Item = DiskId> + '_ {
        let disks = self.disks.keys().copied();
        disks.filter(move |disk| disk.domid == domid)
    }

    /// Tells the processes of a domain, but that of a new disk, what each of them may use now.
    fn share_quota(&self, domid: u16, new: Option<DiskId>) {
        let disks: Vec<_> = self.disks_of(domid).collect();
        if disks.iter().any(|disk| Some(*disk) != new) {
            self.options.share_quota(&self.run, domid, disks);
        }
    }

    /// Adds a disk that is being attached, or whose record was lost. Returns `false` if it is
    /// neither.
    fn add(&mut self, disk: DiskId, now: Instant) -> io::Result<bool> {
        let backend = match backend::read(&mut self.store, disk)? {
            Some(backend) if backend.state != backend::CLOSED || backend.online => backend,
            _ => return Ok(false),
        };
        let entry = Entry {
            disk: Disk::new(disk, &backend, &self.run, &self.program, now),
            due: None,
            error: None,
        };
        if entry.disk.process().is_some() {
            api::message!("{disk}: its record was lost; the process that serves it was found");
        }
        self.disks.insert(disk, entry);
        self.share_quota(disk.domid, Some(disk));
        Ok(true)
    }

    fn record(&self, disk: DiskId) -> Option<Record> {
        let entry = self.disks.get(&disk)?;
        Some(entry.disk.record().clone())
    }

    fn try_update(&mut self, disk: DiskId, now: Instant) -> io::Result<Next> {
        if !self.disks.contains_key(&disk) && !self.add(disk, now)? {
            return Ok(Next::Forget);
        }
        let disks_of_domain = self.disks_of(disk.domid).count();
        let mut context = Context {
            store: &mut self.store,
            run: &self.run,
            program: &self.program,
            options: &self.options,
            disks_of_domain,
            now,
        };
        match self.disks.get_mut(&disk) {
            Some(entry) => entry.disk.update(&mut context),
            None => Ok(Next::Forget),
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) -> io::Result<()> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.store.fd(), PollFlags::IN),
            PollFd::new(&self.wakeup, PollFlags::IN),
        ];
        let processes = self.disks.values().filter_map(|entry| entry.disk.process());
        fds.extend(processes.map(|process| PollFd::new(process, PollFlags::IN)));
        let due = self.disks.values().filter_map(|entry| entry.due);
        let due = due.chain(self.retry_at).min();
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Err(error) if error != rustix::io::Errno::INTR => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Adopts the disks of an earlier `rblkd`.
fn adopt(run: &RunDir, program: &Path) -> io::Result<BTreeMap<DiskId, Entry>> {
    let now = Instant::now();
    let mut disks = BTreeMap::new();
    for record in run.records()? {
        let id = record.disk;
        let entry = Entry {
            disk: Disk::adopt(record, run, program, now),
            due: Some(now),
            error: None,
        };
        disks.insert(id, entry);
    }
    Ok(disks)
}

impl Entry {
    /// Returns `true` if its time has come, or its process has ended.
    fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
            || self
                .disk
                .process()
                .is_some_and(|process| process.has_ended())
    }
}

#[cfg(test)]
mod crash_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::tests::options;
    use crate::process::tests::PROGRAM;
    use crate::process::Process;
    use api::Phase;
    use xen_user::fake::Host;
    use xen_user::xenstore::Nodes;

    pub(super) const DISK: DiskId = DiskId {
        domid: 5,
        devid: 51712,
    };

    /// A host with a disk, and the supervisor of its domain 0.
    struct Rig {
        host: Host,
        dir: tempfile::TempDir,
        supervisor: Supervisor,
        commands: Commands,
        store: Xenstore,
    }

    impl Rig {
        fn new(image: &str) -> Self {
            let (host, dir) = (Host::new(), tempfile::tempdir().unwrap());
            let mut store = host.xenstore().unwrap();
            store.write("backend/vbd3/5/51712/params", image).unwrap();
            store.write("backend/vbd3/5/51712/state", "1").unwrap();
            let (supervisor, commands) = supervisor(&host, &dir);
            Self {
                host,
                dir,
                supervisor,
                commands,
                store,
            }
        }

        fn run(&self) -> RunDir {
            RunDir::new(self.dir.path())
        }

        fn record(&self) -> Record {
            self.run().read_record(DISK).unwrap().unwrap()
        }

        fn state(&mut self) -> String {
            let state = self.store.read_text("backend/vbd3/5/51712/state").unwrap();
            state.unwrap_or_default()
        }

        fn set_state(&mut self, state: &str) {
            self.store
                .write("backend/vbd3/5/51712/state", state)
                .unwrap();
        }

        /// Plays a process that has opened the image.
        fn open(&mut self, process: &Process) {
            let node = "backend/vbd3/5/51712/kthread-pid";
            let pid = process.pid().to_string();
            self.store.write(node, &pid).unwrap();
        }

        /// Drops the supervisor, which is what a kill of `rblkd` does.
        fn kill(&mut self) {
            let elsewhere = tempfile::tempdir().unwrap();
            let idle = supervisor(&Host::new(), &elsewhere).0;
            drop(std::mem::replace(&mut self.supervisor, idle));
        }

        /// Starts another supervisor of the same disks.
        fn start(&mut self) {
            (self.supervisor, self.commands) = supervisor(&self.host, &self.dir);
        }

        /// Lets the supervisor work until something is so.
        fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !is_so(self) {
                assert!(Instant::now() < deadline, "{what}");
                self.supervisor.step(Instant::now()).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
        }

        /// Waits for a process with a number other than `old`, and returns it.
        fn process(&mut self, old: u32) -> Process {
            let running = |rig: &mut Self| {
                let process = rig.run().read_record(DISK).unwrap()?.phase.process();
                let (pid, start_time) = process.filter(|(pid, _)| *pid != old)?;
                Process::adopt(pid, start_time)
            };
            self.until("no process", |rig| running(rig).is_some());
            running(self).unwrap()
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            for entry in self.supervisor.disks.values() {
                if let Some(process) = entry.disk.process() {
                    process.kill();
                }
            }
        }
    }

    pub(super) fn supervisor(host: &Host, dir: &tempfile::TempDir) -> (Supervisor, Commands) {
        // A child that another test is starting has all locks until it runs its program.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let store = host.xenstore().unwrap();
            match Supervisor::new(store, RunDir::new(dir.path()), PROGRAM.into(), options(&[])) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    assert!(Instant::now() < deadline);
                }
                result => return result.unwrap(),
            }
        }
    }

    #[test]
    fn a_process_is_started_and_replaced_until_the_disk_is_detached() {
        let mut rig = Rig::new("serve");
        let first = rig.process(0);
        assert_eq!(
            (rig.record().name.as_str(), rig.record().restarts),
            ("xvda", 0)
        );
        rig.set_state("4");
        first.kill();
        let second = rig.process(first.pid());
        assert_eq!(rig.record().restarts, 1);
        rig.set_state("6");
        second.kill();
        rig.until("record left", |rig| rig.run().records().unwrap().is_empty());
        rig.store.remove("backend/vbd3/5").unwrap();
        rig.until("disk left", |rig| rig.supervisor.disks.is_empty());
    }

    #[test]
    fn a_disk_that_the_guest_has_closed_is_served_until_it_is_detached() {
        let mut rig = Rig::new("serve");
        let first = serve(&mut rig, 0);
        let online = "backend/vbd3/5/51712/online";
        rig.store.write(online, "1").unwrap();
        rig.set_state("6");
        first.kill();
        let second = rig.process(first.pid());
        rig.kill();
        rig.run().remove(DISK).unwrap();
        rig.start();
        let adopted = rig.process(first.pid());
        assert_eq!(adopted.pid(), second.pid());
        rig.store.write(online, "0").unwrap();
        second.kill();
        rig.until("record left", |rig| rig.run().records().unwrap().is_empty());
    }

    #[test]
    fn the_name_of_a_guest_may_change() {
        let mut rig = Rig::new("serve");
        let name = "/local/domain/5/name";
        rig.store.write(name, "web--incoming").unwrap();
        serve(&mut rig, 0);
        rig.store.write(name, "web").unwrap();
        rig.set_state("4");
        rig.until("not renamed", |rig| {
            rig.record().domain.as_deref() == Some("web")
        });
    }

    #[test]
    fn a_disk_that_is_attached_again_gets_a_process_when_the_former_one_has_ended() {
        let mut rig = Rig::new("serve");
        let first = serve(&mut rig, 0);
        rig.set_state("6");
        rig.store.remove("backend/vbd3/5").unwrap();
        rig.store
            .write("backend/vbd3/5/51712/params", "serve b")
            .unwrap();
        rig.set_state("1");
        let inflight = rig.dir.path().join("5-51712.inflight");
        fs::write(&inflight, "").unwrap();
        while rig.supervisor.step(Instant::now()).unwrap() {}
        assert_eq!(rig.record().phase.pid(), Some(first.pid()));
        first.kill();
        let second = rig.process(first.pid());
        assert_eq!(
            (rig.record().image.as_str(), rig.state().as_str()),
            ("serve b", "1")
        );
        assert!(!inflight.exists());
        rig.open(&second);
        rig.until("not recorded", |rig| rig.record().phase.is_running());
    }

    #[test]
    fn a_refusal_whose_reason_cannot_be_written_is_completed() {
        // xenstore takes 4096 bytes.
        let mut rig = Rig::new(&format!("serve {}", "x".repeat(4040)));
        rig.process(0);
        let later = Instant::now() + crate::disk::OPEN_LIMIT;
        rig.supervisor.step(later).unwrap();
        assert_eq!(rig.state(), "2");
        assert!(matches!(rig.record().phase, Phase::Failed { .. }));
    }

    #[test]
    fn the_reason_of_a_failed_start_is_recorded_before_the_state_is_written() {
        let mut rig = Rig::new("fail:no such file");
        rig.until("still Initialising", |rig| rig.state() != "1");
        assert_eq!(rig.state(), "2");
        let cause = "no such file".to_owned();
        assert_eq!(rig.record().phase, Phase::Failed { cause });
        let error = rig
            .store
            .read_text("error/backend/vbd3/5/51712/error")
            .unwrap();
        assert_eq!(error.as_deref(), Some("no such file"));
        rig.set_state("5");
        rig.until("not Closed", |rig| rig.state() == "6");
        rig.until("record left", |rig| rig.run().records().unwrap().is_empty());
    }

    #[test]
    fn an_image_that_does_not_open_in_time_is_refused() {
        let mut rig = Rig::new("serve");
        let process = rig.process(0);
        let started = Instant::now();
        rig.supervisor
            .step(started + crate::disk::ANNOUNCE_LIMIT)
            .unwrap();
        assert_eq!(rig.state(), "2");
        assert_eq!(rig.record().phase, process.opening());
        rig.supervisor
            .step(started + crate::disk::OPEN_LIMIT)
            .unwrap();
        rig.until("not killed", |rig| {
            rig.supervisor.disks[&DISK].disk.process().is_none()
        });
        assert!(process.has_ended());
        let Phase::Failed { cause } = rig.record().phase else {
            panic!("{:?}", rig.record().phase);
        };
        assert!(
            cause.starts_with("serve has not been opened in 30 seconds"),
            "{cause}"
        );
        rig.set_state("5");
        rig.until("not Closed", |rig| rig.state() == "6");
    }

    #[test]
    fn an_image_that_opens_late_is_served() {
        let mut rig = Rig::new("serve");
        let process = rig.process(0);
        let later = Instant::now() + crate::disk::ANNOUNCE_LIMIT;
        rig.supervisor.step(later).unwrap();
        assert_eq!(rig.state(), "2");
        rig.open(&process);
        rig.until("not recorded", |rig| rig.record().phase.is_running());
        // From now on the disk is served, even if the process has to be replaced.
        process.kill();
        let second = rig.process(process.pid());
        let later = Instant::now() + crate::disk::OPEN_LIMIT;
        rig.supervisor.step(later).unwrap();
        assert_eq!(rig.record().phase, second.opening());
    }

    #[test]
    fn a_process_that_fails_after_init_wait_is_a_reason() {
        let mut rig = Rig::new("serve");
        let process = rig.process(0);
        let later = Instant::now() + crate::disk::ANNOUNCE_LIMIT;
        rig.supervisor.step(later).unwrap();
        process.kill();
        rig.until("not refused", |rig| {
            matches!(rig.record().phase, Phase::Failed { .. })
                && rig.supervisor.disks[&DISK].disk.process().is_none()
        });
        while rig.supervisor.step(Instant::now()).unwrap() {}
        assert!(matches!(rig.record().phase, Phase::Failed { .. }));
        rig.set_state("5");
        rig.until("not Closed", |rig| rig.state() == "6");
    }

    #[test]
    fn a_process_does_not_outlive_its_disk() {
        let mut rig = Rig::new("serve");
        let process = rig.process(0);
        rig.set_state("4");
        rig.until("not noticed", |rig| {
            rig.supervisor.disks[&DISK].due.is_none()
        });
        rig.store.remove("backend/vbd3/5").unwrap();
        rig.until("not gone", |rig| rig.supervisor.disks[&DISK].due.is_some());
        assert!(!process.has_ended());
        let later = Instant::now() + Duration::from_secs(11);
        rig.supervisor.step(later).unwrap();
        rig.until("record left", |rig| rig.run().records().unwrap().is_empty());
        assert!(process.has_ended());
    }

    #[test]
    fn a_missing_program_is_a_reason() {
        let mut rig = Rig::new("serve");
        rig.supervisor.program = "/nonexistent/rblktap".into();
        rig.until("still Initialising", |rig| rig.state() != "1");
        let Phase::Failed { cause } = rig.record().phase else {
            panic!("{:?}", rig.record().phase);
        };
        let start = "/nonexistent/rblktap does not start";
        assert!(cause.starts_with(start), "{cause}");
    }

    #[test]
    fn a_disk_whose_volume_another_one_has_used_gets_no_process() {
        let mut rig = Rig::new("serve");
        let process = rig.process(0);
        rig.set_state("4");
        rig.kill();
        process.kill();
        let mut record = rig.record();
        record.image = format!("exit:{}", api::EXIT_STALE);
        rig.run().write_record(&record).unwrap();
        rig.start();
        let has_failed = |rig: &mut Rig| matches!(rig.record().phase, Phase::Failed { .. });
        rig.until("not failed", has_failed);
        let later = Instant::now() + Duration::from_secs(60);
        while rig.supervisor.step(later).unwrap() {}
        assert!(has_failed(&mut rig));
        assert_eq!(rig.record().restarts, 0);
        rig.set_state("5");
        rig.until("not Closed", |rig| rig.state() == "6");
    }

    #[test]
    fn a_later_supervisor_adopts_the_process() {
        let mut rig = Rig::new("serve");
        let process = rig.process(0);
        rig.set_state("4");
        let other = host_supervisor_error(&rig);
        assert_eq!(other, io::ErrorKind::WouldBlock);
        rig.kill();
        rig.start();
        while rig.supervisor.step(Instant::now()).unwrap() {}
        assert!(!process.has_ended());
        assert_eq!(rig.record().phase.pid(), Some(process.pid()));
        process.kill();
        rig.process(process.pid());
        assert_eq!(rig.record().restarts, 1);
    }

    #[test]
    fn a_disk_whose_record_is_lost_keeps_its_process_and_its_image() {
        let mut rig = Rig::new("serve");
        let process = rig.process(0);
        rig.set_state("4");
        rig.open(&process);
        rig.kill();
        rig.run().remove(DISK).unwrap();
        // The image may have been replaced since the toolstack wrote it.
        rig.store
            .write("backend/vbd3/5/51712/params", "fail:earlier")
            .unwrap();
        rig.start();
        rig.until("no record", |rig| {
            let record = rig.run().read_record(DISK).unwrap();
            record.is_some_and(|record| record.phase.is_running())
        });
        assert_eq!(rig.record().phase.pid(), Some(process.pid()));
        assert_eq!(rig.record().image, "serve");
        assert!(!process.has_ended());
    }

    #[test]
    fn a_disk_that_cannot_be_recorded_is_refused_and_ended() {
        let (host, dir) = (Host::new(), tempfile::tempdir().unwrap());
        // The name of the new record is taken by a directory.
        let new = dir.path().join("5-51712.json.new");
        fs::create_dir(&new).unwrap();
        let mut store = host.xenstore().unwrap();
        let state = format!("{}/state", backend::path(DISK));
        store.write(&state, "1").unwrap();
        let (mut supervisor, _commands) = supervisor(&host, &dir);
        let mut until = |expected: &str, store: &mut Xenstore| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while store.read_text(&state).unwrap().as_deref() != Some(expected) {
                assert!(Instant::now() < deadline, "not {expected}");
                supervisor.step(Instant::now()).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
            supervisor.disks.len()
        };
        assert_eq!(until("2", &mut store), 1);
        let error = format!("error/{}/error", backend::path(DISK));
        let cause = store.read_text(&error).unwrap().unwrap();
        assert!(cause.contains("5-51712.json"), "{cause}");
        store.write(&state, "5").unwrap();
        assert_eq!(until("6", &mut store), 0);
    }

    #[test]
    fn fifty_disks_are_adopted() {
        const DISKS: u16 = 50;
        let mut rig = Rig::new("serve");
        for domid in 6..5 + DISKS {
            let dir = format!("backend/vbd3/{domid}/51712");
            rig.store.write(&format!("{dir}/params"), "serve").unwrap();
            rig.store.write(&format!("{dir}/state"), "1").unwrap();
        }
        let pids = |rig: &Rig| -> Vec<u32> {
            let records = rig.run().records().unwrap().into_iter();
            records.filter_map(|record| record.phase.pid()).collect()
        };
        rig.until("not started", |rig| pids(rig).len() == usize::from(DISKS));
        let started = pids(&rig);
        rig.kill();
        let time = Instant::now();
        rig.start();
        while rig.supervisor.step(Instant::now()).unwrap() {}
        println!("{DISKS} disks were adopted in {:?}", time.elapsed());
        assert_eq!(pids(&rig), started);
    }

    #[test]
    fn a_record_of_an_earlier_disk_names_no_image() {
        let mut rig = Rig::new("serve");
        let mut record = Record {
            disk: DISK,
            name: "xvda".to_owned(),
            domain: None,
            image: "fail:earlier".to_owned(),
            restarts: 0,
            replaced: None,
            phase: Phase::Starting,
        };
        rig.run().write_record(&record).unwrap();
        record.disk.devid = 7;
        rig.run().write_record(&record).unwrap();
        rig.kill();
        rig.start();
        rig.process(0);
        assert_eq!(rig.record().image, "serve");
        rig.until("other record left", |rig| {
            rig.run().records().unwrap().len() == 1
        });
    }

    fn host_supervisor_error(rig: &Rig) -> io::ErrorKind {
        let store = rig.host.xenstore().unwrap();
        let second = Supervisor::new(store, rig.run(), PROGRAM.into(), options(&[]));
        second
            .err()
            .map_or(io::ErrorKind::Other, |error| error.kind())
    }

    #[test]
    fn a_disk_that_vanished_meanwhile_is_forgotten() {
        let mut rig = Rig::new("serve");
        let process = rig.process(0);
        process.kill();
        rig.store.remove("backend/vbd3/5").unwrap();
        rig.until("record left", |rig| rig.run().records().unwrap().is_empty());
        assert!(rig.supervisor.disks.is_empty());
    }

    /// Has the process of the disk replaced by one that uses `image`.
    fn replace(rig: &Rig, image: &str) -> Receiver<Outcome> {
        let (outcome, outcomes) = channel();
        let image = Some(image.to_owned());
        let disk = DISK;
        let command = Command::Replace {
            disk,
            image,
            outcome,
        };
        rig.commands.send(command).unwrap();
        outcomes
    }

    /// Waits for a process that serves the disk, and plays it.
    fn serve(rig: &mut Rig, old: u32) -> Process {
        let process = rig.process(old);
        rig.open(&process);
        rig.until("not recorded", |rig| rig.record().phase.is_running());
        process
    }

    #[test]
    fn a_replacement_uses_the_new_image_or_the_old_one_again() {
        let mut rig = Rig::new("serve");
        let first = serve(&mut rig, 0);
        rig.set_state("4");
        let outcomes = replace(&rig, "serve b");
        let second = serve(&mut rig, first.pid());
        assert_eq!(outcomes.try_recv(), Ok(Ok(second.pid())));
        assert_eq!(
            (rig.record().image.as_str(), rig.record().replaced),
            ("serve b", None)
        );
        let outcomes = replace(&rig, "fail:no");
        let mut outcome = None;
        rig.until("no failure", |_| {
            outcome = outcomes.try_recv().ok();
            outcome.is_some()
        });
        assert_eq!(outcome, Some(Err("no".to_owned())));
        rig.process(second.pid());
        assert_eq!(rig.record().image, "serve b");
        // It has not opened the image.
        let outcomes = replace(&rig, "serve");
        rig.until("not refused", |_| {
            outcomes.try_recv().is_ok_and(|outcome| outcome.is_err())
        });
    }

    #[test]
    fn an_image_that_was_opened_is_the_image_of_the_disk_from_then_on() {
        let mut rig = Rig::new("serve");
        let first = serve(&mut rig, 0);
        rig.set_state("4");
        // No client waits, and the process ends before it is found to have opened the image.
        drop(replace(&rig, "serve b"));
        let second = rig.process(first.pid());
        rig.open(&second);
        second.kill();
        while !second.has_ended() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let third = rig.process(second.pid());
        assert_eq!(
            (rig.record().image.as_str(), rig.record().replaced),
            ("serve b", None)
        );
        // The same, and another rblkd finds that.
        rig.open(&third);
        rig.until("not recorded", |rig| rig.record().phase.is_running());
        drop(replace(&rig, "serve c"));
        let fourth = rig.process(third.pid());
        rig.kill();
        rig.open(&fourth);
        fourth.kill();
        rig.start();
        rig.process(fourth.pid());
        assert_eq!(
            (rig.record().image.as_str(), rig.record().replaced),
            ("serve c", None)
        );
    }

    #[test]
    fn a_later_supervisor_uses_the_old_image_if_the_new_one_cannot_be_opened() {
        let mut rig = Rig::new("serve");
        let first = serve(&mut rig, 0);
        rig.set_state("4");
        drop(replace(&rig, "fail:no"));
        rig.until("not replaced", |rig| rig.record().image == "fail:no");
        rig.kill();
        rig.start();
        rig.process(first.pid());
        assert_eq!(
            (rig.record().image.as_str(), rig.record().replaced),
            ("serve", None)
        );
    }
}
