// SPDX-License-Identifier: GPL-2.0-only

//! Parsers of the values of xenstore nodes.
//!
//! The peer or a tool writes the nodes, so parsing is strict: a number consists only of digits. The
//! error is an [`InvalidNode`], with the name of the node, its text and the reason, for the
//! message.

use core::{
    fmt,
    str, //
};

/// Number of bytes of a node's text that an [`InvalidNode`] stores.
const TEXT_LEN: usize = 32;

/// The reason why a node is invalid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// A required node is missing.
    Missing,
    /// The text is not a number of the expected form.
    NotANumber,
    /// The number is too large.
    TooLarge {
        /// The largest valid number.
        limit: u64,
    },
    /// The number is not a power of two from `min` to `max`.
    NotPowerOfTwo {
        /// The smallest valid number.
        min: u32,
        /// The largest valid number.
        max: u32,
    },
    /// The text is not one of the known values.
    Unknown,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Missing => f.write_str("missing"),
            Reason::NotANumber => f.write_str("not a number of the form expected"),
            Reason::TooLarge { limit } => write!(f, "larger than {limit}"),
            Reason::NotPowerOfTwo { min, max } => {
                write!(f, "not a power of two from {min} to {max}")
            }
            Reason::Unknown => f.write_str("not known"),
        }
    }
}

/// An invalid node: its name, its text and the reason.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InvalidNode {
    node: &'static str,
    text: [u8; TEXT_LEN],
    len: u8,
    cut: bool,
    reason: Reason,
}

impl InvalidNode {
    /// Creates an error about `node`.
    ///
    /// It stores the first 32 bytes of `text`, with `?` for those that are not printable ASCII.
    pub fn new(node: &'static str, text: &[u8], reason: Reason) -> Self {
        let mut kept = [0; TEXT_LEN];
        for (to, from) in kept.iter_mut().zip(text) {
            *to = if from.is_ascii_graphic() || *from == b' ' {
                *from
            } else {
                b'?'
            };
        }
        let len = text.len().min(TEXT_LEN) as u8;
        InvalidNode {
            node,
            text: kept,
            len,
            cut: text.len() > TEXT_LEN,
            reason,
        }
    }

    /// Creates an error about a required node that does not exist.
    pub fn missing(node: &'static str) -> Self {
        Self::new(node, &[], Reason::Missing)
    }

    /// Returns the name of the node, without the directory.
    pub fn node(&self) -> &'static str {
        self.node
    }

    /// Returns the reason.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Returns the stored part of the text.
    pub fn text(&self) -> &str {
        let text = self.text.get(..usize::from(self.len)).unwrap_or(&[]);
        str::from_utf8(text).unwrap_or("")
    }
}

impl fmt::Display for InvalidNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.reason == Reason::Missing {
            return write!(f, "{}: missing", self.node);
        }
        let more = if self.cut { "..." } else { "" };
        write!(
            f,
            "{} = \"{}{}\": {}",
            self.node,
            self.text(),
            more,
            self.reason
        )
    }
}

/// Parses a number in decimal: only digits, at least one, at most `limit`.
pub fn decimal(node: &'static str, text: &[u8], limit: u64) -> Result<u64, InvalidNode> {
    parse_number(text, 10, limit).map_err(|wrong| InvalidNode::new(node, text, wrong))
}

/// Parses a `u32` in decimal: a grant reference, an event channel, a count.
pub fn decimal_u32(node: &'static str, text: &[u8]) -> Result<u32, InvalidNode> {
    decimal(node, text, u64::from(u32::MAX)).map(|number| number as u32)
}

/// Parses a truth value: 0 is `false`, every other number is `true`.
pub fn boolean(node: &'static str, text: &[u8]) -> Result<bool, InvalidNode> {
    decimal_u32(node, text).map(|number| number != 0)
}

