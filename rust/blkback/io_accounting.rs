// SPDX-License-Identifier: GPL-2.0-only

//! Whom the I/O of a disk counts for: what the toolstack has written to the backend's directory.
//!
//! - `cgroup`: I/O is charged to this cgroup of version 2, a path below the root of the hierarchy. Its
//!   limits, weights and counters (`io.max`, `io.weight`, `io.stat`) hold for the guest then.
//! - `io-priority`: `realtime/N`, `best-effort/N` or `idle`, as of `ionice`, for schedulers that know
//!   priorities.
//!
//! That is as far as it goes: the kernel gives modules no way to charge a cgroup for the CPU time or
//! the memory of a kernel thread. For these, and to choose the CPUs, a person can move the threads
//! (`cgroup.procs`, `taskset`): they have names and stay while the frontend is connected.

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
        xenstore::DirectoryListing, //
    },
};

use blkif::node::{
    self,
    InvalidNode,
    Reason, //
};

use crate::connect::{
    read_listed,
    ConnectError,
    ResultExt, //
};

/// Whom the I/O of a disk counts for.
pub(crate) struct IoAccounting {
    group: Option<BlkcgCss>,
    priority: Option<IoPriority>,
}

impl IoAccounting {
    /// As the toolstack wants it. `listing` lists the device's directory.
    pub(crate) fn read(
        xbdev: &xenbus::Device,
        listing: &DirectoryListing,
    ) -> Result<Self, ConnectError> {
        Ok(Self {
            group: read_group(xbdev, listing)?,
            priority: read_priority(xbdev, listing)?,
        })
    }

    /// Has the I/O of the thread of a queue count so, until the result is dropped.
    pub(crate) fn apply<'a>(&self, thread: &'a Current, queue: &CStr) -> Option<BlkcgGuard<'a>> {
        if let Some(priority) = self.priority {
            if let Err(error) = thread.set_io_priority(priority) {
                ratelimited!(pr_warn!(
                    "{queue}: cannot set the priority of I/O: {error:?}\n"
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
    let Some(path) = read_listed(listing, xbdev.nodename(), NODE)? else {
        return Ok(None);
    };
    let text = CString::try_from_fmt(fmt!("{}", &*path)).during("keeping the name of a cgroup")?;
    match BlkcgCss::find(&text) {
        Ok(group) => Ok(Some(group)),
        Err(error) if error == ENOENT => {
            let bad = InvalidNode::new(NODE, path.as_bytes(), Reason::Unknown);
            Err(ConnectError::Node(bad))
        }
        Err(error) => Err(ConnectError::Local("looking for a cgroup", error)),
    }
}

fn read_priority(
    xbdev: &xenbus::Device,
    listing: &DirectoryListing,
) -> Result<Option<IoPriority>, ConnectError> {
    const NODE: &str = "io-priority";
    let Some(value) = read_listed(listing, xbdev.nodename(), NODE)? else {
        return Ok(None);
    };
    let priority = node::io_priority(NODE, value.as_bytes()).map_err(ConnectError::Node)?;
    Ok(Some(match priority {
        node::IoPriority::RealTime(level) => IoPriority::RealTime(level),
        node::IoPriority::BestEffort(level) => IoPriority::BestEffort(level),
        node::IoPriority::Idle => IoPriority::Idle,
    }))
}
