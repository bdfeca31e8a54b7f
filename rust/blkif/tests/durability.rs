// SPDX-License-Identifier: GPL-2.0-only

//! Search of all states that a write and a flush can reach: none is reported as done before it is.
//!
//! A *model state* is that of a disk of our frontend, of one write, of one fsync that is called
//! when the write has completed, and of the current backend. A backend with a cache acknowledges a
//! write that is durable only after a flush. A backend without a flush may have no cache, but it
//! cannot flush what an earlier one has in its cache. The search visits every state that any
//! sequence of steps reaches.
//!
//! The block layer is modelled after `submit_bio_noacct`: as long as a disk has no write cache, it
//! drops FUA from writes, and reports a flush done without asking the driver.

use blkif::negotiate::negotiate;
use blkif::negotiate::BackOffer;
use blkif::negotiate::Features;
use blkif::negotiate::Flush;
use blkif::negotiate::FrontLimits;
use std::collections::HashSet;

const FRONT: FrontLimits = FrontLimits {
    max_ring_page_order: 0,
    max_queues: 1,
    max_indirect_segments: 0,
    persistent: false,
    trusted: true,
};

/// What backends say about their caches.
const OFFERS: [(bool, bool); 3] = [(false, false), (true, false), (false, true)];

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Write {
    /// Not submitted.
    Absent,
    /// The block layer has it, or it is in the ring.
    Waiting,
    /// The backend has it in its cache. Not reported done: the frontend flushes it.
    Flushing,
    /// Done, and in the cache of a backend.
    Volatile,
    /// Done, and durable.
    Durable,
    /// Reported as an error.
    Failed,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Sync {
    Absent,
    /// The block layer has it, or it is in the ring.
    Waiting,
    Done,
    Failed,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Model {
    /// What the block layer was told when the disk was made.
    write_cache: bool,
    flush: Flush,
    write_through: bool,
    /// The write was submitted with FUA.
    fua: bool,
    write: Write,
    sync: Sync,
}

fn features(offer: (bool, bool)) -> Features {
    let (flush_cache, barrier) = offer;
    let offer = BackOffer {
        flush_cache,
        barrier,
        ..BackOffer::default()
    };
    negotiate(&FRONT, &offer)
}

impl Model {
    fn new(features: &Features, fua: bool) -> Self {
        Model {
            write_cache: features.write_cache(),
            flush: features.flush,
            write_through: features.write_through,
            fua,
            write: Write::Absent,
            sync: Sync::Absent,
        }
    }

    /// Returns `true` if the backend of this connection has a cache.
    fn is_cached(&self) -> bool {
        self.flush.operation().is_some()
    }

    /// Replaces the backend by another one. Requests without a response are sent again.
    fn reconnect(mut self, offer: (bool, bool)) -> Self {
        let features = features(offer).for_disk(self.write_cache);
        assert_eq!(features.write_cache(), self.write_cache);
        (self.flush, self.write_through) = (features.flush, features.write_through);
        if self.write == Write::Flushing {
            self.write = Write::Waiting;
        }
        self
    }

    fn submit_write(mut self) -> Option<Self> {
        (self.write == Write::Absent).then(|| {
            self.write = Write::Waiting;
            self
        })
    }

    /// Completes the write, as the backend does. One with FUA that the block layer has kept is
    /// followed by a flush of the block layer's own: it is the fsync of this model.
    fn complete_write(mut self) -> Option<Self> {
        self.write = match self.write {
            Write::Waiting if !self.is_cached() => Write::Durable,
            Write::Waiting if self.write_through => Write::Flushing,
            Write::Waiting => Write::Volatile,
            Write::Flushing => Write::Durable,
            _ => return None,
        };
        Some(self)
    }

    /// Fails the frontend's own flush of a write.
    fn fail_flush_of_write(mut self) -> Option<Self> {
        (self.write == Write::Flushing).then(|| {
            self.write = Write::Failed;
            self
        })
    }

    fn submit_sync(mut self) -> Option<Self> {
        let written = matches!(self.write, Write::Volatile | Write::Durable);
        if !written || self.sync != Sync::Absent {
            return None;
        }
        self.sync = if self.write_cache {
            Sync::Waiting
        } else {
            Sync::Done
        };
        Some(self)
    }

    fn serve_sync(mut self) -> Option<Self> {
        if self.sync != Sync::Waiting {
            return None;
        }
        self.sync = match self.flush {
            Flush::None => Sync::Done,
            Flush::Unavailable => Sync::Failed,
            Flush::Cache | Flush::Barrier => {
                if self.write == Write::Volatile {
                    self.write = Write::Durable;
                }
                Sync::Done
            }
        };
        Some(self)
    }

    fn steps(self) -> Vec<Model> {
        let steps = [
            self.submit_write(),
            self.complete_write(),
            self.fail_flush_of_write(),
            self.submit_sync(),
            self.serve_sync(),
        ];
        let reconnects = OFFERS.map(|offer| self.reconnect(offer));
        steps.into_iter().flatten().chain(reconnects).collect()
    }

    fn check(&self) {
        if self.sync == Sync::Done {
            assert_eq!(self.write, Write::Durable, "{self:?}");
        }
        // The block layer has dropped FUA, and reports the write durable when it is done.
        if self.fua && !self.write_cache {
            assert_ne!(self.write, Write::Volatile, "{self:?}");
        }
    }
}

#[test]
fn no_flush_is_reported_as_done_before_it_is() {
    let mut states = HashSet::new();
    let mut waiting = Vec::new();
    for offer in OFFERS {
        for fua in [false, true] {
            waiting.push(Model::new(&features(offer), fua));
        }
    }
    while let Some(state) = waiting.pop() {
        state.check();
        if states.insert(state) {
            waiting.extend(state.steps());
        }
    }
    println!("{} states", states.len());
    assert!(states.len() > 50);
}

/// A flush fails only on a disk that has had a cache, and with a backend that cannot flush.
#[test]
fn a_disk_without_a_cache_has_nothing_to_flush() {
    let none = features((false, false));
    let again = none.for_disk(none.write_cache());
    assert_eq!(again, none);
    let cached = features((true, false));
    assert_eq!(cached.for_disk(true), cached);
    assert_eq!(none.for_disk(true).flush, Flush::Unavailable);
}
