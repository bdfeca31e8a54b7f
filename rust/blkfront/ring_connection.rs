// SPDX-License-Identifier: GPL-2.0-only

//! A ring and its event channel, shared with the backend.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::xen::{
    events::{
        EventChannel,
        Notifier, //
    },
    grant::GrantRef,
    ring::RingPages,
    xenbus, //
};

use blkif::{
    ring::FrontRing,
    wire::Abi, //
};

use crate::queue::Queue;

/// A ring and its event channel. Dropping it ends both; it sleeps.
pub(crate) struct RingConnection {
    pub(crate) ring: FrontRing<RingPages>,
    pub(crate) channel: Arc<EventChannel<Queue>>,
    pub(crate) notifier: Notifier,
}

impl RingConnection {
    /// Makes a ring of `1 << page_order` pages and an event channel for the device's backend, whose
    /// events `queue` gets.
    pub(crate) fn new(
        device: &xenbus::Device,
        page_order: u32,
        queue: &Arc<Queue>,
    ) -> Result<Self> {
        let pages = RingPages::new(device, page_order)?;
        let ring = FrontRing::new(pages, Abi::native()).map_err(|_| EINVAL)?;
        let channel = EventChannel::alloc_unbound(device, c"blkif", queue.clone())?;
        Ok(Self {
            ring,
            notifier: channel.notifier().ok_or(EINVAL)?,
            channel: Arc::new(channel, GFP_KERNEL)?,
        })
    }

    /// Ends the event channel. Waits for its handler; sleeps.
    pub(crate) fn disconnect(self) -> RingPages {
        let Self { ring, channel, .. } = self;
        drop(channel);
        ring.into_memory()
    }

    /// Returns `true` unless the domain was saved and restored since the connection was made.
    pub(crate) fn is_open(&self) -> bool {
        self.channel.is_open()
    }

    /// The grants of the ring's pages, for xenstore.
    pub(crate) fn references(&self) -> impl Iterator<Item = GrantRef> + '_ {
        self.ring.memory().references()
    }
}
