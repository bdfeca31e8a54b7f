// SPDX-License-Identifier: GPL-2.0-only

//! The flush of a drained disk, before its process is replaced.
//!
//! `qemu-storage-daemon` ends with the process. If it cannot write its caches then, completed
//! writes are lost; as long as it runs, that is an error, and it keeps them.

use engine::Engine;
use engine::Errno;
use engine::Request;
use engine::DROP_TIMEOUT;
use std::sync::mpsc::channel;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::TryRecvError;
use std::thread;

/// The flush of a drained disk.
#[derive(Default)]
pub(crate) enum DrainFlush {
    /// It was not started.
    #[default]
    Due,
    /// A thread waits for it.
    Running(Receiver<engine::Result<()>>),
    /// It has ended.
    Ended(engine::Result<()>),
}

impl DrainFlush {
    /// Starts it at the first call. Returns `true` if it has succeeded.
    pub(crate) fn poll(&mut self, image: &dyn Engine) -> engine::Result<bool> {
        *self = match std::mem::take(self) {
            Self::Due => start(image).map_or_else(|error| Self::Ended(Err(error)), Self::Running),
            Self::Running(result) => match result.try_recv() {
                Ok(ended) => Self::Ended(ended),
                Err(TryRecvError::Empty) => Self::Running(result),
                Err(TryRecvError::Disconnected) => Self::Ended(Err(thread_error())),
            },
            ended => ended,
        };
        match self {
            Self::Ended(result) => result.clone().map(|()| true),
            Self::Due | Self::Running(_) => Ok(false),
        }
    }
}

/// Starts a thread that flushes an image.
fn start(image: &dyn Engine) -> engine::Result<Receiver<engine::Result<()>>> {
    let mut queue = image.queue(1)?;
    let (sender, result) = channel();
    let flush = move || {
        let mut completions = Vec::new();
        queue.submit(Request::flush(0));
        let drained = queue.drain(DROP_TIMEOUT, &mut completions);
        let flushed = completions.pop().map(|completion| completion.result);
        // The drain may have ended without it.
        let _ = sender.send(flushed.unwrap_or(drained));
    };
    let thread = thread::Builder::new().name("flush".to_owned());
    let started = thread.spawn(flush);
    started.map(|_| result).map_err(|_| thread_error())
}

fn thread_error() -> engine::Error {
    engine::Error::new(
        Errno::AGAIN,
        "there is no thread to flush the image",
        "raise the limit of threads",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::memory::MemoryEngine;
    use std::time::Duration;
    use std::time::Instant;

    fn image() -> MemoryEngine {
        MemoryEngine::open(1 << 20, &engine::Options::default()).unwrap()
    }

    /// Waits for the end of the flush.
    fn end(flush: &mut DrainFlush, image: &MemoryEngine) -> engine::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !flush.poll(image)? {
            assert!(Instant::now() < deadline, "the flush does not end");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    #[test]
    fn a_disk_is_flushed_once() {
        let image = image();
        image.set_faults(|faults| faults.hold = true);
        let mut flush = DrainFlush::default();
        for _ in 0..3 {
            assert!(!flush.poll(&image).unwrap());
        }
        image.set_faults(|faults| faults.hold = false);
        end(&mut flush, &image).unwrap();
        end(&mut flush, &image).unwrap();
        assert_eq!(image.set_faults(|faults| faults.flushes), 1);
    }

    #[test]
    fn an_error_of_the_flush_stays() {
        let image = image();
        image.set_faults(|faults| faults.errors.push_back(Some(Errno::NOSPC)));
        let mut flush = DrainFlush::default();
        for _ in 0..2 {
            let error = end(&mut flush, &image).unwrap_err();
            assert_eq!(error.errno(), Errno::NOSPC);
        }
    }
}
