// SPDX-License-Identifier: GPL-2.0-only

//! A process `rblktap`.
//!
//! It is named by its pid and its start time, and held by a pidfd, so that a later process with the
//! same pid is never taken for it. It is in a process group of its own and writes its messages to a
//! file, so that nothing that happens to `rblkd` reaches it.

use api::{DiskId, Phase, RunDir, EXIT_STALE};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// Time for which a process waits for another user of its image: less than the limit for opening
/// it.
const LOCK_SECONDS: &str = "5";

/// The number of times that processes are searched while one of them is new, and the delay between
/// them.
const FIND_TRIES: u32 = 20;
const FIND_DELAY: Duration = Duration::from_millis(50);

/// The greatest size of the messages of a disk's processes that are kept, in bytes.
const MAX_LOG: u64 = 1 << 20;

/// Time between two checks of the sizes of messages.
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// The greatest length of a message that is taken for a reason, in bytes. It fits in a request to
/// xenstore, which has 4096 bytes.
const MAX_MESSAGE: u64 = 2048;

/// A process.
pub struct Process {
    pid: u32,
    start_time: u64,
    fd: OwnedFd,
    /// Set if this `rblkd` has started it.
    child: Option<Child>,
    /// The start of its messages in the file of messages.
    log_start: u64,
}

impl Process {
    /// Starts the process of a disk, with these options.
    pub fn start(
        program: &Path,
        run: &RunDir,
        disk: DiskId,
        image: &str,
        options: &[String],
    ) -> io::Result<Self> {
        let (log, log_start) = open_log(run, disk)?;
        let mut child = Command::new(program)
            .arg("--state-dir")
            .arg(run.path())
            .args(["--lock-seconds", LOCK_SECONDS])
            .args(options)
            .args([disk.domid.to_string(), disk.devid.to_string()])
            .arg("--")
            .arg(image)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        match Self::open(child.id(), log_start) {
            Ok(mut process) => {
                process.child = Some(child);
                Ok(process)
            }
            Err(error) => {
                // Nothing would watch it.
                child.kill()?;
                child.wait()?;
                Err(error)
            }
        }
    }

    /// Adopts a process that an earlier `rblkd` started. Returns `None` if it has ended.
    pub fn adopt(pid: u32, start_time: u64) -> Option<Self> {
        let process = Self::open(pid, 0).ok()?;
        (process.start_time == start_time && !process.has_ended()).then_some(process)
    }

    /// Finds the process of a disk whose number was not recorded. Returns it and its image.
    ///
    /// Context: waits for processes that have no command line yet, for up to a second.
    pub fn find(program: &Path, run: &RunDir, disk: DiskId) -> Option<(Self, String)> {
        for _ in 0..FIND_TRIES {
            let mut has_new = false;
            for pid in pids().ok()? {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                if let Some(image) = served_image(&line, program, run, disk) {
                    return Some((Self::open(pid, 0).ok()?, image));
                }
                // A kernel thread and a zombie have no executable.
                let executable = fs::read_link(format!("/proc/{pid}/exe"));
                has_new |= line.is_empty() && executable.is_ok();
            }
            if !has_new {
                break;
            }
            thread::sleep(FIND_DELAY);
        }
        None
    }

