// SPDX-License-Identifier: GPL-2.0-only

//! The driver's side of a split virtqueue of a virtio block device.
//!
//! Each request has a slot, with fixed descriptors and a fixed place for its header and its status.
//! So nothing that the driver relies on is in memory that the device can write.

use crate::shared_memory::{SharedMemory, WORDS};
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

/// The greatest number of virtqueues.
pub(super) const MAX_QUEUES: usize = 16;

/// The address of the shared memory as the device sees it.
pub(super) const BASE: u64 = 1 << 30;

/// The greatest number of descriptors of a virtqueue that QEMU supports.
const MAX_SIZE: u16 = 1024;

/// The descriptors of a slot: for the header, the data and the status.
const DESCRIPTORS: u16 = 3;

const DESCRIPTOR_BYTES: usize = 16;
const USED_BYTES: usize = 8;

/// The bytes of the header, the range and the status of a slot.
const SLOT_BYTES: usize = 64;
const HEADER_BYTES: u32 = 16;
const RANGE: usize = 16;
const RANGE_BYTES: u32 = 16;
const STATUS: usize = 32;

/// The flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The bytes of the memory that a virtqueue has.
const AREA: usize = WORDS / MAX_QUEUES;

/// The data of a request, besides its header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Payload {
    /// Nothing.
    None,
    /// Data at this offset of the shared memory, which the device reads.
    Out(usize, u32),
    /// Data at this offset of the shared memory, which the device writes.
    In(usize, u32),
    /// A number of sectors from `sector` of the header, with flags.
    Range(u32, u32),
}

/// A completion that belongs to no request.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Violation;

/// The addresses of the parts of a virtqueue as the device sees them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// The driver's side of a virtqueue.
pub(super) struct Virtqueue {
    memory: Arc<SharedMemory>,
    /// The number of descriptors, a power of two.
    size: u16,
    /// The offsets of the parts in the memory.
    descriptors: usize,
    available: usize,
    used: usize,
    slots: usize,
    /// The next index of the available ring, and what the device was told.
    next_available: u16,
    published: u16,
    /// The next index of the used ring.
    next_used: u16,
}

impl Virtqueue {
    /// Creates the virtqueue of this number, with at least `depth` slots if the device supports it.
    pub(super) fn new(memory: Arc<SharedMemory>, number: usize, depth: u32) -> Self {
        let wanted = depth.clamp(1, MAX_SIZE.into());
        let wanted = wanted.saturating_mul(DESCRIPTORS.into());
        let size = u16::try_from(wanted.next_power_of_two()).unwrap_or(MAX_SIZE);
        let size = size.min(MAX_SIZE);
        let entries = usize::from(size);
        let descriptors = AREA.saturating_mul(number);
        let available = descriptors.saturating_add(entries.saturating_mul(DESCRIPTOR_BYTES));
        // Flags, index, ring, event.
        let bytes = entries.saturating_mul(2).saturating_add(6);
        let used = available.saturating_add(bytes).next_multiple_of(8);
        let bytes = entries.saturating_mul(USED_BYTES).saturating_add(6);
        let slots = used.saturating_add(bytes).next_multiple_of(SLOT_BYTES);
        Self {
            memory,
            size,
            descriptors,
            available,
            used,
            slots,
            next_available: 0,
            published: 0,
            next_used: 0,
        }
    }

    /// Empties the virtqueue, which no device uses.
    pub(super) fn reset(&mut self) {
        (self.next_available, self.published, self.next_used) = (0, 0, 0);
        for offset in [self.available, self.used] {
            self.memory.store_u32(offset, 0);
        }
        self.memory.store_u16(self.used_event(), 0);
        self.memory.store_u16(self.available_event(), 0);
    }

    /// Returns the number of descriptors.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Returns the number of slots.
    pub(super) fn slots(&self) -> u16 {
        self.size / DESCRIPTORS
    }

