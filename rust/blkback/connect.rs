// SPDX-License-Identifier: GPL-2.0-only

//! Connecting to a frontend: reads its directory, and writes to the backend's (`connect_ring()`,
//! `read_per_ring_refs()`, `connect()` of `xen-blkback`).
//!
//! [`Connection::new`] reads the choice of the frontend, [`Connection::connect_ring`] maps each of
//! its rings and creates the queue, and [`Connection::write_connected`] writes the properties of
//! the disk, with the state Connected. [`blkif::negotiate`] and [`blkif::node`] check the values
//! that are read.

use kernel::{
    fmt,
    prelude::*,
    str::{
        BStr,
        CStr,
        CString, //
    },
    sync::{
        aref::ARef,
        Arc, //
    }, //
};

use kernel_ext::{
    block::bdev::{
        Access,
        Claim,
        DeviceNumber, //
    },
    ratelimited,
    xen::{
        grant::ForeignRef,
        ring::MAX_PAGES,
        xenbus::{
            self,
            Switched, //
        },
        xenstore::{
            self,
            Context,
            DirectoryListing,
            NoTransaction,
            NodeError,
            Reader,
            Transaction, //
        }, //
    },
};

use blkif::{
    negotiate::{
        Accepted,
        BackLimits,
        FrontChoice, //
    },
    node::{
        self,
        InvalidNode,
        PhysicalDevice,
        Reason, //
    },
    state::XenbusState, //
};

use crate::{
    barrier::{
        BarrierGate,
        GateMember, //
    },
    disk::Disk,
    domain::Domain,
    error::{
        ConnectError,
        ResultExt, //
    },
    io_accounting::IoAccounting,
    queue::{
        Queue,
        QueueConfig, //
    },
    ring_channel::RingChannel,
    stats::{
        Counters,
        Stats, //
    },
    xenstore::{
        reader,
        READING, //
    }, //
};

/// Outcome of writing Connected.
pub(crate) enum ConnectOutcome {
    /// Connected was written.
    Connected,
    /// The frontend has withdrawn the rings that are mapped.
    Withdrawn,
    /// Another state was found, which must not be overwritten.
    Refused(XenbusState),
}

/// Opens the disk that the hotplug script has named.
///
/// Returns `None` if the script has not named a disk, or if a `disk` is open already.
///
/// Context: may sleep until I/O on the disk completes, possibly forever.
pub(crate) fn open_disk(
    xbdev: &xenbus::Device,
    disk: Option<&Disk>,
) -> Result<Option<Arc<Disk>>, ConnectError> {
    const NODE: &str = "physical-device";
    let reader = reader(xbdev.nodename());
    let Some(value) = reader.value(NODE).during(READING)? else {
        return Ok(None);
    };
    let PhysicalDevice {
        major,
        minor,
        sequence,
    } = node::physical_device(NODE, value.as_bytes()).map_err(ConnectError::Toolstack)?;
    let number = DeviceNumber::new(major, minor).ok_or_else(|| {
        ConnectError::Toolstack(InvalidNode::new(NODE, value.as_bytes(), Reason::Unknown))
    })?;
    if let Some(disk) = disk {
        if disk.number != number {
            ratelimited!(dev_warn!(
                xbdev.as_ref(),
                "{NODE} was changed to {major:x}:{minor:x}, which is ignored: detach the disk and attach it again\n"
            ));
        }
        return Ok(None);
    }
    let mode = reader.value("mode").during(READING)?;
    let mode = mode.ok_or(ConnectError::Toolstack(InvalidNode::missing("mode")))?;
    let (access, claim) = match mode.as_bytes() {
        [b'r'] => (Access::ReadOnly, Claim::None),
        mode if mode.contains(&b'w') && mode.contains(&b'!') => (Access::ReadWrite, Claim::None),
        mode if mode.contains(&b'w') => (Access::ReadWrite, Claim::Exclusive),
        other => {
            let bad = InvalidNode::new("mode", other, Reason::Unknown);
            return Err(ConnectError::Toolstack(bad));
        }
    };
    let mode = CString::try_from_fmt(fmt!("{}", &*mode)).during("copying the mode")?;
    let discard = reader.value("discard-enable").during(READING)?;
    let discard = discard.is_none_or(|value| value.as_bytes() != b"0");
    let disk = Disk::open(number, access, claim, mode, discard)
        .map_err(|error| ConnectError::Disk(number, access, error))?;
    let found = disk.bdev.disk_sequence();
    if let Some(wanted) = sequence.filter(|wanted| *wanted != found) {
        return Err(ConnectError::WrongSequence(number, wanted, found));
    }
    let disk = Arc::new(disk, GFP_KERNEL)
        .map_err(|_| ConnectError::Local("allocating the disk", ENOMEM))?;
    Ok(Some(disk))
}

