// SPDX-License-Identifier: GPL-2.0

//! From a virtual device number to name and minors.
//!
//! The toolstack writes the number of a disk into the node `virtual-device`. It has several forms,
//! of which only those of major 202 are in use today; the others stem from times when a PV disk
//! could take the place of an emulated one (`xen-vbd-interface(7)`):
//!
//! | form | number | disk |
//! |---|---|---|
//! | xvd | `202 << 8 \| disk << 4 \| partition` | up to 16 disks of 16 minors |
//! | extended | `1 << 28 \| disk << 8 \| partition` | 4096 disks of 256 minors |
//! | hd | `3 << 8` or `22 << 8`, `\| disk << 6 \| partition` | two disks for each major |
//! | sd | `8 << 8`, `65..=71 << 8`, `128..=135 << 8`, `\| disk << 4 \| partition` | 16 for each major |
//!
//! All become disks of major 202 named `xvda`, `xvdb`, ... as `xen-blkfront` names them. A number
//! that names a partition becomes a disk of one minor with the partition in its name (`xvda1`). Of
//! an hd number the partition has never had an effect.

use core::fmt;
use core::str;

/// Major number of all Xen virtual disks.
pub const MAJOR: u32 = 202;

/// Minors that Linux has for one major.
const MINORS: u32 = 1 << 20;

const EXTENDED_SHIFT: u32 = 28;
const MINORS_PER_DISK: u32 = 16;
const MINORS_PER_EXTENDED_DISK: u32 = 256;
const MINORS_PER_HD: u32 = 64;

/// Longest name: `xvd`, three letters, three digits.
const NAME_LEN: usize = 12;

/// The form of a virtual device number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// Major 202.
    Xvd,
    /// Extended: bit 28 is set.
    Extended,
    /// Major of an IDE controller.
    Hd,
    /// Major of SCSI disks.
    Sd,
}

/// Why a virtual device number names no disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BadNumber {
    /// Bits above the extended form are set.
    Beyond(u32),
    /// The major is not one of a disk.
    Major(u32),
    /// The minor is more than Linux has for a major.
    Minor(u32),
}

impl fmt::Display for BadNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadNumber::Beyond(number) => {
                write!(f, "virtual device {number:#x} is above the extended range")
            }
            BadNumber::Major(major) => {
                write!(
                    f,
                    "virtual device of major {major}, please use an xvd device instead"
                )
            }
            BadNumber::Minor(minor) => {
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
pub struct Name {
    text: [u8; NAME_LEN],
    len: u8,
}

impl Name {
    fn new(disk: u32, partition: Option<u32>) -> Self {
        let mut name = Name {
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

    /// 0 is `a`, 25 is `z`, 26 is `aa`: at most `fbn` for the last of 4096 disks.
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

    /// The name.
    pub fn as_str(&self) -> &str {
        let text = self.text.get(..usize::from(self.len)).unwrap_or(&[]);
        str::from_utf8(text).unwrap_or("")
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a virtual device number stands for. The major is always [`MAJOR`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VirtualDevice {
    /// The form of the number. In a guest that may also see emulated disks, only some forms are
    /// safe to use.
    pub form: Form,
    /// Number of the disk: 0 for `xvda`.
    pub disk: u32,
    /// First minor.
    pub minor: u32,
    /// Number of minors: 16 or 256 for a disk, 1 for a partition.
    pub minors: u32,
    /// Name of the block device.
    pub name: Name,
}

impl VirtualDevice {
    /// The meaning of a virtual device number.
    pub fn new(number: u32) -> Result<Self, BadNumber> {
        match number >> EXTENDED_SHIFT {
            0 => Self::classic(number >> 8, number & 0xff),
            1 => Self::extended(number & ((1 << EXTENDED_SHIFT) - 1)),
            _ => Err(BadNumber::Beyond(number)),
        }
    }

    fn classic(major: u32, minor: u32) -> Result<Self, BadNumber> {
        let hd = |first: u32| (Form::Hd, (first + minor / MINORS_PER_HD) * MINORS_PER_DISK);
        let sd = |group: u32| (Form::Sd, group * 256 + minor);
        let (form, minor) = match major {
            MAJOR => (Form::Xvd, minor),
            3 => hd(0),
            22 => hd(2),
            8 => sd(0),
            65..=71 => sd(major - 64),
            128..=135 => sd(major - 120),
            _ => return Err(BadNumber::Major(major)),
        };
        Ok(Self::of_minor(form, minor, MINORS_PER_DISK))
    }

    fn extended(minor: u32) -> Result<Self, BadNumber> {
        if minor >= MINORS {
            return Err(BadNumber::Minor(minor));
        }
        Ok(Self::of_minor(
            Form::Extended,
            minor,
            MINORS_PER_EXTENDED_DISK,
        ))
    }

    fn of_minor(form: Form, minor: u32, per_disk: u32) -> Self {
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
            name: Name::new(disk, partition),
        }
    }
}
