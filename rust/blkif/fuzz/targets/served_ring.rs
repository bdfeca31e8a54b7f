// SPDX-License-Identifier: GPL-2.0-only

//! A ring that `rblktap` serves: a frontend writes anything to it, and the process survives.

#![no_main]

#[path = "../../../tap/tests/common/mod.rs"]
mod common;

use blkif::wire::Abi;
use blkif_fuzz::Input;
use common::Choice;
use common::Front;
use common::Options;
use common::Toolstack;
use engine::memory::MemoryEngine;
use libfuzzer_sys::fuzz_target;
use std::path::Path;
use xen_user::event::Channel;

const SECTORS: u64 = 64;
const WORDS: usize = 1024;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let state_dir = Path::new("/dev/shm").join(format!("rblk-fuzz-ring-{}", std::process::id()));
    std::fs::create_dir_all(&state_dir).unwrap();
    let mut toolstack = Toolstack::new("w");
    let options = engine::Options::default();
    let image = Box::new(MemoryEngine::open(SECTORS * 512, &options).unwrap());
    let served = common::serve(&mut toolstack, image, &Options::new(&state_dir));
    let choice = Choice {
        abi: [Abi::X86_64, Abi::X86_32][usize::from(input.u8() % 2)],
        order: u32::from(input.u8() % 2),
        ..Choice::PLAIN
    };
    let mut front = Front::connect(&mut toolstack, choice);
    // Random words of the ring get a valid reference, a small number or any number.
    for round in 0..1 + input.u8() % 4 {
        let memory = &front.rings[0].memory;
        for _ in 0..input.u8() {
            let word = usize::from(input.u16()) % WORDS;
            let value = match input.u8() % 4 {
                0 => front.references[usize::from(input.u8())],
                1 => input.u8().into(),
                _ => input.u32(),
            };
            memory.store(word, value);
        }
        // The producer index, within the ring and beyond.
        memory.store(0, u32::from(round + 1) * u32::from(input.u8()));
        front.rings[0].channel.notify().unwrap();
    }
    toolstack.start_detach();
    front.set_state("5");
    front.set_state("6");
    served.join().unwrap().unwrap();
    assert_eq!(toolstack.host.mapped(), 0);
});
