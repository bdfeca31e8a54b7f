// SPDX-License-Identifier: GPL-2.0-only

//! A process that is confined serves an image of Ceph, also after the daemons have
//! been replaced.

use daemons::Ceph;
use engine::rbd::RbdPool;
use engine::Buffer;
use engine::Completion;
use engine::Engine;
use engine::Operation;
use engine::Options;
use engine::Queue;
use engine::Request;
use std::fs;
use std::fs::File;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Lines;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::ChildStdout;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

/// The user of the confined process.
const USER: u32 = 1_895_825_413;

const SIZE: u64 = 4 << 20;
const BLOCK: usize = 65536;

/// The time in which requests succeed after the daemons have been replaced.
const PATIENCE: Duration = Duration::from_secs(60);

/// The confined process.
struct Process {
    child: Child,
    output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts a process that opens an image and is confined then.
    fn start(uri: &str, dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process", "--ignored", "--nocapture"])
            .env("CONFINED_URI", uri)
            .env("CONFINED_DIR", dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut process = Self { child, output };
        process.wait_for("confined");
        process
    }

    fn wait_for(&mut self, word: &str) {
        let found = self.output.any(|line| line.unwrap().ends_with(word));
        assert!(found, "the process has ended before it was {word}");
    }

    /// Has the process write all blocks, and read and compare them.
    fn verify(&mut self) {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(b"verify\n").unwrap();
        self.wait_for("verified");
    }

    /// Checks what `/proc` says about each thread.
    fn check(&self, root: &Path) {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let mut threads = 0;
        for task in fs::read_dir(process.join("task")).unwrap() {
            let status = task.unwrap().path().join("status");
            let status = fs::read_to_string(status).unwrap();
            let is = |name: &str, value: &str| {
                let mut lines = status.lines();
                let line = lines.find_map(|line| line.strip_prefix(name)).unwrap();
                assert_eq!(line.trim(), value, "{name} of {status}");
            };
            let user = [USER.to_string().as_str(); 4].join("\t");
            is("Uid:", &user);
            is("Gid:", &user);
            is("Groups:", "");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                is(set, "0000000000000000");
            }
            is("NoNewPrivs:", "1");
            is("Seccomp:", "2");
            threads += 1;
        }
        assert!(threads > 3, "the library has {threads} threads");
        assert!(fs::read_dir(root).unwrap().next().is_none());
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        self.wait_for("closed");
        assert!(self.child.wait().unwrap().success());
    }
}

/// Has a process write to an image before and after `replace` has replaced daemons.
fn serve(uri: &str, dir: &Path, replace: impl FnOnce()) {
    let root = dir.join("empty");
    fs::create_dir_all(&root).unwrap();
    let mut process = Process::start(uri, dir);
    process.check(&root);
    process.verify();
    replace();
    process.verify();
    process.check(&root);
    process.end();
    let options = Options {
        runtime_dir: dir.to_owned(),
        ..Options::default()
    };
    engine::remove_files(&uri.parse().unwrap(), &options).unwrap();
    let left: Vec<_> = fs::read_dir(dir).unwrap().map(Result::unwrap).collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn ceph() {
    let mut ceph = Ceph::start(1);
    let address: engine::RbdAddress = format!("rbd?conf={}", ceph.conf()).parse().unwrap();
    RbdPool::connect(&address)
        .unwrap()
        .create("image", SIZE)
        .unwrap();
    let uri = address.image("image").to_string();
    serve(&uri, &daemons::work_dir("confined-ceph"), || {
        for daemon in [&mut ceph.mons[0], &mut ceph.osds[0]] {
            daemon.kill();
            daemon.restart();
        }
    });
}

/// The confined process itself.
#[test]
#[ignore = "it is a process of other tests"]
fn process() {
    let dir = PathBuf::from(std::env::var_os("CONFINED_DIR").unwrap());
    let uri = std::env::var("CONFINED_URI").unwrap();
    let root = dir.join("empty");
    rblktap::cluster::prepare(&root).unwrap();
    let options = Options {
        runtime_dir: dir.clone(),
        ..Options::default()
    };
    let engine = engine::open(&uri.parse().unwrap(), &options).unwrap();
    let mut queue = engine.queue(32).unwrap();
    rblktap::cluster::confine(USER, &root).unwrap();
    try_all(&dir);
    println!("confined");
    for (version, line) in (1..).zip(io::stdin().lines()) {
        assert_eq!(line.unwrap(), "verify");
        verify(&*engine, &mut *queue, version);
        println!("verified");
    }
    drop(queue);
    engine.close().unwrap();
    println!("closed");
}

/// Tries what a process that was taken over would try.
fn try_all(dir: &Path) {
    let tried = [
        ("read a file", File::open("/etc/passwd").map(drop)),
        ("create a file", File::create("/usr/file").map(drop)),
        ("find a process", File::open("/proc/1/status").map(drop)),
        ("see its directory", fs::read_dir(dir).map(drop)),
        ("use a local socket", UnixDatagram::unbound().map(drop)),
        ("run a program", Command::new("/bin/true").spawn().map(drop)),
    ];
    for (what, result) in tried {
        assert!(result.is_err(), "the process could {what}");
    }
}

/// Writes all blocks, flushes, reads and compares them.
fn verify(engine: &dyn Engine, queue: &mut dyn Queue, version: u8) {
    let write = |mut buffer: Buffer, offset, data: &[u8]| {
        buffer.write_at(0, data).unwrap();
        Request::write(1, offset, vec![buffer])
    };
    let mut run = |request: &dyn Fn(Buffer) -> Request| {
        let buffer = engine.allocate(BLOCK).unwrap();
        queue.submit(request(buffer));
        let mut completions = Vec::new();
        queue.drain(PATIENCE, &mut completions).unwrap();
        let completion: Completion = completions.remove(0);
        completion.result.as_ref().unwrap();
        completion
    };
    let blocks = (0..SIZE).step_by(BLOCK).zip(version..);
    for (offset, value) in blocks.clone() {
        run(&|buffer| write(buffer, offset, &[value; BLOCK]));
    }
    run(&|_| Request::flush(1));
    for (offset, value) in blocks {
        let completion = run(&|buffer| Request {
            operation: Operation::Read,
            ..write(buffer, offset, &[0; BLOCK])
        });
        let mut data = vec![0; BLOCK];
        completion.buffers[0].read_at(0, &mut data).unwrap();
        assert!(data == [value; BLOCK], "{offset}");
    }
}
