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
        events::Channel,
        grant::ForeignRef,
        ring::{
            MappedRing,
            MAX_PAGES, //
        },
        xenbus::{
            Device,
            State,
            Switched, //
        },
        xenstore::{
            self,
            Context,
            Listing,
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
        BadChoice,
        FrontChoice, //
    },
    node::{
        self,
        BadNode,
        PhysicalDevice,
        Wrong, //
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
    charge::Charge,
    disk::{
        Disk,
        MAX_INDIRECT_SEGMENTS, //
    },
    domain::{
        self,
        Domain, //
    },
    fence::{
        Fence,
        Post, //
    },
    inbox::Inbox,
    queue::{
        Parts,
        Queue, //
    },
    stats::{
        Counters,
        Stats, //
    },
};

/// Why a connection cannot be made. Written to xenstore for a person to read.
#[derive(Debug)]
pub(crate) enum Fault {
    /// A node of the frontend.
    Node(BadNode),
    /// A node of the toolstack, or of its hotplug script.
    Toolstack(BadNode),
    /// A node of one queue.
    Queue(u32, BadNode),
    /// A choice that was not offered.
    Choice(BadChoice),
    /// The indices in a ring make no sense.
    Ring(u32, RingError),
    /// A number that the frontend gave for a queue is refused by Xen: the node and the number.
    Refused(u32, &'static str, u32, Error),
    /// The frontend's state is none, or has no place in the protocol.
    State(BadNode),
    /// The disk cannot be opened.
    Disk(DeviceNumber, Access, Error),
    /// The disk has another sequence number than the toolstack says: it is another disk.
    Recycled(DeviceNumber, u64, u64),
    /// Something of our own failed.
    Own(&'static str, Error),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Node(bad) | Fault::Toolstack(bad) => write!(f, "{bad}"),
            Fault::Queue(index, bad) => write!(f, "queue {index}: {bad}"),
            Fault::Choice(bad) => write!(f, "{bad}"),
            Fault::Ring(index, error) => write!(f, "ring of queue {index}: {error}"),
            Fault::Refused(index, node, number, _) => {
                write!(f, "queue {index}: {node} = \"{number}\": refused by Xen")
            }
            Fault::State(bad) => write!(
                f,
                "{} = \"{}\": no state that a frontend may have now",
                bad.node(),
                bad.text()
            ),
            Fault::Disk(number, access, error) => {
                let (major, minor) = (number.major(), number.minor());
                let what = match access {
                    _ if *error == EBUSY => "in use here: mounted, or part of another device",
                    Access::ReadOnly => "cannot be opened for reading",
                    Access::ReadWrite => "cannot be opened for writing",
                };
                write!(f, "physical-device = \"{major:x}:{minor:x}\": {what}")
            }
            Fault::Recycled(number, wanted, found) => {
                let (major, minor) = (number.major(), number.minor());
                write!(
                    f,
                    "physical-device = \"{wanted:x}@{major:x}:{minor:x}\": another disk, \
                     {found:x}, has that number now"
                )
            }
            Fault::Own(what, _) => f.write_str(what),
        }
    }
}

impl Fault {
    /// The errno that goes with it.
    pub(crate) fn error(&self) -> Error {
        match self {
            Fault::Node(_) | Fault::Toolstack(_) | Fault::State(_) => EINVAL,
            Fault::Queue(..) | Fault::Choice(_) => EINVAL,
            Fault::Ring(..) => EIO,
            Fault::Recycled(..) => ENXIO,
            Fault::Disk(_, _, error) | Fault::Refused(_, _, _, error) | Fault::Own(_, error) => {
                *error
            }
        }
    }
}

impl Fault {
    /// Returns what the fault is to the connection. `connected`: whether a frontend has been connected
    /// to the device before.
    pub(crate) fn failure(&self, connected: impl FnOnce() -> bool) -> Failure {
        match self {
            Fault::Node(_) | Fault::Queue(..) | Fault::Choice(_) => Failure::Frontend,
            Fault::Ring(..) | Fault::State(_) => Failure::Frontend,
            fault if is_shortage(fault.error()) => Failure::Shortage,
            _ => Failure::Unusable {
                connected: connected(),
            },
        }
    }
}

/// Returns `true` if what has failed so may succeed later without anybody's help.
fn is_shortage(error: Error) -> bool {
    [ENOMEM, EAGAIN, ENOSPC, EINTR].contains(&error)
}

