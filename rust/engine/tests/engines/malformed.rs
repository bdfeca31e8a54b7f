// SPDX-License-Identifier: GPL-2.0-only

//! Images that `qemu-img` has made, with a field or a part that is wrong.
//!
//! Each is refused with a message that says what is wrong, or it is opened, and requests complete,
//! with or without an error. What an image says about places, sizes and counts does no harm.

use crate::disk::{buffers, read_only, Cut, Disk};
use crate::qsd::{qemu_img, Image};
use crate::suite::Target;
use engine::{Errno, Options, Request};
use std::fs;
use std::time::Duration;

/// A place that is in no file.
const FAR: u64 = 1 << 50;

/// The largest number of 32 bits.
const MOST: u64 = u32::MAX as u64;

/// A change that makes an image malformed.
enum Damage {
    /// Bytes are missing at the end.
    Cut(usize),
    /// A number, with its place and its length in bytes, is another one; most significant byte
    /// first.
    Number(usize, usize, u64),
    /// The same, least significant byte first.
    Little(usize, usize, u64),
    /// A part is zero.
    Zero(usize, usize),
    /// A number in a VHD's footer or header, whose checksums are right.
    Sealed(usize, usize, u64),
    /// Several of them.
    All(&'static [Damage]),
    /// The first entry of the table whose place is at this offset of the image.
    Entry(usize, usize, u64),
}

use Damage::{All, Cut as CutAt, Entry, Little, Number, Sealed, Zero};

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match *self {
            CutAt(len) => bytes.truncate(len),
            Number(at, len, value) => bytes[at..at + len].copy_from_slice(&big_endian(value, len)),
            Little(at, len, value) => {
                bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            }
            Zero(at, len) => bytes[at..at + len].fill(0),
            Sealed(at, len, value) => {
                Number(at, len, value).apply(bytes);
                seal(bytes);
            }
            All(parts) => parts.iter().for_each(|part| part.apply(bytes)),
            Entry(at, len, value) => {
                let table = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
                Number(table as usize, len, value).apply(bytes);
            }
        }
    }
}

fn big_endian(value: u64, len: usize) -> Vec<u8> {
    value.to_be_bytes()[8 - len..].to_vec()
}

