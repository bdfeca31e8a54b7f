// SPDX-License-Identifier: GPL-2.0-only

//! Virtual device numbers: from the number to the name and the minors of the disk.
//!
//! The toolstack writes the number of a disk into the node `virtual-device`. It has several forms,
//! of which only those of major 202 are in use today; the others are from the time when a PV disk
//! could replace an emulated one (`xen-vbd-interface(7)`):
//!
//! | form | number | disk |
//! |---|---|---|
//! | xvd | `202 << 8 \| disk << 4 \| partition` | up to 16 disks of 16 minors |
//! | extended | `1 << 28 \| disk << 8 \| partition` | 4096 disks of 256 minors |
//! | hd | `3 << 8` or `22 << 8`, `\| disk << 6 \| partition` | two disks per major |
//! | sd | `8 << 8`, `65..=71 << 8`, `128..=135 << 8`, `\| disk << 4 \| partition` | 16 per major |
//!
//! All become disks of major 202 named `xvda`, `xvdb`, ... as `xen-blkfront` names them. A number
//! that names a partition becomes a disk of one minor with the partition in its name (`xvda1`). The
//! partition of an hd number has never had an effect.
//!
//! # Examples
//!
//! ```
//! use blkif::vdev::VirtualDevice;
//!
//! let disk = VirtualDevice::new(51728)?;
//! assert_eq!((disk.name.as_str(), disk.minor, disk.minors), ("xvdb", 16, 16));
//! let partition = VirtualDevice::new(202 << 8 | 1)?;
//! assert_eq!((partition.name.as_str(), partition.minors), ("xvda1", 1));
//! # Ok::<(), blkif::vdev::InvalidNumber>(())
//! ```

use core::{
    fmt,
    str, //
};

/// Major number of all Xen virtual disks.
pub const MAJOR: u32 = 202;

/// Minors that Linux has for one major.
const MINORS: u32 = 1 << 20;

const EXTENDED_SHIFT: u32 = 28;
const LAST_NUMBER: u32 = (2 << EXTENDED_SHIFT) - 1;
const MINORS_PER_DISK: u32 = 16;
const MINORS_PER_EXTENDED_DISK: u32 = 256;
const MINORS_PER_HD: u32 = 64;

/// At least the length of the longest name, `xvd` with three letters and three digits.
const NAME_LEN: usize = 12;

/// The form of a virtual device number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NumberForm {
    /// Major 202.
    Xvd,
    /// Extended: bit 28 is set.
    Extended,
    /// Major of an IDE controller.
    Hd,
    /// Major of SCSI disks.
    Sd,
}

/// The reason why a virtual device number is not that of a disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InvalidNumber {
    /// Bits above the extended form are set.
    Beyond(u32),
    /// The major is not one of a disk.
    Major(u32),
    /// The minor is more than Linux has for a major.
    Minor(u32),
}

impl fmt::Display for InvalidNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InvalidNumber::Beyond(number) => {
                write!(
                    f,
                    "virtual device {number:#x} is above {LAST_NUMBER:#x}, the largest number"
                )
            }
            InvalidNumber::Major(major) => {
                write!(
                    f,
                    "virtual device of major {major}, not that of a disk: use a name such as xvda"
                )
            }
            InvalidNumber::Minor(minor) => {
                write!(
                    f,
                    "virtual device with minor {minor}, at most {} are possible",
                    MINORS - 1
                )
            }
        }
    }
}

/// Name of a disk, without `/dev/`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiskName {
    text: [u8; NAME_LEN],
    len: u8,
}

impl DiskName {
    fn new(disk: u32, partition: Option<u32>) -> Self {
        let mut name = DiskName {
            text: [0; NAME_LEN],
            len: 0,
        };
        name.push_all(b"xvd");
        name.push_letters(disk);
        if let Some(partition) = partition {
            name.push_decimal(partition);
        }
        name
    }

    fn push(&mut self, byte: u8) {
        if let Some(end) = self.text.get_mut(usize::from(self.len)) {
            *end = byte;
            self.len = self.len.wrapping_add(1);
        }
    }

