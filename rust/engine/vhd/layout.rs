// SPDX-License-Identifier: GPL-2.0-only

//! The structures of a VHD.

/// The unit of a disk in bytes.
pub(super) const SECTOR: u64 = 512;

pub(super) const FOOTER_LEN: usize = 512;
pub(super) const HEADER_LEN: usize = 1024;

/// The greatest block size in bytes.
const MAX_BLOCK: u32 = 256 << 20;

/// The greatest number of blocks: 2 TiB in blocks of 512 KiB.
const MAX_ENTRIES: u32 = 1 << 22;

/// The platforms of a locator whose names are known: UTF-16 relative and absolute Windows paths,
/// and URLs in UTF-8.
const PLATFORM_W2RU: u32 = u32::from_be_bytes(*b"W2ru");
const PLATFORM_W2KU: u32 = u32::from_be_bytes(*b"W2ku");
const PLATFORM_MACX: u32 = u32::from_be_bytes(*b"MacX");

/// The type of a VHD.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Kind {
    /// As it is.
    #[default]
    Fixed,
    /// In blocks, where missing ones are zero.
    Dynamic,
    /// In blocks, where missing sectors are those of the parent.
    Differencing,
}

/// The footer of a VHD.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Footer {
    pub(super) kind: Kind,
    /// The size of the disk in bytes.
    pub(super) size: u64,
    /// The offset of the dynamic header in the file.
    pub(super) data_offset: u64,
    /// The identity of the VHD.
    pub(super) id: [u8; 16],
}

impl Footer {
    /// Returns [`None`] if the footer is invalid.
    pub(super) fn parse(bytes: &[u8; FOOTER_LEN]) -> Option<Self> {
        if bytes.get(..8)? != b"conectix" || checksum(bytes, 64) != number(bytes, 64)? {
            return None;
        }
        let kind = match number(bytes, 60)? {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            _ => return None,
        };
        let size = long_number(bytes, 48)?;
        (size % SECTOR == 0).then_some(Self {
            kind,
            size,
            data_offset: long_number(bytes, 16)?,
            id: array(bytes, 68)?,
        })
    }
}

/// The header of a dynamic or differencing VHD.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct DynamicHeader {
    /// The offset of the block allocation table in the file.
    pub(super) table_offset: u64,
    /// The number of entries of the table.
    pub(super) entries: u32,
    /// The size of a block in bytes.
    pub(super) block_size: u32,
    /// The identity of the parent.
    pub(super) parent_id: [u8; 16],
    /// The name of the parent.
    pub(super) parent_name: String,
    /// The places of further names of the parent.
    pub(super) locators: Vec<Locator>,
}

impl DynamicHeader {
    /// Returns [`None`] if the header is invalid.
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Option<Self> {
        if bytes.get(..8)? != b"cxsparse" || checksum(bytes, 36) != number(bytes, 36)? {
            return None;
        }
        let block_size = number(bytes, 32)?;
        let entries = number(bytes, 28)?;
        let is_valid = block_size.is_power_of_two()
            && (SECTOR as u32..=MAX_BLOCK).contains(&block_size)
            && entries <= MAX_ENTRIES;
        if !is_valid {
            return None;
        }
        let name = bytes.get(64..576)?;
        let locators = bytes.get(576..768)?.chunks(24);
        Some(Self {
            table_offset: long_number(bytes, 16)?,
            entries,
            block_size,
            parent_id: array(bytes, 40)?,
            parent_name: utf16(name, u16::from_be_bytes),
            locators: locators.map(Locator::parse).collect::<Option<_>>()?,
        })
    }
}

/// The place of a name of the parent in the file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Locator {
    platform: u32,
    pub(super) length: u32,
    pub(super) offset: u64,
}

impl Locator {
    fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            platform: number(bytes, 0)?,
            length: number(bytes, 8)?,
            offset: long_number(bytes, 16)?,
        })
    }

    /// Returns the function that decodes the name, if the platform is known.
    pub(super) fn decoder(&self) -> Option<fn(&[u8]) -> String> {
        match self.platform {
            PLATFORM_W2RU | PLATFORM_W2KU => Some(|name| utf16(name, u16::from_le_bytes)),
            PLATFORM_MACX => Some(|name| String::from_utf8_lossy(name).into_owned()),
            _ => None,
        }
    }
}

/// Returns the length of a block's bitmap in bytes: one bit for each sector, in whole sectors.
pub(super) fn bitmap_size(block_size: u32) -> u64 {
    (u64::from(block_size) / SECTOR)
        .div_ceil(8)
        .next_multiple_of(SECTOR)
}

/// Returns the complement of the sum of all bytes but the four at `field`.
fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = bytes
        .iter()
        .enumerate()
        .filter(|(index, _)| !(field..field.saturating_add(4)).contains(index))
        .fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)));
    !sum
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk::<N>().copied()
}

fn number(bytes: &[u8], offset: usize) -> Option<u32> {
    array(bytes, offset).map(u32::from_be_bytes)
}

fn long_number(bytes: &[u8], offset: usize) -> Option<u64> {
    array(bytes, offset).map(u64::from_be_bytes)
}

/// Returns text in UTF-16, up to the first NUL.
fn utf16(bytes: &[u8], decode: fn([u8; 2]) -> u16) -> String {
    let units = bytes
        .chunks_exact(2)
        .filter_map(|unit| unit.first_chunk::<2>())
        .map(|unit| decode(*unit))
        .take_while(|unit| *unit != 0);
    char::decode_utf16(units)
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bitmaps_are_whole_sectors() {
        assert_eq!(bitmap_size(2 << 20), 512);
        assert_eq!(bitmap_size(512), 512);
        assert_eq!(bitmap_size(256 << 20), 64 << 10);
    }

    #[test]
    fn names_end_at_a_nul() {
        assert_eq!(
            utf16(&[0, b'a', 0, b'b', 0, 0, 0, b'c'], u16::from_be_bytes),
            "ab"
        );
        assert_eq!(
            utf16(&[b'a', 0, 0x3d, 0xd8, 1], u16::from_le_bytes),
            "a\u{fffd}"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(
            mut bytes in proptest::collection::vec(any::<u8>(), HEADER_LEN),
            dynamic in any::<bool>(),
        ) {
            let (magic, field): (&[u8], _) = if dynamic { (b"cxsparse", 36) } else { (b"conectix", 64) };
            bytes[..8].copy_from_slice(magic);
            bytes[60..64].copy_from_slice(&[0, 0, 0, 3]);
            let end = if dynamic { HEADER_LEN } else { FOOTER_LEN };
            let sum = checksum(&bytes[..end], field).to_be_bytes();
            bytes[field..field + 4].copy_from_slice(&sum);
            let footer = Footer::parse(bytes.first_chunk().unwrap());
            let header = DynamicHeader::parse(bytes.first_chunk().unwrap());
            prop_assert!(footer.is_none() || header.is_none());
        }
    }
}
