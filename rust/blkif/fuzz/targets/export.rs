// SPDX-License-Identifier: GPL-2.0-only

//! An NBD client that sends anything to the export of an image.

#![no_main]

use engine::memory::MemoryEngine;
use engine::nbd;
use engine::nbd::Export;
use engine::Engine;
use engine::Options;
use libfuzzer_sys::fuzz_target;
use std::io;
use std::io::Read;
use std::io::Write;
use std::sync::atomic::AtomicBool;

/// A client that sends these bytes, and ignores what it gets.
struct Client<'a>(&'a [u8]);

impl Read for Client<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let image = MemoryEngine::open(1 << 20, &Options::default()).unwrap();
    let (info, queue) = (image.info(), image.queue(nbd::DEPTH).unwrap());
    let is_stopped = AtomicBool::new(false);
    let export = Export::new(info, queue, true, &is_stopped);
    // It fails if the client breaks the protocol.
    let _ = export.serve(Client(data));
});
