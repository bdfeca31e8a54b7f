// SPDX-License-Identifier: GPL-2.0-only

//! The stream of simple and structured replies of an NBD server.

use super::protocol::{
    errno, take_u16, take_u32, take_u64, REPLY_ERROR_OFFSET, REPLY_FLAG_DONE, REPLY_FLAG_ERROR,
    REPLY_NONE, REPLY_OFFSET_DATA, REPLY_OFFSET_HOLE, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use rustix::io::Errno;

/// The greatest length of the description of an error, as the protocol limits strings.
const MAX_ERROR: u32 = 4096 + 14;

/// A violation of the protocol by the server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Violation(pub(super) &'static str);

/// The requests that replies belong to.
pub(super) trait Handler {
    /// Returns the number of bytes that a simple reply to the command carries, or [`None`] if no
    /// such command is in flight.
    fn data_length(&self, cookie: u64) -> Option<u64>;

    /// Takes data of a read, which starts `offset` in the image, or in the request after a simple
    /// reply.
    fn data(&mut self, cookie: u64, position: Position, data: &[u8]) -> Result<(), Violation>;

    /// Takes a range of a read that is zero.
    fn hole(&mut self, cookie: u64, offset: u64, length: u32) -> Result<(), Violation>;

    /// Takes an error of the command.
    fn error(&mut self, cookie: u64, errno: Errno) -> Result<(), Violation>;

    /// Takes the end of all replies to the command.
    fn done(&mut self, cookie: u64) -> Result<(), Violation>;
}

/// The place for the data of a read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Position {
    /// An offset in the image.
    Image(u64),
    /// An offset in the request.
    Request(u64),
}

impl Position {
    fn advance(&mut self, count: u64) {
        let (Self::Image(offset) | Self::Request(offset)) = self;
        *offset = offset.saturating_add(count);
    }
}

/// The state of a partly received reply.
#[derive(Clone, Copy, Debug)]
enum State {
    /// At the magic number of a reply.
    Start,
    /// Inside the data of a read.
    Data {
        cookie: u64,
        position: Position,
        left: u64,
        is_last: bool,
    },
}

/// A reader of the stream of replies.
#[derive(Debug)]
pub(super) struct ReplyReader {
    state: State,
    /// The start of a header that is not complete.
    partial: Vec<u8>,
}

impl ReplyReader {
    pub(super) fn new() -> Self {
        Self {
            state: State::Start,
            partial: Vec::new(),
        }
    }