    fn open(pid: u32, log_start: u64) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or(io::ErrorKind::InvalidInput)?;
        let fd = pidfd_open(number, PidfdFlags::empty())?;
        Ok(Self {
            pid,
            start_time: start_time(pid)?,
            fd,
            child: None,
            log_start,
        })
    }

    /// Returns the pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the phase of a disk whose process this is, and has not opened the image.
    pub fn opening(&self) -> Phase {
        Phase::Opening {
            pid: self.pid,
            start_time: self.start_time,
        }
    }

    /// Returns `true` if the process has ended.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }

    /// Ends the process at once. Requests in flight stay in the table for the next one.
    pub fn kill(&self) {
        // It fails only if the process has ended already.
        let _ = pidfd_send_signal(&self.fd, Signal::KILL);
    }

    /// Returns `true` if the process has ended because its disk must not be served any more.
    ///
    /// Context: waits for the end of the process.
    pub fn was_last(&mut self) -> bool {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        status.and_then(|status| status.code()) == Some(EXIT_STALE.into())
    }

    /// Returns why the process has ended: its last message, or its exit status.
    ///
    /// Context: waits for the end of the process.
    pub fn reason(mut self, run: &RunDir, disk: DiskId) -> String {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        let failed = status.is_none_or(|status| status.code().is_some());
        let message = last_message(&run.log(disk), self.log_start).filter(|_| failed);
        match (message, status) {
            (Some(message), _) => message,
            (None, Some(status)) => format!("rblktap has ended: {status}"),
            (None, None) => "rblktap has ended".to_owned(),
        }
    }
}

impl AsFd for Process {
    /// Returns the pidfd, which is readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Returns the numbers of all processes.
fn pids() -> io::Result<impl Iterator<Item = u32>> {
    let entries = fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()))
}

/// Returns the image if a command line, as in `/proc/PID/cmdline`, is one of [`Process::start`].
fn served_image(line: &[u8], program: &Path, run: &RunDir, disk: DiskId) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    let words: Vec<&str> = line.split('\0').collect();
    let is_program = |word: &&str| Path::new(word).file_name() == program.file_name();
    // An interpreter comes before its script.
    let start = words.iter().take(2).position(is_program)?;
    let end = words.iter().position(|word| *word == "--")?;
    let [_, "--state-dir", dir, .., domid, devid] = words.get(start..end)? else {
        return None;
    };
    let is_its = Path::new(dir) == run.path() && format!("{domid}/{devid}").parse() == Ok(disk);
    let image = words.get(end.saturating_add(1)).filter(|_| is_its)?;
    Some((*image).to_owned())
}

/// Opens the file of messages. Returns it and its length.
fn open_log(run: &RunDir, disk: DiskId) -> io::Result<(File, u64)> {
    let path = run.log(disk);
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    limit_log(&file)?;
    let len = file.metadata()?.len();
    Ok((file, len))
}

/// Empties a file of messages that is too large. A process that runs appends to it.
fn limit_log(file: &File) -> io::Result<()> {
    if file.metadata()?.len() > MAX_LOG {
        file.set_len(0)?;
    }
    Ok(())
}

/// Starts a thread that limits the messages of processes, which are in memory: a guest can cause
/// them.
pub fn limit_logs(run: RunDir) -> io::Result<()> {
    let thread = thread::Builder::new().name("logs".to_owned());
    thread.spawn(move || loop {
        limit_logs_once(&run);
        thread::sleep(LOG_PERIOD);
    })?;
    Ok(())
}

fn limit_logs_once(run: &RunDir) {
    // A directory that cannot be read is reported by others.
    for record in run.records().unwrap_or_default() {
        let file = OpenOptions::new().append(true).open(run.log(record.disk));
        if let Err(error) = file.and_then(|file| limit_log(&file)) {
            // It is created when a process is started.
            if error.kind() != io::ErrorKind::NotFound {
                api::message!("{}: its messages: {error}", record.disk);
            }
        }
    }
}

/// Returns the last line that is not empty, from `start` on, without the program's name.
fn last_message(path: &Path, start: u64) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let end = file.metadata().ok()?.len();
    // The file may have been emptied meanwhile.
    let start = if start > end { 0 } else { start };
    let start = start.max(end.saturating_sub(MAX_MESSAGE));
    file.seek(SeekFrom::Start(start)).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_MESSAGE).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.strip_prefix("rblktap: ").unwrap_or(line).to_owned())
}

