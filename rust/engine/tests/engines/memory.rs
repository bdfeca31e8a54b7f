// SPDX-License-Identifier: GPL-2.0-only

//! The engine in memory.

use crate::disk::{buffers, Cut, Disk, TIMEOUT};
use crate::suite::{Target, SIZE};
use engine::memory::MemoryEngine;
use engine::{Engine, Errno, Options, Request};
use std::time::Duration;

struct Memory;

impl Target for Memory {
    fn open(&self, options: &Options) -> engine::Result<Box<dyn Engine>> {
        engine::open(&format!("memory:{SIZE}").parse()?, options)
    }

    fn resize(&self, _size: u64) -> bool {
        false
    }

    fn is_persistent(&self) -> bool {
        false
    }
}

conformance!(Some(Memory));

#[test]
fn faults_are_as_the_test_wants() {
    let engine = MemoryEngine::open(SIZE, &Options::default()).unwrap();
    let mut queue = engine.queue(4).unwrap();
    engine.set_faults(|faults| faults.errors.extend([Some(Errno::AGAIN), None]));
    engine.set_faults(|faults| faults.hold = true);
    queue.submit(Request::flush(1));
    queue.submit(Request::flush(2));
    let mut completions = Vec::new();
    let error = queue.drain(Duration::from_millis(20), &mut completions);
    assert_eq!(error.unwrap_err().errno(), Errno::TIMEDOUT);
    engine.set_faults(|faults| faults.hold = false);
    queue.drain(TIMEOUT, &mut completions).unwrap();
    let errors: Vec<_> = completions
        .into_iter()
        .map(|completion| completion.result.err().map(|error| error.errno()))
        .collect();
    assert_eq!(errors, [Some(Errno::AGAIN), None]);
    assert_eq!(engine.set_faults(|faults| faults.flushes), 1);
}

#[test]
fn the_size_changes() {
    let engine = MemoryEngine::open(SIZE, &Options::default()).unwrap();
    engine.resize(SIZE * 2).unwrap();
    assert!(engine.resize(0).is_err());
    let mut disk = Disk::new(Box::new(engine));
    assert_eq!(disk.info().size, SIZE * 2);
    let memory = buffers(&*disk.engine, 512, Cut::Whole, None);
    assert_eq!(disk.errno(Request::read(1, SIZE, memory)), None);
}