    /// Takes bytes that were received.
    pub(super) fn receive<H: Handler>(
        &mut self,
        mut bytes: &[u8],
        handler: &mut H,
    ) -> Result<(), Violation> {
        while !bytes.is_empty() {
            match self.state {
                State::Data { left, .. } => {
                    let count =
                        usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
                    let (data, rest) = bytes.split_at(count);
                    bytes = rest;
                    self.receive_data(data, handler)?;
                }
                State::Start => {
                    // One byte at a time: only the length of the whole tells where it ends.
                    let needed = needed(&self.partial)?;
                    let count = needed.saturating_sub(self.partial.len()).min(bytes.len());
                    let (part, rest) = bytes.split_at(count);
                    bytes = rest;
                    self.partial.extend_from_slice(part);
                    if self.partial.len() == needed && needed_more(&self.partial)? == 0 {
                        let message = std::mem::take(&mut self.partial);
                        self.state = parse(&message, handler)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn receive_data<H: Handler>(&mut self, data: &[u8], handler: &mut H) -> Result<(), Violation> {
        let State::Data {
            cookie,
            position,
            left,
            is_last,
        } = &mut self.state
        else {
            return Ok(());
        };
        handler.data(*cookie, *position, data)?;
        position.advance(data.len() as u64);
        *left = left.saturating_sub(data.len() as u64);
        if *left == 0 {
            let (cookie, is_last) = (*cookie, *is_last);
            self.state = State::Start;
            if is_last {
                handler.done(cookie)?;
            }
        }
        Ok(())
    }
}

/// The header of a structured reply.
struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    length: u32,
}

impl Header {
    fn parse(bytes: &mut &[u8]) -> Option<Self> {
        Some(Self {
            flags: take_u16(bytes)?,
            kind: take_u16(bytes)?,
            cookie: take_u64(bytes)?,
            length: take_u32(bytes)?,
        })
    }

    /// Returns the number of bytes after the header that are parsed together with it.
    fn extra(&self) -> Result<usize, Violation> {
        let length = match self.kind {
            REPLY_NONE if self.length == 0 => 0,
            REPLY_OFFSET_DATA if self.length > 8 => 8,
            REPLY_OFFSET_HOLE if self.length == 12 => 12,
            kind if kind & REPLY_FLAG_ERROR != 0 && (6..=MAX_ERROR).contains(&self.length) => {
                self.length
            }
            _ => return Err(Violation("a reply has an invalid type or length")),
        };
        usize::try_from(length).map_err(|_| Violation("a reply is too long"))
    }
}

/// Returns the length of the message that starts with `bytes`, as far as these tell.
fn needed(bytes: &[u8]) -> Result<usize, Violation> {
    Ok(bytes.len().saturating_add(needed_more(bytes)?))
}

/// Returns how many bytes are missing, at least, until the message is complete.
fn needed_more(bytes: &[u8]) -> Result<usize, Violation> {
    let mut rest = bytes;
    let total = match take_u32(&mut rest) {
        None => 4,
        Some(SIMPLE_REPLY_MAGIC) => 16,
        Some(STRUCTURED_REPLY_MAGIC) => match Header::parse(&mut rest) {
            None => 20,
            Some(header) => header.extra()?.saturating_add(20),
        },
        Some(_) => return Err(Violation("a reply has an invalid magic number")),
    };
    Ok(total.saturating_sub(bytes.len()))
}

/// Handles a complete message, and returns how the stream continues.
fn parse<H: Handler>(message: &[u8], handler: &mut H) -> Result<State, Violation> {
    const SHORT: Violation = Violation("a reply is too short");
    let mut rest = message;
    if take_u32(&mut rest) == Some(SIMPLE_REPLY_MAGIC) {
        let error = take_u32(&mut rest).ok_or(SHORT)?;
        let cookie = take_u64(&mut rest).ok_or(SHORT)?;
        return parse_simple(error, cookie, handler);
    }
    let header = Header::parse(&mut rest).ok_or(SHORT)?;
    let cookie = header.cookie;
    let is_last = header.flags & REPLY_FLAG_DONE != 0;
    if handler.data_length(cookie).is_none() {
        return Err(Violation("a reply is about no command in flight"));
    }
    match header.kind {
        REPLY_NONE if !is_last => return Err(Violation("a reply without content is not the last")),
        REPLY_NONE => {}
        REPLY_OFFSET_DATA => {
            return Ok(State::Data {
                cookie,
                position: Position::Image(take_u64(&mut rest).ok_or(SHORT)?),
                left: u64::from(header.length).saturating_sub(8),
                is_last,
            });
        }
        REPLY_OFFSET_HOLE => {
            let offset = take_u64(&mut rest).ok_or(SHORT)?;
            handler.hole(cookie, offset, take_u32(&mut rest).ok_or(SHORT)?)?;
        }
        kind => {
            let number = errno(take_u32(&mut rest).ok_or(SHORT)?);
            if kind == REPLY_ERROR_OFFSET && header.length < 14 {
                return Err(SHORT);
            }
            handler.error(cookie, number)?;
        }
    }
    if is_last {
        handler.done(cookie)?;
    }
    Ok(State::Start)
}

fn parse_simple<H: Handler>(error: u32, cookie: u64, handler: &mut H) -> Result<State, Violation> {
    let Some(length) = handler.data_length(cookie) else {
        return Err(Violation("a reply is about no command in flight"));
    };
    if error == 0 && length > 0 {
        return Ok(State::Data {
            cookie,
            position: Position::Request(0),
            left: length,
            is_last: true,
        });
    }
    if error != 0 {
        handler.error(cookie, errno(error))?;
    }
    handler.done(cookie)?;
    Ok(State::Start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Log(Vec<String>);

    impl Handler for Log {
        fn data_length(&self, cookie: u64) -> Option<u64> {
            (cookie < 4).then_some(cookie)
        }

        fn data(&mut self, cookie: u64, position: Position, data: &[u8]) -> Result<(), Violation> {
            for (index, byte) in data.iter().enumerate() {
                let mut position = position;
                position.advance(index as u64);
                self.0.push(format!("{cookie} {position:?} {byte}"));
            }
            Ok(())
        }

        fn hole(&mut self, cookie: u64, offset: u64, length: u32) -> Result<(), Violation> {
            self.0.push(format!("{cookie} hole {offset} {length}"));
            Ok(())
        }

        fn error(&mut self, cookie: u64, errno: Errno) -> Result<(), Violation> {
            self.0.push(format!("{cookie} {}", errno.raw_os_error()));
            Ok(())
        }

        fn done(&mut self, cookie: u64) -> Result<(), Violation> {
            self.0.push(format!("{cookie} done"));
            Ok(())
        }
    }

    fn simple(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn structured(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend((payload.len() as u32).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn offset(offset: u64, rest: &[u8]) -> Vec<u8> {
        let mut bytes = offset.to_be_bytes().to_vec();
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn replies_in_any_pieces() {
        let stream = [
            simple(0, 0, &[]),
            simple(0, 2, &[7, 8]),
            simple(28, 3, &[]),
            structured(0, REPLY_OFFSET_DATA, 1, &offset(512, &[9])),
            structured(0, REPLY_OFFSET_HOLE, 1, &offset(513, &[0, 0, 2, 0])),
            structured(REPLY_FLAG_DONE, REPLY_NONE, 1, &[]),
            structured(
                1,
                REPLY_ERROR_OFFSET,
                2,
                &[0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            ),
        ]
        .concat();
        let expected = [
            "0 done",
            "2 Request(0) 7",
            "2 Request(1) 8",
            "2 done",
            "3 28",
            "3 done",
            "1 Image(512) 9",
            "1 hole 513 512",
            "1 done",
            "2 5",
            "2 done",
        ];
        for size in 1..stream.len() {
            let mut reader = ReplyReader::new();
            let mut log = Log::default();
            for piece in stream.chunks(size) {
                reader.receive(piece, &mut log).unwrap();
            }
            assert_eq!(log.0, expected);
        }
    }

    #[test]
    fn violations_are_found() {
        for stream in [
            vec![1, 2, 3, 4],
            simple(0, 9, &[]),
            structured(1, REPLY_NONE, 9, &[]),
            structured(0, REPLY_NONE, 1, &[]),
            structured(1, REPLY_NONE, 1, &[1]),
            structured(1, REPLY_OFFSET_DATA, 1, &[0; 8]),
            structured(1, REPLY_OFFSET_HOLE, 1, &[0; 13]),
            structured(1, REPLY_FLAG_ERROR, 1, &[0; 5]),
            structured(1, REPLY_ERROR_OFFSET, 1, &[0; 13]),
            structured(1, REPLY_FLAG_ERROR, 1, &[0; 5000]),
            structured(1, 77, 1, &[0; 8]),
        ] {
            let mut log = Log::default();
            assert!(ReplyReader::new().receive(&stream, &mut log).is_err());
            assert!(log.0.iter().all(|line| !line.contains("done")));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(
            magic in prop_oneof![Just(SIMPLE_REPLY_MAGIC), Just(STRUCTURED_REPLY_MAGIC)],
            bytes in proptest::collection::vec(0u8..12, 0..100),
        ) {
            let mut stream = magic.to_be_bytes().to_vec();
            stream.extend(bytes);
            let _ = ReplyReader::new().receive(&stream, &mut Log::default());
        }
    }
}
