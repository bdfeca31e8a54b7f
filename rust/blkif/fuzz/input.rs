// SPDX-License-Identifier: GPL-2.0-only

//! The fuzzer's bytes as numbers, words and memory.

use blkif::request::DiskLimits;
use blkif::ring::SharedMemory;
use blkif::wire::Abi;
use blkif::wire::WireSegment;
use std::cell::RefCell;

/// Bytes that are taken from the front. When they are used up, they are zero.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | (u32::from(self.u16()) << 16)
    }

    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | (u64::from(self.u32()) << 32)
    }

    pub fn abi(&mut self) -> Abi {
        [Abi::X86_64, Abi::X86_32, Abi::Arm][usize::from(self.u8() % 3)]
    }

    pub fn segment(&mut self) -> WireSegment {
        WireSegment::decode([self.u32(), self.u32()])
    }

    pub fn disk(&mut self) -> DiskLimits {
        let flags = self.u8();
        DiskLimits {
            block_size: 512 << (flags & 7),
            read_only: flags & 8 != 0,
            discard: flags & 16 != 0,
            secure_discard: flags & 32 != 0,
            indirect_segments: self.u16(),
            sectors: self.u64(),
        }
    }
}

/// One page of a ring. A word that was never written holds the next one of the input: the other
/// side may have written anything.
pub struct Page<'a> {
    words: RefCell<Vec<Option<u32>>>,
    input: RefCell<Input<'a>>,
}

impl<'a> Page<'a> {
    pub fn new(input: Input<'a>) -> Self {
        Page {
            words: RefCell::new(vec![None; 1024]),
            input: RefCell::new(input),
        }
    }

    /// Writes as the other side.
    pub fn set(&self, word: usize, value: u32) {
        self.words.borrow_mut()[word] = Some(value);
    }

    /// Returns the next number of the input, or `None` at its end.
    pub fn next(&self) -> Option<u32> {
        let mut input = self.input.borrow_mut();
        (!input.is_empty()).then(|| input.u32())
    }
}

impl SharedMemory for Page<'_> {
    fn words(&self) -> usize {
        1024
    }

    fn load(&self, word: usize) -> u32 {
        let written = self.words.borrow()[word];
        written.unwrap_or_else(|| self.input.borrow_mut().u32())
    }

    fn store(&self, word: usize, value: u32) {
        self.words.borrow_mut()[word] = Some(value);
    }

    fn rmb(&self) {}
    fn wmb(&self) {}
    fn mb(&self) {}
}
