// SPDX-License-Identifier: GPL-2.0-only

//! Connecting to a frontend: what is read from its directory and written to ours.

use kernel::{
    fmt,
    prelude::*,
    str::{
        BStr,
        CStr,
        CString, //
    },
    sync::Arc, //
};

use kernel_ext::{
    block::bdev::{
        Access,
        Claim,
        DeviceNumber, //
    },
    ratelimited,
    xen::{
        events::EventChannel,
        grant::ForeignRef,
        ring::{
            MappedRing,
            MAX_PAGES, //
        },
        xenbus::{
            self,
            State,
            Switched, //
        },
        xenstore::{
            self,
            Context,
            DirectoryListing,
            NoTransaction,
            Transaction,
            Value, //
        }, //
    },
};

use blkif::{
    negotiate::{
        Accepted,
        BackLimits,
        FrontChoice,
        InvalidChoice, //
    },
    node::{
        self,
        InvalidNode,
        PhysicalDevice,
        Reason, //
    },
    ring::{
        BackRing,
        RingError, //
    },
    state::{
        self,
        Failure,
        XenbusState, //
    },
};

use crate::{
    barrier::{
        BarrierGate,
        GateMember, //
    },
    disk::{
        Disk,
        MAX_INDIRECT_SEGMENTS, //
    },
    domain::{
        self,
        Domain, //
    },
    events::QueueEvents,
    io_accounting::IoAccounting,
    queue::{
        Queue,
        QueueConfig, //
    },
    stats::{
        Counters,
        Stats, //
    }, //
};

/// Why a connection cannot be made. Written to xenstore for a person to read.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// A node of the frontend.
    Node(InvalidNode),
    /// A node of the toolstack, or of its hotplug script.
    Toolstack(InvalidNode),
    /// A node of one queue.
    Queue(u32, InvalidNode),
    /// A choice that was not offered.
    Choice(InvalidChoice),
    /// The indices in a ring make no sense.
    Ring(u32, RingError),
    /// A number that the frontend gave for a queue is refused by Xen: the node and the number.
    Refused(u32, &'static str, u32, Error),
    /// The frontend's state is none, or has no place in the protocol.
    State(InvalidNode),
    /// The disk cannot be opened.
    Disk(DeviceNumber, Access, Error),
    /// The disk has another sequence number than the toolstack says: it is another disk.
    WrongSequence(DeviceNumber, u64, u64),
    /// Something of our own failed.
    Local(&'static str, Error),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::Node(bad) | ConnectError::Toolstack(bad) => write!(f, "{bad}"),
            ConnectError::Queue(index, bad) => write!(f, "queue {index}: {bad}"),
            ConnectError::Choice(bad) => write!(f, "{bad}"),
            ConnectError::Ring(index, error) => write!(f, "ring of queue {index}: {error}"),
            ConnectError::Refused(index, node, number, _) => {
                write!(f, "queue {index}: {node} = \"{number}\": refused by Xen")
            }
            ConnectError::State(bad) => write!(
                f,
                "{} = \"{}\": no state that a frontend may have now",
                bad.node(),
                bad.text()
            ),
            ConnectError::Disk(number, access, error) => {
                let (major, minor) = (number.major(), number.minor());
                let what = match access {
                    _ if *error == EBUSY => "in use here: mounted, or part of another device",
                    Access::ReadOnly => "cannot be opened for reading",
                    Access::ReadWrite => "cannot be opened for writing",
                };
                write!(f, "physical-device = \"{major:x}:{minor:x}\": {what}")
            }
            ConnectError::WrongSequence(number, wanted, found) => {
                let (major, minor) = (number.major(), number.minor());
                write!(
                    f,
                    "physical-device = \"{wanted:x}@{major:x}:{minor:x}\": another disk, \
                     {found:x}, has that number now"
                )
            }
            ConnectError::Local(what, _) => f.write_str(what),
        }
    }
}

impl ConnectError {
    /// The errno that goes with it.
    pub(crate) fn error(&self) -> Error {
        match self {
            ConnectError::Node(_) | ConnectError::Toolstack(_) | ConnectError::State(_) => EINVAL,
            ConnectError::Queue(..) | ConnectError::Choice(_) => EINVAL,
            ConnectError::Ring(..) => EIO,
            ConnectError::WrongSequence(..) => ENXIO,
            ConnectError::Disk(_, _, error)
            | ConnectError::Refused(_, _, _, error)
            | ConnectError::Local(_, error) => *error,
        }
    }
}

