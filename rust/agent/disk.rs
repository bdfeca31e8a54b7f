// SPDX-License-Identifier: GPL-2.0-only

//! One disk: which process it has, and what is done next.

use crate::backend::{self, Backend};
use crate::options::TapOptions;
use crate::process::Process;
use api::{DiskId, Phase, Record, Replaced, RunDir};
use std::io;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};
use xen_user::xenstore::Xenstore;

/// Time after which InitWait is written for a process that has not opened its image yet. libxl
/// waits for InitWait for 10 seconds, counted from a moment that `rblkd` does not know.
pub const ANNOUNCE_LIMIT: Duration = Duration::from_secs(4);

/// Limit for opening an image. libxl starts the hotplug script in InitWait and waits for it for 40
/// seconds; the script waits for the image.
pub const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// Time after which a process is killed whose disk's directory was removed.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);

/// A process that has lived for so long is replaced at once when it ends.
const STABLE: Duration = Duration::from_secs(10);

/// The longest time between two starts of a process that fails.
const MAX_DELAY: Duration = Duration::from_secs(5);

/// Processes that may fail in a row to detach a disk, before it is detached without one.
const CLOSING_TRIES: u32 = 2;

/// The context of an update of a disk.
pub struct Context<'a> {
    /// A connection to xenstore.
    pub store: &'a mut Xenstore,
    /// The directory of records.
    pub run: &'a RunDir,
    /// The program `rblktap`.
    pub program: &'a Path,
    /// The options of processes.
    pub options: &'a TapOptions,
    /// The number of disks of the domain.
    pub disks_of_domain: usize,
    /// The time.
    pub now: Instant,
}

/// The next step for a disk.
#[derive(Debug, Eq, PartialEq)]
pub enum Next {
    /// It is updated when something happens, or at a time.
    Wait(Option<Instant>),
    /// Nothing is left of it.
    Forget,
}

/// A replacement of a process that a client waits for.
struct Replacement {
    /// The new process was started.
    started: bool,
    /// Receives the outcome: the new process when it has opened the image, or why it has failed.
    outcome: Sender<Outcome>,
}

/// The outcome of a replacement: the new process, or why there is none.
pub type Outcome = Result<u32, String>;

/// A disk.
pub struct Disk {
    record: Record,
    /// The record as it was written last.
    written: Option<Record>,
    process: Option<Process>,
    /// When the process was started or adopted.
    started: Instant,
    /// Why the last process has ended, if none has served the disk since.
    ended: Option<String>,
    /// Why a process has ended since the last [`Self::take_end`].
    unreported_end: Option<String>,
    /// Processes that have ended in a row, each soon after its start.
    failures: u32,
    /// The disk is not tried again: it was refused when it was attached, or another disk has used
    /// its volume meanwhile.
    refused: bool,
    /// InitWait was written for a process that has not opened the image yet.
    announced: bool,
    /// When the directory was found to be gone.
    gone: Option<Instant>,
    replacement: Option<Replacement>,
}

impl Disk {
    /// Creates a disk that has no record.
    ///
    /// Its process is searched if it was attached before: the record was lost.
    pub fn new(
        disk: DiskId,
        backend: &Backend,
        run: &RunDir,
        program: &Path,
        now: Instant,
    ) -> Self {
        let record = Record {
            disk,
            name: backend::name(disk),
            domain: backend.domain.clone(),
            image: backend.image.clone(),
            restarts: 0,
            phase: Phase::Starting,
            replaced: None,
        };
        if backend.state == backend::INITIALISING {
            return Self::with_process(record, None, now);
        }
        Self::find(record, run, program, now)
    }

    /// Takes a disk over from an earlier `rblkd`, with its process if that still runs.
    pub fn adopt(record: Record, run: &RunDir, program: &Path, now: Instant) -> Self {
        let written = record.clone();
        let mut disk = Self::find(record, run, program, now);
        disk.written = Some(written);
        disk
    }

    /// Returns a disk with its process, if that still runs.
    fn find(mut record: Record, run: &RunDir, program: &Path, now: Instant) -> Self {
        let process = match record.phase {
            Phase::Opening { pid, start_time } | Phase::Running { pid, start_time } => {
                Process::adopt(pid, start_time)
            }
            Phase::Starting => {
                let found = Process::find(program, run, record.disk);
                found.map(|(process, image)| {
                    record.image = image;
                    process
                })
            }
            Phase::Failed { .. } => None,
        };
        if let (Phase::Starting, Some(process)) = (&record.phase, &process) {
            record.phase = process.opening();
        }
        Self::with_process(record, process, now)
    }

