// SPDX-License-Identifier: GPL-2.0-only

//! Wire format: requests, responses and segments as 32-bit words.
//!
//! A frontend writes its ring in the layout of its own architecture, the [`Abi`], which it names in
//! the node `protocol`. The layouts differ only in one word of padding:
//!
//! | byte (64-bit, arm) | byte (x86_32) | field |
//! |---|---|---|
//! | 0 | 0 | operation u8 |
//! | 1 | 1 | nr_segments u8, or discard flags u8, or operation of an indirect request u8 |
//! | 2 | 2 | handle u16, or nr_segments u16 of an indirect request |
//! | 4 | - | padding |
//! | 8 | 4 | id u64 |
//! | 16 | 12 | sector u64 |
//! | 24 | 20 | 11 segments of 8 bytes, or nr_sectors u64, or handle u16, padding, 8 grants u32 |
//!
//! In each ABI a read or write, a discard and an indirect request consist of whole words, so a
//! request is written and read word by word, each word once. No uninitialised byte reaches the
//! other domain (XSA-216), and no word is read twice (XSA-155).
//!
//! The values of these types are not checked: see [`request`](crate::request).

/// Bytes in a sector, the unit of all sector numbers and counts on the wire.
pub const SECTOR_SIZE: u32 = 512;

/// Bytes in a granted page. Grants are 4 KiB even where the kernel's pages are larger.
pub const PAGE_SIZE: u32 = 4096;

/// Sectors in a granted page.
pub const SECTORS_PER_PAGE: u8 = 8;

/// Words in a granted page.
pub const WORDS_PER_PAGE: usize = 1024;

/// Largest number of segments in a slot (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const DIRECT_SEGMENTS: usize = 11;

/// Pages of segments that an indirect request can name
/// (`BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`).
pub const INDIRECT_PAGES: usize = 8;

/// Segments in one page of an indirect request.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = 512;

/// Largest number of segments of an indirect request.
pub const INDIRECT_SEGMENTS: usize = INDIRECT_PAGES * SEGMENTS_PER_INDIRECT_PAGE;

/// Words of the largest request.
pub const REQUEST_WORDS: usize = 28;

/// Number of words of a response without padding. Some layouts add a word of padding, which is
/// never written.
pub const RESPONSE_WORDS: usize = 3;

/// Operations (`BLKIF_OP_*`). Number 4 is reserved: old SLES kernels sent packet commands with it.
pub mod op {
    /// Read into the segments.
    pub const READ: u8 = 0;
    /// Write from the segments.
    pub const WRITE: u8 = 1;
    /// Write after all earlier requests are complete and flushed.
    pub const WRITE_BARRIER: u8 = 2;
    /// Flush the disk's volatile write cache.
    pub const FLUSH_DISKCACHE: u8 = 3;
    /// Discard the content of sectors.
    pub const DISCARD: u8 = 5;
    /// A read or write whose segments are in pages of their own.
    pub const INDIRECT: u8 = 6;
}

/// Flag of a discard request: the data must not be recoverable.
pub const DISCARD_SECURE: u8 = 1;

/// Flags of the node `info`.
pub mod info {
    /// The disk is a CD-ROM drive.
    pub const CDROM: u32 = 1;
    /// The medium is removable.
    pub const REMOVABLE: u32 = 2;
    /// The disk refuses writes.
    pub const READONLY: u32 = 4;
}

/// Layout of a ring, named by the frontend's node `protocol`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Abi {
    /// 64-bit x86: slots of 112 bytes, `u64` aligned to 8.
    X86_64,
    /// 32-bit x86: slots of 108 bytes, `u64` aligned to 4.
    X86_32,
    /// 32-bit and 64-bit Arm, same layout as 64-bit x86.
    Arm,
}

impl Abi {
    /// Returns the layout of the architecture that this is compiled for.
    pub const fn native() -> Self {
        if cfg!(target_arch = "x86") {
            Abi::X86_32
        } else if cfg!(target_arch = "x86_64") {
            Abi::X86_64
        } else {
            Abi::Arm
        }
    }

