// SPDX-License-Identifier: GPL-2.0-only

//! The engine for NBD exports, with nbdkit and QEMU as servers.

use crate::disk::{buffers, pattern, read_only, Cut, Disk};
use crate::server::{is_installed, Server};
use crate::suite::{Target, SIZE};
use engine::{Engine, Errno, Options, Request};
use std::fs::File;
use std::path::PathBuf;
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
