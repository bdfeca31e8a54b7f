// SPDX-License-Identifier: GPL-2.0

//! Text of xenstore nodes to numbers.
//!
//! What stands in a node was written by the other side or by a tool, so it is read strictly: a
//! number is digits and nothing else. What is wrong is a [`BadNode`], which knows the node, the text
//! and the reason, so that a message can name all three.

use core::fmt;
use core::str;

/// Bytes of a node's text that a [`BadNode`] keeps.
const KEPT: usize = 32;

/// What is wrong with a node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wrong {
    /// A required node is not there.
    Missing,
    /// The text is not a number of the form expected.
    NotANumber,
    /// The number is larger than can be.
    TooLarge {
        /// The largest number that can be.
        limit: u64,
    },
    /// The number must be a power of two between these two.
    NotABlockSize {
        /// The smallest.
        min: u32,
        /// The largest.
        max: u32,
    },
    /// The number must not be zero.
    Zero,
    /// The text is none of those that are known.
    Unknown,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wrong::Missing => f.write_str("missing"),
            Wrong::NotANumber => f.write_str("not a number of the form expected"),
            Wrong::TooLarge { limit } => write!(f, "larger than {limit}"),
            Wrong::NotABlockSize { min, max } => {
                write!(f, "not a power of two from {min} to {max}")
            }
            Wrong::Zero => f.write_str("zero"),
            Wrong::Unknown => f.write_str("not known"),
        }
    }
}

/// A node that cannot be used: its name, its text and what is wrong with it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BadNode {
    node: &'static str,
    text: [u8; KEPT],
    len: u8,
    cut: bool,
    wrong: Wrong,
}

impl BadNode {
    /// A complaint about `node`. Of `text` the first 32 bytes are kept, without those that are not
    /// printable ASCII.
    pub fn new(node: &'static str, text: &[u8], wrong: Wrong) -> Self {
        let mut kept = [0; KEPT];
        for (to, from) in kept.iter_mut().zip(text) {
            *to = if from.is_ascii_graphic() || *from == b' ' {
                *from
            } else {
                b'?'
            };
        }
        let len = text.len().min(KEPT) as u8;
        BadNode {
            node,
            text: kept,
            len,
            cut: text.len() > KEPT,
            wrong,
        }
    }

    /// A complaint about a required node that is not there.
    pub fn missing(node: &'static str) -> Self {
        Self::new(node, &[], Wrong::Missing)
    }

    /// Name of the node, without the directory.
    pub fn node(&self) -> &'static str {
        self.node
    }

    /// What is wrong.
    pub fn wrong(&self) -> Wrong {
        self.wrong
    }

    /// The text, as far as it was kept.
    pub fn text(&self) -> &str {
        let text = self.text.get(..usize::from(self.len)).unwrap_or(&[]);
        str::from_utf8(text).unwrap_or("")
    }
}

impl fmt::Display for BadNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.wrong == Wrong::Missing {
            return write!(f, "{}: missing", self.node);
        }
        let more = if self.cut { "..." } else { "" };
        write!(
            f,
            "{} = \"{}{}\": {}",
            self.node,
            self.text(),
            more,
            self.wrong
        )
    }
}

/// Reads a number in decimal: one or more digits, nothing else, at most `limit`.
pub fn decimal(node: &'static str, text: &[u8], limit: u64) -> Result<u64, BadNode> {
    digits(text, 10, limit).map_err(|wrong| BadNode::new(node, text, wrong))
}

/// Reads a `u32` in decimal: a grant reference, an event channel, a count.
pub fn decimal_u32(node: &'static str, text: &[u8]) -> Result<u32, BadNode> {
    decimal(node, text, u64::from(u32::MAX)).map(|number| number as u32)
}

/// Reads a switch: 0 is off, every other number is on.
pub fn switch(node: &'static str, text: &[u8]) -> Result<bool, BadNode> {
    decimal_u32(node, text).map(|number| number != 0)
}

/// Reads a virtual device number: decimal, or hexadecimal after `0x`.
pub fn device_number(node: &'static str, text: &[u8]) -> Result<u32, BadNode> {
    let limit = u64::from(u32::MAX);
    let number = match text.strip_prefix(b"0x") {
        Some(hex) => digits(hex, 16, limit),
        None => digits(text, 10, limit),
    };
    number
        .map(|number| number as u32)
        .map_err(|wrong| BadNode::new(node, text, wrong))
}

/// Reads a physical device as a hotplug script writes it: major and minor in hexadecimal with a
/// colon between.
pub fn physical_device(node: &'static str, text: &[u8]) -> Result<(u32, u32), BadNode> {
    major_minor(text).map_err(|wrong| BadNode::new(node, text, wrong))
}

/// Major has 12 bits and minor 20 in the kernel.
fn major_minor(text: &[u8]) -> Result<(u32, u32), Wrong> {
    let colon = text
        .iter()
        .position(|byte| *byte == b':')
        .ok_or(Wrong::NotANumber)?;
    let (major, rest) = text.split_at_checked(colon).ok_or(Wrong::NotANumber)?;
    let minor = rest.strip_prefix(b":").ok_or(Wrong::NotANumber)?;
    Ok((
        digits(major, 16, 0xfff)? as u32,
        digits(minor, 16, 0xf_ffff)? as u32,
    ))
}

/// Reads digits to a base of at most 16.
fn digits(text: &[u8], base: u32, limit: u64) -> Result<u64, Wrong> {
    if text.is_empty() {
        return Err(Wrong::NotANumber);
    }
    let mut number = Some(0u64);
    for byte in text {
        let digit = char::from(*byte).to_digit(base).ok_or(Wrong::NotANumber)?;
        number = number
            .and_then(|number| number.checked_mul(u64::from(base)))
            .and_then(|number| number.checked_add(u64::from(digit)));
    }
    number
        .filter(|number| *number <= limit)
        .ok_or(Wrong::TooLarge { limit })
}
