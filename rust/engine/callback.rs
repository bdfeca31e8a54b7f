// SPDX-License-Identifier: GPL-2.0-only

//! Engines of libraries that complete requests in threads of their own.
//!
//! An [`Image`] is what differs between the libraries; [`CallbackEngine`] is the rest.
//!
//! A [`Task`] owns a request and its memory while the library works on it. The thread that
//! completes it adds it to the queue's list, and makes the queue's file descriptor readable.

use crate::check::check;
use crate::error::Result;
use crate::event::Event;
use crate::info::{Discard, Guarantees, Info};
use crate::memory::{allocate, in_use};
use crate::request::{Completion, Request};
use crate::{wait_readable, Engine, Queue, DROP_TIMEOUT};
use io_buffer::Buffer;
use libc::iovec;
use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

const BLOCK_SIZE: u32 = 512;
const PAGE_SIZE: usize = 4096;

/// An open image of a library.
pub(crate) trait Image: Send + Sync + 'static {
    /// Reads the size of the image in bytes.
    fn size(&self) -> Result<u64>;

    /// Starts a request that has passed the checks.
    ///
    /// The task is completed exactly once, in any thread.
    fn start(&self, task: Task);

    /// Closes the image, after a flush if `flushes` is set.
    fn close(self, flushes: bool) -> Result<()>;
}

/// The limits of a library.
pub(crate) struct Limits {
    /// The greatest number of buffers of a read or write.
    pub(crate) max_buffers: usize,
    /// The unit in bytes in which discards free storage.
    pub(crate) granularity: u32,
}

/// An engine for the images of a library.
pub(crate) struct CallbackEngine<I> {
    shared: Arc<Shared<I>>,
}

/// The state that the queues of an image share.
struct Shared<I> {
    image: I,
    info: Info,
    size: AtomicU64,
}

impl<I> Shared<I> {
    fn info(&self) -> Info {
        Info {
            size: self.size.load(Ordering::Relaxed),
            ..self.info
        }
    }
}

impl<I: Image> CallbackEngine<I> {
    /// Creates the engine of an image, which is locked against other writers if `is_locked` is set.
    pub(crate) fn new(image: I, limits: &Limits, read_only: bool, is_locked: bool) -> Result<Self> {
        let size = whole_blocks(image.size()?);
        let info = Info {
            size,
            logical_block_size: BLOCK_SIZE,
            physical_block_size: 4096,
            max_transfer: 32 << 20,
            max_buffers: limits.max_buffers,
            max_queues: 64,
            buffer_alignment: 1,
            read_only,
            discard: Some(Discard {
                granularity: limits.granularity,
                alignment: 0,
            }),
            write_zeroes: true,
            guarantees: Guarantees {
                durable: true,
                direct: true,
                exclusive: is_locked || read_only,
            },
        };
        let size = AtomicU64::new(size);
        let shared = Arc::new(Shared { image, info, size });
        Ok(Self { shared })
    }
}

/// Returns the part of a size that is whole blocks.
fn whole_blocks(size: u64) -> u64 {
    size & !u64::from(BLOCK_SIZE - 1)
}

impl<I: Image> Engine for CallbackEngine<I> {
    fn info(&self) -> Info {
        self.shared.info()
    }

    fn refresh(&self) -> Result<Info> {
        let size = whole_blocks(self.shared.image.size()?);
        self.shared.size.store(size, Ordering::Relaxed);
        Ok(self.info())
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn Queue>> {
        Ok(Box::new(CallbackQueue::new(self.shared.clone(), depth)?))
    }

    fn allocate(&self, len: usize) -> Result<Buffer> {
        allocate(len, PAGE_SIZE)
    }

    fn close(self: Box<Self>) -> Result<()> {
        let shared = Arc::into_inner(self.shared).ok_or_else(in_use)?;
        shared.image.close(!shared.info.read_only)
    }
}

/// A request that a library works on.
pub(crate) struct Task {
    /// The request.
    pub(crate) request: Request,
    list: Arc<List>,
}

impl Task {
    /// Returns the memory of the buffers, as the functions of the libraries take it.
    pub(crate) fn vectors(&mut self) -> Vec<iovec> {
        let vector = |buffer: &mut Buffer| iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        self.request.buffers.iter_mut().map(vector).collect()
    }

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
struct CallbackQueue<I: Image> {
    shared: Arc<Shared<I>>,
    list: Arc<List>,
    waiting: VecDeque<Request>,
    depth: usize,
    /// Requests that were started and whose completions were not taken.
    started: usize,
}

impl<I: Image> CallbackQueue<I> {
    /// Creates a queue that has up to `depth` requests in flight.
    fn new(shared: Arc<Shared<I>>, depth: u32) -> Result<Self> {
        Ok(Self {
            shared,
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
            let checked = check(&request, &self.shared.info());
            let list = self.list.clone();
            let task = Task { request, list };
            match checked {
                Ok(()) => self.shared.image.start(task),
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
        mem::forget(self.shared.clone());
    }
}
