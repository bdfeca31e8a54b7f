// SPDX-License-Identifier: GPL-2.0-only

//! A ring and its event channel, shared with the backend.

use kernel::{
    prelude::*,
    sync::Arc, //
};

use kernel_ext::xen::{
    events::{
        EventChannel,
        Handler,
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

/// A ring and its event channel, whose events `H` handles.
///
/// Dropping it frees the ring and closes the channel.
///
/// Context: dropping it may sleep.
pub(crate) struct RingChannel<H: Handler> {
    pub(crate) ring: FrontRing<RingPages>,
    pub(crate) channel: Arc<EventChannel<H>>,
    pub(crate) notifier: Notifier,
}

impl<H: Handler> RingChannel<H> {
    /// Creates a ring of `1 << page_order` pages and an event channel, for the backend of the
    /// device.
    ///
    /// Context: may sleep.
    pub(crate) fn new(device: &xenbus::Device, page_order: u32, handler: &Arc<H>) -> Result<Self> {
        let pages = RingPages::new(device, page_order)?;
        let ring = FrontRing::new(pages, Abi::native()).map_err(|_| EINVAL)?;
        let channel = EventChannel::alloc_unbound(device, c"blkif", handler.clone())?;
        Ok(Self {
            ring,
            notifier: channel.notifier().ok_or(EINVAL)?,
            channel: Arc::new(channel, GFP_KERNEL)?,
        })
    }

    /// Closes the event channel and waits for its handler.
    ///
    /// Returns the memory of the ring.
    ///
    /// Context: may sleep.
    pub(crate) fn disconnect(self) -> RingPages {
        let Self { ring, channel, .. } = self;
        drop(channel);
        ring.into_memory()
    }

    /// Returns `true` unless the domain was restored since the connection was made.
    pub(crate) fn is_open(&self) -> bool {
        self.channel.is_open()
    }

    /// Returns the grant references of the pages of the ring.
    pub(crate) fn references(&self) -> impl Iterator<Item = GrantRef> + '_ {
        self.ring.memory().references()
    }
}