/// Sets the checksums of a dynamic VHD: of the footer, its copy at the end, and the header.
fn seal(bytes: &mut [u8]) {
    for (part, field) in [(0..512, 64), (512..1536, 36)] {
        let part = &mut bytes[part];
        part[field..field + 4].fill(0);
        let sum: u32 = part.iter().map(|byte| u32::from(*byte)).sum();
        part[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
    }
    let footer = bytes.len() - 512;
    bytes.copy_within(..512, footer);
}

/// The effect of an image.
enum Effect {
    /// It is not opened, and the message has this text.
    Refused(&'static str),
    /// It is opened; requests may fail.
    Served,
}

use Effect::{Refused, Served};

/// Format, name of the case, what is done, and its effect.
type Case = (&'static str, &'static str, Damage, Effect);

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("qcow2", "empty", CutAt(0), Refused("not in qcow2 format")),
    ("qcow2", "half a header", CutAt(64), Refused("header too short")),
    ("qcow2", "tables missing", CutAt(70_000), Served),
    ("qcow2", "magic number", Number(0, 4, 0), Refused("not in qcow2 format")),
    ("qcow2", "version", Number(4, 4, 99), Refused("Unsupported qcow2 version 99")),
    ("qcow2", "large clusters", Number(20, 4, 63), Refused("Unsupported cluster size")),
    ("qcow2", "small clusters", Number(20, 4, 1), Refused("Unsupported cluster size")),
    ("qcow2", "size", Number(24, 8, u64::MAX / 2), Refused("Image is too big")),
    ("qcow2", "negative size", Number(24, 8, u64::MAX), Refused("File too large")),
    ("qcow2", "L1 table outside", Number(40, 8, FAR), Served),
    ("qcow2", "L1 table at an odd place", Number(40, 8, 0x30001), Refused("L1 table offset invalid")),
    ("qcow2", "huge L1 table", Number(36, 4, MOST), Refused("L1 table too large")),
    ("qcow2", "no L1 table", Number(36, 4, 0), Refused("L1 table is too small")),
    ("qcow2", "L2 table outside", Entry(40, 8, FAR | (1 << 63)), Served),
    ("qcow2", "L2 table in the header", Entry(40, 8, 1 << 63), Served),
    ("qcow2", "reference counts outside", Number(48, 8, FAR), Served),
    ("qcow2", "huge table of reference counts", Number(56, 4, MOST), Refused("table too large")),
    ("qcow2", "no reference counts", Number(56, 4, 0), Refused("not contain a reference count table")),
    ("qcow2", "wide reference counts", Number(96, 4, 60), Refused("width too large")),
    ("qcow2", "many snapshots", Number(60, 4, MOST), Refused("Snapshot table too large")),
    ("qcow2", "snapshots outside", All(&[Number(60, 4, 3), Number(64, 8, FAR)]), Served),
    ("qcow2", "header of 4 GiB", Number(100, 4, MOST - 15), Refused("header exceeds cluster size")),
    ("qcow2", "unknown feature", Number(72, 8, 1 << 40), Refused("Unsupported qcow2 feature")),
    ("qcow2", "encryption", Number(32, 4, 77), Refused("Unsupported encryption method 77")),
    ("qcow2", "name of the backing file outside", All(&[Number(8, 8, FAR), Number(16, 4, 1000)]), Refused("Invalid backing file offset")),
    ("qcow2", "long name of the backing file", All(&[Number(8, 8, 512), Number(16, 4, 0xff_ffff)]), Refused("name too long")),
    ("qcow2", "huge extension", All(&[Number(112, 4, 0xe279_2aca), Number(116, 4, MOST - 15)]), Refused("extension too large")),
    ("vhd", "half a footer", CutAt(300), Refused("check the image")),
    ("vhd", "footer alone", CutAt(512), Refused("Invalid header magic")),
    ("vhd", "magic number", Zero(0, 8), Refused("invalid VPC image")),
    ("vhd", "magic number of the header", Sealed(512, 8, 0), Refused("Invalid header magic")),
    ("vhd", "header outside", Sealed(16, 8, FAR), Refused("Invalid header magic")),
    ("vhd", "huge table", Sealed(512 + 28, 4, MOST), Refused("Max Table Entries too large")),
    ("vhd", "no table", Sealed(512 + 28, 4, 0), Refused("Page table too small")),
    ("vhd", "table outside", Sealed(512 + 16, 8, FAR), Refused("after the end of file")),
    ("vhd", "blocks of no size", Sealed(512 + 32, 4, 0), Refused("Invalid block size 0")),
    ("vhd", "odd blocks", Sealed(512 + 32, 4, 12345), Refused("Invalid block size 12345")),
    ("vhd", "blocks of 2 GiB", Sealed(512 + 32, 4, 1 << 31), Served),
    ("vhd", "size", Sealed(48, 8, 1 << 62), Served),
    ("vhd", "type", Sealed(60, 4, 9), Served),
    ("vhd", "block outside", Entry(512 + 16, 4, MOST - 15), Refused("after the end of file")),
    ("vhdx", "no header", CutAt(1000), Refused("No valid VHDX header")),
    ("vhdx", "second region table missing", CutAt(0x40000), Refused("Invalid argument")),
    ("vhdx", "magic number", Zero(0, 8), Refused("Invalid argument")),
    ("vhdx", "both headers", Zero(0x10000, 0x20000), Refused("No valid VHDX header")),
    ("vhdx", "both region tables", Zero(0x30000, 0x20000), Refused("Invalid argument")),
    ("vhdx", "many regions", All(&[Little(0x30008, 4, MOST), Little(0x40008, 4, MOST)]), Refused("Invalid argument")),
    ("vmdk", "half a header", CutAt(300), Refused("File truncated")),
    ("vmdk", "magic number", Zero(0, 4), Refused("invalid VMDK image descriptor")),
    ("vmdk", "version", Little(4, 4, 99), Refused("Unsupported VMDK version 99")),
    ("vmdk", "size", Little(12, 8, 1 << 62), Refused("File too large")),
    ("vmdk", "grains of no size", Little(20, 8, 0), Refused("L1 entry size is invalid")),
    ("vmdk", "huge grains", Little(20, 8, 1 << 40), Refused("L1 entry size is invalid")),
    ("vmdk", "odd grains", Little(20, 8, 3), Served),
    ("vmdk", "descriptor outside", Little(28, 8, 1 << 40), Served),
    ("vmdk", "huge descriptor", Little(36, 8, 1 << 40), Served),
    ("vmdk", "huge table", Little(44, 4, MOST), Refused("L2 table size too big")),
    ("vmdk", "no table", Little(44, 4, 0), Refused("L1 entry size is invalid")),
    ("vmdk", "table outside", Little(56, 8, 1 << 40), Served),
    ("vmdk", "second table outside", Little(48, 8, 1 << 40), Served),
    ("luks", "half a header", CutAt(300), Refused("overlapping")),
    ("luks", "magic number", Zero(0, 6), Refused("not in LUKS format")),
    ("luks", "version", Number(6, 2, 9), Refused("version 9 is not supported")),
    ("luks", "cipher", Zero(8, 32), Refused("")),
    ("luks", "hash", Zero(72, 32), Refused("")),
    ("luks", "data outside", Number(104, 4, MOST - 15), Refused("")),
    ("luks", "huge key", Number(108, 4, MOST), Refused("overlapping")),
    ("luks", "no iterations", Zero(164, 4), Refused("iteration count is zero")),
    ("luks", "key slot outside", Number(208 + 40, 4, MOST - 15), Refused("")),
    ("luks", "stripes", Number(208 + 44, 4, 7), Refused("stripes 7")),
    ("luks", "no key slots", Zero(208, 8 * 48), Refused("stripes 0")),
];

/// Returns how an image of a format is made.
fn options_of(format: &str) -> &'static [&'static str] {
    match format {
        "luks" => &["-o", "key-secret=key,iter-time=10"],
        _ => &[],
    }
}

