// SPDX-License-Identifier: GPL-2.0-only

//! Requests in a virtqueue, which is set up again when its connection is lost.

use super::link::Shared;
use super::second::SecondAttempts;
use super::task::{Next, Task};
use super::vhost_user::Session;
use super::virtqueue::Virtqueue;
use crate::check::check;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::reconnect::{Connecting, Target};
use crate::request::{Completion, Request};
use crate::{Queue, DROP_TIMEOUT};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError};

/// The status of a request (`VIRTIO_BLK_S_OK`, `VIRTIO_BLK_S_UNSUPP`).
const OK: u8 = 0;
const UNSUPPORTED: u8 = 2;

/// Number of connections that may be lost with the same request in flight.
const MAX_LOSSES: u8 = 3;

/// A queue of an image.
pub(super) struct QsdQueue {
    shared: Arc<Shared>,
    number: usize,
    pub(super) virtqueue: Virtqueue,
    /// Notifies the device.
    kick: Event,
    /// Is set by the device, and by threads that have something for this queue.
    call: Arc<Event>,
    link: Link,
    /// The tasks in the virtqueue, by their slots.
    tasks: Vec<Option<Task>>,
    free: Vec<u16>,
    /// Tasks that are not in the virtqueue.
    waiting: VecDeque<Task>,
    completed: Vec<Completion>,
    seconds: Option<SecondAttempts>,
    /// There was nothing to take at the last call, and the event was not cleared.
    was_idle: bool,
}

/// The state of the connection.
enum Link {
    /// The virtqueue is set up.
    Up(Arc<Session>),
    /// A thread connects.
    Connecting(Connecting<Arc<Session>>),
    /// There is no connection, and no task that needs one.
    Down,
}