    fn push_all(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.push(*byte);
        }
    }

    /// Appends the letters of a disk: 0 is `a`, 25 is `z`, 26 is `aa`, at most `fan` for the last
    /// of 4096.
    fn push_letters(&mut self, disk: u32) {
        if let Some(higher) = (disk / 26).checked_sub(1) {
            self.push_letters(higher);
        }
        self.push(b'a'.wrapping_add((disk % 26) as u8));
    }

    fn push_decimal(&mut self, number: u32) {
        if number >= 10 {
            self.push_decimal(number / 10);
        }
        self.push(b'0'.wrapping_add((number % 10) as u8));
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        let text = self.text.get(..usize::from(self.len)).unwrap_or(&[]);
        str::from_utf8(text).unwrap_or("")
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The disk that a virtual device number names. The major is always [`MAJOR`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VirtualDevice {
    /// The form of the number. In an HVM guest a disk with a number of the form hd or sd may also
    /// be emulated.
    pub form: NumberForm,
    /// Number of the disk: 0 for `xvda`.
    pub disk: u32,
    /// First minor.
    pub minor: u32,
    /// Number of minors: 16 or 256 for a disk, 1 for a partition.
    pub minors: u32,
    /// Name of the block device.
    pub name: DiskName,
}

impl VirtualDevice {
    /// Returns the disk of a virtual device number.
    pub fn new(number: u32) -> Result<Self, InvalidNumber> {
        match number >> EXTENDED_SHIFT {
            0 => Self::classic(number >> 8, number & 0xff),
            1 => Self::extended(number & ((1 << EXTENDED_SHIFT) - 1)),
            _ => Err(InvalidNumber::Beyond(number)),
        }
    }

    fn classic(major: u32, minor: u32) -> Result<Self, InvalidNumber> {
        let hd = |first: u32| {
            (
                NumberForm::Hd,
                (first + minor / MINORS_PER_HD) * MINORS_PER_DISK,
            )
        };
        let sd = |group: u32| (NumberForm::Sd, group * 256 + minor);
        let (form, minor) = match major {
            MAJOR => (NumberForm::Xvd, minor),
            3 => hd(0),
            22 => hd(2),
            8 => sd(0),
            65..=71 => sd(major - 64),
            128..=135 => sd(major - 120),
            _ => return Err(InvalidNumber::Major(major)),
        };
        Ok(Self::of_minor(form, minor, MINORS_PER_DISK))
    }

    fn extended(minor: u32) -> Result<Self, InvalidNumber> {
        if minor >= MINORS {
            return Err(InvalidNumber::Minor(minor));
        }
        Ok(Self::of_minor(
            NumberForm::Extended,
            minor,
            MINORS_PER_EXTENDED_DISK,
        ))
    }

    fn of_minor(form: NumberForm, minor: u32, per_disk: u32) -> Self {
        let disk = minor / per_disk;
        let partition = minor % per_disk;
        let (minors, partition) = if partition == 0 {
            (per_disk, None)
        } else {
            (1, Some(partition))
        };
        VirtualDevice {
            form,
            disk,
            minor,
            minors,
            name: DiskName::new(disk, partition),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    fn classic(major: u32, minor: u32) -> u32 {
        major * 256 + minor
    }

    fn extended(disk: u32, partition: u32) -> u32 {
        (1 << 28) + disk * 256 + partition
    }

    fn assert_is(number: u32, form: NumberForm, disk: u32, minor: u32, minors: u32, name: &str) {
        let device = VirtualDevice::new(number).unwrap();
        assert_eq!(device.name.as_str(), name, "{number:#x}");
        assert_eq!((device.form, device.disk), (form, disk), "{number:#x}");
        assert_eq!(
            (device.minor, device.minors),
            (minor, minors),
            "{number:#x}"
        );
    }

    #[test]
    fn xvd_numbers() {
        assert_is(classic(202, 0), NumberForm::Xvd, 0, 0, 16, "xvda");
        assert_is(classic(202, 0x10), NumberForm::Xvd, 1, 16, 16, "xvdb");
        assert_is(classic(202, 0xf0), NumberForm::Xvd, 15, 240, 16, "xvdp");
    }

    #[test]
    fn partitions() {
        assert_is(classic(202, 1), NumberForm::Xvd, 0, 1, 1, "xvda1");
        assert_is(classic(202, 0xff), NumberForm::Xvd, 15, 255, 1, "xvdp15");
        assert_is(
            extended(26, 255),
            NumberForm::Extended,
            26,
            26 * 256 + 255,
            1,
            "xvdaa255",
        );
    }

    #[test]
    fn extended_numbers() {
        assert_is(extended(0, 0), NumberForm::Extended, 0, 0, 256, "xvda");
        assert_is(extended(16, 0), NumberForm::Extended, 16, 4096, 256, "xvdq");
        assert_is(extended(25, 0), NumberForm::Extended, 25, 6400, 256, "xvdz");
        assert_is(
            extended(26, 0),
            NumberForm::Extended,
            26,
            6656,
            256,
            "xvdaa",
        );
        assert_is(
            extended(701, 0),
            NumberForm::Extended,
            701,
            179_456,
            256,
            "xvdzz",
        );
        assert_is(
            extended(702, 0),
            NumberForm::Extended,
            702,
            179_712,
            256,
            "xvdaaa",
        );
        assert_is(
            extended(4095, 0),
            NumberForm::Extended,
            4095,
            1_048_320,
            256,
            "xvdfan",
        );
        assert_is(
            (1 << 28) + (1 << 20) - 1,
            NumberForm::Extended,
            4095,
            1_048_575,
            1,
            "xvdfan255",
        );
    }

    #[test]
    fn hd_and_its_partitions() {
        assert_is(classic(3, 0), NumberForm::Hd, 0, 0, 16, "xvda");
        assert_is(classic(3, 1), NumberForm::Hd, 0, 0, 16, "xvda");
        assert_is(classic(3, 64), NumberForm::Hd, 1, 16, 16, "xvdb");
        assert_is(classic(22, 0), NumberForm::Hd, 2, 32, 16, "xvdc");
        assert_is(classic(22, 65), NumberForm::Hd, 3, 48, 16, "xvdd");
    }

    #[test]
    fn sd_numbers() {
        assert_is(classic(8, 0), NumberForm::Sd, 0, 0, 16, "xvda");
        assert_is(classic(8, 0x12), NumberForm::Sd, 1, 18, 1, "xvdb2");
        assert_is(classic(65, 0), NumberForm::Sd, 16, 256, 16, "xvdq");
        assert_is(classic(71, 0xf0), NumberForm::Sd, 127, 2032, 16, "xvddx");
        assert_is(classic(128, 0), NumberForm::Sd, 128, 2048, 16, "xvddy");
        assert_is(classic(135, 0xf0), NumberForm::Sd, 255, 4080, 16, "xvdiv");
    }

    #[test]
    fn numbers_of_no_disk() {
        for major in [0, 2, 4, 7, 9, 21, 23, 64, 72, 127, 136, 201, 203, 1 << 19] {
            let bad = VirtualDevice::new(major << 8);
            assert_eq!(bad, Err(InvalidNumber::Major(major)));
        }
        assert_eq!(
            VirtualDevice::new(extended(4096, 0)),
            Err(InvalidNumber::Minor(1 << 20))
        );
        assert_eq!(
            VirtualDevice::new(2 << 28),
            Err(InvalidNumber::Beyond(2 << 28))
        );
        assert_eq!(
            VirtualDevice::new(u32::MAX),
            Err(InvalidNumber::Beyond(u32::MAX))
        );
    }

    #[test]
    fn messages() {
        assert_eq!(
            InvalidNumber::Beyond(2 << 28).to_string(),
            "virtual device 0x20000000 is above 0x1fffffff, the largest number"
        );
        assert_eq!(
            InvalidNumber::Major(9).to_string(),
            "virtual device of major 9, not that of a disk: use a name such as xvda"
        );
        assert_eq!(
            InvalidNumber::Minor(1 << 20).to_string(),
            "virtual device with minor 1048576, at most 1048575 are possible"
        );
        assert_eq!(
            VirtualDevice::new(202 << 8).unwrap().name.to_string(),
            "xvda"
        );
    }

    #[test]
    fn every_classic_number_has_a_name_of_its_own_or_none() {
        let mut seen = std::collections::BTreeMap::new();
        for number in (0..1u32 << 16).filter(|number| number >> 8 != 3 && number >> 8 != 22) {
            let Ok(device) = VirtualDevice::new(number) else {
                continue;
            };
            if device.form == NumberForm::Xvd {
                continue;
            }
            let other = seen.insert(device.name.to_string(), number);
            assert_eq!(other, None, "{number:#x}");
        }
        assert_eq!(seen.len(), 16 * 256);
    }
}