impl ConnectError {
    /// Returns what the fault is to the connection. `connected`: whether a frontend has been connected
    /// to the device before.
    pub(crate) fn failure(&self, connected: impl FnOnce() -> bool) -> Failure {
        match self {
            ConnectError::Node(_) | ConnectError::Queue(..) | ConnectError::Choice(_) => {
                Failure::Frontend
            }
            ConnectError::Ring(..) | ConnectError::State(_) => Failure::Frontend,
            error if is_transient(error.error()) => Failure::Shortage,
            _ => Failure::Unusable {
                connected: connected(),
            },
        }
    }
}

/// Returns `true` if what has failed so may succeed later without anybody's help.
fn is_transient(error: Error) -> bool {
    [ENOMEM, EAGAIN, ENOSPC, EINTR].contains(&error)
}

/// Returns `true` if a frontend has been connected to the device before, be it by a driver that was
/// unbound: that has described the disk.
pub(crate) fn was_connected(xbdev: &xenbus::Device) -> bool {
    xenstore::exists(&NoTransaction, xbdev.nodename(), fmt!("sectors"))
}

/// Removes the error that was written for the toolstack: it holds no more.
pub(crate) fn clear_error(xbdev: &xenbus::Device) -> Result {
    let dir = CString::try_from_fmt(fmt!("error/{}", xbdev.nodename()))?;
    xenstore::remove(&NoTransaction, &dir, fmt!("error"))
}

/// Returns `true` if the toolstack wants the device to stay when a frontend in this state closes it.
pub(crate) fn is_online(xbdev: &xenbus::Device, frontend: XenbusState) -> bool {
    let value = read(xbdev.nodename(), fmt!("online")).ok().flatten();
    state::is_online(value.as_ref().map(|value| value.as_bytes()), frontend)
}

/// Says what was being done when an error happened.
pub(crate) trait ResultExt<T> {
    fn during(self, what: &'static str) -> Result<T, ConnectError>;
}

impl<T> ResultExt<T> for Result<T> {
    fn during(self, what: &'static str) -> Result<T, ConnectError> {
        self.map_err(|error| ConnectError::Local(what, error))
    }
}

/// Says what became of the attempt to show Connected.
pub(crate) enum ConnectOutcome {
    /// It is shown.
    Connected,
    /// The frontend has withdrawn the rings that are mapped.
    Withdrawn,
    /// Another state was found.
    Refused(State),
}

/// Reads a node. One that is empty counts as missing.
pub(crate) fn read(dir: &CStr, node: fmt::Arguments<'_>) -> Result<Option<Value>, ConnectError> {
    read_within(&NoTransaction, dir, node)
}

fn read_within(
    context: &impl Context,
    dir: &CStr,
    node: fmt::Arguments<'_>,
) -> Result<Option<Value>, ConnectError> {
    match xenstore::read(context, dir, node) {
        Ok(value) => Ok(Some(value).filter(|value| !value.as_bytes().is_empty())),
        Err(error) if error == ENOENT => Ok(None),
        Err(error) => Err(ConnectError::Local("reading xenstore", error)),
    }
}

/// Reads a node of a directory that was listed. One that is empty counts as missing.
pub(crate) fn read_listed(
    listing: &DirectoryListing,
    dir: &CStr,
    node: &str,
) -> Result<Option<Value>, ConnectError> {
    if listing.may_have(node) {
        read(dir, fmt!("{node}"))
    } else {
        Ok(None)
    }
}

/// Whether a frontend's state that xenbus cannot read is there, and no number.
pub(crate) fn has_invalid_state(frontend: &CStr) -> bool {
    let Ok(Some(value)) = read(frontend, fmt!("state")) else {
        return false;
    };
    node::decimal_u32("state", value.as_bytes()).is_err()
}

/// What is wrong with the state of a frontend.
pub(crate) fn bad_state_error(frontend: &CStr) -> ConnectError {
    match read(frontend, fmt!("state")) {
        Ok(Some(value)) => {
            ConnectError::State(InvalidNode::new("state", value.as_bytes(), Reason::Unknown))
        }
        Ok(None) => ConnectError::State(InvalidNode::missing("state")),
        Err(error) => error,
    }
}

/// Opens the disk that the hotplug script has written to our directory; `None` if it has not, or
/// there is one already.
pub(crate) fn open_disk(
    xbdev: &xenbus::Device,
    disk: Option<&Disk>,
) -> Result<Option<Arc<Disk>>, ConnectError> {
    const NODE: &str = "physical-device";
    let dir = xbdev.nodename();
    let Some(value) = read(dir, fmt!("{NODE}"))? else {
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
                "{NODE} was changed to {major:x}:{minor:x}: ignored\n"
            ));
        }
        return Ok(None);
    }
    let mode =
        read(dir, fmt!("mode"))?.ok_or(ConnectError::Toolstack(InvalidNode::missing("mode")))?;
    let (access, claim) = match mode.as_bytes() {
        [b'r'] => (Access::ReadOnly, Claim::None),
        mode if mode.contains(&b'w') && mode.contains(&b'!') => (Access::ReadWrite, Claim::None),
        mode if mode.contains(&b'w') => (Access::ReadWrite, Claim::Exclusive),
        other => {
            let bad = InvalidNode::new("mode", other, Reason::Unknown);
            return Err(ConnectError::Toolstack(bad));
        }
    };
    let mode = CString::try_from_fmt(fmt!("{}", &*mode)).during("keeping the mode")?;
    let discard = read(dir, fmt!("discard-enable"))?.is_none_or(|value| value.as_bytes() != b"0");
    let disk = Disk::open(number, access, claim, mode, discard)
        .map_err(|error| ConnectError::Disk(number, access, error))?;
    let found = disk.bdev.disk_sequence();
    if let Some(wanted) = sequence.filter(|wanted| *wanted != found) {
        return Err(ConnectError::WrongSequence(number, wanted, found));
    }
    let disk =
        Arc::new(disk, GFP_KERNEL).map_err(|_| ConnectError::Local("keeping the disk", ENOMEM))?;
    Ok(Some(disk))
}