    pub(super) fn addresses(&self) -> Addresses {
        let address = |offset: usize| BASE.saturating_add(offset as u64);
        Addresses {
            descriptors: address(self.descriptors),
            available: address(self.available),
            used: address(self.used),
        }
    }

    fn used_event(&self) -> usize {
        let ring = usize::from(self.size).saturating_mul(2);
        self.available.saturating_add(4).saturating_add(ring)
    }

    fn available_event(&self) -> usize {
        let ring = usize::from(self.size).saturating_mul(USED_BYTES);
        self.used.saturating_add(4).saturating_add(ring)
    }

    /// Returns the bits of an index that are the number of an entry.
    fn mask(&self) -> u16 {
        self.size.wrapping_sub(1)
    }

    fn slot(&self, slot: u16) -> usize {
        let offset = usize::from(slot).saturating_mul(SLOT_BYTES);
        self.slots.saturating_add(offset)
    }

    /// Adds a request, which the device sees after [`Self::publish`].
    ///
    /// The slot is one below [`Self::slots`] that no other request has.
    pub(super) fn push(&mut self, slot: u16, kind: u32, sector: u64, payload: Payload) {
        let place = self.slot(slot);
        let at = |offset: usize| place.saturating_add(offset);
        let is_range = matches!(payload, Payload::Range(..));
        self.memory.store_u32(place, kind);
        self.memory.store_u32(at(4), 0);
        self.memory
            .store_u64(at(8), if is_range { 0 } else { sector });
        // A device that completes the request without having done it.
        self.memory.store_u8(at(STATUS), u8::MAX);
        let head = slot.saturating_mul(DESCRIPTORS);
        let (data, last) = (head.saturating_add(1), head.saturating_add(2));
        let next = if payload == Payload::None { last } else { data };
        self.describe(head, place, HEADER_BYTES, NEXT, next);
        match payload {
            Payload::None => {}
            Payload::Out(offset, len) => self.describe(data, offset, len, NEXT, last),
            Payload::In(offset, len) => self.describe(data, offset, len, NEXT | WRITE, last),
            Payload::Range(sectors, flags) => {
                self.memory.store_u64(at(RANGE), sector);
                self.memory.store_u32(at(RANGE + 8), sectors);
                self.memory.store_u32(at(RANGE + 12), flags);
                self.describe(data, at(RANGE), RANGE_BYTES, NEXT, last);
            }
        }
        self.describe(last, at(STATUS), 1, WRITE, 0);
        let entry = usize::from(self.next_available & self.mask());
        let ring = self.available.saturating_add(4);
        let entry = ring.saturating_add(entry.saturating_mul(2));
        self.memory.store_u16(entry, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    fn describe(&self, descriptor: u16, offset: usize, len: u32, flags: u16, next: u16) {
        let place = usize::from(descriptor).saturating_mul(DESCRIPTOR_BYTES);
        let place = self.descriptors.saturating_add(place);
        let at = |offset: usize| place.saturating_add(offset);
        self.memory
            .store_u64(place, BASE.saturating_add(offset as u64));
        self.memory.store_u32(at(8), len);
        self.memory.store_u16(at(12), flags);
        self.memory.store_u16(at(14), next);
    }

    /// Shows the requests to the device. Returns `true` if it has to be notified.
    pub(super) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        self.published = new;
        self.memory.store_u16(self.available.saturating_add(2), new);
        // The device writes its event before it reads the index.
        fence(Ordering::SeqCst);
        let event = self.memory.load_u16(self.available_event());
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Takes a completion: the slot and the status of the request.
    pub(super) fn pop(&mut self) -> Option<Result<(u16, u8), Violation>> {
        if self.memory.load_u16(self.used.saturating_add(2)) == self.next_used {
            return None;
        }
        let entry = usize::from(self.next_used & self.mask());
        let ring = self.used.saturating_add(4);
        let entry = ring.saturating_add(entry.saturating_mul(USED_BYTES));
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(self.memory.load_u32(entry)).ok();
        let slot = head
            .filter(|head| head % DESCRIPTORS == 0)
            .map(|head| head / DESCRIPTORS)
            .filter(|slot| *slot < self.slots());
        Some(slot.ok_or(Violation).map(|slot| {
            let status = self.slot(slot).saturating_add(STATUS);
            (slot, self.memory.load_u8(status))
        }))
    }

    /// Asks the device to notify of the next completion. Returns `true` if there is one already.
    pub(super) fn ask_for_notification(&mut self) -> bool {
        self.memory.store_u16(self.used_event(), self.next_used);
        // The device writes its index before it reads the event.
        fence(Ordering::SeqCst);
        self.memory.load_u16(self.used.saturating_add(2)) != self.next_used
    }
}

#[cfg(test)]
impl Virtqueue {
    /// Completes a request as a device does.
    fn complete(&self, index: u16, head: u32) {
        let entry = self.used + 4 + 8 * usize::from(index & self.mask());
        self.memory.store_u32(entry, head);
        self.memory.store_u16(self.used + 2, index.wrapping_add(1));
    }

    /// Completes all requests as a device does, in order.
    pub(super) fn complete_all(&self, status: u8) {
        let available = self.memory.load_u16(self.available + 2);
        let mut index = self.memory.load_u16(self.used + 2);
        while index != available {
            let entry = self.available + 4 + 2 * usize::from(index & self.mask());
            let head = self.memory.load_u16(entry);
            let place = self.slot(head / DESCRIPTORS) + STATUS;
            self.memory.store_u8(place, status);
            self.complete(index, head.into());
            index = index.wrapping_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(depth: u32) -> Virtqueue {
        let memory = Arc::new(SharedMemory::new().unwrap());
        let mut queue = Virtqueue::new(memory, 3, depth);
        queue.reset();
        queue
    }

    #[test]
    fn virtqueues_do_not_overlap() {
        let memory = Arc::new(SharedMemory::new().unwrap());
        for depth in [0, 1, 32, 512, u32::MAX] {
            let queue = Virtqueue::new(memory.clone(), 1, depth);
            assert!(queue.descriptors == AREA && queue.descriptors % 16 == 0);
            assert!(queue.size.is_power_of_two() && queue.size <= MAX_SIZE);
            assert!(u32::from(queue.slots()) >= depth.min(341));
            let end = queue.slot(queue.slots());
            assert!(end <= 2 * AREA, "{depth}");
            assert!(queue.used_event() < queue.used && queue.available_event() < queue.slots);
        }
    }

    #[test]
    fn requests_wrap_around_and_complete_in_any_order() {
        let mut queue = queue(2);
        let mut index = 0u16;
        for round in 0..70_000u32 {
            let slots = [(round % 2) as u16, ((round + 1) % 2) as u16];
            for slot in slots {
                queue.push(slot, 1, 7, Payload::Out(WORDS, 512));
            }
            assert!(queue.publish());
            assert!(queue.pop().is_none() && !queue.publish());
            let event = queue.available_event();
            queue.memory.store_u16(event, queue.next_available);
            for slot in [slots[1], slots[0]] {
                queue.memory.store_u8(queue.slot(slot) + STATUS, slot as u8);
                queue.complete(index, u32::from(slot) * 3);
                index = index.wrapping_add(1);
                assert!(queue.ask_for_notification());
                assert_eq!(queue.pop(), Some(Ok((slot, slot as u8))));
                assert!(!queue.ask_for_notification());
            }
        }
    }

    #[test]
    fn completions_of_no_request_are_refused() {
        for head in [1, 2, 4, 3 * 341, 0xffff, 0x1_0000, u32::MAX] {
            let mut queue = queue(1000);
            queue.complete(0, head);
            assert_eq!(queue.pop(), Some(Err(Violation)), "{head}");
        }
    }
}