    fn with_process(record: Record, process: Option<Process>, now: Instant) -> Self {
        Self {
            record,
            written: None,
            process,
            started: now,
            ended: None,
            unreported_end: None,
            failures: 0,
            refused: false,
            announced: false,
            gone: None,
            replacement: None,
        }
    }

    /// Returns the record of the disk.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Returns why a process has ended, once.
    pub fn take_end(&mut self) -> Option<String> {
        self.unreported_end.take()
    }

    /// Returns the process, if it has one.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// Ends the process, which is replaced by one that uses `image`.
    pub fn replace(&mut self, image: Option<String>, outcome: Sender<Outcome>) {
        let (Some(process), Phase::Running { pid, .. }) = (&self.process, &self.record.phase)
        else {
            // A client that has left does not need it.
            let _ = outcome.send(Err("no process has opened the image of the disk".to_owned()));
            return;
        };
        process.kill();
        if let Some(image) = image {
            let image = std::mem::replace(&mut self.record.image, image);
            self.record.replaced = Some(Replaced { image, pid: *pid });
        }
        self.replacement = Some(Replacement {
            started: false,
            outcome,
        });
    }

    /// Checks the state of the disk, and takes the next step.
    ///
    /// An error leaves the disk as it is; the next update does what this one has not done.
    pub fn update(&mut self, cx: &mut Context<'_>) -> io::Result<Next> {
        let next = self.take_step(cx)?;
        if next != Next::Forget {
            self.write_record(cx.run)?;
        }
        Ok(next)
    }

    /// Writes the record if it has changed since it was written.
    fn write_record(&mut self, run: &RunDir) -> io::Result<()> {
        if self.written.as_ref() != Some(&self.record) {
            run.write_record(&self.record)?;
            self.written = Some(self.record.clone());
        }
        Ok(())
    }

    fn take_step(&mut self, cx: &mut Context<'_>) -> io::Result<Next> {
        let disk = self.record.disk;
        let backend = backend::read(cx.store, disk)?;
        if let Some(backend) = &backend {
            if self.is_former(backend) {
                return self.start_over(backend, cx);
            }
            if backend.domain.is_some() {
                // It has another name while it is migrated.
                self.record.domain.clone_from(&backend.domain);
            }
            // The node outlives the process: one that has ended may have opened the image.
            self.note_open(backend, cx)?;
        }
        self.notice_end(cx)?;
        let Some(backend) = backend else {
            return self.removed(cx);
        };
        self.gone = None;
        if self.process.is_some() {
            return self.watch_start(&backend, cx);
        }
        match backend.state {
            backend::CLOSED if !backend.online => self.forget(cx),
            backend::CLOSING if self.has_nothing_to_end(&backend) => {
                backend::change_state(cx.store, disk, backend::CLOSING, backend::CLOSED)?;
                #[cfg(test)]
                crate::crash::point("closed");
                self.forget(cx)
            }
            _ if self.refused => self.announce_refusal(cx),
            state if self.ended.is_some() && self.is_attached(state) => {
                let cause = self.ended.take().unwrap_or_default();
                self.refuse(cx, cause)
            }
            _ => self.start_when_due(&backend, cx),
        }
    }

    /// Returns `true` if no process is needed to detach the disk: none has served it, or none can.
    fn has_nothing_to_end(&self, backend: &Backend) -> bool {
        let cannot = self.failures >= CLOSING_TRIES && !backend.online;
        self.refused || cannot || backend.process.is_none()
    }

    /// Returns `true` if this was served in a directory that was removed, and created again for
    /// another disk of the same number.
    fn is_former(&self, backend: &Backend) -> bool {
        let is_new = backend.state == backend::INITIALISING && backend.process.is_none();
        is_new && self.record.phase.is_running()
    }

    /// Waits for the end of the process of the former disk, then starts that of the new one.
    fn start_over(&mut self, backend: &Backend, cx: &mut Context<'_>) -> io::Result<Next> {
        let disk = self.record.disk;
        if self
            .process
            .as_ref()
            .is_some_and(|process| !process.has_ended())
        {
            return self.removed(cx);
        }
        if let Some(process) = self.process.take() {
            let reason = process.reason(cx.run, disk);
            api::message!("{disk}: the process of the former disk: {reason}");
        }
        cx.run.remove(disk)?;
        *self = Self::new(disk, backend, cx.run, cx.program, cx.now);
        self.start_when_due(backend, cx)
    }