    /// Returns the layout of a frontend that has no node `protocol`.
    ///
    /// `blkif.h` says native. Linux backends on x86 have always taken the 32-bit layout, and the
    /// frontends that do not write the node (old 32-bit boot loaders) rely on it.
    pub const fn when_absent() -> Self {
        if cfg!(target_arch = "x86_64") {
            Abi::X86_32
        } else {
            Self::native()
        }
    }

    /// Returns the value of the node `protocol`.
    pub const fn name(self) -> &'static str {
        match self {
            Abi::X86_64 => "x86_64-abi",
            Abi::X86_32 => "x86_32-abi",
            Abi::Arm => "arm-abi",
        }
    }

    /// Returns the layout for a value of the node `protocol`.
    pub fn from_name(name: &[u8]) -> Option<Self> {
        match name {
            b"x86_64-abi" => Some(Abi::X86_64),
            b"x86_32-abi" => Some(Abi::X86_32),
            b"arm-abi" => Some(Abi::Arm),
            _ => None,
        }
    }

    /// Returns the distance between two slots of the ring, in words.
    #[inline]
    pub const fn slot_words(self) -> u32 {
        match self {
            Abi::X86_64 | Abi::Arm => 28,
            Abi::X86_32 => 27,
        }
    }

    /// Returns the distance between two slots of the ring, in bytes.
    pub const fn slot_bytes(self) -> u32 {
        match self {
            Abi::X86_64 | Abi::Arm => 112,
            Abi::X86_32 => 108,
        }
    }

    /// Returns the size of a response with its padding, in bytes.
    pub const fn response_bytes(self) -> u32 {
        match self {
            Abi::X86_64 | Abi::Arm => 16,
            Abi::X86_32 => 12,
        }
    }

    /// Returns `true` if a word of padding is between the first word and the id.
    #[inline]
    const fn pads_id(self) -> bool {
        match self {
            Abi::X86_64 | Abi::Arm => true,
            Abi::X86_32 => false,
        }
    }
}

/// A run of sectors in a granted page, as written by the other side or for it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WireSegment {
    /// Grant reference of the page.
    pub gref: u32,
    /// First sector within the page, 0 to 7 if valid.
    pub first: u8,
    /// Last sector within the page, inclusive, `first` to 7 if valid.
    pub last: u8,
}

impl WireSegment {
    /// Zero.
    pub const EMPTY: Self = WireSegment {
        gref: 0,
        first: 0,
        last: 0,
    };

    /// Returns the two words of a segment, in a slot or in a page of an indirect request.
    #[inline]
    pub const fn encode(self) -> [u32; 2] {
        [self.gref, self.first as u32 | ((self.last as u32) << 8)]
    }

    /// Reads a segment.
    ///
    /// Padding is ignored.
    #[inline]
    pub const fn decode(words: [u32; 2]) -> Self {
        let [gref, range] = words;
        let [first, last, _, _] = range.to_le_bytes();
        WireSegment { gref, first, last }
    }
}

/// Read, write, barrier or flush whose segments are in the slot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RwRequest {
    /// One of [`op::READ`], [`op::WRITE`], [`op::WRITE_BARRIER`], [`op::FLUSH_DISKCACHE`].
    pub operation: u8,
    /// Number of segments as written, which may be more than the slot holds.
    pub nr_segments: u8,
    /// Number of the virtual device. Backends ignore it.
    pub handle: u16,
    /// The id of the request, which the response repeats.
    pub id: u64,
    /// First sector on the disk.
    pub sector: u64,
    /// The segments. Those from `nr_segments` on are zero.
    pub segments: [WireSegment; DIRECT_SEGMENTS],
}

impl RwRequest {
    /// All zero.
    const EMPTY: Self = RwRequest {
        operation: 0,
        nr_segments: 0,
        handle: 0,
        id: 0,
        sector: 0,
        segments: [WireSegment::EMPTY; DIRECT_SEGMENTS],
    };

