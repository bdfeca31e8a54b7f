// SPDX-License-Identifier: GPL-2.0

//! From two sets of offers to one set of features.
//!
//! The two sides meet twice. When the backend is in InitWait, the frontend chooses the shape of the
//! rings from what the backend can do at most ([`RingShape`]) and publishes it; the backend checks
//! that choice ([`FrontChoice::check`]). When the backend is Connected, the frontend reads what the
//! disk is ([`DiskNodes`]) and what it can do ([`BackOffer`]), and both use the same [`Features`].
//!
//! A set of nodes is read like this, for each name in its `NODES`:
//!
//! ```
//! # use blkif::negotiate::BackOffer;
//! # use blkif::node::BadNode;
//! # fn read(node: &str) -> Option<&'static [u8]> { (node == "feature-discard").then_some(b"1") }
//! let mut offer = BackOffer::default();
//! for node in BackOffer::NODES {
//!     if let Some(text) = read(node) {
//!         offer.set(node, text)?;
//!     }
//! }
//! assert!(offer.discard);
//! # Ok::<(), BadNode>(())
//! ```
//!
//! An optional node that cannot be understood leaves the offer as it was, as if it were missing: it
//! is worth a warning, not the disk.

use core::fmt;

use crate::node;
use crate::node::BadNode;
use crate::node::Wrong;
use crate::ring::MAX_PAGE_ORDER;
use crate::wire::info;
use crate::wire::op;
use crate::wire::Abi;
use crate::wire::DIRECT_SEGMENTS;
use crate::wire::INDIRECT_SEGMENTS;
use crate::wire::SECTOR_SIZE;

/// Largest logical block size that is believed.
const MAX_BLOCK_SIZE: u32 = 1 << 16;

/// What the frontend is willing to do: its module parameters and its node `trusted`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FrontOffer {
    /// Largest ring, as the binary logarithm of its pages.
    pub max_ring_page_order: u32,
    /// Largest number of rings.
    pub max_queues: u32,
    /// Largest number of segments of an indirect request.
    pub max_indirect_segments: u32,
    /// Use persistent grants if the backend does.
    pub persistent: bool,
    /// The backend may see what else is in the pages of a request. False if either the parameter
    /// or the node says so.
    pub trusted: bool,
}

/// What the backend offers in its directory. The default is what a backend that writes nothing
/// offers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackOffer {
    /// `max-ring-page-order`: largest ring, as the binary logarithm of its pages.
    pub max_ring_page_order: u32,
    /// `multi-queue-max-queues`: largest number of rings.
    pub max_queues: u32,
    /// `feature-max-indirect-segments`: largest number of segments of an indirect request.
    pub max_indirect_segments: u32,
    /// `feature-persistent`: grants may stay mapped between requests.
    pub persistent: bool,
    /// `feature-flush-cache`: the flush operation works.
    pub flush_cache: bool,
    /// `feature-barrier`: the barrier operation works.
    pub barrier: bool,
    /// `feature-discard`: the discard operation works.
    pub discard: bool,
    /// `discard-granularity` in bytes, 0 if unknown.
    pub discard_granularity: u32,
    /// `discard-alignment`: offset of the first granule, in bytes.
    pub discard_alignment: u32,
    /// `discard-secure`: the flag for secure discard works.
    pub discard_secure: bool,
}

impl Default for BackOffer {
    fn default() -> Self {
        BackOffer {
            max_ring_page_order: 0,
            max_queues: 1,
            max_indirect_segments: 0,
            persistent: false,
            flush_cache: false,
            barrier: false,
            discard: false,
            discard_granularity: 0,
            discard_alignment: 0,
            discard_secure: false,
        }
    }
}

impl BackOffer {
    /// Nodes of the backend's directory that make up the offer. All are optional.
    pub const NODES: [&'static str; 10] = [
        "max-ring-page-order",
        "multi-queue-max-queues",
        "feature-max-indirect-segments",
        "feature-persistent",
        "feature-flush-cache",
        "feature-barrier",
        "feature-discard",
        "discard-granularity",
        "discard-alignment",
        "discard-secure",
    ];

    /// Takes over a node. On an error the offer stays as it was. A name that is not one of
    /// [`BackOffer::NODES`] has no effect.
    pub fn set(&mut self, node: &'static str, text: &[u8]) -> Result<(), BadNode> {
        match node {
            "max-ring-page-order" => self.max_ring_page_order = node::decimal_u32(node, text)?,
            "multi-queue-max-queues" => self.max_queues = node::decimal_u32(node, text)?,
            "feature-max-indirect-segments" => {
                self.max_indirect_segments = node::decimal_u32(node, text)?
            }
            "feature-persistent" => self.persistent = node::switch(node, text)?,
            "feature-flush-cache" => self.flush_cache = node::switch(node, text)?,
            "feature-barrier" => self.barrier = node::switch(node, text)?,
            "feature-discard" => self.discard = node::switch(node, text)?,
            "discard-granularity" => self.discard_granularity = node::decimal_u32(node, text)?,
            "discard-alignment" => self.discard_alignment = node::decimal_u32(node, text)?,
            "discard-secure" => self.discard_secure = node::switch(node, text)?,
            _ => {}
        }
        Ok(())
    }
}

