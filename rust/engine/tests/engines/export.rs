// SPDX-License-Identifier: GPL-2.0-only

//! The NBD server of an open image, with the NBD engine and QEMU's programs as clients.

use crate::disk::Cut;
use crate::server::is_installed;
use crate::suite::{Target, SIZE};
use engine::memory::MemoryEngine;
use engine::nbd::{Export, DEPTH};
use engine::{Completion, Engine, Errno, Operation, Options, Queue, Request};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// The limit for the other end of a connection.
const TIMEOUT: Duration = Duration::from_secs(100);

/// A raw image that is exported as long as the process runs.
struct Exported {
    dir: TempDir,
}

static IS_STOPPED: AtomicBool = AtomicBool::new(false);

/// Serves a client in a thread.
fn serve(engine: &dyn Engine, client: UnixStream) {
    let (info, queue) = (engine.info(), engine.queue(DEPTH).unwrap());
    let export = Export::new(info, queue, true, &IS_STOPPED);
    thread::spawn(move || export.serve(&client));
}

impl Exported {
    fn new(options: &Options) -> Self {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let uri = format!("raw:{}", image.display()).parse().unwrap();
        let engine = engine::open(&uri, options).unwrap();
        let exported = Self { dir };
        let listener = UnixListener::bind(exported.socket()).unwrap();
        thread::spawn(move || {
            for client in listener.incoming() {
                serve(&*engine, client.unwrap());
            }
        });
        exported
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// Runs a program of QEMU with the export as its last argument.
    fn qemu(&self, program: &str, args: &[&str]) -> Option<String> {
        if !is_installed(program) {
            return None;
        }
        let output = Command::new(program)
            .args(args)
            .arg(self.uri())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(output.status.success(), "{text}");
        Some(text)
    }
}

impl Target for Exported {
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>> {
        engine::open(&self.uri().parse()?, options)
    }

