// SPDX-License-Identifier: GPL-2.0-only

//! Queues for libraries that complete requests in threads of their own.
//!
//! A [`Task`] owns a request and its memory while the library works on it. The thread that
//! completes it adds it to the queue's list, and makes the queue's file descriptor readable.

use crate::check::check;
use crate::error::Result;
use crate::event::Event;
use crate::info::Info;
use crate::request::{Completion, Request};
use crate::{wait_readable, Queue, DROP_TIMEOUT};
use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// An open image of a library.
pub(crate) trait Image: Send + Sync + 'static {
    /// Returns the geometry.
    fn info(&self) -> Info;

    /// Starts a request that has passed the checks.
    ///
    /// The task is completed exactly once, in any thread.
    fn start(&self, task: Task);
}

/// A request that a library works on.
pub(crate) struct Task {
    /// The request.
    pub(crate) request: Request,
    list: Arc<List>,
}

impl Task {
    /// Completes the request.
    pub(crate) fn complete(self, result: Result<()>) {
        self.list.add(self.request.complete(result));
    }
}

/// The completions that were not taken.
struct List {
    event: Event,
    completions: Mutex<Vec<Completion>>,
}

impl List {
    fn lock(&self) -> MutexGuard<'_, Vec<Completion>> {
        // The list is valid between any two statements that change it.
        self.completions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, completion: Completion) {
        let mut completions = self.lock();
        let was_empty = completions.is_empty();
        completions.push(completion);
        drop(completions);
        if was_empty {
            self.event.set();
        }
    }

    fn take(&self) -> Vec<Completion> {
        // In this order: what is added after the list was taken sets the event again.
        self.event.clear();
        mem::take(&mut *self.lock())
    }
}

/// A queue of an image.
pub(crate) struct CallbackQueue<I: Image> {
    image: Arc<I>,
    list: Arc<List>,
    waiting: VecDeque<Request>,
    depth: usize,
    /// Requests that were started and whose completions were not taken.
    started: usize,
}

impl<I: Image> CallbackQueue<I> {
    /// Creates a queue that has up to `depth` requests in flight.
    pub(crate) fn new(image: Arc<I>, depth: u32) -> Result<Self> {
        Ok(Self {
            image,
            list: Arc::new(List {
                event: Event::new()?,
                completions: Mutex::new(Vec::new()),
            }),
            waiting: VecDeque::new(),
            depth: usize::try_from(depth).unwrap_or(usize::MAX).max(1),
            started: 0,
        })
    }

    fn start_waiting(&mut self) {
        while self.started < self.depth {
            let Some(request) = self.waiting.pop_front() else {
                return;
            };
            self.started = self.started.saturating_add(1);
            let checked = check(&request, &self.image.info());
            let list = self.list.clone();
            let task = Task { request, list };
            match checked {
                Ok(()) => self.image.start(task),
                Err(error) => task.complete(Err(error)),
            }
        }
    }
}

impl<I: Image> AsFd for CallbackQueue<I> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.list.event.as_fd()
    }
}

impl<I: Image> Queue for CallbackQueue<I> {
    fn submit(&mut self, request: Request) {
        self.waiting.push_back(request);
    }

    fn kick(&mut self) -> Result<()> {
        self.start_waiting();
        Ok(())
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) -> Result<()> {
        let mut taken = self.list.take();
        self.started = self.started.saturating_sub(taken.len());
        completions.append(&mut taken);
        self.start_waiting();
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.waiting.len().saturating_add(self.started)
    }
}

impl<I: Image> Drop for CallbackQueue<I> {
    fn drop(&mut self) {
        let deadline = Instant::now() + DROP_TIMEOUT;
        self.waiting.clear();
        loop {
            self.started = self.started.saturating_sub(self.list.take().len());
            if self.started == 0 {
                return;
            }
            if !matches!(wait_readable(self.as_fd(), deadline), Ok(true)) {
                break;
            }
        }
        // The library still uses the image, so it is never closed. The tasks own their memory.
        mem::forget(self.image.clone());
    }
}