/// Parses digits to `base`, which is from 2 to 16.
///
/// The result is at most `limit`.
pub fn parse_number(text: &[u8], base: u32, limit: u64) -> Result<u64, Reason> {
    // This shows the compiler that `to_digit` does not panic.
    let base = base.clamp(2, 16);
    if text.is_empty() {
        return Err(Reason::NotANumber);
    }
    let mut number = Some(0u64);
    for byte in text {
        let digit = char::from(*byte).to_digit(base).ok_or(Reason::NotANumber)?;
        number = number
            .and_then(|number| number.checked_mul(u64::from(base)))
            .and_then(|number| number.checked_add(u64::from(digit)));
    }
    number
        .filter(|number| *number <= limit)
        .ok_or(Reason::TooLarge { limit })
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn decimal_numbers() {
        assert_eq!(decimal("n", b"0", 9), Ok(0));
        assert_eq!(decimal("n", b"0042", 42), Ok(42));
        assert_eq!(
            decimal("n", b"18446744073709551615", u64::MAX),
            Ok(u64::MAX)
        );
        assert_eq!(decimal_u32("n", b"4294967295"), Ok(u32::MAX));
    }

    #[test]
    fn nothing_but_digits() {
        for text in [
            &b""[..],
            b" 1",
            b"1 ",
            b"1\n",
            b"+1",
            b"-1",
            b"0x1",
            b"1a",
            b"\xff",
            b"1\0",
        ] {
            assert_eq!(
                decimal("n", text, 9).unwrap_err().reason(),
                Reason::NotANumber
            );
        }
        // Also when the number is too large before the text ends.
        assert_eq!(
            decimal("n", b"999x", 9).unwrap_err().reason(),
            Reason::NotANumber
        );
        let text = b"99999999999999999999999x";
        assert_eq!(
            decimal("n", text, 9).unwrap_err().reason(),
            Reason::NotANumber
        );
    }

    #[test]
    fn numbers_that_are_too_large() {
        for text in [
            &b"10"[..],
            b"18446744073709551616",
            b"99999999999999999999999999",
        ] {
            let wrong = Reason::TooLarge { limit: 9 };
            assert_eq!(
                decimal("n", text, 9),
                Err(InvalidNode::new("n", text, wrong))
            );
        }
        let wrong = Reason::TooLarge { limit: 0xffff_ffff };
        assert_eq!(decimal_u32("n", b"4294967296").unwrap_err().reason(), wrong);
    }

    #[test]
    fn switches() {
        assert_eq!(boolean("n", b"0"), Ok(false));
        assert_eq!(boolean("n", b"1"), Ok(true));
        assert_eq!(boolean("n", b"2"), Ok(true));
        assert!(boolean("n", b"y").is_err());
    }

    #[test]
    fn messages_name_node_text_and_reason() {
        let bad = decimal("sectors", b"12q", 9).unwrap_err();
        assert_eq!(bad.node(), "sectors");
        assert_eq!(bad.text(), "12q");
        assert_eq!(
            bad.to_string(),
            "sectors = \"12q\": not a number of the form expected"
        );
        assert_eq!(
            InvalidNode::missing("sectors").to_string(),
            "sectors: missing"
        );
        for (wrong, reason) in [
            (Reason::Missing, "missing"),
            (Reason::TooLarge { limit: 7 }, "larger than 7"),
            (
                Reason::NotPowerOfTwo {
                    min: 512,
                    max: 4096,
                },
                "not a power of two from 512 to 4096",
            ),
            (Reason::Unknown, "not known"),
        ] {
            assert_eq!(wrong.to_string(), reason);
        }
    }

    #[test]
    fn long_and_unprintable_text_is_shortened_and_replaced() {
        let exact = InvalidNode::new("n", &[b'a'; 32], Reason::Unknown);
        assert_eq!(exact.text(), "a".repeat(32));
        assert!(!exact.to_string().contains("..."));
        let long = InvalidNode::new("n", &[b'a'; 300], Reason::Unknown);
        assert_eq!(long.text(), "a".repeat(32));
        assert!(long.to_string().contains("aaa...\""));
        let odd = InvalidNode::new("n", b"a \x1b[2J\n\xff", Reason::Unknown);
        assert_eq!(odd.text(), "a ?[2J??");
    }
}