    /// Returns `true` if the disk is being attached: the toolstack waits until it is served.
    fn is_attached(&self, state: u32) -> bool {
        state == backend::INITIALISING || state == backend::INIT_WAIT && self.announced
    }

    /// Takes note of a process that has ended.
    fn notice_end(&mut self, cx: &Context<'_>) -> io::Result<()> {
        let Some(mut process) = self.process.take_if(|process| process.has_ended()) else {
            return Ok(());
        };
        let was_last = process.was_last();
        let reason = process.reason(cx.run, self.record.disk);
        api::message!("{}: {reason}", self.record.disk);
        self.unreported_end = Some(reason.clone());
        let noted = self.ended(cx, reason);
        self.refused |= was_last;
        noted
    }

    fn ended(&mut self, cx: &Context<'_>, reason: String) -> io::Result<()> {
        let lived = cx.now.saturating_duration_since(self.started);
        self.failures = match &self.replacement {
            Some(Replacement { started: false, .. }) => 0,
            _ if lived > STABLE => 0,
            _ => self.failures.saturating_add(1),
        };
        let outcome = self.undo_replacement();
        if !self.refused {
            self.record.phase = Phase::Failed {
                cause: reason.clone(),
            };
        }
        self.ended = Some(reason.clone());
        self.write_record(cx.run)?;
        if let Some(outcome) = outcome {
            // A client that has left does not need it.
            let _ = outcome.send(Err(reason));
        }
        Ok(())
    }

    /// Uses the old image again if a process has failed to open the new one. Returns where the
    /// reason is sent.
    fn undo_replacement(&mut self) -> Option<Sender<Outcome>> {
        if matches!(&self.replacement, Some(Replacement { started: false, .. })) {
            return None;
        }
        if let Some(replaced) = self.record.replaced.take() {
            self.record.image = replaced.image;
            self.failures = 0;
        }
        Some(self.replacement.take()?.outcome)
    }

    /// Watches a process until it has opened the image.
    fn watch_start(&mut self, backend: &Backend, cx: &mut Context<'_>) -> io::Result<Next> {
        if self.refused || self.record.phase.is_running() || !self.is_attached(backend.state) {
            return Ok(Next::Wait(None));
        }
        let limit = self.started + OPEN_LIMIT;
        if cx.now >= limit {
            return self.give_up(cx);
        }
        let announce = self.started + ANNOUNCE_LIMIT;
        if cx.now < announce {
            return Ok(Next::Wait(Some(announce)));
        }
        let disk = self.record.disk;
        if !self.announced && backend::announce(cx.store, disk)? {
            #[cfg(test)]
            crate::crash::point("announced");
            self.announced = true;
            let image = &self.record.image;
            api::message!("{disk}: {image} is not open yet; the hotplug script waits for it");
        }
        Ok(Next::Wait(Some(limit)))
    }

    /// Records that the process has opened the image, if it has. From then on the disk has no other
    /// image: a guest may have written to this one.
    fn note_open(&mut self, backend: &Backend, cx: &Context<'_>) -> io::Result<()> {
        let opened =
            |replaced: &mut Replaced| backend.process.is_some_and(|pid| pid != replaced.pid);
        self.record.replaced.take_if(opened);
        let Phase::Opening { pid, start_time } = self.record.phase else {
            return Ok(());
        };
        if backend.process != Some(pid) {
            return Ok(());
        }
        self.announced = false;
        self.record.phase = Phase::Running { pid, start_time };
        if let Some(replacement) = self.replacement.take() {
            // A client that has left does not need it.
            let _ = replacement.outcome.send(Ok(pid));
        }
        self.write_record(cx.run)?;
        #[cfg(test)]
        crate::crash::point("open recorded");
        Ok(())
    }

    /// Refuses a disk whose image has not been opened in time.
    fn give_up(&mut self, cx: &mut Context<'_>) -> io::Result<Next> {
        if let Some(process) = &self.process {
            process.kill();
        }
        let seconds = OPEN_LIMIT.as_secs();
        self.refuse(
            cx,
            format!(
                "{} has not been opened in {seconds} seconds; check that its storage answers",
                self.record.image
            ),
        )
    }

