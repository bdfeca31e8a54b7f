// SPDX-License-Identifier: GPL-2.0-only

//! The xenstore nodes of a device that are read and written.
//!
//! An invalid node, or a required one that is missing, is logged with its path and its value.
//!
//! Context: all functions may sleep.

use kernel::{
    fmt,
    prelude::*,
    str::CString, //
};

use kernel_ext::{
    base::fmt::AsKernelDisplay,
    ratelimited,
    xen::{
        self,
        events::Handler,
        xenbus::{
            self,
            Switched, //
        },
        xenstore::{
            self,
            DirectoryListing,
            NodeError,
            Reader,
            Transaction, //
        }, //
    }, //
};

use blkif::{
    negotiate::{
        BackOffer,
        DiskNodes,
        DiskProperties,
        FrontLimits, //
    },
    node::{
        self,
        InvalidNode,
        Reason, //
    },
    state::{
        FrontEvent,
        XenbusState, //
    },
    vdev::{
        NumberForm,
        VirtualDevice, //
    },
    wire::Abi, //
};

use crate::{
    params,
    ring_channel::RingChannel, //
};

/// Logs that a node is invalid.
fn warn_bad_node(reader: &Reader<'_>, invalid: &InvalidNode) {
    ratelimited!(pr_warn!("{}/{}\n", reader.dir(), AsKernelDisplay(invalid)));
}

/// Logs that a required node is missing or invalid, and returns `EINVAL`.
fn bad_node(reader: &Reader<'_>, invalid: InvalidNode) -> Error {
    warn_bad_node(reader, &invalid);
    EINVAL
}

/// Reads a boolean node.
///
/// Returns `None` if there is no such node, and `Some(invalid)`, with a message, if its value is
/// not a number.
fn read_boolean(reader: &Reader<'_>, node: &'static str, invalid: bool) -> Result<Option<bool>> {
    match reader.parse(node, node::boolean) {
        Ok(on) => Ok(on),
        Err(NodeError::Invalid(error)) => {
            warn_bad_node(reader, &error);
            Ok(Some(invalid))
        }
        Err(NodeError::Xenstore(error)) => Err(error),
    }
}

/// Reads the name and the minors of the device.
pub(crate) fn virtual_device(device: &xenbus::Device) -> Result<VirtualDevice> {
    let reader = Reader::new(device.nodename());
    let number = match reader.parse("virtual-device", node::device_number) {
        Ok(None) => reader.parse("virtual-device-ext", node::device_number),
        found => found,
    };
    let number = match number {
        Ok(Some(number)) => number,
        Ok(None) => return Err(bad_node(&reader, InvalidNode::missing("virtual-device"))),
        Err(NodeError::Invalid(error)) => return Err(bad_node(&reader, error)),
        Err(NodeError::Xenstore(error)) => return Err(error),
    };
    VirtualDevice::new(number).map_err(|error| {
        pr_err!("{}: {}\n", reader.dir(), AsKernelDisplay(error));
        ENODEV
    })
}

/// Refuses a device whose disk is also emulated, because the two would have separate page caches of
/// the same data.
pub(crate) fn refuse_emulated(device: &xenbus::Device, vdev: &VirtualDevice) -> Result {
    if !xen::is_hvm_domain() {
        return Ok(());
    }
    let dir = device.nodename();
    let own_major = matches!(vdev.form, NumberForm::Xvd | NumberForm::Extended);
    if xen::has_pv_and_emulated_disks() && !own_major {
        pr_info!(
            "{}: {} is also an emulated disk: ignoring the paravirtual one\n",
            dir,
            vdev.name.as_str()
        );
        return Err(ENODEV);
    }
    let reader = Reader::new(dir);
    let Some(kind) = reader.value("device-type")? else {
        warn_bad_node(&reader, &InvalidNode::missing("device-type"));
        return Err(ENODEV);
    };
    if kind.as_bytes().starts_with(b"cdrom") {
        pr_info!("{}: ignoring a CD-ROM drive, which is emulated\n", dir);
        return Err(ENODEV);
    }
    Ok(())
}

/// Copies a path.
pub(crate) fn path(path: &CStr) -> Result<CString> {
    CString::try_from_fmt(fmt!("{}", path))
}

/// Returns the event for a state of the backend.
///
/// `disk` is `true` if there is a disk from an earlier connection. Fails if the node `online`
/// cannot be read: a detach must not be taken for the end of a connection, which does not write the
/// disk back.
pub(crate) fn backend_event(
    backend: &CStr,
    state: xenbus::OtherendState,
    disk: bool,
) -> Result<FrontEvent> {
    let Ok(state) = state else {
        warn_bad_state(&Reader::new(backend));
        return Ok(FrontEvent::BadState);
    };
    Ok(FrontEvent::Backend {
        state,
        online: is_online(backend)?,
        disk,
    })
}

/// Logs that the node `state` of the backend is not a xenbus state.
fn warn_bad_state(reader: &Reader<'_>) {
    // The node may have changed since then; if it cannot be read now, the text is empty.
    let text = reader.value("state").ok().flatten();
    let text = text.as_ref().map_or(&[][..], |value| value.as_bytes());
    let invalid = InvalidNode::new("state", text, Reason::Unknown);
    ratelimited!(pr_err!(
        "{}/{}: removing the disk\n",
        reader.dir(),
        AsKernelDisplay(invalid)
    ));
}

/// Returns `true` if the backend is online, or has no node `online`.
pub(crate) fn is_online(backend: &CStr) -> Result<bool> {
    let online = read_boolean(&Reader::new(backend), "online", true)?;
    Ok(online.unwrap_or(true))
}

