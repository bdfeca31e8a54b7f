// SPDX-License-Identifier: GPL-2.0-only

//! An open image with one queue, for tests that want one result at a time.

use engine::{Buffer, Completion, Engine, Errno, Info, Options, Queue, Request};
use std::time::Duration;

pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The division of the memory of a request into buffers.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    /// One aligned buffer.
    Whole,
    /// One buffer at an odd address.
    Odd,
    /// Two buffers, of which the first has this length.
    At(usize),
    /// One buffer for each 512 bytes.
    Sectors,
}

/// An open image with one queue.
pub struct Disk {
    pub engine: Box<dyn Engine>,
    pub queue: Box<dyn Queue>,
}

impl Disk {
    pub fn new(engine: Box<dyn Engine>) -> Self {
        let queue = engine.queue(32).unwrap();
        Self { engine, queue }
    }

    pub fn info(&self) -> Info {
        self.engine.info()
    }

    /// Carries out one request.
    pub fn run(&mut self, request: Request) -> Completion {
        let tag = request.tag;
        self.queue.submit(request);
        let mut completions = self.drain();
        assert_eq!(completions.len(), 1);
        let completion = completions.remove(0);
        assert_eq!(completion.tag, tag);
        completion
    }

    pub fn drain(&mut self) -> Vec<Completion> {
        let mut completions = Vec::new();
        self.queue.drain(TIMEOUT, &mut completions).unwrap();
        completions
    }

    pub fn errno(&mut self, request: Request) -> Option<Errno> {
        self.run(request).result.err().map(|error| error.errno())
    }

    pub fn write(&mut self, offset: u64, data: &[u8], cut: Cut) {
        let buffers = buffers(&*self.engine, data.len(), cut, Some(data));
        let completion = self.run(Request::write(1, offset, buffers));
        completion.result.unwrap();
        assert_eq!(bytes(&completion.buffers), data);
    }

    pub fn read(&mut self, offset: u64, len: usize, cut: Cut) -> Vec<u8> {
        let buffers = buffers(&*self.engine, len, cut, None);
        let completion = self.run(Request::read(2, offset, buffers));
        completion.result.unwrap();
        bytes(&completion.buffers)
    }

    pub fn flush(&mut self) {
        assert_eq!(self.errno(Request::flush(3)), None);
    }

    pub fn close(self) {
        drop(self.queue);
        self.engine.close().unwrap();
    }
}

/// Allocates the memory of a request and fills it.
pub fn buffers(engine: &dyn Engine, len: usize, cut: Cut, data: Option<&[u8]>) -> Vec<Buffer> {
    let whole = |len| engine.allocate(len).unwrap();
    let mut buffers = match cut {
        Cut::Whole => vec![whole(len)],
        Cut::Odd => {
            let (_, odd) = whole(len + 1).split_at(1).unwrap();
            vec![odd]
        }
        Cut::At(mid) => {
            let (first, second) = whole(len).split_at(mid.min(len)).unwrap();
            vec![first, second]
        }
        Cut::Sectors => (0..len / 512).map(|_| whole(512)).collect(),
    };
    let mut data = data.unwrap_or_default();
    for buffer in &mut buffers {
        let (part, rest) = data.split_at(buffer.len().min(data.len()));
        buffer.write_at(0, part).unwrap();
        data = rest;
    }
    buffers
}

/// Returns the bytes of all buffers.
pub fn bytes(buffers: &[Buffer]) -> Vec<u8> {
    let mut all = Vec::new();
    for buffer in buffers {
        let mut part = vec![0; buffer.len()];
        buffer.read_at(0, &mut part).unwrap();
        all.extend(part);
    }
    all
}

/// Returns `len` bytes that differ with `seed` and from sector to sector.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(len);
    while data.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend(state.to_le_bytes());
    }
    data.truncate(len);
    data
}

/// Returns options that wait for the lock: a process that another test is starting may have all
/// files of this one open for a moment.
pub fn patient() -> Options {
    Options {
        lock_timeout: TIMEOUT,
        ..Options::default()
    }
}

pub fn read_only() -> Options {
    Options {
        read_only: true,
        ..Options::default()
    }
}
