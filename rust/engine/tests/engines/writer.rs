// SPDX-License-Identifier: GPL-2.0-only

//! A process that writes to an image, and a checker that knows which of its writes were flushed.
//!
//! The process adds a line to its log before it submits writes (`start BLOCK VERSION`), when a
//! flush after them has completed (`flushed BLOCK VERSION`), and when a request fails for good
//! (`error ERRNO`). The log survives a kill of the process.

use crate::disk::{bytes, pattern, Cut, Disk, TIMEOUT};
use crate::suite::SIZE;
use daemons::wait_until;
use engine::{Completion, Errno, Operation, Options, Request};
use rustix::process::{kill_process, Pid, Signal};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const BLOCKS: u64 = SIZE / BLOCK as u64;
const BATCH: u64 = 16;

/// Time for which a temporary error is retried, as by `rblktap`.
const RETRY: Duration = Duration::from_secs(60);

/// The process.
pub struct Writer {
    child: Child,
    dir: PathBuf,
}

impl Writer {
    /// Starts a process that writes to an image until it is told to end.
    pub fn start(uri: &str, runtime_dir: &Path) -> Self {
        let dir = daemons::work_dir(&format!("writer-{:?}", thread::current().id()));
        for file in ["log", "stop"] {
            let _ = fs::remove_file(dir.join(file));
        }
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer::process", "--ignored", "--nocapture"])
            .env("WRITER_URI", uri)
            .env("WRITER_DIR", &dir)
            .env("WRITER_RUNTIME_DIR", runtime_dir)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, dir }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Waits until the process has flushed some more batches of writes.
    pub fn wait_for_writes(&self, batches: usize) {
        let count = || self.log().matches("flushed").count();
        let target = count() + batches * BATCH as usize;
        wait_until("the process writes", || {
            let log = self.log();
            assert!(!log.contains("error"), "{log}");
            count() >= target
        });
    }

    /// Waits until a request of the process has failed.
    pub fn wait_for_error(&self) -> Option<Errno> {
        wait_until("a request fails", || self.log().contains("error"));
        let log = self.log();
        let errno = log.lines().find_map(|line| line.strip_prefix("error "));
        errno.and_then(|errno| Some(Errno::from_raw_os_error(errno.parse().ok()?)))
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn freeze(&self) {
        kill_process(Pid::from_child(&self.child), Signal::STOP).unwrap();
    }

    pub fn thaw(&self) {
        kill_process(Pid::from_child(&self.child), Signal::CONT).unwrap();
    }

    /// Has the process end, and checks that no request has failed.
    pub fn finish(&mut self) {
        File::create(self.dir.join("stop")).unwrap();
        assert!(self.child.wait().unwrap().success());
        let log = self.log();
        assert!(!log.contains("error"), "{log}");
        let stalls = log.lines().filter_map(|line| line.strip_prefix("stall "));
        let longest = stalls.filter_map(|stall| stall.parse::<u64>().ok()).max();
        eprintln!("longest stall: {} ms", longest.unwrap_or(0));
    }

    /// Checks that each block has the version that was flushed last, or one that was started later.
    pub fn verify(&self, disk: &mut Disk) {
        let mut versions: HashMap<u64, Vec<u64>> = HashMap::new();
        for line in self.log().lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [kind, block, version] = words[..] else {
                continue;
            };
            let (block, version) = (block.parse().unwrap(), version.parse().unwrap());
            let allowed = versions.entry(block).or_insert_with(|| vec![0]);
            match kind {
                "start" => allowed.push(version),
                _ => allowed.retain(|old| *old >= version),
            }
        }
        verify(versions, disk);
    }
}

/// Checks that each block has one of the versions that it may have.
fn verify(versions: HashMap<u64, Vec<u64>>, disk: &mut Disk) {
    assert!(!versions.is_empty());
    for (block, allowed) in versions {
        let data = disk.read(block * BLOCK as u64, BLOCK, Cut::Whole);
        let found = allowed
            .iter()
            .any(|version| data == contents(block, *version));
        assert!(found, "block {block} has none of the versions {allowed:?}");
    }
}

