// SPDX-License-Identifier: GPL-2.0-only

//! An image in the memory of this process, for tests.
//!
//! A test can make requests fail or wait, see [`Faults`].

use crate::check::check;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::info::{Discard, Guarantees, Info};
use crate::options::Options;
use crate::request::{Completion, Operation, Request};
use crate::{Engine, Queue};
use io_buffer::Buffer;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The greatest size of an image in memory.
const MAX_SIZE: u64 = 1 << 32;
const BLOCK_SIZE: u32 = 512;
const PAGE_SIZE: usize = 4096;

/// Faults that are injected into requests of an image in memory.
#[derive(Debug, Default)]
pub struct Faults {
    /// The errors of the next requests, in order; [`None`] carries one out.
    pub errors: VecDeque<Option<Errno>>,
    /// Requests stay in flight until this is `false` and [`MemoryEngine::set_faults`] was called.
    pub hold: bool,
    /// Queues can no longer start requests.
    pub broken: bool,
    /// The number of flushes that were carried out.
    pub flushes: u64,
}

/// An image in the memory of this process.
pub struct MemoryEngine {
    image: Arc<Image>,
}

struct Image {
    read_only: bool,
    state: Mutex<State>,
}

struct State {
    data: Vec<u8>,
    faults: Faults,
    /// The events of the queues that hold requests.
    held: Vec<Arc<Event>>,
}

impl MemoryEngine {
    /// Creates an image of `size` zeroed bytes.
    pub fn open(size: u64, options: &Options) -> Result<Self> {
        Ok(Self {
            image: Arc::new(Image {
                read_only: options.read_only,
                state: Mutex::new(State {
                    data: zeroed(size)?,
                    faults: Faults::default(),
                    held: Vec::new(),
                }),
            }),
        })
    }

    /// Changes what happens to requests, and lets held requests continue.
    pub fn set_faults<T>(&self, change: impl FnOnce(&mut Faults) -> T) -> T {
        let mut state = self.image.lock();
        let result = change(&mut state.faults);
        for event in state.held.drain(..) {
            event.set();
        }
        result
    }
}

/// Returns `size` zeroed bytes.
fn zeroed(size: u64) -> Result<Vec<u8>> {
    let invalid = size == 0 || size % u64::from(BLOCK_SIZE) != 0 || size > MAX_SIZE;
    match usize::try_from(size) {
        Ok(len) if !invalid => Ok(vec![0; len]),
        _ => Err(Error::new(
            Errno::INVAL,
            format!("an image in memory cannot have {size} bytes"),
            "use a multiple of 512 up to 4 GiB",
        )),
    }
}

impl Image {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is valid between any two statements that change it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn info(&self) -> Info {
        Info {
            size: self.lock().data.len() as u64,
            logical_block_size: BLOCK_SIZE,
            physical_block_size: BLOCK_SIZE,
            max_transfer: 32 << 20,
            max_buffers: 8192,
            max_queues: 64,
            buffer_alignment: 1,
            read_only: self.read_only,
            discard: Some(Discard {
                granularity: BLOCK_SIZE,
                alignment: 0,
            }),
            write_zeroes: true,
            guarantees: Guarantees {
                durable: false,
                direct: true,
                exclusive: true,
            },
        }
    }
}

impl Engine for MemoryEngine {
    fn info(&self) -> Info {
        self.image.info()
    }

    fn refresh(&self) -> Result<Info> {
        Ok(self.info())
    }

    fn resize(&self, size: u64) -> Result<Info> {
        let mut data = zeroed(size)?;
        let mut state = self.image.lock();
        for (new, old) in data.iter_mut().zip(&state.data) {
            *new = *old;
        }
        state.data = data;
        drop(state);
        Ok(self.info())
    }

    fn queue(&self, _depth: u32) -> Result<Box<dyn Queue>> {
        Ok(Box::new(MemoryQueue {
            image: self.image.clone(),
            event: Arc::new(Event::new()?),
            waiting: VecDeque::new(),
        }))
    }

    fn allocate(&self, len: usize) -> Result<Buffer> {
        allocate(len, PAGE_SIZE)
    }

    fn close(self: Box<Self>) -> Result<()> {
        if Arc::strong_count(&self.image) > 1 {
            return Err(in_use());
        }
        Ok(())
    }
}

/// Allocates zeroed memory with `align`, which is a power of two.
pub(crate) fn allocate(len: usize, align: usize) -> Result<Buffer> {
    Buffer::allocate(len, align).ok_or_else(|| {
        Error::new(
            Errno::NOMEM,
            format!("{len} bytes of memory cannot be allocated"),
            "free some memory",
        )
    })
}

/// Returns the error of closing an image that queues still use.
pub(crate) fn in_use() -> Error {
    Error::new(
        Errno::BUSY,
        "the image is closed while a queue still uses it",
        "drop all queues before",
    )
}

struct MemoryQueue {
    image: Arc<Image>,
    event: Arc<Event>,
    waiting: VecDeque<Request>,
}

impl State {
    /// Carries out a request that has passed the checks.
    fn transfer(&mut self, request: &mut Request) -> Result<()> {
        if let Some(Some(errno)) = self.faults.errors.pop_front() {
            return Err(Error::new(errno, "a test wants this error", "none"));
        }
        if request.operation == Operation::Flush {
            self.faults.flushes = self.faults.flushes.saturating_add(1);
            return Ok(());
        }
        let range = usize::try_from(request.offset)
            .ok()
            .zip(usize::try_from(request.length).ok())
            .and_then(|(start, len)| Some(start..start.checked_add(len)?))
            .and_then(|range| self.data.get_mut(range));
        let Some(mut range) = range else {
            return Err(Error::new(Errno::IO, "the image has shrunk", "enlarge it"));
        };
        match request.operation {
            Operation::Flush => {}
            Operation::Discard | Operation::WriteZeroes { .. } => range.fill(0),
            Operation::Read | Operation::Write { .. } => {
                for buffer in &mut request.buffers {
                    let Some((part, rest)) = range.split_at_mut_checked(buffer.len()) else {
                        break;
                    };
                    match request.operation {
                        Operation::Read => buffer.write_at(0, part)?,
                        _ => buffer.read_at(0, part)?,
                    }
                    range = rest;
                }
            }
        }
        Ok(())
    }
}

impl AsFd for MemoryQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Queue for MemoryQueue {
    fn submit(&mut self, request: Request) {
        self.waiting.push_back(request);
    }

    fn kick(&mut self) -> Result<()> {
        if self.image.lock().faults.broken {
            return Err(Error::new(Errno::AGAIN, "a test wants this error", "none"));
        }
        if !self.waiting.is_empty() {
            self.event.set();
        }
        Ok(())
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) -> Result<()> {
        self.event.clear();
        let info = self.image.info();
        let mut state = self.image.lock();
        if state.faults.hold {
            state.held.push(self.event.clone());
            return Ok(());
        }
        for mut request in self.waiting.drain(..) {
            let result = check(&request, &info).and_then(|()| state.transfer(&mut request));
            completions.push(request.complete(result));
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }
}
