// SPDX-License-Identifier: GPL-2.0-only

//! I/O accounting: the cgroup and the priority that the toolstack has written to the backend's
//! directory.
//!
//! - `cgroup`: I/O is charged to this cgroup of version 2, a path below the root of the hierarchy,
//!   so that its limits, weights and counters (`io.max`, `io.weight`, `io.stat`) apply to the
//!   guest.
//! - `io-priority`: `realtime/N`, `best-effort/N` or `idle`, as for `ionice`, for I/O schedulers
//!   that use priorities.
//!
//! The kernel does not let modules charge a cgroup for the CPU time or the memory of a kernel
//! thread. For these, and to choose CPUs, an administrator can move the queue threads
//! (`cgroup.procs`, `taskset`), which have names and exist while the frontend is connected.

use kernel::{
    prelude::*,
    str::{
        CStr,
        CString, //
    },
};

use kernel_ext::{
    base::{
        blkcg::{
            BlkcgCss,
            BlkcgGuard,
            IoPriority, //
        },
        kthread::Current, //
    },
    ratelimited,
    xen::{
        xenbus,
        xenstore::{
            DirectoryListing,
            Reader, //
        },
    },
};

use blkif::node::{
    self,
    InvalidNode,
    Reason, //
};

use crate::{
    error::{
        ConnectError,
        ResultExt, //
    },
    xenstore::READING, //
};

/// Cgroup and priority of the I/O of a disk.
pub(crate) struct IoAccounting {
    group: Option<BlkcgCss>,
    priority: Option<IoPriority>,
}

impl IoAccounting {
    /// Reads the settings of the toolstack.
    ///
    /// `listing` is that of the device's directory.
    pub(crate) fn read(
        xbdev: &xenbus::Device,
        listing: &DirectoryListing,
    ) -> Result<Self, ConnectError> {
        Ok(Self {
            group: read_group(xbdev, listing)?,
            priority: read_priority(xbdev, listing)?,
        })
    }

    /// Applies the settings to the I/O of a queue thread, until the result is dropped.
    ///
    /// `name` is that of the queue.
    pub(crate) fn apply<'a>(
        &self,
        thread: &'a Current,
        xbdev: &xenbus::Device,
        name: &CStr,
    ) -> Option<BlkcgGuard<'a>> {
        if let Some(priority) = self.priority {
            if let Err(error) = thread.set_io_priority(priority) {
                ratelimited!(dev_warn!(
                    xbdev.as_ref(),
                    "{name}: cannot set the I/O priority: {error:?}: the queue keeps the default\n"
                ));
            }
        }
        self.group.as_ref().map(|group| thread.charge(group))
    }
}

fn read_group(
    xbdev: &xenbus::Device,
    listing: &DirectoryListing,
) -> Result<Option<BlkcgCss>, ConnectError> {
    const NODE: &str = "cgroup";
    let reader = Reader::listed(xbdev.nodename(), listing).ignore_empty();
    let Some(path) = reader.value(NODE).during(READING)? else {
        return Ok(None);
    };
    let text =
        CString::try_from_fmt(fmt!("{}", &*path)).during("copying the name of the cgroup")?;
    match BlkcgCss::find(&text) {
        Ok(group) => Ok(Some(group)),
        Err(error) if error == ENOENT => {
            let bad = InvalidNode::new(NODE, path.as_bytes(), Reason::Unknown);
            Err(ConnectError::Toolstack(bad))
        }
        Err(error) => Err(ConnectError::Local("looking up the cgroup", error)),
    }
}

fn read_priority(
    xbdev: &xenbus::Device,
    listing: &DirectoryListing,
) -> Result<Option<IoPriority>, ConnectError> {
    const NODE: &str = "io-priority";
    let reader = Reader::listed(xbdev.nodename(), listing).ignore_empty();
    let Some(value) = reader.value(NODE).during(READING)? else {
        return Ok(None);
    };
    let priority = node::io_priority(NODE, value.as_bytes()).map_err(ConnectError::Toolstack)?;
    Ok(Some(match priority {
        node::IoPriority::RealTime(level) => IoPriority::RealTime(level),
        node::IoPriority::BestEffort(level) => IoPriority::BestEffort(level),
        node::IoPriority::Idle => IoPriority::Idle,
    }))
}
