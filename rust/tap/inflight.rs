// SPDX-License-Identifier: GPL-2.0-only

//! The in-flight table: a file with the requests in flight, so that a successor completes them
//! after a kill.
//!
//! A response may overwrite a request that is still in flight, so the ring alone does not say which
//! requests were taken and have no response. The file does. It is mapped, so its contents survive
//! the process, and writing to it costs no system call.
//!
//! # Order of writes
//!
//! 1. A request is recorded as taken, then the consumer index is moved.
//! 2. It is recorded as answered, with the index of its response; then the response is published.
//! 3. The entry is free.
//!
//! A successor starts each request again that is recorded as taken below the consumer index, or as
//! answered with an index that was not published. It records those as taken first, because it uses
//! that index for the response to another request. I/O of the dead process may still be in the
//! kernel. It holds a lock of the image or of the disk, so the engine cannot open the image before
//! that I/O has ended. NBD has no such lock, nor have images of Ceph and GlusterFS that others may
//! use.
//!
//! # Layout
//!
//! 32-bit words: a header of 16 with what a successor must know of the disk, and for each queue a
//! header of 16 and 32 for each slot of the ring.

use blkif::wire::Abi;
use blkif::wire::Encode;
use blkif::wire::WireRequest;
use blkif::wire::REQUEST_WORDS;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::atomic::fence;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::Release;
use std::sync::Arc;
use xen_user::memory::Pages;
use xen_user::memory::PAGE_SIZE;

/// First word of the file: "RBLK", and a version.
const MAGIC: u32 = u32::from_le_bytes(*b"RBL1");

const HEADER_WORDS: usize = 16;
const ENTRY_WORDS: usize = 32;

/// Word of the header with flags of the disk, behind those of the identity.
const FLAGS: usize = 4;

/// The disk is paused.
const PAUSED: u32 = 1;

/// Words of a queue's header.
const FIRST_REFERENCE: usize = 0;
const PORT: usize = 1;
const CONSUMER: usize = 2;

/// Words of an entry.
const STATE: usize = 0;
const INDEX: usize = 1;
const RESPONSE: usize = 2;
const REQUEST: usize = 4;

/// States of an entry.
const FREE: u32 = 0;
const TAKEN: u32 = 1;
const ANSWERED: u32 = 2;

/// The identity of the rings of a connection; those of other connections differ.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Identity {
    pub(crate) abi: Abi,
    /// Slots of each ring.
    pub(crate) capacity: u32,
    /// Grant reference of the first page, and event channel of each ring.
    pub(crate) rings: Vec<(u32, u32)>,
}

impl Identity {
    fn words(&self) -> [u32; 4] {
        let rings = u32::try_from(self.rings.len()).unwrap_or(u32::MAX);
        let abi = match self.abi {
            Abi::X86_64 => 1,
            Abi::X86_32 => 2,
            Abi::Arm => 3,
        };
        [MAGIC, rings, self.capacity, abi]
    }

    fn entries(&self) -> usize {
        usize::try_from(self.capacity).unwrap_or(usize::MAX)
    }

    /// Returns the number of words of each queue.
    fn queue_words(&self) -> usize {
        let entries = self.entries().saturating_mul(ENTRY_WORDS);
        entries.saturating_add(HEADER_WORDS)
    }

    /// Returns where a queue begins.
    fn queue(&self, index: usize) -> usize {
        let before = self.queue_words().saturating_mul(index);
        before.saturating_add(HEADER_WORDS)
    }

    fn pages(&self) -> usize {
        self.queue(self.rings.len())
            .saturating_mul(4)
            .div_ceil(PAGE_SIZE)
    }
}

/// The file of a disk.
///
/// It stays open, so that it can be used by a process that cannot open files.
pub(crate) struct InflightFile {
    file: File,
    /// The first page, which has the header. The file never becomes smaller than that.
    header: Pages,
}