/// Returns `true` if a frontend has been connected to the device before, be it by a driver that was
/// unbound: that has described the disk.
pub(crate) fn was_connected(device: &Device) -> bool {
    xenstore::exists(&NoTransaction, device.nodename(), fmt!("sectors"))
}

/// Removes the error that was written for the toolstack: it holds no more.
pub(crate) fn clear_error(device: &Device) -> Result {
    let dir = CString::try_from_fmt(fmt!("error/{}", device.nodename()))?;
    xenstore::remove(&NoTransaction, &dir, fmt!("error"))
}

/// Returns `true` if the toolstack wants the device to stay when a frontend in this state closes it.
pub(crate) fn is_online(device: &Device, frontend: XenbusState) -> bool {
    let value = read(device.nodename(), fmt!("online")).ok().flatten();
    state::is_online(value.as_ref().map(|value| value.as_bytes()), frontend)
}

/// Says what was being done when an error happened.
pub(crate) trait Doing<T> {
    fn doing(self, what: &'static str) -> Result<T, Fault>;
}

impl<T> Doing<T> for Result<T> {
    fn doing(self, what: &'static str) -> Result<T, Fault> {
        self.map_err(|error| Fault::Own(what, error))
    }
}

/// Says what became of the attempt to show Connected.
pub(crate) enum Described {
    /// It is shown.
    Connected,
    /// The frontend has withdrawn the rings that are mapped.
    Withdrawn,
    /// Another state was found.
    Refused(State),
}

/// Reads a node. One that is empty counts as missing.
pub(crate) fn read(dir: &CStr, node: fmt::Arguments<'_>) -> Result<Option<Value>, Fault> {
    read_within(&NoTransaction, dir, node)
}

fn read_within(
    context: &impl Context,
    dir: &CStr,
    node: fmt::Arguments<'_>,
) -> Result<Option<Value>, Fault> {
    match xenstore::read(context, dir, node) {
        Ok(value) => Ok(Some(value).filter(|value| !value.as_bytes().is_empty())),
        Err(error) if error == ENOENT => Ok(None),
        Err(error) => Err(Fault::Own("reading xenstore", error)),
    }
}

/// Reads a node of a directory that was listed. One that is empty counts as missing.
pub(crate) fn read_listed(
    listing: &Listing,
    dir: &CStr,
    node: &str,
) -> Result<Option<Value>, Fault> {
    if listing.may_have(node) {
        read(dir, fmt!("{node}"))
    } else {
        Ok(None)
    }
}

/// Whether a frontend's state that xenbus cannot read is there, and no number.
pub(crate) fn has_wrong_state(frontend: &CStr) -> bool {
    let Ok(Some(value)) = read(frontend, fmt!("state")) else {
        return false;
    };
    node::decimal_u32("state", value.as_bytes()).is_err()
}

/// What is wrong with the state of a frontend.
pub(crate) fn wrong_state(frontend: &CStr) -> Fault {
    match read(frontend, fmt!("state")) {
        Ok(Some(value)) => Fault::State(BadNode::new("state", value.as_bytes(), Wrong::Unknown)),
        Ok(None) => Fault::State(BadNode::missing("state")),
        Err(fault) => fault,
    }
}

/// Opens the disk that the hotplug script has written to our directory; `None` if it has not, or
/// there is one already.
pub(crate) fn find_disk(device: &Device, disk: Option<&Disk>) -> Result<Option<Arc<Disk>>, Fault> {
    const NODE: &str = "physical-device";
    let dir = device.nodename();
    let Some(value) = read(dir, fmt!("{NODE}"))? else {
        return Ok(None);
    };
    let PhysicalDevice {
        major,
        minor,
        sequence,
    } = node::physical_device(NODE, value.as_bytes()).map_err(Fault::Toolstack)?;
    let number = DeviceNumber::new(major, minor)
        .ok_or_else(|| Fault::Toolstack(BadNode::new(NODE, value.as_bytes(), Wrong::Unknown)))?;
    if let Some(disk) = disk {
        if disk.number != number {
            ratelimited!(dev_warn!(
                device.as_ref(),
                "{NODE} was changed to {major:x}:{minor:x}: ignored\n"
            ));
        }
        return Ok(None);
    }
    let mode = read(dir, fmt!("mode"))?.ok_or(Fault::Toolstack(BadNode::missing("mode")))?;
    let (access, claim) = match mode.as_bytes() {
        [b'r'] => (Access::ReadOnly, Claim::None),
        mode if mode.contains(&b'w') && mode.contains(&b'!') => (Access::ReadWrite, Claim::None),
        mode if mode.contains(&b'w') => (Access::ReadWrite, Claim::Exclusive),
        other => {
            let bad = BadNode::new("mode", other, Wrong::Unknown);
            return Err(Fault::Toolstack(bad));
        }
    };
    let mode = CString::try_from_fmt(fmt!("{}", &*mode)).doing("keeping the mode")?;
    let discard = read(dir, fmt!("discard-enable"))?.is_none_or(|value| value.as_bytes() != b"0");
    let disk = Disk::open(number, access, claim, mode, discard)
        .map_err(|error| Fault::Disk(number, access, error))?;
    let found = disk.device.disk_sequence();
    if let Some(wanted) = sequence.filter(|wanted| *wanted != found) {
        return Err(Fault::Recycled(number, wanted, found));
    }
    let disk = Arc::new(disk, GFP_KERNEL).map_err(|_| Fault::Own("keeping the disk", ENOMEM))?;
    Ok(Some(disk))
}

/// Writes what any frontend may choose from.
pub(crate) fn write_offers(dir: &CStr, limits: &BackLimits) -> Result {
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
pub(crate) fn write_size(device: &Device, disk: &Disk) -> Result {
    let dir = device.nodename();
    let sectors = disk.device.sectors();
    device.switch_state_with(State::Connected, |transaction| {
        xenstore::write(transaction, dir, fmt!("sectors"), fmt!("{sectors}"))
    })?;
    disk.told(sectors);
    Ok(())
}

/// Takes back an offer: the disk has refused it.
pub(crate) fn withdraw(device: &Device, node: &str) -> Result {
    xenstore::write(&NoTransaction, device.nodename(), fmt!("{node}"), fmt!("0"))
}

/// Reads what the frontend has chosen.
fn read_choice(frontend: &CStr, limits: &BackLimits) -> Result<Accepted, Fault> {
    let mut choice = FrontChoice::default();
    let listing = Listing::new(&NoTransaction, frontend);
    for node in FrontChoice::NODES {
        if let Some(value) = read_listed(&listing, frontend, node)? {
            choice.set(node, value.as_bytes()).map_err(Fault::Node)?;
        }
    }
    choice.check(limits).map_err(Fault::Choice)
}

/// What the queues of a connection have in common.
pub(crate) struct Connection<'a> {
    device: &'a Device,
    frontend: &'a CStr,
    domain: Arc<Domain>,
    accepted: Accepted,
    charge: Arc<Charge>,
    disk: Arc<Disk>,
    fence: Arc<Fence>,
    /// Name of the virtual device, such as `xvda`.
    name: CString,
    /// The first page of the first ring, once that is mapped.
    first: Option<ForeignRef>,
}

impl<'a> Connection<'a> {
    /// To a frontend that has written what it wants.
    pub(crate) fn new(
        device: &'a Device,
        frontend: &'a CStr,
        domain: &Arc<Domain>,
        disk: Arc<Disk>,
        limits: &BackLimits,
    ) -> Result<Self, Fault> {
        let accepted = read_choice(frontend, limits)?;
        let dev = read(device.nodename(), fmt!("dev"))?
            .ok_or(Fault::Toolstack(BadNode::missing("dev")))?;
        let name = dev.as_bytes();
        let name = name.strip_prefix(b"/dev/").unwrap_or(name);
        let name =
            CString::try_from_fmt(fmt!("{}", BStr::from_bytes(name))).doing("keeping the name")?;
        let own = Listing::new(&NoTransaction, device.nodename());
        let charge = Arc::new(Charge::read(device, &own)?, GFP_KERNEL)
            .map_err(Error::from)
            .doing("keeping whom I/O counts for")?;
        let fence = Arc::pin_init(Fence::new(), GFP_KERNEL).doing("making a fence")?;
        Ok(Self {
            device,
            frontend,
            domain: domain.clone(),
            accepted,
            charge,
            disk,
            fence,
            name,
            first: None,
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
            self.device.as_ref(),
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
    pub(crate) fn queue(&mut self, index: u32, stats: &Stats) -> Result<Queue, Fault> {
        let (references, pages) = self.references(index)?;
        let references = references.get(..pages).unwrap_or_default();
        if index == 0 {
            self.first = references.first().copied();
        }
        let port = self.number(index, "event-channel", fmt!("event-channel"))?;

        let ring = MappedRing::new(self.device, references).map_err(|error| {
            if error == ENOSPC {
                domain::share_mappings();
            }
            let first = references.first().map_or(0, |reference| reference.0);
            Fault::Refused(index, "ring-ref", first, error)
        })?;
        let ring =
            BackRing::attach(ring, self.accepted.abi).map_err(|error| Fault::Ring(index, error))?;
        let inbox = Arc::pin_init(Inbox::new(), GFP_KERNEL).doing("making a queue")?;
        let channel = Channel::bind_interdomain(self.device, port, c"blkif-backend", inbox.clone())
            .map_err(|error| Fault::Refused(index, "event-channel", port, error))?;
        let counters = usize::try_from(index)
            .map_err(Error::from)
            .and_then(|index| stats.queue(index))
            .doing("making a queue")?;
        self.finish(index, ring, inbox, channel, counters)
            .doing("making a queue")
    }

    fn finish(
        &self,
        index: u32,
        ring: BackRing<MappedRing>,
        inbox: Arc<Inbox>,
        channel: Channel<Inbox>,
        counters: Arc<Counters>,
    ) -> Result<Queue> {
        let domain = self.domain.clone();
        Queue::new(Parts {
            name: CString::try_from_fmt(fmt!("{}.{}-{}", domain.id, *self.name, index))?,
            post: Post::new(&self.fence, index, &inbox)?,
            ring,
            channel,
            inbox,
            charge: self.charge.clone(),
            disk: self.disk.clone(),
            counters,
            domain,
            persistent: self.accepted.persistent,
        })
    }

    /// The grant references of the pages of a ring, and their number.
    fn references(&self, index: u32) -> Result<([ForeignRef; MAX_PAGES], usize), Fault> {
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
    ) -> Result<u32, Fault> {
        self.number_within(&NoTransaction, index, name, node)
    }

    fn number_within(
        &self,
        context: &impl Context,
        index: u32,
        name: &'static str,
        node: fmt::Arguments<'_>,
    ) -> Result<u32, Fault> {
        let value = if self.accepted.queue_dirs {
            read_within(context, self.frontend, fmt!("queue-{index}/{node}"))?
        } else {
            read_within(context, self.frontend, node)?
        };
        let number = match &value {
            Some(value) => node::decimal_u32(name, value.as_bytes()),
            None => Err(BadNode::missing(name)),
        };
        number.map_err(|bad| Fault::Queue(index, bad))
    }

    /// The first page of the first ring.
    fn first_reference(&self, context: &impl Context) -> Result<ForeignRef, Fault> {
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
        ) && self.first_reference(transaction).ok() == self.first
    }

    /// Writes what the disk is and can do, and Connected, unless the toolstack or the frontend have
    /// changed their minds since the rings were mapped.
    pub(crate) fn describe_disk(&self) -> Result<Described, Fault> {
        let cdrom = read(self.frontend, fmt!("device-type"))?
            .is_some_and(|kind| kind.as_bytes() == b"cdrom");
        let disk = &self.disk;
        let dir = self.device.nodename();
        let sectors = disk.device.sectors();
        disk.told(sectors);
        let mut offered = true;
        let switched = self
            .device
            .switch_state_with(State::Connected, |transaction| {
                offered = self.is_offered(transaction);
                if !offered {
                    return Err(EBUSY);
                }
                let write = |node: &str, value: u64| {
                    xenstore::write(transaction, dir, fmt!("{node}"), fmt!("{value}"))
                };
                let write_cache = disk.device.write_cache().into();
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
                let block_size = disk.device.logical_block_size().into();
                write("sector-size", block_size)?;
                let physical = disk.device.physical_block_size().into();
                write("physical-sector-size", physical)
            });
        match switched {
            Err(_) if !offered => Ok(Described::Withdrawn),
            Ok(Switched::Written) => Ok(Described::Connected),
            Ok(Switched::Refused(found)) => Ok(Described::Refused(found)),
            Ok(Switched::Failed(error)) | Err(error) => {
                Err(Fault::Own("writing what the disk is", error))
            }
        }
    }
}