    /// Returns the segments that the request has, at most [`DIRECT_SEGMENTS`].
    #[inline]
    pub fn segments(&self) -> &[WireSegment] {
        self.segments
            .get(..usize::from(self.nr_segments))
            .unwrap_or(&self.segments)
    }

    #[inline]
    fn encoder(&self) -> RwEncoder<impl Iterator<Item = WireSegment> + '_> {
        RwEncoder {
            operation: self.operation,
            nr_segments: self.nr_segments,
            handle: self.handle,
            id: self.id,
            sector: self.sector,
            segments: self.segments().iter().copied(),
        }
    }
}

/// A read, write, barrier or flush to be written into a slot: its segments come from an iterator
/// and are not stored.
pub struct RwEncoder<I> {
    /// One of [`op::READ`], [`op::WRITE`], [`op::WRITE_BARRIER`], [`op::FLUSH_DISKCACHE`].
    pub operation: u8,
    /// Number of segments. Those beyond what the slot holds are not written.
    pub nr_segments: u8,
    /// Number of the virtual device. Backends ignore it.
    pub handle: u16,
    /// The id of the request, which the response repeats.
    pub id: u64,
    /// First sector on the disk.
    pub sector: u64,
    /// The segments: `nr_segments`, up to the number that fits into the slot.
    pub segments: I,
}

impl<I: Iterator<Item = WireSegment>> Encode for RwEncoder<I> {
    #[inline]
    fn response_operation(&self) -> u8 {
        self.operation
    }

    #[inline(always)]
    fn write(self, abi: Abi, mut put: impl FnMut(u32)) {
        let [low, high] = self.handle.to_le_bytes();
        let first = u32::from_le_bytes([self.operation, self.nr_segments, low, high]);
        write_head(abi, first, self.id, &mut put);
        write_u64(self.sector, &mut put);
        for segment in self.segments.take(DIRECT_SEGMENTS) {
            let [gref, range] = segment.encode();
            put(gref);
            put(range);
        }
    }
}

/// Request to discard sectors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiscardRequest {
    /// Flags as written; [`DISCARD_SECURE`] is the only one that is defined.
    pub flag: u8,
    /// Number of the virtual device. Backends ignore it.
    pub handle: u16,
    /// The id of the request, which the response repeats.
    pub id: u64,
    /// First sector on the disk.
    pub sector: u64,
    /// Number of sectors.
    pub nr_sectors: u64,
}

/// Read or write whose segments are in granted pages of their own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IndirectRequest {
    /// Operation of the data as written: valid if it is [`op::READ`] or [`op::WRITE`]. The response
    /// repeats it in place of [`op::INDIRECT`].
    pub operation: u8,
    /// Number of segments as written, which may be more than the pages hold.
    pub nr_segments: u16,
    /// Number of the virtual device. Backends ignore it.
    pub handle: u16,
    /// The id of the request, which the response repeats.
    pub id: u64,
    /// First sector on the disk.
    pub sector: u64,
    /// Grant references of the pages of segments. Those that `nr_segments` does not need are zero.
    pub grefs: [u32; INDIRECT_PAGES],
}

impl IndirectRequest {
    /// Returns the grant references of the pages that `nr_segments` needs, at most
    /// [`INDIRECT_PAGES`].
    #[inline]
    pub fn grefs(&self) -> &[u32] {
        self.grefs
            .get(..indirect_pages(self.nr_segments))
            .unwrap_or(&self.grefs)
    }
}

/// Returns the number of pages that hold `segments` segments.
#[inline]
pub const fn indirect_pages(segments: u16) -> usize {
    (segments as usize).div_ceil(SEGMENTS_PER_INDIRECT_PAGE)
}

/// A request in a slot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum WireRequest {
    /// Read, write, barrier or flush with its segments in the slot.
    Rw(RwRequest),
    /// Discard.
    Discard(DiscardRequest),
    /// Read or write with its segments in pages of their own.
    Indirect(IndirectRequest),
    /// An operation that this protocol does not have. The id is in the same position in all kinds
    /// of requests, so even this request can get a response.
    Unknown {
        /// The operation as written.
        operation: u8,
        /// The id of the request.
        id: u64,
    },
}