/// Opens the image, which was damaged, and uses it.
fn check(image: &Image, name: &str, effect: &Effect) {
    let options = Options {
        // A daemon that ends with an assertion is started again, and ends again.
        reconnect_timeout: Duration::from_secs(1),
        ..Options::default()
    };
    let opened = image.open(&options);
    match (opened, effect) {
        (Err(error), Refused(text)) => {
            let message = error.to_string();
            assert!(message.contains(text), "{name}: {message}");
            assert!(message.contains("image"), "{name}: {message}");
            assert_ne!(error.errno(), Errno::TIMEDOUT, "{name}: {message}");
        }
        (Ok(engine), Served) => {
            let mut disk = Disk::new(engine);
            let memory = |disk: &Disk| buffers(&*disk.engine, 65536, Cut::Whole, None);
            let requests = [
                Request::read(1, 0, memory(&disk)),
                Request::write(2, 0, memory(&disk)),
                Request::flush(3),
                Request::read(4, 65536, memory(&disk)),
            ];
            for request in requests {
                // Completes in time; the status depends on the case.
                let _ = disk.run(request).result;
            }
            drop(disk.queue);
            // The daemon may have ended, because of an assertion for instance.
            let _ = disk.engine.close();
        }
        (Err(error), Served) => panic!("{name}: refused: {error}"),
        (Ok(_), Refused(text)) => panic!("{name}: served, and not refused with: {text}"),
    }
}

fn check_format(format: &'static str) {
    let Some(image) = Image::new(format, options_of(format)) else {
        return;
    };
    let original = fs::read(image.path()).unwrap();
    let cases = CASES.iter().filter(|(of, ..)| *of == format);
    for (_, name, damage, effect) in cases {
        let mut bytes = original.clone();
        damage.apply(&mut bytes);
        fs::write(image.path(), &bytes).unwrap();
        check(&image, &format!("{format}: {name}"), effect);
    }
    // The directory has nothing that a refused image has left behind.
    fs::write(image.path(), &original).unwrap();
    image.open(&Options::default()).unwrap().close().unwrap();
}

#[test]
fn qcow2() {
    check_format("qcow2");
}

#[test]
fn vhd() {
    check_format("vhd");
}

#[test]
fn vhdx() {
    check_format("vhdx");
}

#[test]
fn vmdk() {
    check_format("vmdk");
}

#[test]
fn luks() {
    check_format("luks");
}

#[test]
fn a_chain_of_backing_files_that_is_a_loop() {
    let Some(image) = Image::with_backing_file() else {
        return;
    };
    let (top, base) = (image.path(), image.dir.path().join("base"));
    let (top, base) = (top.to_str().unwrap(), base.to_str().unwrap());
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", top, base,
    ]);
    for options in [Options::default(), read_only()] {
        let error = image.open(&options).err().unwrap();
        assert_eq!(error.errno(), Errno::LOOP);
        assert!(error.cause().contains("do not end"), "{error}");
    }
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, base,
    ]);
    let error = image.open(&Options::default()).err().unwrap();
    assert_eq!(error.errno(), Errno::LOOP);
}
