// SPDX-License-Identifier: GPL-2.0-only

//! Negotiation: from two sets of offers to one set of features.
//!
//! The negotiation has two steps. When the backend is in InitWait, the frontend chooses number and
//! size of the rings within the backend's limits ([`RingShape`]) and writes them; the backend
//! checks that choice ([`FrontChoice::check`]). When the backend is Connected, the frontend reads
//! the properties of the disk ([`DiskNodes`]) and the features of the backend ([`BackOffer`]), and
//! computes the [`Features`] that the connection has.
//!
//! A set of nodes is read like this, for each name in its `NODES`:
//!
//! ```
//! # use blkif::negotiate::BackOffer;
//! # use blkif::node::InvalidNode;
//! # fn read(node: &str) -> Option<&'static [u8]> { (node == "feature-discard").then_some(b"1") }
//! let mut offer = BackOffer::default();
//! for node in BackOffer::NODES {
//!     if let Some(text) = read(node) {
//!         offer.set(node, text)?;
//!     }
//! }
//! assert!(offer.discard);
//! # Ok::<(), InvalidNode>(())
//! ```
//!
//! An invalid optional node does not change the offer, as if it were missing: it causes a warning,
//! and the disk works without it.

use core::fmt;

use crate::{
    node::{
        self,
        InvalidNode,
        Reason, //
    },
    ring::MAX_PAGE_ORDER,
    wire::{
        info,
        op,
        Abi,
        DIRECT_SEGMENTS,
        INDIRECT_SEGMENTS,
        SECTOR_SIZE, //
    },
};

/// Largest accepted logical block size.
const MAX_BLOCK_SIZE: u32 = 1 << 16;

/// The limits within which the frontend chooses: its module parameters and its node `trusted`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FrontLimits {
    /// Largest ring, as the binary logarithm of its pages.
    pub max_ring_page_order: u32,
    /// Largest number of rings.
    pub max_queues: u32,
    /// Largest number of segments of an indirect request.
    pub max_indirect_segments: u32,
    /// `true` if persistent grants are used when the backend uses them.
    pub persistent: bool,
    /// `true` unless the parameter or the node is 0: the backend may read whole pages of a
    /// request's data.
    pub trusted: bool,
}

/// The offer in the backend's directory. The default is the offer of a backend that writes
/// nothing.
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
    /// `discard-alignment`: offset of the first unit of discard, in bytes.
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
    /// The nodes of [`BackOffer::NODES`] that limit the number and the size of the rings.
    pub const RING_NODES: [&'static str; 2] = ["max-ring-page-order", "multi-queue-max-queues"];

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

    /// Stores the value of a node.
    ///
    /// On an error the offer does not change. A name that is not one of [`BackOffer::NODES`] has no
    /// effect.
    pub fn set(&mut self, node: &'static str, text: &[u8]) -> Result<(), InvalidNode> {
        match node {
            "max-ring-page-order" => self.max_ring_page_order = node::decimal_u32(node, text)?,
            "multi-queue-max-queues" => self.max_queues = node::decimal_u32(node, text)?,
            "feature-max-indirect-segments" => {
                self.max_indirect_segments = node::decimal_u32(node, text)?
            }
            "feature-persistent" => self.persistent = node::boolean(node, text)?,
            "feature-flush-cache" => self.flush_cache = node::boolean(node, text)?,
            "feature-barrier" => self.barrier = node::boolean(node, text)?,
            "feature-discard" => self.discard = node::boolean(node, text)?,
            "discard-granularity" => self.discard_granularity = node::decimal_u32(node, text)?,
            "discard-alignment" => self.discard_alignment = node::decimal_u32(node, text)?,
            "discard-secure" => self.discard_secure = node::boolean(node, text)?,
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
    /// Returns the shape that the frontend chooses.
    pub fn choose(front: &FrontLimits, back: &BackOffer) -> Self {
        RingShape {
            page_order: front
                .max_ring_page_order
                .min(back.max_ring_page_order)
                .min(MAX_PAGE_ORDER),
            queues: front.max_queues.min(back.max_queues).max(1),
        }
    }

    /// Returns the number of pages of each ring.
    pub fn pages(&self) -> u32 {
        1u32.checked_shl(self.page_order).unwrap_or(1)
    }
}

/// The way to request a flush.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Flush {
    /// Never: the disk has no volatile cache, or none that the backend can flush.
    None,
    /// With the flush operation.
    Cache,
    /// With an empty barrier. It makes writes durable that were completed before, but not data of
    /// its own: a C backend's barrier flushes before its write, not after.
    Barrier,
    /// Never, but an earlier connection of the disk had a cache. Writes that were
    /// acknowledged then may still be in that cache, or lost with it: a flush fails.
    Unavailable,
}

impl Flush {
    /// Returns the operation on the wire.
    pub const fn operation(self) -> Option<u8> {
        match self {
            Flush::None | Flush::Unavailable => None,
            Flush::Cache => Some(op::FLUSH_DISKCACHE),
            Flush::Barrier => Some(op::WRITE_BARRIER),
        }
    }
}

/// The units in which sectors can be discarded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiscardLimits {
    /// Smallest unit in bytes, 0 if unknown.
    pub granularity: u32,
    /// Offset of the first unit in bytes.
    pub alignment: u32,
    /// Secure discard works.
    pub secure: bool,
}

