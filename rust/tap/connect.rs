// SPDX-License-Identifier: GPL-2.0-only

//! The connection to a frontend: reads its nodes, writes ours, and maps its rings.

use crate::barrier::BarrierGate;
use crate::barrier::GateMember;
use crate::disk::Disk;
use crate::disk::MAX_INDIRECT_SEGMENTS;
use crate::error::During;
use crate::error::Error;
use crate::inflight::Identity;
use crate::inflight::InflightFile;
use crate::inflight::InflightTable;
use crate::memory::DataPath;
use crate::queue::EventSender;
use crate::queue::Queue;
use crate::queue::QueueConfig;
use crate::queue::QueueControl;
use crate::queue::Settings;
use crate::ring::RingMemory;
use crate::stats::Stats;
use crate::wakeup::Wakeup;
use crate::xenstore::read;
use crate::xenstore::read_state;
use crate::xenstore::write;
use api::Quota;
use blkif::negotiate::Accepted;
use blkif::negotiate::BackLimits;
use blkif::negotiate::FrontChoice;
use blkif::node;
use blkif::node::InvalidNode;
use blkif::ring;
use blkif::ring::BackRing;
use blkif::ring::SharedMemory;
use blkif::state::XenbusState;
use engine::Access;
use engine::Engine;
use std::io;
use std::sync::Arc;
use xen_user::event::Channel;
use xen_user::event::Events;
use xen_user::grant::Grants;
use xen_user::xenstore::Nodes;
use xen_user::xenstore::Xenstore;

/// Writes the offers that do not depend on the disk.
pub(crate) fn write_offers(
    nodes: &mut impl Nodes,
    dir: &str,
    limits: &BackLimits,
) -> io::Result<()> {
    let indirect = MAX_INDIRECT_SEGMENTS;
    write(nodes, dir, "feature-max-indirect-segments", indirect)?;
    write(nodes, dir, "multi-queue-max-queues", limits.max_queues)?;
    write(
        nodes,
        dir,
        "max-ring-page-order",
        limits.max_ring_page_order,
    )
}

/// Reads the choice of the frontend and checks it.
fn read_choice(
    nodes: &mut impl Nodes,
    frontend: &str,
    limits: &BackLimits,
) -> Result<Accepted, Error> {
    let mut choice = FrontChoice::default();
    for node in FrontChoice::NODES {
        if let Some(value) = read(nodes, frontend, node)? {
            choice.set(node, &value).map_err(Error::Node)?;
        }
    }
    choice.check(limits).map_err(Error::Choice)
}

/// Xen's devices, as the queues use them.
pub struct Xen {
    /// Maps and copies pages.
    pub grants: Arc<dyn Grants>,
    /// Binds event channels.
    pub events: Box<dyn Events>,
}

/// The parts that the queues of a connection are created from.
pub(crate) struct Parts<'a> {
    pub(crate) xen: &'a Xen,
    pub(crate) engine: &'a dyn Engine,
    pub(crate) disk: &'a Arc<Disk>,
    pub(crate) stats: &'a Arc<Stats>,
    /// Directory of the frontend.
    pub(crate) frontend: &'a str,
    pub(crate) domain: u16,
    pub(crate) name: &'a str,
    pub(crate) limits: &'a BackLimits,
    pub(crate) inflight: &'a InflightFile,
    pub(crate) events: EventSender,
    pub(crate) settings: Settings,
    /// The pages and requests that the disk may use.
    pub(crate) quota: Quota,
}

/// A connection whose rings are mapped.
pub(crate) struct Connection {
    pub(crate) accepted: Accepted,
    pub(crate) queues: Vec<(Queue, Arc<QueueControl>)>,
    pub(crate) inflight: InflightTable,
    /// Number of requests that were adopted.
    pub(crate) adopted: usize,
    /// First page of the first ring.
    first_reference: u32,
}

/// A ring that is mapped, and its event channel.
struct MappedRing {
    memory: RingMemory,
    channel: Box<dyn Channel>,
    first_reference: u32,
    port: u32,
}

impl Connection {
    /// Maps the rings that the frontend has offered. `adopt`: a predecessor may have left requests
    /// in flight.
    pub(crate) fn new(store: &mut Xenstore, parts: &Parts<'_>, adopt: bool) -> Result<Self, Error> {
        let accepted = read_choice(store, parts.frontend, parts.limits)?;
        let mut rings = Vec::new();
        for index in 0..accepted.rings.queues {
            rings.push(map_ring(store, parts, &accepted, index)?);
        }
        let identity = Identity {
            abi: accepted.abi,
            capacity: rings
                .first()
                .map_or(0, |ring| ring::capacity(ring.memory.words(), accepted.abi)),
            rings: rings
                .iter()
                .map(|ring| (ring.first_reference, ring.port))
                .collect(),
        };
        let first_reference = rings.first().map_or(0, |ring| ring.first_reference);
        let found = if adopt {
            let found = parts.inflight.find(identity.clone());
            found.during("reading the in-flight table")?
        } else {
            None
        };
        let is_adopted = found.is_some();
        let inflight = match found {
            Some(table) => table,
            None => {
                let created = parts.inflight.create(identity);
                created.during("creating the in-flight table")?
            }
        };
        let gate = Arc::new(BarrierGate::default());
        let mut connection = Self {
            accepted,
            queues: Vec::new(),
            inflight,
            adopted: 0,
            first_reference,
        };
        for (index, ring) in (0..).zip(rings) {
            connection.add_queue(parts, index, ring, &gate, is_adopted)?;
        }
        Ok(connection)
    }