/// Reads the choice of the frontend.
fn read_choice(frontend: &CStr, limits: &BackLimits) -> Result<Accepted, ConnectError> {
    let mut choice = FrontChoice::default();
    let listing = DirectoryListing::new(&NoTransaction, frontend);
    let reader = Reader::listed(frontend, &listing).ignore_empty();
    for node in FrontChoice::NODES {
        if let Some(value) = reader.value(node).during(READING)? {
            choice
                .set(node, value.as_bytes())
                .map_err(ConnectError::Node)?;
        }
    }
    choice.check(limits).map_err(ConnectError::Choice)
}

/// A connection to a frontend: the data that its queues share.
pub(crate) struct Connection<'a> {
    xbdev: &'a xenbus::Device,
    frontend: &'a CStr,
    domain: Arc<Domain>,
    accepted: Accepted,
    io_accounting: Arc<IoAccounting>,
    disk: Arc<Disk>,
    gate: Arc<BarrierGate>,
    /// Name of the virtual device, such as `xvda`.
    name: CString,
    /// The first page of the first ring, once that is mapped.
    first_ring_ref: Option<ForeignRef>,
}

impl<'a> Connection<'a> {
    /// Creates a connection to a frontend that has written its choice.
    pub(crate) fn new(
        xbdev: &'a xenbus::Device,
        frontend: &'a CStr,
        domain: &Arc<Domain>,
        disk: Arc<Disk>,
        limits: &BackLimits,
    ) -> Result<Self, ConnectError> {
        let accepted = read_choice(frontend, limits)?;
        let dev = reader(xbdev.nodename())
            .value("dev")
            .during(READING)?
            .ok_or(ConnectError::Toolstack(InvalidNode::missing("dev")))?;
        let name = dev.as_bytes();
        let name = name.strip_prefix(b"/dev/").unwrap_or(name);
        let name =
            CString::try_from_fmt(fmt!("{}", BStr::from_bytes(name))).during("copying the name")?;
        let listing = DirectoryListing::new(&NoTransaction, xbdev.nodename());
        let io_accounting = Arc::new(IoAccounting::read(xbdev, &listing)?, GFP_KERNEL)
            .map_err(Error::from)
            .during("allocating the I/O accounting")?;
        let gate =
            Arc::pin_init(BarrierGate::new(), GFP_KERNEL).during("allocating the barrier gate")?;
        Ok(Self {
            xbdev,
            frontend,
            domain: domain.clone(),
            accepted,
            io_accounting,
            disk,
            gate,
            name,
            first_ring_ref: None,
        })
    }

    /// Logs the result of the negotiation.
    pub(crate) fn log_result(&self) {
        let Accepted {
            abi,
            rings,
            persistent,
            ..
        } = &self.accepted;
        let (name, abi) = (&*self.name, abi.name());
        let (queues, pages) = (rings.queues, rings.pages());
        let persistent = if *persistent { "on" } else { "off" };
        ratelimited!(dev_info!(
            self.xbdev.as_ref(),
            "{name}: connected: rings: {queues}, pages of each: {pages}, ABI: {abi}, \
             persistent grants: {persistent}\n"
        ));
    }

    /// Returns the number of rings.
    pub(crate) fn queues(&self) -> u32 {
        self.accepted.rings.queues
    }

    /// Maps a ring, binds its event channel, and creates its queue.
    pub(crate) fn connect_ring(
        &mut self,
        index: u32,
        stats: &Stats,
    ) -> Result<Queue, ConnectError> {
        let (references, pages) = self.references(index)?;
        let references = references.get(..pages).unwrap_or_default();
        if index == 0 {
            self.first_ring_ref = references.first().copied();
        }
        let port = self.number(index, "event-channel", fmt!("event-channel"))?;
        let ring_channel =
            RingChannel::new(self.xbdev, index, references, port, self.accepted.abi)?;
        let counters = usize::try_from(index)
            .map_err(Error::from)
            .and_then(|index| stats.queue(index))
            .during("creating a queue")?;
        self.new_queue(index, ring_channel, counters)
            .during("creating a queue")
    }

    fn new_queue(
        &self,
        index: u32,
        ring_channel: RingChannel,
        counters: Arc<Counters>,
    ) -> Result<Queue> {
        let domain = self.domain.clone();
        Queue::new(QueueConfig {
            xbdev: ARef::from(self.xbdev),
            name: CString::try_from_fmt(fmt!("{}.{}-{index}", domain.id, *self.name))?,
            gate: GateMember::new(&self.gate, index, &ring_channel.wakeup)?,
            ring_channel,
            io_accounting: self.io_accounting.clone(),
            disk: self.disk.clone(),
            counters,
            domain,
            persistent: self.accepted.persistent,
        })
    }

    /// Reads the grant references of the pages of a ring.
    ///
    /// Returns them with their number.
    fn references(&self, index: u32) -> Result<([ForeignRef; MAX_PAGES], usize), ConnectError> {
        let mut references = [ForeignRef(0); MAX_PAGES];
        let pages = usize::try_from(self.accepted.rings.pages()).unwrap_or(MAX_PAGES);
        for (page, reference) in references.iter_mut().take(pages).enumerate() {
            let number = if self.accepted.numbered_refs {
                self.number(index, "ring-ref", fmt!("ring-ref{page}"))?
            } else {
                self.number(index, "ring-ref", fmt!("ring-ref"))?
            };
            *reference = ForeignRef(number);
        }
        Ok((references, pages))
    }