    fn resize(&self, _size: u64) -> bool {
        false
    }
}

mod raw {
    conformance!(Some(super::Exported::new(&engine::Options::default())));
}

#[test]
fn qemu_reads_and_writes_it() {
    let exported = Exported::new(&Options::default());
    let Some(text) = exported.qemu(
        "qemu-io",
        &[
            "--format=raw",
            "-c",
            "write -P 0x5a 1M 1M",
            "-c",
            "write -f -P 0x33 512 1k",
            "-c",
            "write -z -u 1M 64k",
            "-c",
            "discard 3M 64k",
            "-c",
            "flush",
            "-c",
            "read -P 0x33 512 1k",
            "-c",
            "read -P 0 1M 64k",
            "-c",
            "read -P 0x5a 1088k 960k",
        ],
    ) else {
        return;
    };
    assert!(!text.contains("failed"), "{text}");
    let image = fs::read(exported.image()).unwrap();
    assert_eq!(image[512..1536], [0x33; 1024]);
    assert_eq!(image[1088 << 10..2 << 20], vec![0x5a; 960 << 10]);
    let same = exported.image();
    let args = ["compare", "-f", "raw", "-F", "raw", same.to_str().unwrap()];
    let text = exported.qemu("qemu-img", &args).unwrap();
    assert!(text.contains("identical"), "{text}");
}

#[test]
fn a_read_only_image_is_exported_as_such() {
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let exported = Exported::new(&options);
    let error = exported.open(&Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::ROFS);
}

/// Connects, and sends the flags of the client.
fn greeted(exported: &Exported) -> UnixStream {
    greet(UnixStream::connect(exported.socket()).unwrap())
}

fn greet(mut client: UnixStream) -> UnixStream {
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(&1u32.to_be_bytes()).unwrap();
    client
}

fn send_option(client: &mut UnixStream, option: u32, data: &[u8]) {
    client.write_all(b"IHAVEOPT").unwrap();
    client.write_all(&option.to_be_bytes()).unwrap();
    let length = u32::try_from(data.len()).unwrap();
    client.write_all(&length.to_be_bytes()).unwrap();
    client.write_all(data).unwrap();
}

/// Returns the kind of the reply to an option, and its data.
fn reply(client: &mut UnixStream) -> (u32, Vec<u8>) {
    let mut header = [0; 20];
    client.read_exact(&mut header).unwrap();
    let number = |at| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut data = vec![0; number(16) as usize];
    client.read_exact(&mut data).unwrap();
    (number(12), data)
}

#[test]
fn options_are_answered() {
    const UNSUPPORTED: u32 = (1 << 31) | 1;
    const INVALID: u32 = (1 << 31) | 3;
    const UNKNOWN: u32 = (1 << 31) | 6;
    let exported = Exported::new(&Options::default());
    let mut client = greeted(&exported);
    send_option(&mut client, 8, &[]);
    assert_eq!(reply(&mut client).0, UNSUPPORTED);
    send_option(&mut client, 3, &[]);
    assert_eq!(reply(&mut client), (2, vec![0; 4]));
    assert_eq!(reply(&mut client).0, 1);
    send_option(&mut client, 6, &[0, 0]);
    assert_eq!(reply(&mut client).0, INVALID);
    send_option(&mut client, 7, b"\0\0\0\x01a\0\0");
    assert_eq!(reply(&mut client).0, UNKNOWN);
    send_option(&mut client, 6, &[0; 6]);
    let (kind, data) = reply(&mut client);
    assert_eq!((kind, &data[2..10]), (3, &SIZE.to_be_bytes()[..]));
    send_option(&mut client, 2, &[]);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(!rest.is_empty());
}

#[test]
fn clients_without_the_newer_option_are_served() {
    let exported = Exported::new(&Options::default());
    let mut client = greeted(&exported);
    send_option(&mut client, 1, &[]);
    let mut found = [0; 134];
    client.read_exact(&mut found).unwrap();
    assert_eq!(found[..8], SIZE.to_be_bytes());
    assert_eq!(found[10..], [0; 124]);
}

/// Enters the transmission phase.
fn enter(client: &mut UnixStream) {
    send_option(client, 1, &[]);
    client.read_exact(&mut [0; 134]).unwrap();
}

/// Sends a command without data, and returns the error of the reply.
fn command(client: &mut UnixStream, kind: u16, offset: u64, length: u32) -> u32 {
    command_with(client, 0, kind, offset, length, &[])
}

/// Sends a command with flags and data, and returns the error of the reply.
fn command_with(
    client: &mut UnixStream,
    flags: u16,
    kind: u16,
    offset: u64,
    length: u32,
    data: &[u8],
) -> u32 {
    const MAGIC: u32 = 0x2560_9513;
    let fields = [
        &MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &7u64.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ];
    client.write_all(&fields.concat()).unwrap();
    let mut header = [0; 16];
    client.read_exact(&mut header).unwrap();
    assert_eq!(header[8..], 7u64.to_be_bytes());
    u32::from_be_bytes(header[4..8].try_into().unwrap())
}

#[test]
fn errors_are_replies() {
    const READ: u16 = 0;
    let exported = Exported::new(&Options::default());
    let mut client = greeted(&exported);
    enter(&mut client);
    let (invalid, io) = (22, 5);
    assert_eq!(command(&mut client, READ, SIZE, 512), io);
    assert_eq!(command(&mut client, READ, 1, 512), invalid);
    assert_eq!(command(&mut client, READ, 0, 0), invalid);
    assert_eq!(command(&mut client, READ, 0, (32 << 20) + 512), invalid);
    assert_eq!(command(&mut client, 99, 0, 512), invalid);
    assert_eq!(command(&mut client, READ, 0, 512), 0);
    let mut data = [1; 512];
    client.read_exact(&mut data).unwrap();
    assert_eq!(data, [0; 512]);
}

#[test]
fn a_client_that_breaks_the_protocol_is_disconnected() {
    let exported = Exported::new(&Options::default());
    let breaches: [&dyn Fn(&mut UnixStream); 5] = [
        &|client| client.write_all(&[0; 16]).unwrap(),
        &|client| send_option(client, 1, b"other"),
        &|client| {
            client.write_all(b"IHAVEOPT").unwrap();
            client.write_all(&[0xff; 8]).unwrap();
        },
        &|client| {
            send_option(client, 1, &[]);
            client.write_all(&[0; 28]).unwrap();
        },
        &|client| {
            send_option(client, 1, &[]);
            // A write of 4 GiB.
            client
                .write_all(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1])
                .unwrap();
            client.write_all(&[0xff; 20]).unwrap();
        },
    ];
    for breach in breaches {
        let mut client = greeted(&exported);
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        breach(&mut client);
        let end = client.read_to_end(&mut Vec::new());
        // The rest of what it has sent may be lost with the connection.
        let is_end = |error: io::Error| error.kind() == io::ErrorKind::ConnectionReset;
        assert!(end.map_or_else(is_end, |_| true));
    }
    let mut disk = exported.disk();
    assert_eq!(disk.read(0, 512, Cut::Whole), vec![0; 512]);
    disk.close();
}