impl InflightFile {
    /// Opens the file of a disk, which is created if it does not exist.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let len = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        let header = Pages::of_file(&file, len.div_ceil(PAGE_SIZE).max(1))?;
        Ok(Self { file, header })
    }

    /// Returns `true` if a predecessor has left a table.
    pub(crate) fn has_table(&self) -> bool {
        self.header.load(0) == MAGIC
    }

    /// Returns `true` if the disk is paused.
    pub(crate) fn is_paused(&self) -> bool {
        self.header.load(FLAGS) & PAUSED != 0
    }

    /// Records if the disk is paused, for a successor.
    pub(crate) fn set_paused(&self, paused: bool) {
        self.header.store(FLAGS, if paused { PAUSED } else { 0 });
    }

    /// Creates a table without requests, in place of one that is there.
    pub(crate) fn create(&self, identity: Identity) -> io::Result<InflightTable> {
        self.header.store(0, 0);
        let pages = Pages::of_file(&self.file, identity.pages())?;
        for word in HEADER_WORDS..pages.len() / 4 {
            pages.store(word, 0);
        }
        for (index, (reference, port)) in identity.rings.iter().enumerate() {
            let queue = identity.queue(index);
            pages.store(queue.saturating_add(FIRST_REFERENCE), *reference);
            pages.store(queue.saturating_add(PORT), *port);
        }
        for (word, value) in identity.words().into_iter().enumerate().rev() {
            pages.store(word, value);
        }
        Ok(InflightTable {
            pages: Arc::new(pages),
            identity,
        })
    }

    /// Returns the table that a predecessor has left for the same rings, if there is one.
    pub(crate) fn find(&self, identity: Identity) -> io::Result<Option<InflightTable>> {
        if !has_size(&self.file, identity.pages())? {
            return Ok(None);
        }
        let pages = Pages::of_file(&self.file, identity.pages())?;
        let mut same = (0..)
            .zip(identity.words())
            .all(|(word, value)| pages.load(word) == value);
        for (index, (reference, port)) in identity.rings.iter().enumerate() {
            let queue = identity.queue(index);
            same &= pages.load(queue.saturating_add(FIRST_REFERENCE)) == *reference
                && pages.load(queue.saturating_add(PORT)) == *port;
        }
        Ok(same.then(|| InflightTable {
            pages: Arc::new(pages),
            identity,
        }))
    }
}

/// The table of a connection.
pub(crate) struct InflightTable {
    pages: Arc<Pages>,
    identity: Identity,
}

impl InflightTable {
    /// Returns the part of a queue whose ring is attached at an index, with no requests.
    pub(crate) fn queue(&self, index: usize, consumer: u32) -> InflightQueue {
        let queue = self.part(index);
        queue.set_consumer(consumer);
        queue
    }

    /// Returns the part of a queue as a predecessor has left it, and its requests.
    pub(crate) fn adopt(&self, index: usize, published: u32) -> (InflightQueue, Adopted) {
        let mut queue = self.part(index);
        let adopted = queue.recover(published);
        (queue, adopted)
    }

    fn part(&self, index: usize) -> InflightQueue {
        InflightQueue {
            pages: self.pages.clone(),
            abi: self.identity.abi,
            start: self.identity.queue(index),
            free: (0..self.identity.entries()).rev().collect(),
        }
    }

    /// Ends the table: nothing is in flight, and the rings are given up.
    pub(crate) fn end(self) {
        self.pages.store(0, 0);
    }
}

fn has_size(file: &File, pages: usize) -> io::Result<bool> {
    let len = pages.saturating_mul(PAGE_SIZE);
    Ok(u64::try_from(len).is_ok_and(|len| file.metadata().is_ok_and(|data| data.len() == len)))
}

/// The number of an entry.
pub(crate) type Entry = usize;

/// Requests that a predecessor has taken.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Adopted {
    /// Its consumer index.
    pub(crate) consumer: u32,
    /// The requests without a published response, in the order in which they were taken.
    pub(crate) requests: Vec<(Entry, WireRequest)>,
}

/// The requests of one queue.
pub(crate) struct InflightQueue {
    pages: Arc<Pages>,
    abi: Abi,
    start: usize,
    /// Entries without a request.
    free: Vec<Entry>,
}