/// A request as words, for tests and for records of requests. The drivers use
/// [`ring`](crate::ring).
pub type RequestWords = [u32; REQUEST_WORDS];

impl WireRequest {
    /// Returns the id of the request.
    #[inline]
    pub fn id(&self) -> u64 {
        match self {
            WireRequest::Rw(r) => r.id,
            WireRequest::Discard(r) => r.id,
            WireRequest::Indirect(r) => r.id,
            WireRequest::Unknown { id, .. } => *id,
        }
    }

    /// Returns the operation that the response must name: that of the data for an indirect request.
    #[inline]
    pub fn response_operation(&self) -> u8 {
        match self {
            WireRequest::Rw(r) => r.operation,
            WireRequest::Discard(_) => op::DISCARD,
            WireRequest::Indirect(r) => r.operation,
            WireRequest::Unknown { operation, .. } => *operation,
        }
    }

    /// Returns the response to this request.
    #[inline]
    pub fn response(&self, status: Status) -> Response {
        Response {
            id: self.id(),
            operation: self.response_operation(),
            status,
        }
    }

    /// Placeholder to read a request into.
    pub const EMPTY: Self = WireRequest::Unknown {
        operation: u8::MAX,
        id: 0,
    };

    /// Returns the request as words, the unused ones zero.
    pub fn encode(&self, abi: Abi) -> RequestWords {
        encode(*self, abi)
    }

    /// Reads a request from private words.
    pub fn decode(abi: Abi, words: &RequestWords) -> Self {
        let mut words = words.iter();
        let mut request = Self::EMPTY;
        request.read(abi, || words.next().copied().unwrap_or(0));
        request
    }

    /// Reads the request whose words `next` returns, in order.
    ///
    /// Each word up to the last one that the request uses, padding included, is read once, and none
    /// after it.
    ///
    /// A request is large, so it is read in place. Only segments that the previous request has left
    /// are cleared.
    #[inline]
    pub(crate) fn read(&mut self, abi: Abi, mut next: impl FnMut() -> u32) {
        let [operation, byte1, byte2, byte3] = next().to_le_bytes();
        let half = u16::from_le_bytes([byte2, byte3]);
        if abi.pads_id() {
            next();
        }
        let id = read_u64(&mut next);
        match operation {
            op::READ | op::WRITE | op::WRITE_BARRIER | op::FLUSH_DISKCACHE => {
                if !matches!(self, WireRequest::Rw(_)) {
                    *self = WireRequest::Rw(RwRequest::EMPTY);
                }
                if let WireRequest::Rw(rw) = self {
                    rw.read(operation, byte1, half, id, &mut next);
                }
            }
            op::DISCARD => {
                *self = WireRequest::Discard(DiscardRequest::read(byte1, half, id, &mut next));
            }
            op::INDIRECT => {
                *self = WireRequest::Indirect(IndirectRequest::read(byte1, half, id, &mut next));
            }
            _ => *self = WireRequest::Unknown { operation, id },
        }
    }
}

/// A request that can be written into a slot: a [`WireRequest`], or one that produces its words
/// while they are written.
pub trait Encode {
    /// Returns the operation that the response must name: that of the data for an indirect request.
    fn response_operation(&self) -> u8;

    /// Passes the words that the request uses to `put`, in order.
    fn write(self, abi: Abi, put: impl FnMut(u32));
}

impl Encode for WireRequest {
    #[inline]
    fn response_operation(&self) -> u8 {
        WireRequest::response_operation(self)
    }

    #[inline]
    fn write(self, abi: Abi, mut put: impl FnMut(u32)) {
        match self {
            WireRequest::Rw(r) => r.encoder().write(abi, put),
            WireRequest::Discard(r) => r.write(abi, &mut put),
            WireRequest::Indirect(r) => r.write(abi, &mut put),
            WireRequest::Unknown { operation, id } => {
                write_head(abi, u32::from(operation), id, &mut put)
            }
        }
    }
}

