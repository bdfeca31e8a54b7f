// SPDX-License-Identifier: GPL-2.0-only

//! Xenstore nodes of a device, other than those of a connection.

use kernel::{
    prelude::*,
    str::{
        CStr,
        CString, //
    },
};

use kernel_ext::{
    ratelimited,
    xen::{
        xenbus::{
            self,
            Switched, //
        },
        xenstore::{
            self,
            NoTransaction,
            NodeError,
            Reader, //
        },
    },
};

use blkif::{
    negotiate::BackLimits,
    node::{
        self,
        InvalidNode,
        Reason, //
    },
    ring::MAX_PAGE_ORDER,
    state::{
        self,
        XenbusState, //
    },
};

use crate::{
    disk::{
        Disk,
        MAX_INDIRECT_SEGMENTS, //
    },
    error::ConnectError, //
};

/// Name of the operation in the error of a failed read.
pub(crate) const READING: &str = "reading xenstore";

/// Creates a reader of a directory.
///
/// An empty node counts as missing.
pub(crate) fn reader(dir: &CStr) -> Reader<'_> {
    Reader::new(dir).ignore_empty()
}

/// Returns `true` if the toolstack wants the device to stay when a frontend in this state closes
/// it.
///
/// A device whose node cannot be read stays: this may be temporary, and removing the device is not.
pub(crate) fn is_online(xbdev: &xenbus::Device, frontend: XenbusState) -> bool {
    match reader(xbdev.nodename()).value("online") {
        Ok(value) => state::is_online(value.as_ref().map(|value| value.as_bytes()), frontend),
        Err(error) => {
            ratelimited!(dev_warn!(
                xbdev.as_ref(),
                "cannot read the node online: {error:?}; keeping the device\n"
            ));
            true
        }
    }
}

/// Returns `true` if a frontend has been connected to the device before.
///
/// It may have been connected to a driver that was unbound since: the nodes of the disk that this
/// driver has written are still there. If they cannot be read, a disk may be in use.
pub(crate) fn was_connected(xbdev: &xenbus::Device) -> bool {
    xenstore::exists(&NoTransaction, xbdev.nodename(), fmt!("sectors")).unwrap_or(true)
}

/// Returns the error for an invalid state of a frontend.
pub(crate) fn bad_state_error(frontend: &CStr) -> ConnectError {
    match reader(frontend).value("state") {
        Ok(Some(value)) => {
            ConnectError::State(InvalidNode::new("state", value.as_bytes(), Reason::Unknown))
        }
        Ok(None) => ConnectError::State(InvalidNode::missing("state")),
        Err(error) => ConnectError::Local(READING, error),
    }
}

/// Removes the error that was written for the toolstack, if there is one.
pub(crate) fn clear_error(xbdev: &xenbus::Device) -> Result {
    let dir = CString::try_from_fmt(fmt!("error/{}", xbdev.nodename()))?;
    match xenstore::remove(&NoTransaction, &dir, fmt!("error")) {
        Err(error) if error == ENOENT => Ok(()),
        result => result,
    }
}

/// Writes the limits for the choice of a frontend, which do not depend on the disk.
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

/// Raises limits to those that the driver before this one has written, if these are higher.
pub(crate) fn keep_offer(dir: &CStr, limits: &mut BackLimits) -> Result {
    let reader = reader(dir);
    let offered = |node| match reader.parse(node, node::decimal_u32) {
        Ok(number) => Ok(number.unwrap_or(0)),
        Err(NodeError::Invalid(_)) => Ok(0),
        Err(NodeError::Xenstore(error)) => Err(error),
    };
    limits.max_queues = limits.max_queues.max(offered("multi-queue-max-queues")?);
    let order = offered("max-ring-page-order")?.min(MAX_PAGE_ORDER);
    limits.max_ring_page_order = limits.max_ring_page_order.max(order);
    Ok(())
}

/// Writes the size of the disk, and Connected again, which makes the frontend read it.
///
/// Writes nothing if the toolstack has asked the device to close.
pub(crate) fn write_size(xbdev: &xenbus::Device, disk: &Disk) -> Result<Switched> {
    let dir = xbdev.nodename();
    let sectors = disk.bdev.sectors();
    let switched = xbdev.switch_state_with(XenbusState::Connected, |transaction| {
        xenstore::write(transaction, dir, fmt!("sectors"), fmt!("{sectors}"))
    })?;
    if switched == Switched::Written {
        disk.set_written_sectors(sectors);
    }
    Ok(switched)
}

/// Withdraws a feature that the disk does not support.
pub(crate) fn withdraw_feature(xbdev: &xenbus::Device, node: &str) -> Result {
    xenstore::write(&NoTransaction, xbdev.nodename(), fmt!("{node}"), fmt!("0"))
}