    /// Has the toolstack find out that the disk cannot be served, and why.
    fn refuse(&mut self, cx: &mut Context<'_>, cause: String) -> io::Result<Next> {
        let disk = self.record.disk;
        api::message!("{disk}: not attached: {cause}");
        self.refused = true;
        if let Err(error) = backend::report_error(cx.store, disk, &cause) {
            // The script takes the cause from the record then.
            api::message!("{disk}: {error}");
        }
        #[cfg(test)]
        crate::crash::point("error written");
        self.record.phase = Phase::Failed { cause };
        if let Err(error) = self.write_record(cx.run) {
            // The script takes the cause from xenstore then.
            api::message!("{disk}: {error}");
        }
        #[cfg(test)]
        crate::crash::point("refusal recorded");
        self.announce_refusal(cx)
    }

    /// Has the hotplug script run, which reads the record.
    fn announce_refusal(&mut self, cx: &mut Context<'_>) -> io::Result<Next> {
        let disk = self.record.disk;
        backend::change_state(cx.store, disk, backend::INITIALISING, backend::INIT_WAIT)?;
        #[cfg(test)]
        crate::crash::point("refused");
        Ok(Next::Wait(None))
    }

    fn start_when_due(&mut self, backend: &Backend, cx: &mut Context<'_>) -> io::Result<Next> {
        if backend.state == backend::INITIALISING {
            // A record that an earlier rblkd left may be that of an earlier disk.
            self.record.image = backend.image.clone();
            self.record.replaced = None;
        }
        let due = self.started + delay(self.failures);
        if self.ended.is_some() && cx.now < due {
            return Ok(Next::Wait(Some(due)));
        }
        if self.ended.take().is_some() {
            self.record.restarts = self.record.restarts.saturating_add(1);
        }
        self.start(backend, cx)
    }

    fn start(&mut self, backend: &Backend, cx: &mut Context<'_>) -> io::Result<Next> {
        self.record.phase = Phase::Starting;
        match self.write_record(cx.run) {
            Err(error) if backend.state == backend::INITIALISING => {
                return self.refuse(cx, error.to_string());
            }
            written => written?,
        }
        #[cfg(test)]
        crate::crash::point("recorded");
        self.started = cx.now;
        let Record { disk, image, .. } = &self.record;
        let options = cx.options.arguments(cx.disks_of_domain);
        if let Some(replacement) = &mut self.replacement {
            replacement.started = true;
        }
        match Process::start(cx.program, cx.run, *disk, image, &options) {
            Ok(process) => {
                #[cfg(test)]
                crate::crash::point("started");
                self.record.phase = process.opening();
                self.process = Some(process);
                self.write_record(cx.run)?;
                #[cfg(test)]
                crate::crash::point("process recorded");
            }
            Err(error) => {
                let program = cx.program.display();
                let remedy = match error.kind() {
                    io::ErrorKind::NotFound => "; install rblktap".to_owned(),
                    io::ErrorKind::StorageFull => {
                        let run = cx.run.path().display();
                        format!("; make room in the file system of {run}")
                    }
                    _ => String::new(),
                };
                self.ended(cx, format!("{program} does not start: {error}{remedy}"))?;
            }
        }
        // What comes next depends on the state.
        Ok(Next::Wait(Some(cx.now)))
    }

    /// Waits for the end of the process of a disk that is gone.
    fn removed(&mut self, cx: &mut Context<'_>) -> io::Result<Next> {
        let Some(process) = &self.process else {
            return self.forget(cx);
        };
        let limit = *self.gone.get_or_insert(cx.now) + REMOVE_LIMIT;
        if cx.now < limit {
            return Ok(Next::Wait(Some(limit)));
        }
        process.kill();
        Ok(Next::Wait(None))
    }

    fn forget(&mut self, cx: &Context<'_>) -> io::Result<Next> {
        cx.run.remove(self.record.disk)?;
        #[cfg(test)]
        crate::crash::point("forgotten");
        Ok(Next::Forget)
    }
}

/// Returns how long to wait for the next start after a number of failures in a row.
fn delay(failures: u32) -> Duration {
    match failures.checked_sub(2) {
        None => Duration::ZERO,
        Some(exponent) => MAX_DELAY.min(Duration::from_millis(100) * (1 << exponent.min(10))),
    }
}