/// The features that a frontend uses on a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Features {
    /// Number and size of the rings.
    pub rings: RingShape,
    /// Segments of an indirect request: 0 for none, else 12 to 4096.
    pub indirect_segments: u16,
    /// Grants stay mapped between requests.
    pub persistent: bool,
    /// The way to request a flush. There is no FUA: the block layer implements it with a flush.
    pub flush: Flush,
    /// `true` if each write is flushed before it is completed: the disk was created without a write
    /// cache, and the backend has one.
    pub write_through: bool,
    /// The units of discards, if the disk supports them.
    pub discard: Option<DiscardLimits>,
    /// `true` if data is copied to and from pages that contain nothing else.
    pub bounce: bool,
}

impl Features {
    /// Returns the features for a disk that an earlier connection has created.
    ///
    /// The write cache of a disk is set when the disk is created. Without one the block layer drops
    /// flushes and FUA; if the new backend has a cache, each write is followed by a flush
    /// (`write_through`). With one, flushes keep coming; if the new backend cannot flush, they fail
    /// ([`Flush::Unavailable`]), because earlier writes may not be durable.
    pub const fn for_disk(self, write_cache: bool) -> Self {
        let (flush, write_through) = match (self.flush, write_cache) {
            (Flush::None, true) => (Flush::Unavailable, false),
            (Flush::Cache | Flush::Barrier, false) => (self.flush, true),
            (flush, _) => (flush, false),
        };
        Features {
            flush,
            write_through,
            ..self
        }
    }

    /// Returns `true` if the block layer must send flushes.
    pub const fn write_cache(&self) -> bool {
        !matches!(self.flush, Flush::None) && !self.write_through
    }
}

/// Returns the features of a connection, from the offers of both sides.
pub fn negotiate(front: &FrontLimits, back: &BackOffer) -> Features {
    let persistent = front.persistent && back.persistent;
    Features {
        rings: RingShape::choose(front, back),
        indirect_segments: indirect_segments(front, back),
        persistent,
        flush: flush(back),
        write_through: false,
        discard: discard(back),
        bounce: persistent || !front.trusted,
    }
}

/// Returns the largest number of segments of an indirect request, or 0 if it is no larger than that
/// of a slot.
fn indirect_segments(front: &FrontLimits, back: &BackOffer) -> u16 {
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

fn discard(back: &BackOffer) -> Option<DiscardLimits> {
    back.discard.then_some(DiscardLimits {
        granularity: back.discard_granularity,
        alignment: back.discard_alignment,
        secure: back.discard_secure,
    })
}

/// The nodes that describe the disk, as far as they were read.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DiskNodes {
    sectors: Option<u64>,
    info: Option<u32>,
    sector_size: Option<u32>,
    physical_sector_size: Option<u32>,
    removable: bool,
}

impl DiskNodes {
    /// Nodes of the backend's directory that describe the disk. The first three are required.
    pub const NODES: [&'static str; 5] = [
        "sectors",
        "info",
        "sector-size",
        "physical-sector-size",
        "removable",
    ];

    /// Returns `true` if the node is required.
    ///
    /// Other nodes count as missing if they are invalid.
    pub fn is_required(node: &str) -> bool {
        matches!(node, "sectors" | "info" | "sector-size")
    }

