// SPDX-License-Identifier: GPL-2.0-only

//! The engine for NBD exports, with nbdkit and QEMU as servers.

use crate::disk::{buffers, pattern, read_only, Cut, Disk};
use crate::server::{is_installed, Server};
use crate::suite::{Target, SIZE};
use engine::{Engine, Errno, Operation, Options, Request};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// An NBD server with an export on a unix socket.
struct Export {
    dir: TempDir,
    server: Server,
}

impl Export {
    /// nbdkit with these arguments.
    fn nbdkit(args: &[&str]) -> Option<Self> {
        if !is_installed("nbdkit") {
            return None;
        }
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("socket");
        let mut all = vec!["--foreground", "--unix", socket.to_str().unwrap()];
        all.extend(args);
        let server = Server::start("nbdkit", &all, &socket);
        Some(Self { dir, server })
    }

    fn nbdkit_memory() -> Option<Self> {
        Self::nbdkit(&["memory", "4M"])
    }

    /// qemu-nbd with a file.
    fn qemu() -> Option<Self> {
        if !is_installed("qemu-nbd") {
            return None;
        }
        let dir = TempDir::new().unwrap();
        File::create(dir.path().join("image"))
            .unwrap()
            .set_len(SIZE)
            .unwrap();
        let server = Self::start_qemu(&dir);
        Some(Self { dir, server })
    }

