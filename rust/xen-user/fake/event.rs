// SPDX-License-Identifier: GPL-2.0-only

//! Event channels made of pairs of `eventfd`s.

use super::lock;
use crate::event::Channel;
use rustix::event::eventfd;
use rustix::event::EventfdFlags;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Mutex;

/// Channels that were allocated.
#[derive(Default)]
pub(super) struct Ports {
    last: u32,
    ports: BTreeMap<u32, Port>,
}

struct Port {
    domain: u16,
    /// Signalled for the domain, and for the other side.
    ends: [End; 2],
    bound: bool,
}

/// The event that is signalled for an end, which a new one may replace.
type End = Arc<Mutex<Arc<File>>>;

/// One end of a channel.
pub struct FakeChannel {
    own: Arc<File>,
    other: End,
    /// Is free for another to bind once this is dropped.
    binding: Option<(Arc<Mutex<Ports>>, u32)>,
}

impl Ports {
    pub(super) fn allocate(&mut self, domain: u16) -> io::Result<(FakeChannel, u32)> {
        self.last = self.last.wrapping_add(1);
        let ends = [
            Arc::new(Mutex::new(new_event()?)),
            Arc::new(Mutex::new(new_event()?)),
        ];
        let [own, other] = ends.clone();
        let own = lock(&own).clone();
        let port = Port {
            domain,
            ends,
            bound: false,
        };
        self.ports.insert(self.last, port);
        let channel = FakeChannel {
            own,
            other,
            binding: None,
        };
        Ok((channel, self.last))
    }

    /// Frees all channels for another process to bind. Those that have them are not notified any
    /// more.
    pub(super) fn unbind(&mut self) -> io::Result<()> {
        for port in self.ports.values_mut() {
            let [_, end] = &port.ends;
            *lock(end) = new_event()?;
            port.bound = false;
        }
        Ok(())
    }
}

fn new_event() -> io::Result<Arc<File>> {
    let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    Ok(Arc::new(fd.into()))
}

/// Binds the other end of a channel. As on Xen, a notification is pending at once.
pub(super) fn bind(
    ports: &Arc<Mutex<Ports>>,
    domain: u16,
    number: u32,
) -> io::Result<Box<dyn Channel>> {
    let mut locked = lock(ports);
    let port = locked.ports.get_mut(&number);
    let port = port
        .filter(|port| port.domain == domain && !port.bound)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    port.bound = true;
    let [other, own] = port.ends.clone();
    let own = lock(&own).clone();
    signal(&own)?;
    Ok(Box::new(FakeChannel {
        own,
        other,
        binding: Some((ports.clone(), number)),
    }))
}

fn signal(mut event: &File) -> io::Result<()> {
    event.write_all(&1u64.to_ne_bytes())
}

impl Channel for FakeChannel {
    fn fd(&self) -> BorrowedFd<'_> {
        self.own.as_fd()
    }

    fn take(&mut self) -> io::Result<bool> {
        match (&*self.own).read(&mut [0; 8]) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn notify(&self) -> io::Result<()> {
        signal(&lock(&self.other))
    }
}

impl Drop for FakeChannel {
    fn drop(&mut self) {
        let Some((ports, number)) = self.binding.take() else {
            return;
        };
        let mut ports = lock(&ports);
        if let Some(port) = ports.ports.get_mut(&number) {
            port.bound = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::event::Channel;
    use crate::event::Events;
    use crate::fake::Host;

    #[test]
    fn notifications_go_both_ways() {
        let host = Host::new();
        let (mut front, port) = host.allocate_channel(5).unwrap();
        assert!(host.bind(6, port).is_err());
        let mut back = host.bind(5, port).unwrap();
        assert!(host.bind(5, port).is_err());
        assert!(back.take().unwrap() && !back.take().unwrap());
        back.notify().unwrap();
        back.notify().unwrap();
        assert!(front.take().unwrap() && !front.take().unwrap());
        front.notify().unwrap();
        assert!(back.take().unwrap());
        drop(back);
        assert!(host.bind(5, port).is_ok());
    }
}