impl QsdQueue {
    pub(super) fn new(shared: Arc<Shared>, depth: u32) -> Result<Self> {
        let call = Arc::new(Event::new()?);
        let kick = Event::new()?;
        let number = shared.add_queue(&call)?;
        let virtqueue = Virtqueue::new(shared.memory.clone(), number, depth);
        let slots = u32::from(virtqueue.slots()).min(depth.max(1));
        let mut queue = Self {
            number,
            virtqueue,
            kick,
            call,
            link: Link::Down,
            tasks: (0..slots).map(|_| None).collect(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            completed: Vec::new(),
            seconds: None,
            was_idle: false,
            shared,
        };
        // Otherwise the first request connects. The end of the connection may not be known yet.
        let session = queue.shared.current_session();
        if session.is_some_and(|session| queue.set_up(session).is_ok()) {
            // The device has set it, in case there are completions.
            queue.call.clear();
        }
        Ok(queue)
    }

    /// Sets up the virtqueue on a new connection.
    fn set_up(&mut self, session: Arc<Session>) -> Result<()> {
        self.virtqueue.reset();
        let slots = u16::try_from(self.tasks.len()).unwrap_or(u16::MAX);
        self.free = (0..slots).rev().collect();
        session.start(self.number, &self.virtqueue, &self.kick, &self.call)?;
        self.link = Link::Up(session);
        Ok(())
    }

    /// Does what can be done without waiting.
    fn run(&mut self) {
        self.check_link();
        if matches!(self.link, Link::Down) && !self.waiting.is_empty() {
            self.connect();
        }
        self.fill();
    }

    /// Notices that a connection was lost, or that there is a new one.
    fn check_link(&mut self) {
        if let Link::Connecting(connecting) = &self.link {
            match connecting.result() {
                Some(Ok(session)) => self.connected(session),
                Some(Err(error)) => self.fail(&error),
                None => {}
            }
        }
        if matches!(&self.link, Link::Up(session) if session.is_lost()) {
            self.lost();
        }
    }

    /// Adds tasks to the virtqueue while there is room, and notifies the device.
    fn fill(&mut self) {
        if !matches!(self.link, Link::Up(_)) {
            return;
        }
        while let Some(slot) = self.free.pop() {
            let Some(task) = self.waiting.pop_front() else {
                self.free.push(slot);
                break;
            };
            self.push(slot, task);
        }
        if self.virtqueue.publish() {
            self.kick.set();
        }
    }

    fn push(&mut self, slot: u16, task: Task) {
        let (kind, sector, payload) = task.command(&self.shared.config);
        self.virtqueue.push(slot, kind, sector, payload);
        if let Some(place) = self.tasks.get_mut(usize::from(slot)) {
            *place = Some(task);
        }
    }

    /// Takes what other processes and threads have for this queue. Returns `true` if there was
    /// something.
    fn collect(&mut self) -> bool {
        let (used, completed) = (self.used(), self.completed.len());
        self.check_link();
        self.take_completed();
        used != self.used() || completed != self.completed.len()
    }

    /// Takes what the daemon has completed.
    ///
    /// A daemon that was killed may have lost that. So nothing is taken after it was decided if
    /// there are writes that were not flushed, see [`Shared::session`]: it is sent again.
    fn take_completed(&mut self) {
        let shared = self.shared.clone();
        let _taking = shared.taking.read().unwrap_or_else(PoisonError::into_inner);
        match &self.link {
            // `check_link` takes the tasks back.
            Link::Up(session) if session.is_lost() => return,
            Link::Up(_) => self.take(),
            Link::Connecting(_) | Link::Down => {}
        }
        self.take_seconds();
    }

    /// Takes the completions of the device.
    fn take(&mut self) {
        loop {
            while let Some(completion) = self.virtqueue.pop() {
                let task = completion.ok().and_then(|(slot, status)| {
                    let place = self.tasks.get_mut(usize::from(slot))?;
                    Some((slot, status, place.take()?))
                });
                let Some((slot, status, task)) = task else {
                    // It completes what it was not asked for.
                    return self.lost();
                };
                self.free.push(slot);
                self.ended(task, status);
            }
            if !self.virtqueue.ask_for_notification() {
                return;
            }
        }
    }

    /// Continues with a task that the device has completed.
    fn ended(&mut self, mut task: Task, status: u8) {
        match status {
            OK => match task.advance(&self.shared.config) {
                Next::Again => self.waiting.push_front(task),
                Next::Done => self.complete(task, Ok(())),
            },
            UNSUPPORTED => {
                let error = task.error(Errno::OPNOTSUPP);
                self.complete(task, Err(error));
            }
            _ => self.try_again(task),
        }
    }

    fn complete(&mut self, task: Task, result: Result<()>) {
        self.completed.push(task.complete(&self.shared, result));
    }

    /// Carries out a task over NBD, which tells the error.
    fn try_again(&mut self, task: Task) {
        let seconds = match self.seconds.take() {
            Some(seconds) => Ok(seconds),
            None => SecondAttempts::start(&self.shared, &self.call),
        };
        match seconds {
            Ok(mut seconds) => {
                seconds.add(task);
                self.seconds = Some(seconds);
            }
            Err(error) => self.complete(task, Err(error)),
        }
    }

    /// Takes the results of second attempts.
    fn take_seconds(&mut self) {
        let mut ended = Vec::new();
        if let Some(seconds) = &mut self.seconds {
            ended.extend(seconds.take());
            if seconds.is_idle() {
                self.seconds = None;
            }
        }
        for (task, result) in ended {
            match result {
                Some(result) => self.complete(task, result),
                None => self.waiting.push_back(task.after_loss()),
            }
        }
    }

    /// Takes back all tasks from the device, whose connection was lost.
    fn lost(&mut self) {
        if let Link::Up(session) = mem::replace(&mut self.link, Link::Down) {
            session.close();
        }
        if let Some(seconds) = &mut self.seconds {
            seconds.lost();
        }
        for task in self.tasks.iter_mut().rev().filter_map(Option::take) {
            self.waiting.push_front(task.after_loss());
        }
    }

    /// Starts a thread that connects.
    fn connect(&mut self) {
        let shared = self.shared.clone();
        let target = Target {
            name: format!("qemu-storage-daemon for {}", shared.path.display()),
            remedy: "check the image, and the load of the host",
            timeout: shared.options.reconnect_timeout,
            // Their number has a limit.
            losses: 0,
        };
        let started = Connecting::start(target, &self.call, move || shared.session());
        self.connecting(started);
    }

    /// Waits for a thread that connects. Without one this thread connects: the device may have the
    /// tasks until then.
    fn connecting(&mut self, started: Result<Connecting<Arc<Session>>>) {
        if let Ok(connecting) = started {
            self.link = Link::Connecting(connecting);
            return;
        }
        match self.shared.session() {
            Ok(session) => self.connected(session),
            Err(error) => self.fail(&error),
        }
    }

    /// Uses a new connection. The device has no tasks of an earlier one.
    fn connected(&mut self, session: Arc<Session>) {
        self.link = Link::Down;
        let is_lost = self.set_up(session).is_err();
        for task in mem::take(&mut self.waiting) {
            let task = if is_lost { task.after_loss() } else { task };
            if task.losses() < MAX_LOSSES {
                self.waiting.push_back(task);
                continue;
            }
            let error = Error::new(
                Errno::NOTCONN,
                format!(
                    "qemu-storage-daemon for {} has ended {MAX_LOSSES} times with the request",
                    self.shared.path.display()
                ),
                "detach the disk, and check the image with qemu-img check",
            );
            self.complete(task, Err(error));
        }
    }

    /// Fails all tasks. The device has none, see [`Connect`](crate::Connect::connect).
    fn fail(&mut self, error: &Error) {
        self.link = Link::Down;
        for task in mem::take(&mut self.waiting) {
            self.complete(task, Err(error.clone()));
        }
    }

    /// Number of tasks that the device has.
    fn used(&self) -> usize {
        match self.link {
            Link::Up(_) => self.tasks.len().saturating_sub(self.free.len()),
            Link::Connecting(_) | Link::Down => 0,
        }
    }
}

impl AsFd for QsdQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }
}

