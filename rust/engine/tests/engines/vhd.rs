// SPDX-License-Identifier: GPL-2.0-only

//! Reading of VHD chains.

use crate::disk::{pattern, Cut, Disk};
use crate::server::is_installed;
use engine::vhd::VhdChain;
use engine::{Errno, Options};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;
const BLOCK: u64 = 2 << 20;

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

/// Creates a dynamic VHD with `data` at `offset`, by QEMU.
fn create(path: &Path, offset: u64, data: &[u8]) {
    let raw = path.with_extension("raw");
    let file = File::create(&raw).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(data, offset).unwrap();
    let (raw, path) = (raw.to_str().unwrap(), path.to_str().unwrap());
    let args = [
        "convert",
        "-f",
        "raw",
        "-O",
        "vpc",
        "-o",
        "force_size=on",
        raw,
        path,
    ];
    run("qemu-img", &args);
}

fn checksum(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let sum = bytes.iter().fold(0u32, |sum, byte| sum + u32::from(*byte));
    bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// Makes a dynamic VHD the child of `parent`, with the sectors `kept` of each of its blocks.
fn make_child(path: &Path, parent: &Path, name: &str, kept: std::ops::Range<u64>) {
    let mut bytes = fs::read(path).unwrap();
    let parent = fs::read(parent).unwrap();
    let end = bytes.len() - 512;
    for footer in [0, end] {
        bytes[footer + 60..footer + 64].copy_from_slice(&4u32.to_be_bytes());
        checksum(&mut bytes[footer..footer + 512], 64);
    }
    let header = &mut bytes[512..1536];
    header[40..56].copy_from_slice(&parent[68..84]);
    for (place, unit) in header[64..576].chunks_mut(2).zip(name.encode_utf16()) {
        place.copy_from_slice(&unit.to_be_bytes());
    }
    checksum(header, 36);
    let table = u64::from_be_bytes(bytes[528..536].try_into().unwrap()) as usize;
    for index in 0..(SIZE / BLOCK) as usize {
        let entry = table + index * 4;
        let sector = u32::from_be_bytes(bytes[entry..entry + 4].try_into().unwrap());
        if sector == u32::MAX {
            continue;
        }
        for number in 0..BLOCK / 512 {
            let byte = &mut bytes[sector as usize * 512 + (number / 8) as usize];
            let bit = 0x80 >> (number % 8);
            *byte &= !bit;
            if kept.contains(&number) {
                *byte |= bit;
            }
        }
    }
    fs::write(path, bytes).unwrap();
}

fn read(chain: &VhdChain) -> Vec<u8> {
    assert_eq!(chain.size(), SIZE);
    let mut data = vec![0; SIZE as usize];
    chain.read_at(0, &mut data).unwrap();
    data
}

struct Files {
    dir: TempDir,
}

impl Files {
    fn new() -> Option<Self> {
        is_installed("qemu-img").then(|| Self {
            dir: TempDir::new().unwrap(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn single_files_are_read_as_by_qemu() {
    let Some(files) = Files::new() else {
        return;
    };
    let data = pattern(1, 3 << 20);
    create(&files.path("a.vhd"), 1 << 20, &data);
    let chain = VhdChain::open(&files.path("a.vhd")).unwrap();
    assert!(!chain.is_differencing());
    assert!(read(&chain) == fs::read(files.path("a.raw")).unwrap());
    let (from, to) = (files.path("a.vhd"), files.path("fixed.vhd"));
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let options = "force_size=on,subformat=fixed";
    run(
        "qemu-img",
        &["convert", "-f", "vpc", "-O", "vpc", "-o", options, from, to],
    );
    let chain = VhdChain::open(Path::new(to)).unwrap();
    assert!(read(&chain) == fs::read(files.path("a.raw")).unwrap());
    let mut sector = [0; 512];
    for (offset, len) in [(SIZE, 512), (100, 512), (u64::MAX - 511, 512), (0, 100)] {
        let error = chain.read_at(offset, &mut sector[..len]).unwrap_err();
        assert_eq!(error.errno(), Errno::INVAL);
    }
}

/// Creates a chain of three files, and returns what it contains.
fn create_chain(files: &Files) -> Vec<u8> {
    let (base, middle, leaf) = (
        files.path("base.vhd"),
        files.path("middle.vhd"),
        files.path("leaf.vhd"),
    );
    let parts = [
        pattern(1, 5 << 20),
        pattern(2, 1 << 20),
        pattern(3, 1 << 20),
    ];
    create(&base, 0, &parts[0]);
    create(&middle, BLOCK, &parts[1]);
    create(&leaf, BLOCK + (512 << 10), &parts[2]);
    make_child(&middle, &base, "base.vhd", 3..1000);
    make_child(&leaf, &middle, "C:\\images\\middle.vhd", 900..1201);
    let mut expected = fs::read(files.path("base.raw")).unwrap();
    for (name, kept) in [("middle.raw", 3..1000u64), ("leaf.raw", 900..1201)] {
        let layer = fs::read(files.path(name)).unwrap();
        let start = (BLOCK + kept.start * 512) as usize;
        let end = (BLOCK + kept.end * 512) as usize;
        expected[start..end].copy_from_slice(&layer[start..end]);
    }
    expected
}

#[test]
fn a_chain_is_read_sector_by_sector() {
    let Some(files) = Files::new() else {
        return;
    };
    let expected = create_chain(&files);
    let chain = VhdChain::open(&files.path("leaf.vhd")).unwrap();
    assert!(chain.is_differencing());
    assert!(read(&chain) == expected);
    let mut part = [0; 1536];
    for offset in (0..SIZE - 1536).step_by(130_560) {
        chain.read_at(offset, &mut part).unwrap();
        assert!(part == expected[offset as usize..][..1536]);
    }
}

#[test]
fn a_chain_is_copied_to_an_engine() {
    let Some(files) = Files::new() else {
        return;
    };
    let expected = create_chain(&files);
    let chain = VhdChain::open(&files.path("leaf.vhd")).unwrap();
    let open = |size: &str| {
        let uri = format!("memory:{size}").parse().unwrap();
        engine::open(&uri, &Options::default()).unwrap()
    };
    let target = open("9M");
    chain.copy_to(&*target).unwrap();
    let mut disk = Disk::new(target);
    assert!(disk.read(0, SIZE as usize, Cut::Whole) == expected);
    let error = chain.copy_to(&*open("7M")).unwrap_err();
    assert_eq!(error.errno(), Errno::NOSPC);
}

#[test]
fn parents_that_are_missing_or_wrong() {
    let Some(files) = Files::new() else {
        return;
    };
    create_chain(&files);
    let errno = || VhdChain::open(&files.path("leaf.vhd")).unwrap_err().errno();
    let base = files.path("base.vhd");
    fs::rename(&base, files.path("other.vhd")).unwrap();
    assert_eq!(errno(), Errno::NOENT);
    create(&base, 0, &pattern(1, 512));
    assert_eq!(errno(), Errno::INVAL);
    fs::copy(files.path("leaf.vhd"), files.path("middle.vhd")).unwrap();
    assert_eq!(errno(), Errno::INVAL);
}

#[test]
fn malformed_files_cause_an_error() {
    let Some(files) = Files::new() else {
        return;
    };
    create_chain(&files);
    let leaf = files.path("leaf.vhd");
    let original = fs::read(&leaf).unwrap();
    for seed in 0..64 {
        let mut bytes = original.clone();
        for place in pattern(seed, 16).chunks(4) {
            let at = usize::from(u16::from_le_bytes([place[0], place[1]])) % 2560;
            bytes[at] = place[2];
        }
        // With valid checksums.
        let end = bytes.len() - 512;
        checksum(&mut bytes[..512], 64);
        checksum(&mut bytes[512..1536], 36);
        checksum(&mut bytes[end..], 64);
        if seed % 2 == 0 {
            bytes.truncate(end);
        }
        fs::write(&leaf, &bytes).unwrap();
        if let Ok(chain) = VhdChain::open(&leaf) {
            let size = chain.size().min(SIZE);
            let _ = chain.read_at(0, &mut vec![0; size as usize]);
        }
    }
    fs::write(&leaf, [0; 100]).unwrap();
    assert!(VhdChain::open(&leaf).is_err());
}