    fn start_qemu(dir: &TempDir) -> Server {
        let socket = dir.path().join("socket");
        let image = dir.path().join("image");
        let args = [
            "--format=raw",
            "--persistent",
            "--shared=20",
            "--discard=unmap",
            "--socket",
            socket.to_str().unwrap(),
            image.to_str().unwrap(),
        ];
        Server::start("qemu-nbd", &args, &socket)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

impl Target for Export {
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>> {
        let uri = format!("nbd+unix:///?socket={}", self.socket().display());
        engine::open(&uri.parse()?, options)
    }

    fn resize(&self, _size: u64) -> bool {
        false
    }
}

mod nbdkit {
    conformance!(super::Export::nbdkit_memory());
}

mod qemu {
    conformance!(super::Export::qemu());
}

mod without_structured_replies {
    conformance!(super::Export::nbdkit(&["--no-sr", "memory", "4M"]));
}

#[test]
fn errors_of_the_server_are_passed_on() {
    let args = [
        "--filter=error",
        "memory",
        "4M",
        "error=ENOSPC",
        "error-pwrite-rate=100%",
    ];
    let Some(export) = Export::nbdkit(&args) else {
        return;
    };
    let mut disk = export.disk();
    let memory = buffers(&*disk.engine, 4096, Cut::Whole, None);
    assert_eq!(disk.errno(Request::write(1, 0, memory)), Some(Errno::NOSPC));
    assert_eq!(disk.read(0, 4096, Cut::Whole), vec![0; 4096]);
    disk.close();
}

#[test]
fn a_server_that_shuts_down_is_as_one_that_is_not_connected() {
    let args = [
        "--filter=error",
        "memory",
        "4M",
        "error=ESHUTDOWN",
        "error-pwrite-rate=1",
    ];
    let Some(export) = Export::nbdkit(&args) else {
        return;
    };
    let mut disk = export.disk();
    let memory = buffers(&*disk.engine, 4096, Cut::Whole, None);
    assert_eq!(
        disk.errno(Request::write(1, 0, memory)),
        Some(Errno::NOTCONN)
    );
    disk.close();
}

#[test]
fn slow_servers_are_waited_for() {
    let args = ["--filter=delay", "memory", "4M", "wdelay=200ms"];
    let Some(export) = Export::nbdkit(&args) else {
        return;
    };
    let mut disk = export.disk();
    for tag in 0..8 {
        let memory = buffers(&*disk.engine, 4096, Cut::Whole, None);
        disk.queue.submit(Request::write(tag, tag * 4096, memory));
    }
    let start = Instant::now();
    let completions = disk.drain();
    assert!(completions
        .iter()
        .all(|completion| completion.result.is_ok()));
    assert!(start.elapsed() >= Duration::from_millis(200));
    disk.close();
}

#[test]
fn exports_for_reading_only() {
    let Some(export) = Export::nbdkit(&["--readonly", "memory", "4M"]) else {
        return;
    };
    let error = export.open(&Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::ROFS);
    let mut disk = Disk::new(export.open(&read_only()).unwrap());
    assert_eq!(disk.read(0, 512, Cut::Whole), vec![0; 512]);
    disk.close();
}

#[test]
fn what_the_server_lacks_is_not_offered() {
    let args = ["--filter=nozero", "memory", "4M", "zeromode=none"];
    let Some(export) = Export::nbdkit(&args) else {
        return;
    };
    let disk = export.disk();
    assert!(!disk.info().write_zeroes);
    disk.close();
}

#[test]
fn an_unknown_export_is_refused() {
    if !is_installed("qemu-nbd") {
        return;
    }
    let export = Export::qemu().unwrap();
    let uri = format!("nbd+unix:///other?socket={}", export.socket().display());
    let error = engine::open(&uri.parse().unwrap(), &Options::default());
    let error = error.err().unwrap();
    assert_eq!(error.errno(), Errno::PROTO);
    assert!(error.cause().contains("no such export"), "{error}");
}

#[test]
fn servers_that_cannot_be_reached() {
    let uri = "nbd+unix:///?socket=/nonexistent".parse().unwrap();
    let error = engine::open(&uri, &Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::NOENT);
    let uri = "nbd://127.0.0.1:1/".parse().unwrap();
    let error = engine::open(&uri, &Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::CONNREFUSED);
}

#[test]
fn requests_are_sent_again_to_a_server_that_was_restarted() {
    let Some(mut export) = Export::qemu() else {
        return;
    };
    let mut disk = export.disk();
    for round in 0..3 {
        for tag in 0..16 {
            let data = pattern(round * 16 + tag, 65536);
            let memory = buffers(&*disk.engine, 65536, Cut::Whole, Some(&data));
            disk.queue.submit(Request::write(tag, tag * 65536, memory));
        }
        disk.queue.kick().unwrap();
        export.server.kill();
        std::fs::remove_file(export.socket()).unwrap();
        export.server = Export::start_qemu(&export.dir);
        let completions = disk.drain();
        assert_eq!(completions.len(), 16);
        for completion in completions {
            completion.result.unwrap();
        }
        for tag in 0..16 {
            let data = disk.read(tag * 65536, 65536, Cut::Whole);
            assert!(data == pattern(round * 16 + tag, 65536));
        }
    }
    disk.close();
}

#[test]
fn requests_fail_when_the_server_stays_away() {
    let Some(mut export) = Export::nbdkit_memory() else {
        return;
    };
    let options = Options {
        reconnect_timeout: Duration::from_millis(300),
        ..Options::default()
    };
    let mut disk = Disk::new(export.open(&options).unwrap());
    export.server.kill();
    let start = Instant::now();
    assert_eq!(disk.errno(Request::flush(1)), Some(Errno::NOTCONN));
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_eq!(disk.errno(Request::flush(1)), Some(Errno::NOTCONN));
}

/// Flags of an export: it has flags, flushes, and writes that include a flush.
const HAS_FLAGS: u16 = 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_FUA: u16 = 1 << 3;

/// Numbers of commands.
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// The reaction of a scripted server to a command.
enum Action {
    /// It replies with an error number, or 0.
    Reply(u32),
    /// It closes the connection.
    Close,
}

/// A server that does with each command what a test says, and replies to all after that.
#[derive(Clone)]
struct Script {
    flags: u16,
    actions: Arc<Mutex<VecDeque<Action>>>,
    commands: Arc<Mutex<Vec<u16>>>,
}

impl Script {
    /// Starts the server, and opens its export.
    fn start(flags: u16, actions: impl IntoIterator<Item = Action>) -> (Self, Disk) {
        Self::start_for(flags, actions, &Options::default())
    }

    /// Starts the server, and opens its export with these options.
    fn start_for(
        flags: u16,
        actions: impl IntoIterator<Item = Action>,
        options: &Options,
    ) -> (Self, Disk) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let script = Self {
            flags: HAS_FLAGS | flags,
            actions: Arc::new(Mutex::new(actions.into_iter().collect())),
            commands: Arc::default(),
        };
        let server = script.clone();
        thread::spawn(move || {
            let _dir = dir;
            for stream in listener.incoming() {
                // The client may end a connection at any point.
                let _ = server.serve(stream.unwrap());
            }
        });
        let uri = format!("nbd+unix:///?socket={}", path.display());
        let engine = engine::open(&uri.parse().unwrap(), options);
        (script, Disk::new(engine.unwrap()))
    }

    fn serve(&self, mut stream: UnixStream) -> std::io::Result<()> {
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x01")?;
        let mut client_flags = [0; 4];
        stream.read_exact(&mut client_flags)?;
        while !self.answer_option(&mut stream)? {}
        while let Some((kind, cookie)) = read_command(&mut stream)? {
            self.commands.lock().unwrap().push(kind);
            let Some(errno) = self.next_reply() else {
                return Ok(());
            };
            stream.write_all(&0x6744_6698u32.to_be_bytes())?;
            stream.write_all(&errno.to_be_bytes())?;
            stream.write_all(&cookie)?;
        }
        Ok(())
    }

    /// Returns the error number of the next reply, unless there is none.
    fn next_reply(&self) -> Option<u32> {
        match self.actions.lock().unwrap().pop_front() {
            Some(Action::Reply(errno)) => Some(errno),
            Some(Action::Close) => None,
            None => Some(0),
        }
    }

    /// Returns `true` if the transmission phase begins.
    fn answer_option(&self, stream: &mut UnixStream) -> std::io::Result<bool> {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let len = u32::from_be_bytes(header[12..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize])?;
        let option = header[8..12].to_vec();
        let mut reply = |kind: u32, data: &[u8]| {
            stream.write_all(&0x3_e889_0455_65a9u64.to_be_bytes())?;
            stream.write_all(&option)?;
            stream.write_all(&kind.to_be_bytes())?;
            stream.write_all(&(data.len() as u32).to_be_bytes())?;
            stream.write_all(data)
        };
        if option != 7u32.to_be_bytes() {
            reply(0x8000_0001, &[])?;
            return Ok(false);
        }
        let mut export = vec![0, 0];
        export.extend(SIZE.to_be_bytes());
        export.extend(self.flags.to_be_bytes());
        reply(3, &export)?;
        reply(1, &[])?;
        Ok(true)
    }
}

/// Reads a command and its data. Returns [`None`] at the end.
fn read_command(stream: &mut UnixStream) -> std::io::Result<Option<(u16, [u8; 8])>> {
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    let kind = u16::from_be_bytes([header[6], header[7]]);
    let len = u32::from_be_bytes(header[24..].try_into().unwrap());
    if kind == WRITE {
        stream.read_exact(&mut vec![0; len as usize])?;
    }
    let cookie = header[8..16].try_into().unwrap();
    Ok((kind != DISCONNECT).then_some((kind, cookie)))
}

/// Returns a write that includes a flush.
fn durable_write(disk: &Disk) -> Request {
    let mut request = Request::write(1, 0, buffers(&*disk.engine, 4096, Cut::Whole, None));
    request.operation = Operation::Write { fua: true };
    request
}

#[test]
fn a_flush_that_has_failed_is_not_an_error_that_may_pass() {
    const NO_SPACE: u32 = 28;
    let actions = || (0..3).map(|_| Action::Reply(NO_SPACE));
    let (_, mut disk) = Script::start(SEND_FLUSH | SEND_FUA, actions());
    assert_eq!(disk.errno(Request::flush(1)), Some(Errno::IO));
    let request = durable_write(&disk);
    assert_eq!(disk.errno(request), Some(Errno::IO));
    let memory = buffers(&*disk.engine, 4096, Cut::Whole, None);
    assert_eq!(disk.errno(Request::write(1, 0, memory)), Some(Errno::NOSPC));
    disk.close();
}

#[test]
fn a_durable_write_is_sent_again_as_a_whole() {
    let actions = [Action::Reply(0), Action::Close];
    let (script, mut disk) = Script::start(SEND_FLUSH, actions);
    let request = durable_write(&disk);
    assert_eq!(disk.errno(request), None);
    let commands = script.commands.lock().unwrap().clone();
    assert_eq!(commands, [WRITE, FLUSH, WRITE, FLUSH]);
    disk.close();
}

#[test]
fn a_server_that_ends_each_connection_is_not_flooded_with_them() {
    let options = Options {
        reconnect_timeout: Duration::from_millis(300),
        ..Options::default()
    };
    let actions = (0..1 << 20).map(|_| Action::Close);
    let (script, mut disk) = Script::start_for(SEND_FLUSH, actions, &options);
    assert_eq!(disk.errno(Request::flush(1)), Some(Errno::NOTCONN));
    // Four delays are longer than the limit.
    let commands = script.commands.lock().unwrap().len();
    assert!(commands <= 6, "{commands} connections");
    script.actions.lock().unwrap().clear();
    assert_eq!(disk.errno(Request::flush(1)), None);
    disk.close();
}