/// Reads the start time of a process, field 22 of `proc_pid_stat(5)`.
fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, field 2, may contain anything.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    let field = fields.and_then(|fields| fields.split_whitespace().nth(19));
    let number = field.and_then(|field| field.parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Instant;

    /// A script that plays `rblktap`; the image says how.
    pub(crate) const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/rblktap");

    const DISK: DiskId = DiskId {
        domid: 5,
        devid: 51712,
    };

    fn start(run: &RunDir, image: &str) -> Process {
        let options = ["--pages".to_owned(), "8".to_owned()];
        Process::start(Path::new(PROGRAM), run, DISK, image, &options).unwrap()
    }

    fn wait(process: &Process) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !process.has_ended() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn the_last_message_is_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let process = start(&run, "fail:no file");
        wait(&process);
        assert_eq!(process.reason(&run, DISK), "no file");
        let log = fs::read_to_string(run.log(DISK)).unwrap();
        assert!(log.contains(" --pages 8 5 51712 -- fail:no file"), "{log}");
    }

    #[test]
    fn a_message_of_an_earlier_process_is_no_reason() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        fs::write(run.log(DISK), "rblktap: earlier\n").unwrap();
        let process = start(&run, "exit:3");
        wait(&process);
        let reason = process.reason(&run, DISK);
        assert_eq!(reason, "rblktap has ended: exit status: 3");
    }

    #[test]
    fn messages_of_a_process_that_runs_are_limited() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let record = |devid| api::Record {
            disk: DiskId { devid, ..DISK },
            name: String::new(),
            domain: None,
            image: String::new(),
            restarts: 0,
            replaced: None,
            phase: Phase::Starting,
        };
        run.write_record(&record(DISK.devid)).unwrap();
        run.write_record(&record(7)).unwrap();
        let (mut log, _) = open_log(&run, DISK).unwrap();
        let size = || fs::metadata(run.log(DISK)).unwrap().len();
        log.write_all(&vec![b'a'; MAX_LOG as usize]).unwrap();
        limit_logs_once(&run);
        assert_eq!(size(), MAX_LOG);
        let start = size();
        log.write_all(b"x").unwrap();
        limit_logs_once(&run);
        assert_eq!(size(), 0);
        log.write_all(b"rblktap: no file\n").unwrap();
        assert_eq!(
            last_message(&run.log(DISK), start).as_deref(),
            Some("no file")
        );
        assert!(!run.log(record(7).disk).exists());
    }

    #[test]
    fn a_process_is_adopted_by_number_and_start_time() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let process = start(&run, "serve");
        let (pid, start_time) = process.opening().process().unwrap();
        assert!(Process::adopt(pid, start_time + 1).is_none());
        let adopted = Process::adopt(pid, start_time).unwrap();
        adopted.kill();
        wait(&process);
        assert!(Process::adopt(pid, start_time).is_none());
        let reason = process.reason(&run, DISK);
        assert_eq!(reason, "rblktap has ended: signal: 9 (SIGKILL)");
    }

    #[test]
    fn a_command_line_says_which_disk_a_process_serves() {
        let program = Path::new("/usr/libexec/rblktap");
        let line =
            "/opt/rblktap --state-dir /run/rblk --lock-seconds 5 --pages 8 5 51712 -- aio:/a";
        let line = line.replace(' ', "\0");
        let run = RunDir::new("/run/rblk");
        let image = |line: &str| served_image(line.as_bytes(), program, &run, DISK);
        assert_eq!(image(&line).as_deref(), Some("aio:/a"));
        assert_eq!(
            image(&format!("/bin/sh\0{line}")).as_deref(),
            Some("aio:/a")
        );
        let server = line.replacen("--state-dir", "--confined\0--state-dir", 1);
        for other in [&server, "rblktap", ""] {
            assert_eq!(image(other), None);
        }
        let line = line.as_bytes();
        let other = DiskId { domid: 6, ..DISK };
        let elsewhere = RunDir::new("/run/other");
        assert_eq!(served_image(line, program, &run, other), None);
        assert_eq!(served_image(line, program, &elsewhere, DISK), None);
        assert_eq!(served_image(line, Path::new("/bin/sh"), &run, DISK), None);
    }
}