impl InflightQueue {
    /// Records that a request was taken at an index. Returns `None` if there is no free entry: more
    /// requests would be in flight than the ring has slots.
    pub(crate) fn take(&mut self, index: u32, request: &WireRequest) -> Option<Entry> {
        let entry = self.free.pop()?;
        // The words that the kind of request does not use stay as they are.
        let words = self.pages.words(self.word(entry, REQUEST), REQUEST_WORDS)?;
        let mut words = words.iter();
        request.write(self.abi, |value| {
            if let Some(word) = words.next() {
                word.store(value, Relaxed);
            }
        });
        self.store(entry, INDEX, index);
        fence(Release);
        self.store(entry, STATE, TAKEN);
        fence(Release);
        self.set_consumer(index.wrapping_add(1));
        Some(entry)
    }

    /// Records the index of the response to a request. The response must not be published yet.
    pub(crate) fn answer(&self, entry: Entry, response: u32) {
        self.store(entry, RESPONSE, response);
        fence(Release);
        self.store(entry, STATE, ANSWERED);
        fence(Release);
    }

    /// Frees an entry whose response was published.
    pub(crate) fn release(&mut self, entry: Entry) {
        self.store(entry, STATE, FREE);
        self.free.push(entry);
    }

    fn recover(&mut self, published: u32) -> Adopted {
        let consumer = self.pages.load(self.start.saturating_add(CONSUMER));
        let mut requests = Vec::new();
        let all = std::mem::take(&mut self.free);
        for entry in all {
            if self.is_in_flight(entry, consumer, published) {
                // Not as answered: the index is used for another response.
                self.store(entry, STATE, TAKEN);
                requests.push((entry, self.request(entry)));
            } else {
                self.release(entry);
            }
        }
        requests.sort_by_key(|(entry, _)| self.load(*entry, INDEX).wrapping_sub(consumer));
        Adopted { consumer, requests }
    }

    fn is_in_flight(&self, entry: Entry, consumer: u32, published: u32) -> bool {
        // Indices wrap; those here are less than a ring apart.
        let before = |index: u32, end: u32| end.wrapping_sub(index).wrapping_sub(1) < u32::MAX / 2;
        match self.load(entry, STATE) {
            TAKEN => before(self.load(entry, INDEX), consumer),
            ANSWERED => !before(self.load(entry, RESPONSE), published),
            _ => false,
        }
    }

    fn request(&self, entry: Entry) -> WireRequest {
        let mut words = [0; REQUEST_WORDS];
        for (number, word) in words.iter_mut().enumerate() {
            *word = self.load(entry, REQUEST.saturating_add(number));
        }
        WireRequest::decode(self.abi, &words)
    }

    fn set_consumer(&self, index: u32) {
        let word = self.start.saturating_add(CONSUMER);
        self.pages.store(word, index);
    }

    fn word(&self, entry: Entry, word: usize) -> usize {
        let entry = entry.saturating_mul(ENTRY_WORDS);
        self.start
            .saturating_add(HEADER_WORDS)
            .saturating_add(entry)
            .saturating_add(word)
    }

    fn load(&self, entry: Entry, word: usize) -> u32 {
        self.pages.load(self.word(entry, word))
    }

