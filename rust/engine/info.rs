// SPDX-License-Identifier: GPL-2.0-only

//! The geometry of an image and what its engine supports.

/// The geometry of an image and what its engine supports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Info {
    /// The size in bytes, a multiple of `logical_block_size`.
    pub size: u64,
    /// The unit in bytes of offsets and lengths: a power of two, at least 512.
    pub logical_block_size: u32,
    /// The unit in bytes that the storage writes without reading: a multiple of
    /// `logical_block_size`.
    pub physical_block_size: u32,
    /// The greatest length in bytes of a read or write.
    pub max_transfer: u64,
    /// The greatest number of buffers of a read or write.
    pub max_buffers: usize,
    /// The greatest number of queues at the same time.
    pub max_queues: usize,
    /// The alignment in bytes of the address and the length of each buffer that avoids a copy.
    pub buffer_alignment: usize,
    /// Writes, discards and write zeroes fail with `EROFS`.
    pub read_only: bool,
    /// The support of discards; `None` if there is none.
    pub discard: Option<Discard>,
    /// Write zeroes are supported.
    pub write_zeroes: bool,
    /// The guarantees of the engine.
    pub guarantees: Guarantees,
}

/// The limits of discards.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Discard {
    /// The unit in bytes in which storage is freed. Discards in smaller units are accepted.
    pub granularity: u32,
    /// The offset in bytes of the first unit.
    pub alignment: u32,
}

/// The guarantees that a caller can rely on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Guarantees {
    /// Data survives a crash and a power failure of the host after a flush.
    pub durable: bool,
    /// Writes bypass the host's page cache.
    pub direct: bool,
    /// No other process that respects the same locks writes to the image.
    pub exclusive: bool,
}
