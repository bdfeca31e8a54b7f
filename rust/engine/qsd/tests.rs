// SPDX-License-Identifier: GPL-2.0-only

//! A server of an image for the tests of the modules: a test plays the device.

use super::queue::QsdQueue;
use super::vhost_user::answer;
use super::QsdEngine;
use crate::connect::{Connect, Protocol};
use crate::error::{Error, Result};
use crate::memory::allocate;
use crate::options::Options;
use crate::request::{Completion, Request};
use crate::Queue;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A server of an image.
#[derive(Default)]
pub(super) struct FakeServer {
    /// The device's ends of all connections.
    devices: Mutex<Vec<UnixStream>>,
    /// For each of them, if the server was told of writes that were not flushed.
    dirty: Mutex<Vec<bool>>,
    /// The errors of the next connections.
    errors: Mutex<VecDeque<Errno>>,
}

impl FakeServer {
    /// Opens the image of the server.
    pub(super) fn open_image() -> (Arc<Self>, QsdEngine) {
        let server = Arc::new(Self::default());
        let options = Options {
            direct: Some(false),
            reconnect_timeout: Duration::from_secs(60),
            ..Options::default()
        };
        let engine = QsdEngine::open(Path::new("/image"), &options, server.clone()).unwrap();
        (server, engine)
    }

    /// Opens the image of the server, and a queue of it.
    pub(super) fn open() -> (Arc<Self>, QsdEngine, QsdQueue) {
        let (server, engine) = Self::open_image();
        let queue = QsdQueue::new(engine.shared.clone(), 4).unwrap();
        (server, engine, queue)
    }

    /// Ends the last connection, as the end of the daemon does.
    pub(super) fn end(&self) {
        let devices = self.devices.lock().unwrap();
        devices.last().unwrap().shutdown(Shutdown::Both).unwrap();
    }

    /// Makes the next connections fail.
    pub(super) fn fail(&self, errors: impl IntoIterator<Item = Errno>) {
        self.errors.lock().unwrap().extend(errors);
    }

    /// Returns for each connection if the server was told of writes that were not flushed.
    pub(super) fn dirty(&self) -> Vec<bool> {
        self.dirty.lock().unwrap().clone()
    }
}

impl Connect for FakeServer {
    fn connect(&self, protocol: Protocol, is_dirty: bool) -> Result<OwnedFd> {
        let error = self.errors.lock().unwrap().pop_front();
        let error = error.or((protocol == Protocol::Nbd).then_some(Errno::CONNREFUSED));
        if let Some(errno) = error {
            return Err(Error::new(errno, "the server is told to fail", "none"));
        }
        let (own, device) = UnixStream::pair().unwrap();
        self.devices
            .lock()
            .unwrap()
            .push(device.try_clone().unwrap());
        self.dirty.lock().unwrap().push(is_dirty);
        thread::spawn(move || answer(device));
        Ok(own.into())
    }

    fn resize(&self, _size: u64) -> Result<()> {
        Ok(())
    }

    fn stop(&self) -> Result<()> {
        Ok(())
    }
}

/// Waits for something, with a deadline.
pub(super) fn wait_for(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !check() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Returns a write of 4096 bytes at the start of the image.
pub(super) fn write() -> Request {
    Request::write(1, 0, vec![allocate(4096, 4096).unwrap()])
}

/// Waits for the completions of all requests, which the device completes with `status` in the order
/// in which it gets them.
pub(super) fn complete_all(queue: &mut QsdQueue, status: u8) -> Vec<Completion> {
    let mut completions = Vec::new();
    wait_for("the completions", || {
        queue.kick().unwrap();
        queue.virtqueue.complete_all(status);
        queue.completions(&mut completions).unwrap();
        queue.in_flight() == 0
    });
    completions
}