/// Number and size of the rings of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RingShape {
    /// Size of each ring, as the binary logarithm of its pages: 0 to 4.
    pub page_order: u32,
    /// Number of rings, at least 1.
    pub queues: u32,
}

impl RingShape {
    /// The shape that the frontend chooses.
    pub fn choose(front: &FrontOffer, back: &BackOffer) -> Self {
        RingShape {
            page_order: front
                .max_ring_page_order
                .min(back.max_ring_page_order)
                .min(MAX_PAGE_ORDER),
            queues: front.max_queues.min(back.max_queues).max(1),
        }
    }

    /// Pages of each ring.
    pub fn pages(&self) -> u32 {
        1u32.checked_shl(self.page_order).unwrap_or(1)
    }
}

/// How a flush is asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flush {
    /// Not at all: the disk has no volatile cache, or none that the backend can flush.
    None,
    /// With the flush operation.
    Cache,
    /// With an empty barrier. It makes durable what was answered before, and promises nothing
    /// about data that it carries: a C backend's barrier flushes before its write, not after.
    Barrier,
}

impl Flush {
    /// The operation on the wire.
    pub const fn operation(self) -> Option<u8> {
        match self {
            Flush::None => None,
            Flush::Cache => Some(op::FLUSH_DISKCACHE),
            Flush::Barrier => Some(op::WRITE_BARRIER),
        }
    }
}

/// How sectors can be discarded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Discard {
    /// Smallest unit in bytes, 0 if unknown.
    pub granularity: u32,
    /// Offset of the first unit in bytes.
    pub alignment: u32,
    /// Secure discard works.
    pub secure: bool,
}

/// What the two sides of a connection agreed on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Features {
    /// Number and size of the rings.
    pub rings: RingShape,
    /// Segments of an indirect request: 0 for none, else 12 to 4096.
    pub indirect_segments: u16,
    /// Grants stay mapped between requests.
    pub persistent: bool,
    /// How a flush is asked for. There is no FUA: the block layer does it with a flush.
    pub flush: Flush,
    /// How sectors can be discarded, if at all.
    pub discard: Option<Discard>,
    /// Data goes through pages that hold nothing else.
    pub bounce: bool,
}

/// The features of a connection, from what both sides offer.
pub fn negotiate(front: &FrontOffer, back: &BackOffer) -> Features {
    let persistent = front.persistent && back.persistent;
    Features {
        rings: RingShape::choose(front, back),
        indirect_segments: indirect_segments(front, back),
        persistent,
        flush: flush(back),
        discard: discard(back),
        bounce: persistent || !front.trusted,
    }
}

/// No more indirect segments than fit into a slot are none at all.
fn indirect_segments(front: &FrontOffer, back: &BackOffer) -> u16 {
    let most = front.max_indirect_segments.min(back.max_indirect_segments);
    match most.min(INDIRECT_SEGMENTS as u32) as u16 {
        few if usize::from(few) <= DIRECT_SEGMENTS => 0,
        segments => segments,
    }
}

fn flush(back: &BackOffer) -> Flush {
    if back.flush_cache {
        Flush::Cache
    } else if back.barrier {
        Flush::Barrier
    } else {
        Flush::None
    }
}

fn discard(back: &BackOffer) -> Option<Discard> {
    back.discard.then_some(Discard {
        granularity: back.discard_granularity,
        alignment: back.discard_alignment,
        secure: back.discard_secure,
    })
}

/// What a backend says about its disk, as far as it was read.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DiskNodes {
    sectors: Option<u64>,
    info: Option<u32>,
    sector_size: Option<u32>,
    physical_sector_size: Option<u32>,
}

impl DiskNodes {
    /// Nodes of the backend's directory that describe the disk. All but the last are required.
    pub const NODES: [&'static str; 4] = ["sectors", "info", "sector-size", "physical-sector-size"];

    /// Takes over a node. A name that is not one of [`DiskNodes::NODES`] has no effect.
    pub fn set(&mut self, node: &'static str, text: &[u8]) -> Result<(), BadNode> {
        match node {
            "sectors" => self.sectors = Some(sectors(text)?),
            "info" => self.info = Some(node::decimal_u32(node, text)?),
            "sector-size" => self.sector_size = Some(block_size(node, text)?),
            "physical-sector-size" => self.physical_sector_size = Some(block_size(node, text)?),
            _ => {}
        }
        Ok(())
    }

    /// The disk, or the first required node that is missing.
    pub fn disk(&self) -> Result<Disk, BadNode> {
        let sectors = self.sectors.ok_or(BadNode::missing("sectors"))?;
        let info = self.info.ok_or(BadNode::missing("info"))?;
        let block_size = self.sector_size.ok_or(BadNode::missing("sector-size"))?;
        let physical = self.physical_sector_size.unwrap_or(block_size);
        Ok(Disk {
            sectors,
            info,
            block_size,
            physical_block_size: physical.max(block_size),
        })
    }
}

/// Reads the node `sectors`, also alone when a disk changes its size. The size in bytes must be a
/// positive `i64`, the kernel's type for offsets.
pub fn sectors(text: &[u8]) -> Result<u64, BadNode> {
    node::decimal("sectors", text, i64::MAX as u64 / u64::from(SECTOR_SIZE))
}

fn block_size(node: &'static str, text: &[u8]) -> Result<u32, BadNode> {
    let size = node::decimal_u32(node, text)?;
    if !size.is_power_of_two() || !(SECTOR_SIZE..=MAX_BLOCK_SIZE).contains(&size) {
        let wrong = Wrong::NotABlockSize {
            min: SECTOR_SIZE,
            max: MAX_BLOCK_SIZE,
        };
        return Err(BadNode::new(node, text, wrong));
    }
    Ok(size)
}

/// A disk as its backend describes it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Disk {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Flags of the module [`info`].
    pub info: u32,
    /// Logical block size in bytes: a power of two from 512 to 65536.
    pub block_size: u32,
    /// Physical block size in bytes: a power of two, at least `block_size`.
    pub physical_block_size: u32,
}