    /// Stores the value of a node.
    ///
    /// A name that is not one of [`DiskNodes::NODES`] has no effect.
    pub fn set(&mut self, node: &'static str, text: &[u8]) -> Result<(), InvalidNode> {
        match node {
            "sectors" => self.sectors = Some(sectors(text)?),
            "info" => self.info = Some(node::decimal_u32(node, text)?),
            "sector-size" => self.sector_size = Some(block_size(node, text)?),
            "physical-sector-size" => self.physical_sector_size = Some(block_size(node, text)?),
            "removable" => self.removable = node::boolean(node, text)?,
            _ => {}
        }
        Ok(())
    }

    /// Returns the disk, or the first required node that is missing.
    pub fn disk(&self) -> Result<DiskProperties, InvalidNode> {
        let sectors = self.sectors.ok_or(InvalidNode::missing("sectors"))?;
        let mut info = self.info.ok_or(InvalidNode::missing("info"))?;
        if self.removable {
            info |= info::REMOVABLE;
        }
        let block_size = self
            .sector_size
            .ok_or(InvalidNode::missing("sector-size"))?;
        let physical = self.physical_sector_size.unwrap_or(block_size);
        Ok(DiskProperties {
            sectors,
            info,
            block_size,
            physical_block_size: physical.max(block_size),
        })
    }
}

/// Reads the node `sectors`.
///
/// The size in bytes must not exceed `i64::MAX`, the kernel's largest offset.
fn sectors(text: &[u8]) -> Result<u64, InvalidNode> {
    node::decimal("sectors", text, i64::MAX as u64 / u64::from(SECTOR_SIZE))
}

fn block_size(node: &'static str, text: &[u8]) -> Result<u32, InvalidNode> {
    let size = node::decimal_u32(node, text)?;
    if !size.is_power_of_two() || !(SECTOR_SIZE..=MAX_BLOCK_SIZE).contains(&size) {
        let wrong = Reason::NotPowerOfTwo {
            min: SECTOR_SIZE,
            max: MAX_BLOCK_SIZE,
        };
        return Err(InvalidNode::new(node, text, wrong));
    }
    Ok(size)
}

/// The properties of a disk, according to its backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DiskProperties {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Flags of the module [`info`].
    pub info: u32,
    /// Logical block size in bytes: a power of two from 512 to 65536.
    pub block_size: u32,
    /// Physical block size in bytes: a power of two, at least `block_size`.
    pub physical_block_size: u32,
}

impl DiskProperties {
    /// Returns `true` if the disk is read-only.
    pub const fn read_only(&self) -> bool {
        self.info & info::READONLY != 0
    }

    /// Returns `true` if the medium is removable.
    pub const fn removable(&self) -> bool {
        self.info & info::REMOVABLE != 0
    }

    /// Returns `true` if the disk is a CD-ROM drive.
    pub const fn cdrom(&self) -> bool {
        self.info & info::CDROM != 0
    }
}

/// The limits of a backend: its module parameters when it wrote its features.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackLimits {
    /// Largest ring, as the binary logarithm of its pages.
    pub max_ring_page_order: u32,
    /// Largest number of rings.
    pub max_queues: u32,
    /// `true` if persistent grants are used when the frontend uses them.
    pub persistent: bool,
}

/// The choice in the frontend's directory: the nodes that were read.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FrontChoice {
    protocol: Option<Abi>,
    queues: Option<u32>,
    ring_page_order: Option<u32>,
    persistent: bool,
}

/// A choice that the backend has accepted.
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

impl BackLimits {
    /// Returns the largest number of rings, at least 1.
    fn queues(&self) -> u32 {
        self.max_queues.max(1)
    }

    /// Returns the largest ring, as the binary logarithm of its pages, at most 4.
    fn page_order(&self) -> u32 {
        self.max_ring_page_order.min(MAX_PAGE_ORDER)
    }
}

impl FrontChoice {
    /// Nodes of the frontend's directory that make up the choice. All are optional.
    pub const NODES: [&'static str; 4] = [
        "protocol",
        "multi-queue-num-queues",
        "ring-page-order",
        "feature-persistent",
    ];