/// Returns a request as words, the unused ones zero.
pub fn encode(request: impl Encode, abi: Abi) -> RequestWords {
    let mut words = [0; REQUEST_WORDS];
    let mut slots = words.iter_mut();
    request.write(abi, |word| {
        if let Some(slot) = slots.next() {
            *slot = word;
        }
    });
    words
}

impl RwRequest {
    #[inline]
    fn read(
        &mut self,
        operation: u8,
        nr_segments: u8,
        handle: u16,
        id: u64,
        next: &mut impl FnMut() -> u32,
    ) {
        // Number of segments that the previous request has left; those after them are zero.
        let before = self.segments().len();
        self.operation = operation;
        self.nr_segments = nr_segments;
        self.handle = handle;
        self.id = id;
        self.sector = read_u64(next);
        let used = usize::from(nr_segments);
        for segment in self.segments.iter_mut().take(used) {
            *segment = WireSegment::decode([next(), next()]);
        }
        for segment in self.segments.iter_mut().take(before).skip(used) {
            *segment = WireSegment::EMPTY;
        }
    }
}

impl DiscardRequest {
    #[inline]
    fn write(&self, abi: Abi, put: &mut impl FnMut(u32)) {
        let [low, high] = self.handle.to_le_bytes();
        let first = u32::from_le_bytes([op::DISCARD, self.flag, low, high]);
        write_head(abi, first, self.id, put);
        write_u64(self.sector, put);
        write_u64(self.nr_sectors, put);
    }

    #[inline]
    fn read(flag: u8, handle: u16, id: u64, next: &mut impl FnMut() -> u32) -> Self {
        DiscardRequest {
            flag,
            handle,
            id,
            sector: read_u64(next),
            nr_sectors: read_u64(next),
        }
    }
}

impl IndirectRequest {
    #[inline]
    fn write(&self, abi: Abi, put: &mut impl FnMut(u32)) {
        let [low, high] = self.nr_segments.to_le_bytes();
        let first = u32::from_le_bytes([op::INDIRECT, self.operation, low, high]);
        write_head(abi, first, self.id, put);
        write_u64(self.sector, put);
        put(u32::from(self.handle));
        for gref in self.grefs() {
            put(*gref);
        }
    }

    #[inline]
    fn read(operation: u8, nr_segments: u16, id: u64, next: &mut impl FnMut() -> u32) -> Self {
        let sector = read_u64(next);
        let [low, high, _, _] = next().to_le_bytes();
        let handle = u16::from_le_bytes([low, high]);
        let mut grefs = [0; INDIRECT_PAGES];
        for gref in grefs.iter_mut().take(indirect_pages(nr_segments)) {
            *gref = next();
        }
        IndirectRequest {
            operation,
            nr_segments,
            handle,
            id,
            sector,
            grefs,
        }
    }
}

/// The status of a response (`BLKIF_RSP_*`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    /// The request was executed.
    Okay,
    /// The request has failed (`BLKIF_RSP_ERROR`, and every value that the protocol does not
    /// define).
    Error,
    /// The backend does not support this operation (`BLKIF_RSP_EOPNOTSUPP`).
    NotSupported,
}

impl Status {
    /// Returns the number on the wire.
    #[inline]
    pub const fn to_wire(self) -> i16 {
        match self {
            Status::Okay => 0,
            Status::Error => -1,
            Status::NotSupported => -2,
        }
    }

    /// Returns the status for a number on the wire.
    ///
    /// An unknown number is an error, so that only a request that the backend reports as done
    /// counts as done.
    #[inline]
    pub const fn from_wire(status: i16) -> Self {
        match status {
            0 => Status::Okay,
            -2 => Status::NotSupported,
            _ => Status::Error,
        }
    }
}

/// A response. The words are the same in all layouts: id, then operation u8, padding, status i16.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Response {
    /// The id of the request.
    pub id: u64,
    /// The operation of the request, see [`WireRequest::response_operation`].
    pub operation: u8,
    /// The status of the request.
    pub status: Status,
}