/// Returns this side's offer.
///
/// `own` is the listing of the device's directory, here and in the functions below.
pub(crate) fn front_limits(device: &xenbus::Device, own: &DirectoryListing) -> Result<FrontLimits> {
    let reader = Reader::listed(device.nodename(), own);
    // An invalid value means untrusted.
    let trusted = read_boolean(&reader, "trusted", false)?.unwrap_or(true);
    Ok(params::front_limits(trusted))
}

/// Returns `true` if the disk must not be scanned for partitions.
///
/// The toolstack writes this node to the device's directory, as it does `trusted`.
pub(crate) fn no_partition_scan(device: &xenbus::Device, own: &DirectoryListing) -> Result<bool> {
    let reader = Reader::listed(device.nodename(), own);
    Ok(read_boolean(&reader, "no-part-scan", true)?.unwrap_or(false))
}

/// Reads the backend's offer from `nodes`.
///
/// Invalid nodes count as missing.
pub(crate) fn back_offer(backend: &CStr, nodes: &[&'static str]) -> Result<BackOffer> {
    let reader = Reader::new(backend);
    let mut offer = BackOffer::default();
    for &node in nodes {
        if let Some(value) = reader.value(node)? {
            if let Err(error) = offer.set(node, value.as_bytes()) {
                warn_bad_node(&reader, &error);
            }
        }
    }
    Ok(offer)
}

/// Reads the properties of the disk.
pub(crate) fn disk_properties(backend: &CStr) -> Result<DiskProperties> {
    let reader = Reader::new(backend);
    let mut nodes = DiskNodes::default();
    for node in DiskNodes::NODES {
        if let Some(value) = reader.value(node)? {
            match nodes.set(node, value.as_bytes()) {
                Err(error) if DiskNodes::is_required(node) => return Err(bad_node(&reader, error)),
                Err(error) => warn_bad_node(&reader, &error),
                Ok(()) => {}
            }
        }
    }
    nodes.disk().map_err(|error| bad_node(&reader, error))
}

/// The directory of a ring's nodes, relative to that of the device: empty, or `queue-N` if there
/// are several rings.
#[derive(Clone, Copy)]
struct Prefix(Option<usize>);

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => write!(f, "queue-{}/", number),
            None => Ok(()),
        }
    }
}

/// The nodes that describe a ring.
pub(crate) struct RingNodes {
    references: KVec<u32>,
    port: u32,
}

impl RingNodes {
    /// Collects the nodes of a ring.
    pub(crate) fn new<H: Handler>(ring_channel: &RingChannel<H>) -> Result<Self> {
        let mut references = KVec::new();
        for reference in ring_channel.references() {
            references.push(reference.value(), GFP_KERNEL)?;
        }
        Ok(Self {
            references,
            port: ring_channel.channel.port().ok_or(EINVAL)?,
        })
    }

    /// Writes the nodes of this ring.
    fn write(&self, transaction: &Transaction, dir: &CStr, prefix: Prefix) -> Result {
        if let [reference] = self.references.as_slice() {
            xenstore::write(
                transaction,
                dir,
                fmt!("{}ring-ref", prefix),
                fmt!("{}", reference),
            )?;
        } else {
            for (number, reference) in self.references.iter().enumerate() {
                xenstore::write(
                    transaction,
                    dir,
                    fmt!("{}ring-ref{}", prefix, number),
                    fmt!("{}", reference),
                )?;
            }
        }
        xenstore::write(
            transaction,
            dir,
            fmt!("{}event-channel", prefix),
            fmt!("{}", self.port),
        )
    }
}

/// Writes the offer and the state Initialised in one transaction.
///
/// Fails with `EAGAIN` if another state is in xenstore that must not be replaced.
pub(crate) fn write_offer(
    device: &xenbus::Device,
    own: &DirectoryListing,
    rings: &[RingNodes],
    page_order: u32,
    persistent: bool,
) -> Result {
    let dir = device.nodename();
    let switched = device.switch_state_with(XenbusState::Initialised, |transaction| {
        let write = |node: &str, value: fmt::Arguments<'_>| {
            xenstore::write(transaction, dir, fmt!("{}", node), value)
        };
        // An earlier connection may have had several rings, or larger ones.
        for node in ["multi-queue-num-queues", "ring-page-order"] {
            if own.may_have(node) {
                remove(transaction, dir, node)?;
            }
        }
        if page_order > 0 {
            write("ring-page-order", fmt!("{}", page_order))?;
        }
        if let [ring] = rings {
            ring.write(transaction, dir, Prefix(None))?;
        } else {
            write("multi-queue-num-queues", fmt!("{}", rings.len()))?;
            for (number, ring) in rings.iter().enumerate() {
                ring.write(transaction, dir, Prefix(Some(number)))?;
            }
        }
        write("protocol", fmt!("{}", Abi::native().name()))?;
        write("feature-persistent", fmt!("{}", u32::from(persistent)))
    })?;
    match switched {
        Switched::Written => Ok(()),
        Switched::Refused(_) => Err(EAGAIN),
        Switched::Failed(error) => Err(error),
    }
}

/// Removes a node, if it exists.
fn remove(transaction: &Transaction, dir: &CStr, node: &str) -> Result {
    match xenstore::remove(transaction, dir, fmt!("{}", node)) {
        Err(error) if error != ENOENT => Err(error),
        _ => Ok(()),
    }
}