/// Checks that the first blocks have the version that was flushed last.
pub fn verify_all(blocks: u64, version: u64, disk: &mut Disk) {
    let versions = (0..blocks).map(|block| (block, vec![version]));
    verify(versions.collect(), disk);
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns what version `version` of a block contains; version 0 was never written.
fn contents(block: u64, version: u64) -> Vec<u8> {
    match version {
        0 => vec![0; BLOCK],
        version => pattern(version * BLOCKS + block, BLOCK),
    }
}

/// The process itself, with the image and its directory in environment variables.
#[test]
#[ignore = "it is a process of other tests"]
fn process() {
    let dir = PathBuf::from(std::env::var_os("WRITER_DIR").unwrap());
    let uri = std::env::var("WRITER_URI").unwrap();
    let options = Options {
        runtime_dir: std::env::var_os("WRITER_RUNTIME_DIR").unwrap().into(),
        lock_timeout: TIMEOUT,
        ..Options::default()
    };
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("log"));
    let mut process = Process {
        disk: Disk::new(engine::open(&uri.parse().unwrap(), &options).unwrap()),
        log: log.unwrap(),
    };
    let mut batch = 0;
    while !dir.join("stop").exists() {
        if let Err(errno) = process.write(batch) {
            process.record(&format!("error {}\n", errno.raw_os_error()));
            return;
        }
        batch += 1;
    }
    process.disk.close();
}

struct Process {
    disk: Disk,
    log: File,
}

impl Process {
    fn record(&mut self, text: &str) {
        self.log.write_all(text.as_bytes()).unwrap();
    }

    /// Writes one batch of blocks, and flushes it.
    fn write(&mut self, batch: u64) -> Result<(), Errno> {
        let version = batch * BATCH / BLOCKS + 1;
        let blocks: Vec<u64> = (0..BATCH)
            .map(|index| (batch * BATCH + index) % BLOCKS)
            .collect();
        let lines = |kind: &str| {
            blocks.iter().fold(String::new(), |mut text, block| {
                writeln!(text, "{kind} {block} {version}").unwrap();
                text
            })
        };
        self.record(&lines("start"));
        let start = Instant::now();
        let requests = blocks.iter().map(|block| {
            let data = contents(*block, version);
            let memory = crate::disk::buffers(&*self.disk.engine, BLOCK, Cut::Whole, Some(&data));
            Request::write(*block, block * BLOCK as u64, memory)
        });
        let requests = requests.collect();
        self.run(requests)?;
        self.run(vec![Request::flush(0)])?;
        let stall = start.elapsed().as_millis();
        let flushed = lines("flushed");
        self.record(&flushed);
        self.record(&format!("stall {stall}\n"));
        Ok(())
    }

    /// Carries out requests, and tries those again that fail with an error that may pass.
    fn run(&mut self, requests: Vec<Request>) -> Result<(), Errno> {
        let deadline = Instant::now() + RETRY;
        let mut requests = requests;
        loop {
            for request in requests.drain(..) {
                self.disk.queue.submit(request);
            }
            let mut completions: Vec<Completion> = Vec::new();
            self.disk
                .queue
                .drain(RETRY, &mut completions)
                .map_err(|error| error.errno())?;
            for completion in completions {
                let Err(error) = &completion.result else {
                    continue;
                };
                if !matches!(
                    error.errno(),
                    Errno::NOTCONN | Errno::TIMEDOUT | Errno::AGAIN
                ) || Instant::now() > deadline
                {
                    eprintln!("{error}");
                    return Err(error.errno());
                }
                requests.push(again(completion));
            }
            if requests.is_empty() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Returns the request that a completion came from.
fn again(completion: Completion) -> Request {
    let length = bytes(&completion.buffers).len() as u64;
    match length {
        0 => Request::flush(completion.tag),
        length => Request {
            operation: Operation::Write { fua: false },
            offset: completion.tag * BLOCK as u64,
            length,
            buffers: completion.buffers,
            tag: completion.tag,
        },
    }
}