impl Response {
    /// Returns the words of the response without padding.
    #[inline]
    pub const fn encode(&self) -> [u32; RESPONSE_WORDS] {
        let [low, high] = self.status.to_wire().to_le_bytes();
        let last = u32::from_le_bytes([self.operation, 0, low, high]);
        [self.id as u32, (self.id >> 32) as u32, last]
    }

    /// Reads a response.
    ///
    /// Padding is ignored.
    #[inline]
    pub const fn decode(words: [u32; RESPONSE_WORDS]) -> Self {
        let [low, high, last] = words;
        let [operation, _, byte2, byte3] = last.to_le_bytes();
        Response {
            id: low as u64 | ((high as u64) << 32),
            operation,
            status: Status::from_wire(i16::from_le_bytes([byte2, byte3])),
        }
    }
}

/// Writes the words that all requests begin with: the first one, padding, the id.
#[inline]
fn write_head(abi: Abi, first: u32, id: u64, put: &mut impl FnMut(u32)) {
    put(first);
    if abi.pads_id() {
        put(0);
    }
    write_u64(id, put);
}

/// Writes a `u64`, low word first.
#[inline]
fn write_u64(value: u64, put: &mut impl FnMut(u32)) {
    put(value as u32);
    put((value >> 32) as u32);
}

