// SPDX-License-Identifier: GPL-2.0-only

//! The constants and messages of the NBD protocol, as in its `doc/proto.md`.

use rustix::io::Errno;

pub(super) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x3_e889_0455_65a9;

pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_FLAG_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_FLAG_ERROR | 1;
pub(super) const REP_ERR_POLICY: u32 = REP_FLAG_ERROR | 2;
pub(super) const REP_ERR_INVALID: u32 = REP_FLAG_ERROR | 3;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_FLAG_ERROR | 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_FLAG_ERROR | 6;
pub(super) const REP_ERR_SHUTDOWN: u32 = REP_FLAG_ERROR | 7;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const FLAG_HAS_FLAGS: u16 = 1 << 0;
pub(super) const FLAG_READ_ONLY: u16 = 1 << 1;
pub(super) const FLAG_SEND_FLUSH: u16 = 1 << 2;
pub(super) const FLAG_SEND_FUA: u16 = 1 << 3;
pub(super) const FLAG_SEND_TRIM: u16 = 1 << 5;
pub(super) const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;

pub(super) const CMD_FLAG_FUA: u16 = 1 << 0;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;

const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

pub(super) const REPLY_FLAG_DONE: u16 = 1 << 0;
pub(super) const REPLY_NONE: u16 = 0;
pub(super) const REPLY_OFFSET_DATA: u16 = 1;
pub(super) const REPLY_OFFSET_HOLE: u16 = 2;
pub(super) const REPLY_FLAG_ERROR: u16 = 1 << 15;
pub(super) const REPLY_ERROR_OFFSET: u16 = REPLY_FLAG_ERROR | 2;

/// A command as it is sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Command {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Command {
    /// Returns the header of the command.
    pub(super) fn encode(&self) -> [u8; 28] {
        let mut bytes = [0; 28];
        let fields: [&[u8]; 6] = [
            &REQUEST_MAGIC.to_be_bytes(),
            &self.flags.to_be_bytes(),
            &self.kind.to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &self.length.to_be_bytes(),
        ];
        let all = fields.into_iter().flatten();
        for (byte, value) in bytes.iter_mut().zip(all) {
            *byte = *value;
        }
        bytes
    }

    /// Returns the command of a header, if it is one.
    pub(super) fn decode(bytes: &[u8; 28]) -> Option<Self> {
        let mut bytes = &bytes[..];
        take_u32(&mut bytes).filter(|magic| *magic == REQUEST_MAGIC)?;
        let flags = take_u16(&mut bytes)?;
        Some(Self {
            flags,
            kind: take_u16(&mut bytes)?,
            cookie: take_u64(&mut bytes)?,
            offset: take_u64(&mut bytes)?,
            length: take_u32(&mut bytes)?,
        })
    }
}

/// Returns the Linux errno for an error of the protocol.
pub(super) fn errno(value: u32) -> Errno {
    match value {
        1 => Errno::PERM,
        12 => Errno::NOMEM,
        22 => Errno::INVAL,
        28 => Errno::NOSPC,
        75 => Errno::OVERFLOW,
        95 => Errno::OPNOTSUPP,
        // The server is about to end; its successor can be connected to.
        108 => Errno::NOTCONN,
        _ => Errno::IO,
    }
}

/// Returns the error of the protocol for a Linux errno.
///
/// A device model to which storage without space is reported stops the emulation of all devices,
/// and nothing on a Xen host lets it continue. So this is an error like any other.
pub(super) fn number(errno: Errno) -> u32 {
    match errno {
        Errno::PERM | Errno::ROFS => 1,
        Errno::NOMEM => 12,
        Errno::INVAL => 22,
        Errno::OVERFLOW => 75,
        Errno::OPNOTSUPP => 95,
        _ => 5,
    }
}

/// Takes a big-endian number of `N` bytes from the start of `bytes`.
pub(super) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (number, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*number)
}

/// Takes a 16-bit number.
pub(super) fn take_u16(bytes: &mut &[u8]) -> Option<u16> {
    take(bytes).map(u16::from_be_bytes)
}

/// Takes a 32-bit number.
pub(super) fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    take(bytes).map(u32::from_be_bytes)
}

/// Takes a 64-bit number.
pub(super) fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    take(bytes).map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_big_endian() {
        let command = Command {
            kind: CMD_WRITE,
            flags: CMD_FLAG_FUA,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            length: 0x200,
        };
        let mut bytes = &command.encode()[..];
        assert_eq!(take_u32(&mut bytes), Some(REQUEST_MAGIC));
        assert_eq!(take_u16(&mut bytes), Some(CMD_FLAG_FUA));
        assert_eq!(take_u16(&mut bytes), Some(CMD_WRITE));
        assert_eq!(take_u64(&mut bytes), Some(command.cookie));
        assert_eq!(take_u64(&mut bytes), Some(0x1000));
        assert_eq!(take_u32(&mut bytes), Some(0x200));
        assert_eq!(take_u16(&mut bytes), None);
        assert_eq!(Command::decode(&command.encode()), Some(command));
        assert_eq!(Command::decode(&[0; 28]), None);
    }

    #[test]
    fn errors_of_the_protocol_come_back_as_they_were() {
        for value in [1, 12, 22, 75, 95, 5] {
            assert_eq!(number(errno(value)), value);
        }
        assert_eq!((number(Errno::ROFS), number(Errno::TIMEDOUT)), (1, 5));
        assert_eq!(number(Errno::NOSPC), 5);
    }
}