/// Writes what any frontend may choose from.
pub(crate) fn write_features(dir: &CStr, limits: &BackLimits) -> Result {
    let write = |node: &str, value: u32| {
        xenstore::write(&NoTransaction, dir, fmt!("{node}"), fmt!("{value}"))
    };
    write(
        "feature-max-indirect-segments",
        MAX_INDIRECT_SEGMENTS.into(),
    )?;
    write("multi-queue-max-queues", limits.max_queues)?;
    write("max-ring-page-order", limits.max_ring_page_order)
}

/// Writes the size of the disk, and Connected again, which makes the frontend look at it. If the
/// toolstack has asked the device to close, that stays as it is.
pub(crate) fn write_size(xbdev: &xenbus::Device, disk: &Disk) -> Result {
    let dir = xbdev.nodename();
    let sectors = disk.bdev.sectors();
    xbdev.switch_state_with(State::Connected, |transaction| {
        xenstore::write(transaction, dir, fmt!("sectors"), fmt!("{sectors}"))
    })?;
    disk.set_reported(sectors);
    Ok(())
}

/// Takes back an offer: the disk has refused it.
pub(crate) fn withdraw_feature(xbdev: &xenbus::Device, node: &str) -> Result {
    xenstore::write(&NoTransaction, xbdev.nodename(), fmt!("{node}"), fmt!("0"))
}

/// Reads what the frontend has chosen.
fn read_choice(frontend: &CStr, limits: &BackLimits) -> Result<Accepted, ConnectError> {
    let mut choice = FrontChoice::default();
    let listing = DirectoryListing::new(&NoTransaction, frontend);
    for node in FrontChoice::NODES {
        if let Some(value) = read_listed(&listing, frontend, node)? {
            choice
                .set(node, value.as_bytes())
                .map_err(ConnectError::Node)?;
        }
    }
    choice.check(limits).map_err(ConnectError::Choice)
}