    /// Stores the value of a node.
    ///
    /// A name that is not one of [`FrontChoice::NODES`] has no effect.
    pub fn set(&mut self, node: &'static str, text: &[u8]) -> Result<(), InvalidNode> {
        match node {
            "protocol" => {
                let unknown = || InvalidNode::new(node, text, Reason::Unknown);
                self.protocol = Some(Abi::from_name(text).ok_or_else(unknown)?);
            }
            "multi-queue-num-queues" => self.queues = Some(node::decimal_u32(node, text)?),
            "ring-page-order" => self.ring_page_order = Some(node::decimal_u32(node, text)?),
            "feature-persistent" => self.persistent = node::boolean(node, text)?,
            _ => {}
        }
        Ok(())
    }

    /// Checks the choice against the limits of the backend.
    pub fn check(&self, limits: &BackLimits) -> Result<Accepted, InvalidChoice> {
        let queues = self.queues.unwrap_or(1);
        let limit = limits.queues();
        if queues == 0 || queues > limit {
            return Err(InvalidChoice::Queues { queues, limit });
        }
        let order = self.ring_page_order.unwrap_or(0);
        let limit = limits.page_order();
        if order > limit {
            return Err(InvalidChoice::RingPageOrder { order, limit });
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
pub enum InvalidChoice {
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

impl fmt::Display for InvalidChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InvalidChoice::Queues { queues, limit } => {
                write!(
                    f,
                    "multi-queue-num-queues = \"{queues}\": not from 1 to {limit}"
                )
            }
            InvalidChoice::RingPageOrder { order, limit } => {
                write!(f, "ring-page-order = \"{order}\": larger than {limit}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    const FRONT: FrontLimits = FrontLimits {
        max_ring_page_order: 4,
        max_queues: 4,
        max_indirect_segments: 32,
        persistent: true,
        trusted: true,
    };

    fn offer(nodes: &[(&'static str, &str)]) -> BackOffer {
        let mut offer = BackOffer::default();
        for (node, text) in nodes {
            assert!(BackOffer::NODES.contains(node));
            offer.set(node, text.as_bytes()).unwrap();
        }
        offer
    }

    fn features(nodes: &[(&'static str, &str)]) -> Features {
        negotiate(&FRONT, &offer(nodes))
    }

    #[test]
    fn nodes_of_rings_are_of_the_offer() {
        for node in BackOffer::RING_NODES {
            assert!(BackOffer::NODES.contains(&node));
        }
    }

    #[test]
    fn a_disk_needs_what_is_required_and_no_more() {
        let mut nodes = DiskNodes::default();
        for node in DiskNodes::NODES {
            assert_eq!(nodes.disk().is_err(), DiskNodes::is_required(node));
            if DiskNodes::is_required(node) {
                nodes.set(node, b"512").unwrap();
            }
        }
        assert!(nodes.disk().is_ok());
    }

    #[test]
    fn a_backend_that_offers_nothing() {
        let expected = Features {
            rings: RingShape {
                page_order: 0,
                queues: 1,
            },
            indirect_segments: 0,
            persistent: false,
            flush: Flush::None,
            write_through: false,
            discard: None,
            bounce: false,
        };
        assert_eq!(features(&[]), expected);
    }

    #[test]
    fn a_linux_backend() {
        let features = features(&[
            ("max-ring-page-order", "4"),
            ("multi-queue-max-queues", "2"),
            ("feature-max-indirect-segments", "256"),
            ("feature-persistent", "1"),
            ("feature-flush-cache", "1"),
            ("feature-barrier", "1"),
            ("feature-discard", "1"),
            ("discard-granularity", "4096"),
            ("discard-alignment", "512"),
            ("discard-secure", "1"),
        ]);
        let expected = Features {
            rings: RingShape {
                page_order: 4,
                queues: 2,
            },
            indirect_segments: 32,
            persistent: true,
            flush: Flush::Cache,
            write_through: false,
            discard: Some(DiscardLimits {
                granularity: 4096,
                alignment: 512,
                secure: true,
            }),
            bounce: true,
        };
        assert_eq!(features, expected);
    }

    #[test]
    fn the_smaller_ring_wins() {
        let order = |front, back: &str| {
            let front = FrontLimits {
                max_ring_page_order: front,
                ..FRONT
            };
            RingShape::choose(&front, &offer(&[("max-ring-page-order", back)])).page_order
        };
        assert_eq!(order(2, "4"), 2);
        assert_eq!(order(4, "3"), 3);
        assert_eq!(order(9, "9"), 4);
        assert_eq!(
            RingShape {
                page_order: 0,
                queues: 1
            }
            .pages(),
            1
        );
        assert_eq!(
            RingShape {
                page_order: 4,
                queues: 1
            }
            .pages(),
            16
        );
        assert_eq!(
            RingShape {
                page_order: 99,
                queues: 1
            }
            .pages(),
            1
        );
    }

    #[test]
    fn the_smaller_number_of_queues_wins() {
        let queues = |front, back: &str| {
            let front = FrontLimits {
                max_queues: front,
                ..FRONT
            };
            RingShape::choose(&front, &offer(&[("multi-queue-max-queues", back)])).queues
        };
        assert_eq!(queues(4, "2"), 2);
        assert_eq!(queues(2, "4"), 2);
        assert_eq!(queues(4, "0"), 1);
        assert_eq!(queues(0, "4"), 1);
    }

    #[test]
    fn indirect_segments() {
        let segments = |front, back: &str| {
            let front = FrontLimits {
                max_indirect_segments: front,
                ..FRONT
            };
            let back = offer(&[("feature-max-indirect-segments", back)]);
            negotiate(&front, &back).indirect_segments
        };
        assert_eq!(segments(32, "256"), 32);
        assert_eq!(segments(256, "32"), 32);
        assert_eq!(segments(12, "256"), 12);
        assert_eq!(segments(11, "256"), 0);
        assert_eq!(segments(32, "11"), 0);
        assert_eq!(segments(u32::MAX, "4294967295"), 4096);
        assert_eq!(segments(0x1_0020, "65568"), 4096);
    }

    #[test]
    fn persistent_takes_two() {
        for (front, back, both) in [
            (true, "1", true),
            (true, "0", false),
            (false, "1", false),
            (false, "0", false),
        ] {
            let front = FrontLimits {
                persistent: front,
                ..FRONT
            };
            let features = negotiate(&front, &offer(&[("feature-persistent", back)]));
            assert_eq!((features.persistent, features.bounce), (both, both));
        }
    }

    #[test]
    fn an_untrusted_backend_sees_only_bounced_data() {
        let front = FrontLimits {
            trusted: false,
            ..FRONT
        };
        let features = negotiate(&front, &BackOffer::default());
        assert_eq!((features.persistent, features.bounce), (false, true));
    }

    #[test]
    fn flush_is_better_than_barrier() {
        let flush = |cache, barrier| {
            features(&[("feature-flush-cache", cache), ("feature-barrier", barrier)]).flush
        };
        assert_eq!(flush("0", "0"), Flush::None);
        assert_eq!(flush("1", "0"), Flush::Cache);
        assert_eq!(flush("0", "1"), Flush::Barrier);
        assert_eq!(flush("1", "1"), Flush::Cache);
        assert_eq!(Flush::None.operation(), None);
        assert_eq!(Flush::Cache.operation(), Some(op::FLUSH_DISKCACHE));
        assert_eq!(Flush::Barrier.operation(), Some(op::WRITE_BARRIER));
    }

    #[test]
    fn the_cache_of_a_disk_stays_what_it_was() {
        use Flush::{
            Barrier,
            Cache,
            None,
            Unavailable, //
        };
        let expected = [
            (None, false, (None, false)),
            (None, true, (Unavailable, false)),
            (Cache, false, (Cache, true)),
            (Cache, true, (Cache, false)),
            (Barrier, false, (Barrier, true)),
            (Barrier, true, (Barrier, false)),
        ];
        for (flush, write_cache, (then, write_through)) in expected {
            let made = Features {
                flush,
                ..features(&[])
            };
            assert_eq!(made.write_cache(), flush != None);
            let kept = made.for_disk(write_cache);
            let expected = Features {
                flush: then,
                write_through,
                ..made
            };
            assert_eq!(kept, expected);
            assert_eq!(kept.write_cache(), write_cache);
        }
        assert_eq!(Unavailable.operation(), Option::None);
    }

    #[test]
    fn discard_details_without_discard_mean_nothing() {
        assert_eq!(
            features(&[("discard-secure", "1"), ("discard-granularity", "512")]).discard,
            None
        );
    }

    #[test]
    fn a_bad_node_leaves_the_offer_as_it_was() {
        for node in BackOffer::NODES {
            let mut offer = BackOffer::default();
            let bad = offer.set(node, b"many").unwrap_err();
            assert_eq!((bad.node(), bad.text()), (node, "many"));
            assert_eq!(offer, BackOffer::default());
        }
        let mut offer = BackOffer::default();
        assert_eq!(offer.set("feature-unheard-of", b"many"), Ok(()));
        assert_eq!(offer, BackOffer::default());
    }

    fn nodes(list: &[(&'static str, &str)]) -> DiskNodes {
        let mut nodes = DiskNodes::default();
        for (node, text) in list {
            assert!(DiskNodes::NODES.contains(node));
            nodes.set(node, text.as_bytes()).unwrap();
        }
        nodes
    }

    #[test]
    fn a_disk() {
        let disk = nodes(&[
            ("sectors", "2048"),
            ("info", "4"),
            ("sector-size", "512"),
            ("physical-sector-size", "4096"),
        ]);
        let expected = DiskProperties {
            sectors: 2048,
            info: 4,
            block_size: 512,
            physical_block_size: 4096,
        };
        assert_eq!(disk.disk(), Ok(expected));
    }

    #[test]
    fn a_disk_is_removable_by_info_or_by_a_node_of_its_own() {
        let required = [("sectors", "8"), ("sector-size", "512")];
        for (info, removable, expected) in [
            ("0", "0", false),
            ("2", "0", true),
            ("0", "1", true),
            ("2", "1", true),
        ] {
            let mut nodes = nodes(&required);
            nodes.set("info", info.as_bytes()).unwrap();
            nodes.set("removable", removable.as_bytes()).unwrap();
            assert_eq!(nodes.disk().unwrap().removable(), expected);
        }
        assert!(DiskNodes::default().set("removable", b"yes").is_err());
    }

    #[test]
    fn the_physical_block_is_at_least_the_logical_one() {
        let required = [("sectors", "8"), ("info", "0"), ("sector-size", "4096")];
        let disk = nodes(&required).disk().unwrap();
        assert_eq!(disk.physical_block_size, 4096);
        let mut nodes = nodes(&required);
        nodes.set("physical-sector-size", b"512").unwrap();
        assert_eq!(nodes.disk().unwrap().physical_block_size, 4096);
    }

    #[test]
    fn required_nodes_that_are_missing() {
        let all = [("sectors", "8"), ("info", "0"), ("sector-size", "512")];
        for without in all {
            let rest: std::vec::Vec<_> = all.into_iter().filter(|node| *node != without).collect();
            assert_eq!(nodes(&rest).disk(), Err(InvalidNode::missing(without.0)));
        }
    }

    #[test]
    fn nodes_of_a_disk_that_cannot_be() {
        let limits = Reason::NotPowerOfTwo {
            min: 512,
            max: 65536,
        };
        for node in ["sector-size", "physical-sector-size"] {
            for text in ["0", "256", "513", "3072", "131072", "4294967295"] {
                let mut nodes = DiskNodes::default();
                let bad = nodes.set(node, text.as_bytes()).unwrap_err();
                assert_eq!(bad, InvalidNode::new(node, text.as_bytes(), limits));
                assert_eq!(nodes, DiskNodes::default());
            }
            for text in ["512", "65536"] {
                assert_eq!(DiskNodes::default().set(node, text.as_bytes()), Ok(()));
            }
        }
        assert!(DiskNodes::default().set("info", b"ro").is_err());
        assert!(DiskNodes::default().set("sectors", b"-1").is_err());
        assert_eq!(DiskNodes::default().set("size", b"-1"), Ok(()));
    }

    #[test]
    fn the_largest_disk() {
        assert_eq!(sectors(b"18014398509481983"), Ok(i64::MAX as u64 / 512));
        let wrong = Reason::TooLarge {
            limit: 18_014_398_509_481_983,
        };
        assert_eq!(sectors(b"18014398509481984").unwrap_err().reason(), wrong);
    }

    #[test]
    fn flags_of_a_disk() {
        for (info, flags) in [
            (0, (false, false, false)),
            (1, (true, false, false)),
            (2, (false, true, false)),
            (4, (false, false, true)),
            (7, (true, true, true)),
            (!7, (false, false, false)),
        ] {
            let disk = DiskProperties {
                sectors: 0,
                info,
                block_size: 512,
                physical_block_size: 512,
            };
            assert_eq!((disk.cdrom(), disk.removable(), disk.read_only()), flags);
        }
    }

    const BACK: BackLimits = BackLimits {
        max_ring_page_order: 3,
        max_queues: 2,
        persistent: true,
    };

    fn choice(list: &[(&'static str, &str)]) -> FrontChoice {
        let mut choice = FrontChoice::default();
        for (node, text) in list {
            assert!(FrontChoice::NODES.contains(node));
            choice.set(node, text.as_bytes()).unwrap();
        }
        choice
    }

    #[test]
    fn a_frontend_that_says_nothing() {
        let expected = Accepted {
            abi: Abi::when_absent(),
            rings: RingShape {
                page_order: 0,
                queues: 1,
            },
            numbered_refs: false,
            queue_dirs: false,
            persistent: false,
        };
        assert_eq!(choice(&[]).check(&BACK), Ok(expected));
    }

    #[test]
    fn a_frontend_that_takes_all() {
        let choice = choice(&[
            ("protocol", "arm-abi"),
            ("multi-queue-num-queues", "2"),
            ("ring-page-order", "3"),
            ("feature-persistent", "1"),
        ]);
        let expected = Accepted {
            abi: Abi::Arm,
            rings: RingShape {
                page_order: 3,
                queues: 2,
            },
            numbered_refs: true,
            queue_dirs: true,
            persistent: true,
        };
        assert_eq!(choice.check(&BACK), Ok(expected));
        let without = BackLimits {
            persistent: false,
            ..BACK
        };
        assert!(!choice.check(&without).unwrap().persistent);
    }

    #[test]
    fn places_of_the_rings() {
        let accepted = choice(&[("ring-page-order", "0"), ("multi-queue-num-queues", "1")]);
        let accepted = accepted.check(&BACK).unwrap();
        assert_eq!((accepted.numbered_refs, accepted.queue_dirs), (true, false));
    }

    #[test]
    fn choices_that_were_not_offered() {
        for queues in [0, 3, u32::MAX] {
            let text = queues.to_string();
            let bad = choice(&[("multi-queue-num-queues", &text)]).check(&BACK);
            assert_eq!(bad, Err(InvalidChoice::Queues { queues, limit: 2 }));
        }
        let bad = choice(&[("ring-page-order", "4")]).check(&BACK);
        assert_eq!(
            bad,
            Err(InvalidChoice::RingPageOrder { order: 4, limit: 3 })
        );
        let large = BackLimits {
            max_ring_page_order: 99,
            ..BACK
        };
        assert!(choice(&[("ring-page-order", "4")]).check(&large).is_ok());
        let bad = choice(&[("ring-page-order", "5")]).check(&large);
        assert_eq!(
            bad,
            Err(InvalidChoice::RingPageOrder { order: 5, limit: 4 })
        );
    }

    #[test]
    fn one_queue_is_always_offered() {
        let none = BackLimits {
            max_queues: 0,
            ..BACK
        };
        assert_eq!(choice(&[]).check(&none).unwrap().rings.queues, 1);
        assert_eq!(none.queues(), 1);
        let bad = choice(&[("multi-queue-num-queues", "2")]).check(&none);
        assert_eq!(
            bad,
            Err(InvalidChoice::Queues {
                queues: 2,
                limit: 1
            })
        );
    }

    #[test]
    fn bad_nodes_of_a_choice() {
        let mut choice = FrontChoice::default();
        let bad = choice.set("protocol", b"s390-abi").unwrap_err();
        assert_eq!(
            bad,
            InvalidNode::new("protocol", b"s390-abi", Reason::Unknown)
        );
        for node in [
            "multi-queue-num-queues",
            "ring-page-order",
            "feature-persistent",
        ] {
            let bad = choice.set(node, b"all").unwrap_err();
            assert_eq!(bad, InvalidNode::new(node, b"all", Reason::NotANumber));
        }
        assert_eq!(choice.set("ring-ref", b"all"), Ok(()));
        assert_eq!(choice, FrontChoice::default());
    }

    #[test]
    fn messages() {
        let bad = InvalidChoice::Queues {
            queues: 3,
            limit: 2,
        };
        assert_eq!(
            bad.to_string(),
            "multi-queue-num-queues = \"3\": not from 1 to 2"
        );
        let bad = InvalidChoice::RingPageOrder { order: 5, limit: 4 };
        assert_eq!(bad.to_string(), "ring-page-order = \"5\": larger than 4");
    }
}
