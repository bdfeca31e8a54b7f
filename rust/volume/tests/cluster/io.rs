// SPDX-License-Identifier: GPL-2.0-only

//! One request at a time to the image of a volume.

use engine::{Buffer, Completion, Engine, Options, Queue, Request, Result};
use std::time::Duration;

/// The bytes of a block.
pub const BLOCK: u64 = 4096;

/// The blocks that are written.
pub const BLOCKS: u64 = 64;

/// The time that a request may take.
const TIMEOUT: Duration = Duration::from_secs(90);

/// An open image.
pub struct Image {
    engine: Box<dyn Engine>,
    queue: Box<dyn Queue>,
}

impl Image {
    /// Opens an image for writing, as the single writer.
    pub fn open(uri: &str) -> Self {
        let options = Options {
            runtime_dir: daemons::work_dir("run"),
            lock_timeout: TIMEOUT,
            ..Options::default()
        };
        let engine = engine::open(&uri.parse().unwrap(), &options).unwrap();
        let queue = engine.queue(1).unwrap();
        Self { engine, queue }
    }

    fn run(&mut self, request: Request) -> Completion {
        self.queue.submit(request);
        let mut completions = Vec::new();
        self.queue.drain(TIMEOUT, &mut completions).unwrap();
        completions.remove(0)
    }

    fn buffer(&self) -> Buffer {
        self.engine.allocate(BLOCK as usize).unwrap()
    }

    /// Writes a block.
    pub fn write(&mut self, block: u64, data: &[u8]) -> Result<()> {
        let mut buffer = self.buffer();
        buffer.write_at(0, data).unwrap();
        self.run(Request::write(1, block * BLOCK, vec![buffer]))
            .result
    }

    /// Reads a block.
    pub fn read(&mut self, block: u64) -> Result<Vec<u8>> {
        let read = self.run(Request::read(1, block * BLOCK, vec![self.buffer()]));
        read.result?;
        let mut data = vec![0; BLOCK as usize];
        read.buffers[0].read_at(0, &mut data).unwrap();
        Ok(data)
    }

    pub fn close(self) {
        drop(self.queue);
        self.engine.close().unwrap();
    }
}

/// Returns the contents of a block.
pub fn pattern(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK as usize]
}