impl Disk {
    /// The disk refuses writes.
    pub const fn read_only(&self) -> bool {
        self.info & info::READONLY != 0
    }

    /// The medium is removable.
    pub const fn removable(&self) -> bool {
        self.info & info::REMOVABLE != 0
    }

    /// The disk is a CD-ROM drive.
    pub const fn cdrom(&self) -> bool {
        self.info & info::CDROM != 0
    }
}

/// What a backend can do at most: its module parameters, as it wrote them at probe.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackLimits {
    /// Largest ring, as the binary logarithm of its pages.
    pub max_ring_page_order: u32,
    /// Largest number of rings.
    pub max_queues: u32,
    /// Use persistent grants if the frontend does.
    pub persistent: bool,
}

/// What a frontend chose in its directory, as far as it was read.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FrontChoice {
    protocol: Option<Abi>,
    queues: Option<u32>,
    ring_page_order: Option<u32>,
    persistent: bool,
}

/// What a backend connects with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Accepted {
    /// Layout of the rings.
    pub abi: Abi,
    /// Number and size of the rings.
    pub rings: RingShape,
    /// The ring's pages are in the nodes `ring-ref0`, `ring-ref1`, ... and not in `ring-ref`.
    pub numbered_refs: bool,
    /// The rings are in directories `queue-0`, `queue-1`, ... and not in the frontend's own.
    pub queue_dirs: bool,
    /// Grants stay mapped between requests.
    pub persistent: bool,
}

impl FrontChoice {
    /// Nodes of the frontend's directory that make up the choice. All are optional.
    pub const NODES: [&'static str; 4] = [
        "protocol",
        "multi-queue-num-queues",
        "ring-page-order",
        "feature-persistent",
    ];

    /// Takes over a node. A name that is not one of [`FrontChoice::NODES`] has no effect.
    pub fn set(&mut self, node: &'static str, text: &[u8]) -> Result<(), BadNode> {
        match node {
            "protocol" => {
                let unknown = || BadNode::new(node, text, Wrong::Unknown);
                self.protocol = Some(Abi::from_name(text).ok_or_else(unknown)?);
            }
            "multi-queue-num-queues" => self.queues = Some(node::decimal_u32(node, text)?),
            "ring-page-order" => self.ring_page_order = Some(node::decimal_u32(node, text)?),
            "feature-persistent" => self.persistent = node::switch(node, text)?,
            _ => {}
        }
        Ok(())
    }

    /// Checks the choice against what the backend offered.
    pub fn check(&self, limits: &BackLimits) -> Result<Accepted, BadChoice> {
        let queues = self.queues.unwrap_or(1);
        if queues == 0 || queues > limits.max_queues.max(1) {
            return Err(BadChoice::Queues {
                queues,
                limit: limits.max_queues,
            });
        }
        let order = self.ring_page_order.unwrap_or(0);
        let limit = limits.max_ring_page_order.min(MAX_PAGE_ORDER);
        if order > limit {
            return Err(BadChoice::RingPageOrder { order, limit });
        }
        Ok(Accepted {
            abi: self.protocol.unwrap_or(Abi::when_absent()),
            rings: RingShape {
                page_order: order,
                queues,
            },
            numbered_refs: self.ring_page_order.is_some(),
            queue_dirs: queues > 1,
            persistent: self.persistent && limits.persistent,
        })
    }
}

/// A frontend's choice that was not offered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BadChoice {
    /// `multi-queue-num-queues` is 0 or larger than offered.
    Queues {
        /// As written.
        queues: u32,
        /// As offered.
        limit: u32,
    },
    /// `ring-page-order` is larger than offered.
    RingPageOrder {
        /// As written.
        order: u32,
        /// As offered.
        limit: u32,
    },
}

impl fmt::Display for BadChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadChoice::Queues { queues, limit } => {
                write!(
                    f,
                    "multi-queue-num-queues = \"{queues}\": not from 1 to {limit}"
                )
            }
            BadChoice::RingPageOrder { order, limit } => {
                write!(f, "ring-page-order = \"{order}\": larger than {limit}")
            }
        }
    }
}
