// SPDX-License-Identifier: GPL-2.0-only

//! A VHD: any footer, header and table are read or refused.
//!
//! The magic numbers and checksums are right, because a wrong one ends everything.

#![no_main]

use engine::vhd::VhdChain;
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::io::Write;
use std::path::Path;

const FOOTER: usize = 512;
const HEADER: usize = 1024;
const SECTOR: usize = 512;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    bytes.resize(bytes.len().max(FOOTER + HEADER), 0);
    let (footer, rest) = bytes.split_at_mut(FOOTER);
    seal(footer, b"conectix", 64);
    seal(&mut rest[..HEADER], b"cxsparse", 36);
    let footer = footer.to_vec();
    bytes.extend(footer);
    read(&bytes);
});

/// Sets the magic number and the checksum.
fn seal(bytes: &mut [u8], magic: &[u8; 8], field: usize) {
    bytes[..8].copy_from_slice(magic);
    bytes[field..field + 4].fill(0);
    let sum = bytes
        .iter()
        .fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// Reads the first and the last sector, and some in between.
fn read(bytes: &[u8]) {
    let path = Path::new("/dev/shm").join(format!("rblk-fuzz-vhd-{}", std::process::id()));
    File::create(&path).unwrap().write_all(bytes).unwrap();
    let chain = VhdChain::open(&path);
    std::fs::remove_file(&path).unwrap();
    let Ok(chain) = chain else {
        return;
    };
    let mut data = [0; 4 * SECTOR];
    for part in 0..8 {
        let offset = chain.size() / 8 * part / SECTOR as u64 * SECTOR as u64;
        // The file may be shorter than it says.
        let _ = chain.read_at(offset, &mut data);
    }
    assert!(chain.read_at(chain.size(), &mut data).is_err());
}
