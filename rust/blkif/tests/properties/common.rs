// SPDX-License-Identifier: GPL-2.0-only

//! What several tests use: memory of a ring, and arbitrary requests.

use blkif::ring::SharedMemory;
use blkif::wire::indirect_pages;
use blkif::wire::op;
use blkif::wire::DiscardRequest;
use blkif::wire::IndirectRequest;
use blkif::wire::RwRequest;
use blkif::wire::WireRequest;
use blkif::wire::WireSegment;
use proptest::prelude::*;
use std::cell::Cell;
use std::rc::Rc;

/// Words that both ends of a ring use, in one thread.
#[derive(Clone)]
pub struct Words(Rc<Vec<Cell<u32>>>);

impl Words {
    pub fn new(pages: usize) -> Self {
        Words(Rc::new(vec![Cell::new(0); pages * 1024]))
    }
}

impl SharedMemory for Words {
    fn words(&self) -> usize {
        self.0.len()
    }
    fn load(&self, word: usize) -> u32 {
        self.0[word].get()
    }
    fn store(&self, word: usize, value: u32) {
        self.0[word].set(value);
    }
    fn rmb(&self) {}
    fn wmb(&self) {}
    fn mb(&self) {}
}

pub fn segment() -> impl Strategy<Value = WireSegment> {
    any::<(u32, u8, u8)>().prop_map(|(gref, first, last)| WireSegment { gref, first, last })
}

/// Returns a request with its segments in the slot. `nr_segments` may be any number; the slot has
/// those that fit.
fn rw() -> impl Strategy<Value = WireRequest> {
    let operation = prop_oneof![
        Just(op::READ),
        Just(op::WRITE),
        Just(op::WRITE_BARRIER),
        Just(op::FLUSH_DISKCACHE)
    ];
    let nr_segments = prop_oneof![0..=11u8, any::<u8>()];
    let segments = proptest::array::uniform11(segment());
    let rest = any::<(u16, u64, u64)>();
    (operation, nr_segments, segments, rest).prop_map(
        |(operation, nr_segments, mut segments, rest)| {
            let (handle, id, sector) = rest;
            for unused in segments.iter_mut().skip(nr_segments.into()) {
                *unused = WireSegment::default();
            }
            WireRequest::Rw(RwRequest {
                operation,
                nr_segments,
                handle,
                id,
                sector,
                segments,
            })
        },
    )
}

fn discard() -> impl Strategy<Value = WireRequest> {
    any::<(u8, u16, u64, u64, u64)>().prop_map(|(flag, handle, id, sector, nr_sectors)| {
        WireRequest::Discard(DiscardRequest {
            flag,
            handle,
            id,
            sector,
            nr_sectors,
        })
    })
}

fn indirect() -> impl Strategy<Value = WireRequest> {
    let nr_segments = prop_oneof![0..=4096u16, any::<u16>()];
    let rest = any::<(u8, u16, u64, u64, [u32; 8])>();
    (nr_segments, rest).prop_map(
        |(nr_segments, (operation, handle, id, sector, mut grefs))| {
            for unused in grefs.iter_mut().skip(indirect_pages(nr_segments)) {
                *unused = 0;
            }
            WireRequest::Indirect(IndirectRequest {
                operation,
                nr_segments,
                handle,
                id,
                sector,
                grefs,
            })
        },
    )
}

fn unknown() -> impl Strategy<Value = WireRequest> {
    (prop_oneof![Just(4), 7..=255u8], any::<u64>())
        .prop_map(|(operation, id)| WireRequest::Unknown { operation, id })
}

pub fn request() -> impl Strategy<Value = WireRequest> {
    prop_oneof![rw(), discard(), indirect(), unknown()]
}