    fn add_queue(
        &mut self,
        parts: &Parts<'_>,
        index: u32,
        ring: MappedRing,
        gate: &Arc<BarrierGate>,
        adopt: bool,
    ) -> Result<(), Error> {
        let number = usize::try_from(index).unwrap_or(usize::MAX);
        let wrong = |error| Error::Ring(index, error);
        let MappedRing {
            memory, channel, ..
        } = ring;
        let mut ring = BackRing::attach(memory, self.accepted.abi).map_err(wrong)?;
        // The frontend can change `rsp_prod` in the ring: it is read once.
        let responses = ring.responses_published();
        let (inflight, consumer, adopted) = if adopt {
            let (inflight, adopted) = self.inflight.adopt(number, responses);
            ring.adopt(adopted.consumer).map_err(wrong)?;
            (inflight, adopted.consumer, adopted.requests)
        } else {
            let inflight = self.inflight.queue(number, responses);
            (inflight, responses, Vec::new())
        };
        self.adopted = self.adopted.saturating_add(adopted.len());
        let queues = usize::try_from(self.accepted.rings.queues).unwrap_or(usize::MAX);
        let quota = parts.quota.share(queues);
        let wakeup = Arc::new(Wakeup::new().during("creating a queue")?);
        let control = Arc::new(QueueControl::new(wakeup.clone(), quota));
        let depth = ring.capacity();
        let data = DataPath::new(
            parts.domain,
            parts.xen.grants.clone(),
            self.accepted.persistent,
            parts.engine.shared_memory(),
        );
        let queue = Queue::new(QueueConfig {
            name: format!("{}-{index}", parts.name),
            index,
            ring,
            channel,
            image: parts.engine.queue(depth)?,
            data,
            domain: parts.domain,
            disk: parts.disk.clone(),
            gate: GateMember::new(gate, index, &wakeup),
            stats: parts.stats.clone(),
            control: control.clone(),
            events: parts.events.clone(),
            inflight,
            consumer,
            responses,
            adopted,
            settings: parts.settings,
        });
        self.queues.push((queue, control));
        Ok(())
    }

    /// Returns `true` if the frontend still offers the rings that are mapped. New rings would have
    /// other grant references: a reference is not reused while its page is mapped.
    pub(crate) fn is_offered(&self, nodes: &mut impl Nodes, frontend: &str) -> bool {
        let state = read_state(nodes, frontend);
        let waits = matches!(
            state,
            Ok(Some(XenbusState::Initialised | XenbusState::Connected))
        );
        let reference = number(
            nodes,
            frontend,
            &self.accepted,
            0,
            "ring-ref",
            &first_node(&self.accepted),
        );
        waits && reference.ok() == Some(self.first_reference)
    }
}

/// Writes the properties and features of the disk.
pub(crate) fn write_disk(
    nodes: &mut impl Nodes,
    dir: &str,
    disk: &Disk,
    persistent: bool,
    cdrom: bool,
) -> io::Result<()> {
    write(nodes, dir, "feature-flush-cache", 1)?;
    write(nodes, dir, "feature-barrier", 1)?;
    if let Some(discard) = disk.discard() {
        write(nodes, dir, "discard-granularity", discard.granularity)?;
        write(nodes, dir, "discard-alignment", discard.alignment)?;
        write(nodes, dir, "discard-secure", 0)?;
        write(nodes, dir, "feature-discard", 1)?;
    }
    write(nodes, dir, "feature-persistent", u32::from(persistent))?;
    write(nodes, dir, "sectors", disk.sectors())?;
    write(nodes, dir, "info", disk.info_node(cdrom))?;
    write(nodes, dir, "sector-size", disk.block_size())?;
    let physical = disk.physical_block_size();
    write(nodes, dir, "physical-sector-size", physical)
}

/// Maps the ring of a queue, and binds its event channel.
fn map_ring(
    nodes: &mut impl Nodes,
    parts: &Parts<'_>,
    accepted: &Accepted,
    index: u32,
) -> Result<MappedRing, Error> {
    let mut references = Vec::new();
    for page in 0..accepted.rings.pages() {
        let node = if accepted.numbered_refs {
            format!("ring-ref{page}")
        } else {
            "ring-ref".to_string()
        };
        references.push(number(
            nodes,
            parts.frontend,
            accepted,
            index,
            "ring-ref",
            &node,
        )?);
    }
    let first_reference = references.first().copied().unwrap_or(0);
    let node = "event-channel";
    let port = number(nodes, parts.frontend, accepted, index, node, node)?;
    let grants: &dyn Grants = &*parts.xen.grants;
    let pages = grants
        .map(parts.domain, &references, Access::ReadWrite)
        .map_err(|error| Error::Refused(index, "ring-ref", first_reference, error))?;
    let channel = parts
        .xen
        .events
        .bind(parts.domain, port)
        .map_err(|error| Error::Refused(index, node, port, error))?;
    Ok(MappedRing {
        memory: RingMemory::new(pages),
        channel,
        first_reference,
        port,
    })
}

/// Returns the node of the first page of a ring.
fn first_node(accepted: &Accepted) -> String {
    let node = if accepted.numbered_refs {
        "ring-ref0"
    } else {
        "ring-ref"
    };
    node.to_string()
}

/// Reads a number in the directory of a queue.
fn number(
    nodes: &mut impl Nodes,
    frontend: &str,
    accepted: &Accepted,
    index: u32,
    name: &'static str,
    node: &str,
) -> Result<u32, Error> {
    let value = if accepted.queue_dirs {
        read(nodes, frontend, &format!("queue-{index}/{node}"))?
    } else {
        read(nodes, frontend, node)?
    };
    let number = match &value {
        Some(value) => node::decimal_u32(name, value),
        None => Err(InvalidNode::missing(name)),
    };
    number.map_err(|bad| Error::Queue(index, bad))
}