/// Reads a `u64`, low word first.
#[inline]
fn read_u64(next: &mut impl FnMut() -> u32) -> u64 {
    let low = u64::from(next());
    low | (u64::from(next()) << 32)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    const ABIS: [Abi; 3] = [Abi::X86_64, Abi::X86_32, Abi::Arm];

    fn bytes(request: &WireRequest, abi: Abi) -> Vec<u8> {
        request
            .encode(abi)
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    /// Returns all bytes of a slot: those of `(offset, bytes)`, and zeroes.
    fn slot(fields: &[(usize, &[u8])]) -> Vec<u8> {
        let mut slot = std::vec![0; 4 * REQUEST_WORDS];
        for (offset, field) in fields {
            slot[*offset..offset + field.len()].copy_from_slice(field);
        }
        slot
    }

    fn rw(nr_segments: u8) -> RwRequest {
        let mut segments = [WireSegment::default(); DIRECT_SEGMENTS];
        for (n, segment) in segments.iter_mut().take(nr_segments.into()).enumerate() {
            *segment = WireSegment {
                gref: 0xa0b0_c000 + n as u32,
                first: 1,
                last: 6,
            };
        }
        let id = 0x0807_0605_0403_0201;
        let sector = 0x1817_1615_1413_1211;
        RwRequest {
            operation: op::WRITE,
            nr_segments,
            handle: 0x2221,
            id,
            sector,
            segments,
        }
    }

    const ID: (usize, &[u8]) = (8, &[1, 2, 3, 4, 5, 6, 7, 8]);
    const SECTOR: (usize, &[u8]) = (16, &[0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);

    /// Returns the same fields four bytes earlier, except those of the first word.
    fn packed<'a>(fields: &[(usize, &'a [u8])]) -> Vec<(usize, &'a [u8])> {
        fields
            .iter()
            .map(|(at, field)| (if *at < 4 { *at } else { at - 4 }, *field))
            .collect()
    }

    fn assert_layout(request: &WireRequest, fields: &[(usize, &[u8])]) {
        assert_eq!(bytes(request, Abi::X86_64), slot(fields));
        assert_eq!(bytes(request, Abi::Arm), slot(fields));
        assert_eq!(bytes(request, Abi::X86_32), slot(&packed(fields)));
        for abi in ABIS {
            assert_eq!(WireRequest::decode(abi, &request.encode(abi)), *request);
        }
    }

    #[test]
    fn abi_sizes() {
        for (abi, slot, response) in [
            (Abi::X86_64, 112, 16),
            (Abi::X86_32, 108, 12),
            (Abi::Arm, 112, 16),
        ] {
            assert_eq!(abi.slot_bytes(), slot);
            assert_eq!(abi.slot_words() * 4, slot);
            assert_eq!(abi.response_bytes(), response);
        }
    }

    #[test]
    fn abi_names() {
        let names = ["x86_64-abi", "x86_32-abi", "arm-abi"];
        for (abi, name) in ABIS.into_iter().zip(names) {
            assert_eq!(abi.name(), name);
            assert_eq!(Abi::from_name(name.as_bytes()), Some(abi));
        }
        assert_eq!(Abi::from_name(b"x86_64-abi\n"), None);
        assert_eq!(Abi::from_name(b""), None);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn abi_of_this_machine() {
        assert_eq!(Abi::native(), Abi::X86_64);
        assert_eq!(Abi::when_absent(), Abi::X86_32);
    }

    #[test]
    fn layout_of_a_direct_request() {
        let segments = [
            0x00, 0xc0, 0xb0, 0xa0, 1, 6, 0, 0, 0x01, 0xc0, 0xb0, 0xa0, 1, 6, 0, 0,
        ];
        let head = [op::WRITE, 2, 0x21, 0x22];
        let fields = [(0, &head[..]), ID, SECTOR, (24, &segments)];
        assert_layout(&WireRequest::Rw(rw(2)), &fields);
    }

    #[test]
    fn a_full_slot_ends_with_the_last_segment() {
        let request = WireRequest::Rw(rw(11));
        assert_eq!(
            bytes(&request, Abi::X86_64)[104..108],
            [0x0a, 0xc0, 0xb0, 0xa0]
        );
        assert_eq!(
            bytes(&request, Abi::X86_32)[100..104],
            [0x0a, 0xc0, 0xb0, 0xa0]
        );
        assert_eq!(bytes(&request, Abi::X86_32)[108..], [0; 4]);
    }

    #[test]
    fn layout_of_a_discard() {
        let discard = DiscardRequest {
            flag: DISCARD_SECURE,
            handle: 0x2221,
            id: 0x0807_0605_0403_0201,
            sector: 0x1817_1615_1413_1211,
            nr_sectors: 0x3837_3635_3433_3231,
        };
        let sectors = [0x31, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x38];
        let fields = [(0, &[5, 1, 0x21, 0x22][..]), ID, SECTOR, (24, &sectors)];
        assert_layout(&WireRequest::Discard(discard), &fields);
    }

    #[test]
    fn layout_of_an_indirect_request() {
        let mut grefs = [0; INDIRECT_PAGES];
        grefs[0] = 0xa0b0_c0d0;
        grefs[1] = 0xa1b1_c1d1;
        let indirect = IndirectRequest {
            operation: op::WRITE,
            nr_segments: 0x0201,
            handle: 0x2221,
            id: 0x0807_0605_0403_0201,
            sector: 0x1817_1615_1413_1211,
            grefs,
        };
        let pages = [0xd0, 0xc0, 0xb0, 0xa0, 0xd1, 0xc1, 0xb1, 0xa1];
        let fields = [
            (0, &[6, 1, 1, 2][..]),
            ID,
            SECTOR,
            (24, &[0x21, 0x22]),
            (28, &pages),
        ];
        assert_layout(&WireRequest::Indirect(indirect), &fields);
    }

    #[test]
    fn an_unknown_operation_has_its_id() {
        let request = WireRequest::Unknown {
            operation: 4,
            id: 0x0807_0605_0403_0201,
        };
        assert_layout(&request, &[(0, &[4][..]), ID]);
        assert_eq!(request.id(), 0x0807_0605_0403_0201);
        assert_eq!(request.response_operation(), 4);
    }

    #[test]
    fn a_request_with_too_many_segments_has_those_that_fit() {
        let mut words = WireRequest::Rw(rw(11)).encode(Abi::X86_64);
        words[0] = u32::from_le_bytes([op::READ, 255, 0, 0]);
        let WireRequest::Rw(read) = WireRequest::decode(Abi::X86_64, &words) else {
            panic!()
        };
        assert_eq!(read.nr_segments, 255);
        assert_eq!(read.segments(), rw(11).segments);
    }

    #[test]
    fn only_the_words_in_use_are_touched() {
        for abi in ABIS {
            let head = if abi == Abi::X86_32 { 5 } else { 6 };
            for (request, used) in [
                (WireRequest::Rw(rw(0)), head),
                (WireRequest::Rw(rw(3)), head + 6),
                (WireRequest::Rw(rw(11)), head + 22),
                (
                    WireRequest::Unknown {
                        operation: 9,
                        id: 1,
                    },
                    head - 2,
                ),
            ] {
                let mut words = Vec::new();
                request.write(abi, |word| words.push(word));
                assert_eq!(words.len(), used);
                let mut read = 0;
                let mut place = WireRequest::Rw(rw(11));
                place.read(abi, || {
                    read += 1;
                    words[read - 1]
                });
                assert_eq!(read, used);
                // Nothing is left of what was there before.
                assert_eq!(place, request);
            }
        }
    }

    #[test]
    fn responses_name_the_operation_of_the_data() {
        let grefs = [0; INDIRECT_PAGES];
        let indirect = IndirectRequest {
            operation: op::WRITE,
            nr_segments: 1,
            handle: 0,
            id: 7,
            sector: 0,
            grefs,
        };
        let discard = DiscardRequest {
            flag: 0,
            handle: 0,
            id: 8,
            sector: 0,
            nr_sectors: 1,
        };
        for (request, id, operation) in [
            (WireRequest::Rw(RwRequest { id: 6, ..rw(1) }), 6, op::WRITE),
            (WireRequest::Indirect(indirect), 7, op::WRITE),
            (WireRequest::Discard(discard), 8, op::DISCARD),
        ] {
            let response = Response {
                id,
                operation,
                status: Status::Error,
            };
            assert_eq!(request.response(Status::Error), response);
        }
    }

    #[test]
    fn layout_of_a_response() {
        let response = Response {
            id: 0x0807_0605_0403_0201,
            operation: op::DISCARD,
            status: Status::NotSupported,
        };
        let words = response.encode();
        assert_eq!(words, [0x0403_0201, 0x0807_0605, 0xfffe_0005]);
        assert_eq!(Response::decode(words), response);
        // Padding after the operation is not looked at.
        assert_eq!(
            Response::decode([0x0403_0201, 0x0807_0605, 0xfffe_aa05]),
            response
        );
    }

    #[test]
    fn statuses() {
        for (status, number) in [
            (Status::Okay, 0),
            (Status::Error, -1),
            (Status::NotSupported, -2),
        ] {
            assert_eq!(status.to_wire(), number);
            assert_eq!(Status::from_wire(number), status);
        }
        assert_eq!(Status::from_wire(1), Status::Error);
        assert_eq!(Status::from_wire(i16::MIN), Status::Error);
    }

    #[test]
    fn layout_of_a_segment() {
        let segment = WireSegment {
            gref: 9,
            first: 2,
            last: 7,
        };
        assert_eq!(segment.encode(), [9, 0x0702]);
        assert_eq!(WireSegment::decode([9, 0xffff_0702]), segment);
    }

    #[test]
    fn pages_for_segments() {
        for (segments, pages) in [
            (0, 0),
            (1, 1),
            (512, 1),
            (513, 2),
            (4096, 8),
            (u16::MAX, 128),
        ] {
            assert_eq!(indirect_pages(segments), pages);
        }
        let grefs = [1, 2, 3, 4, 5, 6, 7, 8];
        let indirect = IndirectRequest {
            operation: 0,
            nr_segments: 513,
            handle: 0,
            id: 0,
            sector: 0,
            grefs,
        };
        assert_eq!(indirect.grefs(), [1, 2]);
        assert_eq!(
            IndirectRequest {
                nr_segments: 9999,
                ..indirect
            }
            .grefs(),
            grefs
        );
    }
}
