// SPDX-License-Identifier: GPL-2.0-only

//! Values of xenstore nodes that only block devices have.
//!
//! # Examples
//!
//! ```
//! use blkif::node::physical_device;
//!
//! let device = physical_device("physical-device", b"fe:3")?;
//! assert_eq!((device.major, device.minor), (254, 3));
//! # Ok::<(), blkif::node::InvalidNode>(())
//! ```

use xen_io::node::parse_number;

pub use xen_io::node::{
    boolean,
    decimal,
    decimal_u32,
    InvalidNode,
    Reason, //
};

/// Parses a virtual device number: decimal, or hexadecimal after `0x`.
pub fn device_number(node: &'static str, text: &[u8]) -> Result<u32, InvalidNode> {
    let limit = u64::from(u32::MAX);
    let number = match text.strip_prefix(b"0x") {
        Some(hex) => parse_number(hex, 16, limit),
        None => parse_number(text, 10, limit),
    };
    number
        .map(|number| number as u32)
        .map_err(|wrong| InvalidNode::new(node, text, wrong))
}

/// A block device as a hotplug script names it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PhysicalDevice {
    /// Major number, 12 bits.
    pub major: u32,
    /// Minor number, 20 bits.
    pub minor: u32,
    /// Sequence number of the disk in the kernel. A later disk with the same device number has
    /// another one.
    pub sequence: Option<u64>,
}

/// Parses a physical device: major and minor in hexadecimal with a colon between.
///
/// Before them there may be the disk's sequence number in hexadecimal and an `@`.
pub fn physical_device(node: &'static str, text: &[u8]) -> Result<PhysicalDevice, InvalidNode> {
    sequence_and_numbers(text).map_err(|wrong| InvalidNode::new(node, text, wrong))
}

/// The priority of the I/O of a disk: a class, and for two of them a level from 0, the most urgent
/// one, to 7.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IoPriority {
    /// `realtime/N`.
    RealTime(u8),
    /// `best-effort/N`.
    BestEffort(u8),
    /// `idle`.
    Idle,
}

/// Parses a priority of I/O.
pub fn io_priority(node: &'static str, text: &[u8]) -> Result<IoPriority, InvalidNode> {
    let level = |digits: &[u8]| decimal(node, digits, 7).map(|level| level as u8);
    let priority = if text == b"idle" {
        Ok(IoPriority::Idle)
    } else if let Some(digits) = text.strip_prefix(b"realtime/") {
        level(digits).map(IoPriority::RealTime)
    } else if let Some(digits) = text.strip_prefix(b"best-effort/") {
        level(digits).map(IoPriority::BestEffort)
    } else {
        return Err(InvalidNode::new(node, text, Reason::Unknown));
    };
    priority.map_err(|bad| InvalidNode::new(node, text, bad.reason()))
}

fn sequence_and_numbers(text: &[u8]) -> Result<PhysicalDevice, Reason> {
    let mut parts = text.splitn(2, |byte| *byte == b'@');
    let (first, second) = (parts.next().unwrap_or_default(), parts.next());
    let sequence = match second {
        Some(_) => Some(parse_number(first, 16, u64::MAX)?),
        None => None,
    };
    let (major, minor) = major_minor(second.unwrap_or(first))?;
    Ok(PhysicalDevice {
        major,
        minor,
        sequence,
    })
}

/// Parses major and minor, which have 12 and 20 bits in the kernel.
fn major_minor(text: &[u8]) -> Result<(u32, u32), Reason> {
    let colon = text
        .iter()
        .position(|byte| *byte == b':')
        .ok_or(Reason::NotANumber)?;
    let (major, rest) = text.split_at_checked(colon).ok_or(Reason::NotANumber)?;
    let minor = rest.strip_prefix(b":").ok_or(Reason::NotANumber)?;
    Ok((
        parse_number(major, 16, 0xfff)? as u32,
        parse_number(minor, 16, 0xf_ffff)? as u32,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers() {
        assert_eq!(device_number("n", b"51712"), Ok(51712));
        assert_eq!(device_number("n", b"0xca00"), Ok(51712));
        assert_eq!(
            device_number("n", b"0XCA00").unwrap_err().reason(),
            Reason::NotANumber
        );
        assert_eq!(
            device_number("n", b"0x").unwrap_err().reason(),
            Reason::NotANumber
        );
        let wrong = Reason::TooLarge { limit: 0xffff_ffff };
        assert_eq!(
            device_number("n", b"0x100000000").unwrap_err().reason(),
            wrong
        );
    }

    #[test]
    fn physical_devices() {
        let device = |major, minor, sequence| {
            Ok(PhysicalDevice {
                major,
                minor,
                sequence,
            })
        };
        assert_eq!(physical_device("n", b"7:0"), device(7, 0, None));
        assert_eq!(physical_device("n", b"fd:1A"), device(0xfd, 0x1a, None));
        let largest = device(0xfff, 0xf_ffff, Some(u64::MAX));
        let text = b"ffffffffffffffff@fff:fffff";
        assert_eq!(physical_device("n", text), largest);
        for text in [
            &b""[..],
            b":",
            b"7",
            b"7:",
            b":0",
            b"7:0:0",
            b"7 :0",
            b"7:0\n",
            b"g:0",
            b"@7:0",
            b"1@@7:0",
            b"1@7",
            b"7:0@1",
        ] {
            assert_eq!(
                physical_device("n", text).unwrap_err().reason(),
                Reason::NotANumber
            );
        }
        for text in [&b"1000:0"[..], b"0:100000", b"10000000000000000@7:0"] {
            let wrong = physical_device("n", text).unwrap_err().reason();
            assert!(matches!(wrong, Reason::TooLarge { .. }));
        }
    }

    #[test]
    fn io_priorities() {
        let good = [
            (&b"idle"[..], IoPriority::Idle),
            (b"realtime/0", IoPriority::RealTime(0)),
            (b"best-effort/7", IoPriority::BestEffort(7)),
        ];
        for (text, priority) in good {
            assert_eq!(io_priority("n", text), Ok(priority));
        }
        let too_large = Reason::TooLarge { limit: 7 };
        let bad = [
            (&b""[..], Reason::Unknown),
            (b"idle/1", Reason::Unknown),
            (b"Idle", Reason::Unknown),
            (b"realtime", Reason::Unknown),
            (b"realtime/", Reason::NotANumber),
            (b"best-effort/-1", Reason::NotANumber),
            (b"best-effort/8", too_large),
        ];
        for (text, wrong) in bad {
            assert_eq!(
                io_priority("n", text),
                Err(InvalidNode::new("n", text, wrong))
            );
        }
    }
}
