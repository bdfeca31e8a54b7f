// SPDX-License-Identifier: GPL-2.0-only

//! Second attempts of requests that have failed.
//!
//! A virtio block device says that a request has failed, but not why, and a caller has to know: a
//! write without space is retried later. So such a request is carried out again over NBD, whose
//! replies have an error number. A thread does that, and ends when there is nothing left to do.

use super::link::Shared;
use super::task::Task;
use crate::connect::{Connect, Protocol};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::nbd::NbdEngine;
use crate::request::{Completion, Request};
use crate::{Engine, Queue, DROP_TIMEOUT};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread;

/// The second attempts of a queue.
pub(super) struct SecondAttempts {
    /// The tasks whose requests the thread has, in order.
    tasks: VecDeque<Task>,
    /// The number of those at the front that a daemon that has ended may have carried out.
    lost: usize,
    requests: Sender<Request>,
    results: Receiver<Completion>,
}

/// Connections of [`NbdEngine`] to the daemon.
struct OverNbd(Arc<Shared>);

impl Connect for OverNbd {
    fn connect(&self, protocol: Protocol, _is_dirty: bool) -> Result<OwnedFd> {
        // Starts a daemon that has ended again.
        self.0.session()?;
        self.0.server.connect(protocol, self.0.writes.is_dirty())
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.0.server.resize(size)
    }

    fn stop(&self) -> Result<()> {
        // The owner of the daemon does it.
        Ok(())
    }
}

impl SecondAttempts {
    /// Starts a thread, which sets `event` when it has a result.
    pub(super) fn start(shared: &Arc<Shared>, event: &Arc<Event>) -> Result<Self> {
        let (requests, received) = channel();
        let (sender, results) = channel();
        let (shared, event) = (shared.clone(), event.clone());
        let thread = thread::Builder::new().name("qsd-second".to_owned());
        let started = thread.spawn(move || {
            let mut queue = None;
            while let Ok(request) = received.recv() {
                let completion = attempt(&shared, &mut queue, request);
                if sender.send(completion).is_err() {
                    return;
                }
                event.set();
            }
        });
        started.map_err(|error| {
            Error::from_io(&error, "starting a thread", "raise the limit of threads")
        })?;
        Ok(Self {
            tasks: VecDeque::new(),
            lost: 0,
            requests,
            results,
        })
    }

    /// Adds a task that has failed.
    pub(super) fn add(&mut self, mut task: Task) {
        // The thread receives as long as this exists.
        let _ = self.requests.send(task.second_request());
        self.tasks.push_back(task);
    }

    /// Takes the end of the daemon into account.
    pub(super) fn lost(&mut self) {
        self.lost = self.tasks.len();
    }

    /// Takes the tasks that have ended. Those without a result have succeeded on a daemon that may
    /// have lost them when it ended.
    pub(super) fn take(&mut self) -> Vec<(Task, Option<Result<()>>)> {
        let mut ended = Vec::new();
        while let Ok(completion) = self.results.try_recv() {
            if let Some(mut task) = self.tasks.pop_front() {
                task.give_back(completion.buffers);
                let is_lost = self.lost > 0;
                self.lost = self.lost.saturating_sub(1);
                let result = match completion.result {
                    Ok(()) if is_lost => None,
                    Ok(()) if task.is_flush() => Some(Err(flush_error())),
                    result => Some(result),
                };
                ended.push((task, result));
            }
        }
        ended
    }

    /// Returns the number of tasks that have not ended.
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Returns `true` if all tasks have ended.
    pub(super) fn is_idle(&self) -> bool {
        self.tasks.is_empty()
    }
}

/// Carries out one request, over `queue` once there is one.
fn attempt(
    shared: &Arc<Shared>,
    queue: &mut Option<Box<dyn Queue>>,
    request: Request,
) -> Completion {
    let queue = match queue {
        Some(queue) => queue,
        none => match connect(shared) {
            Ok(new) => none.insert(new),
            Err(error) => return request.complete(Err(connect_error(error))),
        },
    };
    queue.submit(request);
    let mut completions = Vec::new();
    // What has not ended after the limit ends later.
    while queue.drain(DROP_TIMEOUT, &mut completions).is_err() && queue.in_flight() > 0 {}
    completions.pop().unwrap_or_else(|| Completion {
        tag: 0,
        result: Err(Error::new(Errno::IO, "a request was lost", "report this")),
        buffers: Vec::new(),
    })
}

fn connect(shared: &Arc<Shared>) -> Result<Box<dyn Queue>> {
    let server = Arc::new(OverNbd(shared.clone()));
    NbdEngine::of_daemon(&shared.export, &shared.options, server)?.queue(1)
}

/// Returns the error of a request for which there is no connection: it may be carried out later,
/// unless the daemon has lost writes.
fn connect_error(error: Error) -> Error {
    if error.errno() == Errno::NOTRECOVERABLE {
        return error;
    }
    let (cause, remedy) = (error.cause().to_owned(), error.remedy().to_owned());
    Error::new(Errno::NOTCONN, cause, remedy)
}

/// Returns the error of a flush that has failed, and succeeds now. It does not say that what the
/// first one could not write is durable.
fn flush_error() -> Error {
    Error::new(
        Errno::IO,
        "qemu-storage-daemon fails a flush, and the next one succeeds",
        "check the storage below the image: the last writes may be lost",
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::{complete_all, write, FakeServer};
    use super::*;

    /// `VIRTIO_BLK_S_IOERR`.
    const FAILED: u8 = 1;

    #[test]
    fn a_request_without_a_second_attempt_may_be_carried_out_later() {
        let (server, _engine, mut queue) = FakeServer::open();
        for (errno, expected) in [
            (Errno::CONNREFUSED, Errno::NOTCONN),
            (Errno::PROTO, Errno::NOTCONN),
            (Errno::NOTRECOVERABLE, Errno::NOTRECOVERABLE),
        ] {
            server.fail([errno]);
            queue.submit(write());
            let completions = complete_all(&mut queue, FAILED);
            let error = completions[0].result.as_ref().unwrap_err();
            assert_eq!(error.errno(), expected);
        }
    }
}
