// SPDX-License-Identifier: GPL-2.0-only

//! Ring channels: a mapped ring with its event channel (`xen_blkif_map()`).

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::xen::{
    events::EventChannel,
    grant::ForeignRef,
    ring::MappedRing,
    xenbus, //
};

use blkif::wire::Abi;

use crate::{
    domain,
    error::{
        ConnectError,
        ResultExt, //
    },
    handoff::Ring,
    wakeup::QueueWakeup, //
};

/// A mapped ring with its event channel.
pub(crate) struct RingChannel {
    pub(crate) ring: Ring,
    pub(crate) channel: EventChannel<QueueWakeup>,
    /// The wakeup flags, which events of the channel set.
    pub(crate) wakeup: Arc<QueueWakeup>,
}

impl RingChannel {
    /// Maps the pages of ring `index`, and binds the event channel at `port` of the frontend.
    pub(crate) fn new(
        xbdev: &xenbus::Device,
        index: u32,
        references: &[ForeignRef],
        port: u32,
        abi: Abi,
    ) -> Result<Self, ConnectError> {
        let ring = MappedRing::new(xbdev, references).map_err(|error| {
            if error == ENOSPC {
                domain::reclaim_mappings();
            }
            let first = references.first().map_or(0, |reference| reference.0);
            ConnectError::Unreachable(index, "ring-ref", first, error)
        })?;
        let ring = Ring::attach(ring, abi).map_err(|error| ConnectError::Ring(index, error))?;
        let wakeup = Arc::pin_init(QueueWakeup::new(), GFP_KERNEL).during("allocating a queue")?;
        let channel = EventChannel::bind_interdomain(xbdev, port, c"blkif-backend", wakeup.clone())
            .map_err(|error| ConnectError::Unreachable(index, "event-channel", port, error))?;
        Ok(Self {
            ring,
            channel,
            wakeup,
        })
    }
}
