// SPDX-License-Identifier: GPL-2.0-only

//! An idle disk wakes no thread. In a process of its own, as it counts all threads.

mod common;

use blkif::wire::op;
use common::*;
use engine::memory::MemoryEngine;
use std::fs;
use std::thread;
use std::time::Duration;

/// Returns how often the threads of the disk's queues have slept.
fn sleeps() -> Vec<u64> {
    let mut counts = Vec::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        if !name.starts_with("5-51712-") {
            continue;
        }
        let status = fs::read_to_string(path.join("status")).unwrap();
        let mut lines = status.lines();
        let line = lines.find(|line| line.starts_with("voluntary_ctxt_switches"));
        let count = line.unwrap().split_whitespace().last().unwrap();
        counts.push(count.parse().unwrap());
    }
    counts
}

#[test]
fn an_idle_disk_causes_no_wakeups() {
    let dir = tempfile::tempdir().unwrap();
    let mut toolstack = Toolstack::new("w");
    let image = MemoryEngine::open(1 << 20, &engine::Options::default()).unwrap();
    let served = serve(&mut toolstack, Box::new(image), &Options::new(dir.path()));
    let choice = Choice {
        queues: 2,
        ..Choice::PLAIN
    };
    let mut front = Front::connect(&mut toolstack, choice);
    let segment = front.segment(0, 0, 7);
    okay(front.rings[0].call(direct(op::WRITE, 1, 0, &[segment])));
    thread::sleep(Duration::from_millis(100));
    let before = sleeps();
    assert_eq!(before.len(), 2);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(sleeps(), before);
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
}
