// SPDX-License-Identifier: GPL-2.0-only

//! Xen in one process, for tests on a machine without it.
//!
//! A [`Host`] has one memory, whose pages other domains grant, event channels made of pairs of
//! `eventfd`s, and a xenstore that speaks the protocol of `xs_wire.h` over sockets. A test plays
//! the other domain: it allocates pages and channels and writes to xenstore.

mod event;
mod grant;
mod store;

pub use event::FakeChannel;

use crate::event::Channel;
use crate::event::Events;
use crate::grant::Copies;
use crate::grant::Grants;
use crate::memory::Pages;
use crate::xenstore::Xenstore;
use event::Ports;
use grant::GrantTable;
use io_buffer::Access;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use store::Server;

/// Xen. Clones are the same one.
#[derive(Clone, Default)]
pub struct Host {
    grants: Arc<Mutex<GrantTable>>,
    ports: Arc<Mutex<Ports>>,
    server: Server,
}

impl Host {
    /// Returns a host without any grant, channel or node.
    pub fn new() -> Self {
        Self::default()
    }

    /// Connects to xenstore.
    pub fn xenstore(&self) -> io::Result<Xenstore> {
        self.server.connect()
    }

    /// Allocates consecutive pages in a domain and grants each of them. Returns the pages, as the
    /// domain sees them, and the grant references.
    pub fn grant(
        &self,
        domain: u16,
        count: usize,
        access: Access,
    ) -> io::Result<(Pages, Vec<u32>)> {
        lock(&self.grants).grant(domain, count, access)
    }

    /// Ends grants. Pages that are mapped stay mapped.
    pub fn end_grants(&self, references: &[u32]) {
        lock(&self.grants).end(references);
    }

    /// Returns the number of grants that are mapped now.
    pub fn mapped(&self) -> usize {
        lock(&self.grants).mapped()
    }

    /// Allocates an event channel in a domain. Returns its end there, and its number.
    pub fn allocate_channel(&self, domain: u16) -> io::Result<(FakeChannel, u32)> {
        lock(&self.ports).allocate(domain)
    }

    /// Closes the other ends of all channels, as if their process had been killed.
    pub fn unbind_channels(&self) -> io::Result<()> {
        lock(&self.ports).unbind()
    }
}

impl Grants for Host {
    fn map(&self, domain: u16, references: &[u32], access: Access) -> io::Result<Pages> {
        grant::map(&self.grants, domain, references, access)
    }

    fn copy(&self, copies: &mut Copies<'_>) -> io::Result<()> {
        lock(&self.grants).copy(copies);
        Ok(())
    }
}

impl Events for Host {
    fn bind(&self, domain: u16, port: u32) -> io::Result<Box<dyn Channel>> {
        event::bind(&self.ports, domain, port)
    }
}

/// Locks, also after a panic of another thread, which a test reports by itself.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