impl Queue for QsdQueue {
    fn submit(&mut self, request: Request) {
        let shared = &self.shared;
        let task = match check(&request, &shared.info()) {
            Ok(()) => Task::new(request, shared),
            Err(error) => Err((request, error)),
        };
        let is_up = matches!(self.link, Link::Up(_)) && self.waiting.is_empty();
        match task {
            Ok(task) => match self.free.pop() {
                Some(slot) if is_up => self.push(slot, task),
                slot => {
                    self.free.extend(slot);
                    self.waiting.push_back(task);
                }
            },
            Err((request, error)) => self.completed.push(request.complete(Err(error))),
        }
    }

    fn kick(&mut self) -> Result<()> {
        self.run();
        if !self.completed.is_empty() {
            self.call.set();
        }
        Ok(())
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) -> Result<()> {
        let had_completed = !self.completed.is_empty();
        let has_some = self.collect() || had_completed;
        // A caller tries this before it waits, too: no system call is made then.
        if has_some || self.was_idle {
            self.call.clear();
            // What came before that is not announced again.
            self.collect();
        }
        self.was_idle = !has_some && !self.was_idle;
        self.run();
        completions.append(&mut self.completed);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        let seconds = self.seconds.as_ref().map_or(0, SecondAttempts::len);
        self.used()
            .saturating_add(self.waiting.len())
            .saturating_add(self.completed.len())
            .saturating_add(seconds)
    }
}

impl Drop for QsdQueue {
    fn drop(&mut self) {
        // What is left afterwards is not complete.
        let _ = self.drain(DROP_TIMEOUT, &mut Vec::new());
        if self.in_flight() > 0 {
            // The device may still use the memory, and the virtqueue.
            mem::forget(mem::take(&mut self.tasks));
            mem::forget(mem::take(&mut self.waiting));
            return;
        }
        if let Link::Up(session) = &self.link {
            session.stop(self.number);
        }
        self.shared.remove_queue(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{complete_all, wait_for, write, FakeServer};
    use super::*;

    #[test]
    fn what_a_daemon_has_completed_does_not_count_after_its_end() {
        let (server, engine, mut queue) = FakeServer::open();
        queue.submit(write());
        queue.kick().unwrap();
        queue.virtqueue.complete_all(OK);
        // The queue has not noticed the end yet when another one connects again.
        queue.check_link();
        let Link::Up(session) = &queue.link else {
            panic!("there is no connection");
        };
        session.close();
        engine.shared.session().unwrap();
        assert_eq!(server.dirty(), [false, false]);
        queue.take_completed();
        assert!(queue.completed.is_empty());
        let completions = complete_all(&mut queue, OK);
        completions[0].result.as_ref().unwrap();
        assert!(engine.shared.writes.is_dirty());
    }

    #[test]
    fn the_end_of_a_connection_is_noticed_that_no_queue_uses() {
        let (server, engine, queue) = FakeServer::open();
        drop(queue);
        for _ in 0..2 {
            let session = engine.shared.session().unwrap();
            server.end();
            wait_for("the end", || session.is_lost());
        }
    }

    #[test]
    fn tasks_do_not_end_before_the_device_has_no_more_of_them() {
        let (server, _engine, mut queue) = FakeServer::open();
        queue.submit(write());
        queue.kick().unwrap();
        queue.lost();
        let error = Error::new(Errno::AGAIN, "there is no thread", "none");
        queue.connecting(Err(error));
        // The new connection is there, and the task is sent again.
        assert_eq!(server.dirty().len(), 2);
        assert!(queue.completed.is_empty());
        let completions = complete_all(&mut queue, OK);
        completions[0].result.as_ref().unwrap();
    }

    #[test]
    fn a_new_queue_does_not_wait_for_a_connection() {
        let (server, engine, queue) = FakeServer::open();
        drop(queue);
        let session = engine.shared.session().unwrap();
        server.end();
        wait_for("the end", || session.is_lost());
        server.fail([Errno::CONNREFUSED]);
        let mut queue = QsdQueue::new(engine.shared.clone(), 4).unwrap();
        queue.submit(write());
        let completions = complete_all(&mut queue, OK);
        completions[0].result.as_ref().unwrap();
    }

    #[test]
    fn a_daemon_that_ends_before_the_first_queue_is_replaced() {
        let (server, engine) = FakeServer::open_image();
        server.end();
        let mut queue = QsdQueue::new(engine.shared.clone(), 4).unwrap();
        queue.submit(write());
        let completions = complete_all(&mut queue, OK);
        completions[0].result.as_ref().unwrap();
        assert_eq!(server.dirty(), [false, false]);
    }

    #[test]
    fn an_image_is_not_resized_without_a_connection() {
        let (server, engine, _queue) = FakeServer::open();
        engine.shared.resize(1 << 30).unwrap();
        let session = engine.shared.session().unwrap();
        server.end();
        wait_for("the end", || session.is_lost());
        let error = engine.shared.resize(1 << 30).unwrap_err();
        assert_eq!(error.errno(), Errno::AGAIN);
        engine.shared.refresh().unwrap();
        engine.shared.resize(1 << 30).unwrap();
    }
}