/// What the queues of a connection have in common.
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
    /// To a frontend that has written what it wants.
    pub(crate) fn new(
        xbdev: &'a xenbus::Device,
        frontend: &'a CStr,
        domain: &Arc<Domain>,
        disk: Arc<Disk>,
        limits: &BackLimits,
    ) -> Result<Self, ConnectError> {
        let accepted = read_choice(frontend, limits)?;
        let dev = read(xbdev.nodename(), fmt!("dev"))?
            .ok_or(ConnectError::Toolstack(InvalidNode::missing("dev")))?;
        let name = dev.as_bytes();
        let name = name.strip_prefix(b"/dev/").unwrap_or(name);
        let name =
            CString::try_from_fmt(fmt!("{}", BStr::from_bytes(name))).during("keeping the name")?;
        let listing = DirectoryListing::new(&NoTransaction, xbdev.nodename());
        let io_accounting = Arc::new(IoAccounting::read(xbdev, &listing)?, GFP_KERNEL)
            .map_err(Error::from)
            .during("keeping whom I/O counts for")?;
        let gate = Arc::pin_init(BarrierGate::new(), GFP_KERNEL).during("making a fence")?;
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

    /// Says what was agreed on.
    pub(crate) fn report(&self) {
        let Accepted {
            abi,
            rings,
            persistent,
            ..
        } = &self.accepted;
        ratelimited!(dev_info!(
            self.xbdev.as_ref(),
            "{}: {} queues of {} pages, {}, persistent grants {}\n",
            &*self.name,
            rings.queues,
            rings.pages(),
            abi.name(),
            if *persistent { "on" } else { "off" }
        ));
    }

    /// Number of rings.
    pub(crate) fn queues(&self) -> u32 {
        self.accepted.rings.queues
    }

    /// Maps the ring of a queue, and connects its event channel.
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

        let ring = MappedRing::new(self.xbdev, references).map_err(|error| {
            if error == ENOSPC {
                domain::reclaim_mappings();
            }
            let first_ring_ref = references.first().map_or(0, |reference| reference.0);
            ConnectError::Refused(index, "ring-ref", first_ring_ref, error)
        })?;
        let ring = BackRing::attach(ring, self.accepted.abi)
            .map_err(|error| ConnectError::Ring(index, error))?;
        let events = Arc::pin_init(QueueEvents::new(), GFP_KERNEL).during("making a queue")?;
        let channel =
            EventChannel::bind_interdomain(self.xbdev, port, c"blkif-backend", events.clone())
                .map_err(|error| ConnectError::Refused(index, "event-channel", port, error))?;
        let counters = usize::try_from(index)
            .map_err(Error::from)
            .and_then(|index| stats.queue(index))
            .during("making a queue")?;
        self.new_queue(index, ring, events, channel, counters)
            .during("making a queue")
    }

    fn new_queue(
        &self,
        index: u32,
        ring: BackRing<MappedRing>,
        events: Arc<QueueEvents>,
        channel: EventChannel<QueueEvents>,
        counters: Arc<Counters>,
    ) -> Result<Queue> {
        let domain = self.domain.clone();
        Queue::new(QueueConfig {
            name: CString::try_from_fmt(fmt!("{}.{}-{}", domain.id, *self.name, index))?,
            gate: GateMember::new(&self.gate, index, &events)?,
            ring,
            channel,
            events,
            io_accounting: self.io_accounting.clone(),
            disk: self.disk.clone(),
            counters,
            domain,
            persistent: self.accepted.persistent,
        })
    }

    /// The grant references of the pages of a ring, and their number.
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

    /// A number in the directory of a queue.
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
        let value = if self.accepted.queue_dirs {
            read_within(context, self.frontend, fmt!("queue-{index}/{node}"))?
        } else {
            read_within(context, self.frontend, node)?
        };
        let number = match &value {
            Some(value) => node::decimal_u32(name, value.as_bytes()),
            None => Err(InvalidNode::missing(name)),
        };
        number.map_err(|bad| ConnectError::Queue(index, bad))
    }

    /// The first page of the first ring.
    fn read_first_ring_ref(&self, context: &impl Context) -> Result<ForeignRef, ConnectError> {
        let node = if self.accepted.numbered_refs {
            "ring-ref0"
        } else {
            "ring-ref"
        };
        self.number_within(context, 0, "ring-ref", fmt!("{node}"))
            .map(ForeignRef)
    }

    /// Returns `true` if the frontend still offers the rings that are mapped. Others have other
    /// references, for those of a page that is mapped are not used again.
    fn is_offered(&self, transaction: &Transaction) -> bool {
        let state = read_within(transaction, self.frontend, fmt!("state"))
            .ok()
            .flatten();
        let state = state.and_then(|state| node::decimal_u32("state", state.as_bytes()).ok());
        let state = state.and_then(XenbusState::from_number);
        matches!(
            state,
            Some(XenbusState::Initialised | XenbusState::Connected)
        ) && self.read_first_ring_ref(transaction).ok() == self.first_ring_ref
    }

    /// Writes what the disk is and can do, and Connected, unless the toolstack or the frontend have
    /// changed their minds since the rings were mapped.
    pub(crate) fn describe_disk(&self) -> Result<ConnectOutcome, ConnectError> {
        let cdrom = read(self.frontend, fmt!("device-type"))?
            .is_some_and(|kind| kind.as_bytes() == b"cdrom");
        let disk = &self.disk;
        let dir = self.xbdev.nodename();
        let sectors = disk.bdev.sectors();
        disk.set_reported(sectors);
        let mut offered = true;
        let switched = self
            .xbdev
            .switch_state_with(State::Connected, |transaction| {
                offered = self.is_offered(transaction);
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
                write("info", disk.info(cdrom).into())?;
                let block_size = disk.bdev.logical_block_size().into();
                write("sector-size", block_size)?;
                let physical = disk.bdev.physical_block_size().into();
                write("physical-sector-size", physical)
            });
        match switched {
            Err(_) if !offered => Ok(ConnectOutcome::Withdrawn),
            Ok(Switched::Written) => Ok(ConnectOutcome::Connected),
            Ok(Switched::Refused(found)) => Ok(ConnectOutcome::Refused(found)),
            Ok(Switched::Failed(error)) | Err(error) => {
                Err(ConnectError::Local("writing what the disk is", error))
            }
        }
    }
}