    /// Reads a number from the directory of a queue.
    fn number(
        &self,
        index: u32,
        name: &'static str,
        node: fmt::Arguments<'_>,
    ) -> Result<u32, ConnectError> {
        self.number_within(&NoTransaction, index, name, node)
    }

    fn number_within(
        &self,
        context: &impl Context,
        index: u32,
        name: &'static str,
        node: fmt::Arguments<'_>,
    ) -> Result<u32, ConnectError> {
        let reader = Reader::within(context, self.frontend).ignore_empty();
        let number = if self.accepted.queue_dirs {
            reader.parse_at(fmt!("queue-{index}/{node}"), name, node::decimal_u32)
        } else {
            reader.parse_at(node, name, node::decimal_u32)
        };
        match number {
            Ok(Some(number)) => Ok(number),
            Ok(None) => Err(ConnectError::Queue(index, InvalidNode::missing(name))),
            Err(NodeError::Invalid(invalid)) => Err(ConnectError::Queue(index, invalid)),
            Err(NodeError::Xenstore(error)) => Err(ConnectError::Local(READING, error)),
        }
    }

    /// Reads the grant reference of the first page of the first ring.
    fn read_first_ring_ref(&self, context: &impl Context) -> Result<ForeignRef, ConnectError> {
        let node = if self.accepted.numbered_refs {
            "ring-ref0"
        } else {
            "ring-ref"
        };
        self.number_within(context, 0, "ring-ref", fmt!("{node}"))
            .map(ForeignRef)
    }

    /// Returns `true` if the frontend still offers the rings that are mapped.
    ///
    /// Other rings would have other references, because a reference is not reused while its page is
    /// mapped.
    fn is_offered(&self, transaction: &Transaction) -> Result<bool> {
        let reader = Reader::within(transaction, self.frontend);
        let state = match reader.parse("state", node::decimal_u32) {
            Ok(state) => state.and_then(|number| XenbusState::try_from(number).ok()),
            Err(NodeError::Invalid(_)) => None,
            Err(NodeError::Xenstore(error)) => return Err(error),
        };
        if !matches!(
            state,
            Some(XenbusState::Initialised | XenbusState::Connected)
        ) {
            return Ok(false);
        }
        match self.read_first_ring_ref(transaction) {
            Ok(reference) => Ok(Some(reference) == self.first_ring_ref),
            Err(ConnectError::Local(_, error)) => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Writes the properties and features of the disk, and Connected (`connect()` of
    /// `xen-blkback`).
    ///
    /// Writes nothing if the state of the backend or of the frontend has changed since the rings
    /// were mapped.
    pub(crate) fn write_connected(&self) -> Result<ConnectOutcome, ConnectError> {
        let cdrom = reader(self.frontend)
            .value("device-type")
            .during(READING)?
            .is_some_and(|kind| kind.as_bytes() == b"cdrom");
        let disk = &self.disk;
        let dir = self.xbdev.nodename();
        let sectors = disk.bdev.sectors();
        let info = disk.announce_info(cdrom);
        let mut offered = true;
        let switched = self
            .xbdev
            .switch_state_with(XenbusState::Connected, |transaction| {
                offered = self.is_offered(transaction)?;
                if !offered {
                    return Err(EBUSY);
                }
                let write = |node: &str, value: u64| {
                    xenstore::write(transaction, dir, fmt!("{node}"), fmt!("{value}"))
                };
                let write_cache = disk.bdev.write_cache().into();
                write("feature-flush-cache", write_cache)?;
                write("feature-barrier", write_cache)?;
                if let Some(discard) = disk.discard {
                    write("discard-granularity", discard.granularity.into())?;
                    write("discard-alignment", discard.alignment.into())?;
                    write("discard-secure", discard.secure.into())?;
                    write("feature-discard", 1)?;
                }
                write("feature-persistent", self.accepted.persistent.into())?;
                write("sectors", sectors)?;
                write("info", info.into())?;
                let block_size = disk.bdev.logical_block_size().into();
                write("sector-size", block_size)?;
                let physical = disk.bdev.physical_block_size().into();
                write("physical-sector-size", physical)
            });
        match switched {
            Err(_) if !offered => Ok(ConnectOutcome::Withdrawn),
            Ok(Switched::Written) => {
                disk.set_written_sectors(sectors);
                Ok(ConnectOutcome::Connected)
            }
            Ok(Switched::Refused(found)) => Ok(ConnectOutcome::Refused(found)),
            Ok(Switched::Failed(error)) | Err(error) => Err(ConnectError::Local(
                "writing the properties of the disk",
                error,
            )),
        }
    }
}