/// An image in memory that notes the operations of its queues.
struct Noting {
    image: MemoryEngine,
    operations: Arc<Mutex<Vec<Operation>>>,
}

struct NotingQueue {
    queue: Box<dyn Queue>,
    operations: Arc<Mutex<Vec<Operation>>>,
}

impl AsFd for NotingQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

impl Queue for NotingQueue {
    fn submit(&mut self, request: Request) {
        self.operations.lock().unwrap().push(request.operation);
        self.queue.submit(request);
    }

    fn kick(&mut self) -> engine::Result<()> {
        self.queue.kick()
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) -> engine::Result<()> {
        self.queue.completions(completions)
    }

    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }
}

impl Noting {
    fn new() -> Self {
        Self {
            image: MemoryEngine::open(SIZE, &Options::default()).unwrap(),
            operations: Arc::default(),
        }
    }

    /// Returns a client in the transmission phase.
    fn client(&self, discard: bool, is_stopped: &'static AtomicBool) -> UnixStream {
        let (client, other) = UnixStream::pair().unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        let queue = Box::new(NotingQueue {
            queue: self.image.queue(DEPTH).unwrap(),
            operations: self.operations.clone(),
        });
        let export = Export::new(self.image.info(), queue, discard, is_stopped);
        thread::spawn(move || export.serve(&other));
        let mut client = greet(client);
        enter(&mut client);
        client
    }

    fn take(&self) -> Vec<Operation> {
        std::mem::take(&mut self.operations.lock().unwrap())
    }
}

const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const FUA: u16 = 1;

#[test]
fn flushes_and_forced_unit_access_reach_the_image() {
    let noting = Noting::new();
    let mut client = noting.client(true, &IS_STOPPED);
    assert_eq!(command(&mut client, FLUSH, 0, 0), 0);
    assert_eq!(noting.take(), [Operation::Flush]);
    for (flags, fua) in [(FUA, true), (0, false)] {
        let error = command_with(&mut client, flags, WRITE, 0, 512, &[1; 512]);
        assert_eq!(error, 0);
        assert_eq!(noting.take(), [Operation::Write { fua }]);
    }
    let may_unmap = true;
    for (kind, operation) in [
        (TRIM, Operation::Discard),
        (WRITE_ZEROES, Operation::WriteZeroes { may_unmap }),
    ] {
        assert_eq!(command_with(&mut client, FUA, kind, 0, 512, &[]), 0);
        assert_eq!(noting.take(), [operation, Operation::Flush]);
        assert_eq!(command(&mut client, kind, 0, 512), 0);
        assert_eq!(noting.take(), [operation]);
    }
}

#[test]
fn a_flush_that_fails_is_an_error() {
    let noting = Noting::new();
    let mut client = noting.client(true, &IS_STOPPED);
    let fail = |errors: Vec<Option<Errno>>| {
        noting
            .image
            .set_faults(|faults| faults.errors = errors.into());
    };
    let io = 5;
    fail(vec![Some(Errno::NOSPC)]);
    assert_eq!(command(&mut client, FLUSH, 0, 0), io);
    fail(vec![None, Some(Errno::IO)]);
    assert_eq!(command_with(&mut client, FUA, TRIM, 0, 512, &[]), io);
    assert_eq!(command(&mut client, FLUSH, 0, 0), 0);
}

#[test]
fn storage_is_not_freed_unless_that_is_allowed() {
    let noting = Noting::new();
    let mut client = noting.client(false, &IS_STOPPED);
    let unsupported = 95;
    assert_eq!(command(&mut client, TRIM, 0, 512), unsupported);
    assert_eq!(noting.take(), []);
    assert_eq!(command(&mut client, WRITE_ZEROES, 0, 512), 0);
    let may_unmap = false;
    assert_eq!(noting.take(), [Operation::WriteZeroes { may_unmap }]);
}

#[test]
fn a_stopped_export_does_not_wait_for_the_image() {
    static IS_STOPPED: AtomicBool = AtomicBool::new(false);
    let noting = Noting::new();
    let mut client = noting.client(true, &IS_STOPPED);
    noting.image.set_faults(|faults| faults.hold = true);
    client.write_all(&[0x25, 0x60, 0x95, 0x13]).unwrap();
    client.write_all(&[0, 0, 0, 3]).unwrap();
    client.write_all(&[0; 20]).unwrap();
    IS_STOPPED.store(true, Ordering::Relaxed);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}
