// SPDX-License-Identifier: GPL-2.0-only

//! An NBD server that sends anything: the negotiation, and the replies to some requests.

#![no_main]

use engine::nbd::NbdEngine;
use engine::Engine;
use engine::NbdAddress;
use engine::NbdExport;
use engine::Options;
use engine::Queue;
use engine::Request;
use engine::Server;
use engine::Uri;
use libfuzzer_sys::fuzz_target;
use std::io::Read;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

fuzz_target!(|data: &[u8]| {
    let path = Path::new("/dev/shm").join(format!("rblk-fuzz-nbd-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let export = NbdExport {
        address: NbdAddress::Unix(path.clone()),
        name: String::new(),
    };
    let options = Options {
        reconnect_timeout: Duration::ZERO,
        ..Options::default()
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            // The client may have closed the connection.
            let _ = stream.write_all(data);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
            std::fs::remove_file(&path).unwrap();
        });
        let server = Server::start(&Uri::Nbd(export.clone()), &options);
        let server = Arc::new(server.unwrap().unwrap());
        if let Ok(engine) = NbdEngine::open(&export, &options, server) {
            if let Ok(queue) = engine.queue(8) {
                send(&engine, queue);
            }
        }
    });
});

/// Sends requests, each of which completes once.
fn send(engine: &NbdEngine, mut queue: Box<dyn Queue>) {
    let buffer = || vec![engine.allocate(4096).unwrap()];
    queue.submit(Request::read(1, 0, buffer()));
    queue.submit(Request::write(2, 0, buffer()));
    queue.submit(Request::flush(3));
    let mut completions = Vec::new();
    queue
        .drain(Duration::from_secs(10), &mut completions)
        .unwrap();
    assert_eq!(completions.len(), 3);
}