    fn store(&self, entry: Entry, word: usize, value: u32) {
        self.pages.store(self.word(entry, word), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blkif::wire::DiscardRequest;

    fn identity() -> Identity {
        Identity {
            abi: Abi::X86_64,
            capacity: 32,
            rings: vec![(8, 3), (9, 4)],
        }
    }

    fn request(id: u64) -> WireRequest {
        WireRequest::Discard(DiscardRequest {
            flag: 0,
            handle: 0,
            id,
            sector: id * 8,
            nr_sectors: 8,
        })
    }

    fn ids(adopted: &Adopted) -> Vec<u64> {
        adopted.requests.iter().map(|(_, wire)| wire.id()).collect()
    }

    #[test]
    fn a_second_successor_finds_what_the_first_one_has_not_answered() {
        let dir = tempfile::tempdir().unwrap();
        let file = InflightFile::open(&dir.path().join("1-51712.inflight")).unwrap();
        let table = file.create(identity()).unwrap();
        let mut queue = table.queue(0, 0);
        let first = queue.take(0, &request(0)).unwrap();
        queue.take(1, &request(1)).unwrap();
        // It ends before it publishes the response.
        queue.answer(first, 0);
        let (mut queue, adopted) = table.adopt(0, 0);
        assert_eq!(ids(&adopted), [0, 1]);
        // The response to another request gets the same index, and is published.
        let second = adopted.requests[1].0;
        queue.answer(second, 0);
        queue.release(second);
        assert_eq!(ids(&table.adopt(0, 1).1), [0]);
    }

    #[test]
    fn a_successor_finds_what_has_no_published_response() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1-51712.inflight");
        let start = u32::MAX - 1;
        let file = InflightFile::open(&path).unwrap();
        assert!(!file.has_table());
        let file = file.create(identity()).unwrap();
        file.queue(0, 0);
        let mut queue = file.queue(1, start);
        let entries: Vec<_> = (0..5)
            .map(|id| {
                queue
                    .take(start.wrapping_add(id as u32), &request(id))
                    .unwrap()
            })
            .collect();
        // The response to 3 is published, that to 1 is not, and that to 0 is forgotten.
        queue.answer(entries[0], start);
        queue.release(entries[0]);
        queue.answer(entries[3], start.wrapping_add(1));
        queue.answer(entries[1], start.wrapping_add(2));
        drop((file, queue));

        let whole = InflightFile::open(&path).unwrap();
        assert!(whole.has_table());
        let file = whole.find(identity()).unwrap().unwrap();
        let (mut queue, adopted) = file.adopt(1, start.wrapping_add(2));
        assert_eq!(adopted.consumer, start.wrapping_add(5));
        assert_eq!(ids(&adopted), [1, 2, 4]);
        assert_eq!(adopted.requests[1].1, request(2));
        // The others are free.
        for index in 0..29 {
            assert!(queue
                .take(start.wrapping_add(5 + index), &request(9))
                .is_some());
        }
        assert!(queue.take(0, &request(9)).is_none());
        assert_eq!(ids(&file.adopt(0, 0).1), [0; 0]);
        file.end();
        assert!(!whole.has_table());
        assert!(whole.find(identity()).unwrap().is_none());
        assert_eq!(
            ids(&whole.create(identity()).unwrap().adopt(1, 0).1),
            [0; 0]
        );
    }

    #[test]
    fn a_request_before_the_consumer_index_moved_is_still_in_the_ring() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = InflightFile::open(&path).unwrap();
        let file = file.create(identity()).unwrap();
        let mut queue = file.queue(0, 7);
        queue.take(7, &request(1)).unwrap();
        queue.set_consumer(7);
        let (_, adopted) = file.adopt(0, 7);
        assert_eq!((adopted.consumer, ids(&adopted)), (7, vec![]));
    }

    #[test]
    fn the_file_of_other_rings_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = InflightFile::open(&path).unwrap();
        assert!(file.find(identity()).unwrap().is_none());
        drop(file.create(identity()).unwrap());
        assert!(file.find(identity()).unwrap().is_some());
        let mut other = identity();
        other.rings[1].1 = 5;
        assert!(file.find(other).unwrap().is_none());
        let mut other = identity();
        other.capacity = 64;
        assert!(file.find(other).unwrap().is_none());
    }

    #[test]
    fn a_pause_outlives_processes_and_connections() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = InflightFile::open(&path).unwrap();
        assert!(!file.is_paused());
        file.set_paused(true);
        drop(file);
        let file = InflightFile::open(&path).unwrap();
        assert!(file.is_paused() && !file.has_table());
        file.create(identity()).unwrap().end();
        assert!(file.is_paused());
        file.set_paused(false);
        assert!(!InflightFile::open(&path).unwrap().is_paused());
    }

    #[test]
    fn a_file_of_any_size_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for len in [0, 1, 5000] {
            std::fs::write(&path, vec![7; len]).unwrap();
            let file = InflightFile::open(&path).unwrap();
            assert!(!file.has_table());
            assert!(file.find(identity()).unwrap().is_none());
        }
    }
}
