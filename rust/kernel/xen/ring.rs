// SPDX-License-Identifier: GPL-2.0-only

//! The memory of a ring: pages that both domains may read and write at any time.
//!
//! The frontend allocates and grants it ([`RingPages`]), the backend maps it ([`MappedRing`]). Both
//! deref to [`SharedWords`], whose functions are the only access: loads and stores of 32-bit words,
//! and fences. The protocol defines the meaning of the words.
//!
//! C header: [`include/xen/xenbus.h`](srctree/include/xen/xenbus.h)

use core::{
    ops::Deref,
    ptr::NonNull, //
};

use kernel::{
    error::to_result,
    page::PAGE_SIZE,
    prelude::*,
    sync::aref::ARef, //
};

use super::{
    grant::{
        self,
        map::{
            Mapper,
            PageCache, //
        },
        ForeignRef,
        GrantAccess,
        GrantRef,
        GrantReserve, //
    },
    xenbus, //
};

/// Largest number of pages of a ring (`XENBUS_MAX_RING_GRANTS`).
pub const MAX_PAGES: usize = bindings_ext::XENBUS_MAX_RING_GRANTS as usize;

const WORDS_PER_PAGE: usize = PAGE_SIZE / size_of::<u32>();

/// Words of 32 bits that another domain may read and write at any time.
///
/// Accesses are ordered only by the fences.
///
/// # Invariants
///
/// `words` points to `len` words of shared memory that outlive this.
pub struct SharedWords {
    words: NonNull<u32>,
    len: usize,
}

// SAFETY: All access is by single volatile words, which may race.
unsafe impl Send for SharedWords {}
// SAFETY: As above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Returns the number of words.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns `false`, because there is at least one page of words.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads a word once (`READ_ONCE`), or returns 0 if there is no such word.
    #[inline]
    pub fn load(&self, index: usize) -> u32 {
        if index >= self.len {
            return 0;
        }
        // SAFETY: In range, and by the type invariant valid; volatile, because it may change.
        unsafe { self.words.as_ptr().add(index).read_volatile() }
    }

    /// Writes a word once (`WRITE_ONCE`), if there is such a word.
    #[inline]
    pub fn store(&self, index: usize, value: u32) {
        if index >= self.len {
            return;
        }
        // SAFETY: As in `load`.
        unsafe { self.words.as_ptr().add(index).write_volatile(value) };
    }

    /// Orders loads before it against loads after it (`virt_rmb`).
    #[inline]
    pub fn read_fence(&self) {
        fence::read();
    }

    /// Orders stores before it against stores after it (`virt_wmb`).
    #[inline]
    pub fn write_fence(&self) {
        fence::write();
    }

    /// Orders all loads and stores (`virt_mb`).
    #[inline]
    pub fn full_fence(&self) {
        fence::full();
    }
}

/// The memory of the rings of a protocol.
///
/// [`RingPages`] and [`MappedRing`] are such memory too, because they deref to this.
impl xen_io::ring::SharedMemory for SharedWords {
    #[inline]
    fn words(&self) -> usize {
        self.len()
    }

    #[inline]
    fn load(&self, word: usize) -> u32 {
        SharedWords::load(self, word)
    }

    #[inline]
    fn store(&self, word: usize, value: u32) {
        SharedWords::store(self, word, value);
    }

    #[inline]
    fn rmb(&self) {
        self.read_fence();
    }

    #[inline]
    fn wmb(&self) {
        self.write_fence();
    }

    #[inline]
    fn mb(&self) {
        self.full_fence();
    }
}

/// The `virt_*` barriers, which kernels for one CPU have too, because the other domain has a CPU of
/// its own.
#[cfg(target_arch = "x86_64")]
mod fence {
    use core::arch::asm;

    /// Orders loads: a compiler barrier, because x86 does not reorder loads.
    #[inline(always)]
    pub(super) fn read() {
        // SAFETY: No instruction.
        unsafe { asm!("", options(nostack, preserves_flags)) };
    }

    /// Orders stores: a compiler barrier, because x86 does not reorder stores.
    #[inline(always)]
    pub(super) fn write() {
        // SAFETY: No instruction.
        unsafe { asm!("", options(nostack, preserves_flags)) };
    }

    /// Orders loads and stores by a locked instruction on the stack, as the kernel does, which is
    /// cheaper than `mfence`.
    #[inline(always)]
    pub(super) fn full() {
        // SAFETY: Adds 0 to a word below the stack pointer, where the kernel stores nothing.
        unsafe { asm!("lock add dword ptr [rsp - 4], 0") };
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod fence {
    #[inline]
    pub(super) fn read() {
        // SAFETY: A barrier.
        unsafe { bindings_ext::virt_rmb() };
    }

    #[inline]
    pub(super) fn write() {
        // SAFETY: A barrier.
        unsafe { bindings_ext::virt_wmb() };
    }

    #[inline]
    pub(super) fn full() {
        // SAFETY: A barrier.
        unsafe { bindings_ext::virt_mb() };
    }
}

/// The value of `xenbus_teardown_ring()` for no reference.
const NO_REFERENCE: u32 = u32::MAX;

/// A ring of this domain, granted to the other side of a device for reading and writing.
///
/// Dropping it ends the grants and frees the pages; those that the other side still maps stay on
/// the kernel's list of deferred grants (XSA-396).
///
/// # Invariants
///
/// `words` are the `pages` pages at an address from `alloc_pages_exact`, which are owned. Each of
/// the first `pages` of `references` is ours and grants one of them, or is [`NO_REFERENCE`].
pub struct RingPages {
    words: SharedWords,
    references: [u32; MAX_PAGES],
    pages: usize,
}

impl RingPages {
    /// Allocates `1 << order` zeroed pages, at most [`MAX_PAGES`], and grants them.
    ///
    /// The pages are contiguous, so allocating more than one may fail although memory is free.
    ///
    /// Fails with `ENOMEM` if there is no memory, and with `ENOSPC` if the grant table is full.
    /// Unlike `xenbus_setup_ring()`, this does not switch the device to `Closing` then.
    ///
    /// Context: may sleep; does no I/O.
    pub fn new(device: &xenbus::Device, order: u32) -> Result<Self> {
        let pages = 1usize.checked_shl(order).ok_or(EINVAL)?;
        if pages > MAX_PAGES {
            return Err(EINVAL);
        }
        let mut reserve = GrantReserve::new(pages as u16)?;
        let size = pages.wrapping_mul(PAGE_SIZE);
        // SAFETY: Allocates memory, whatever the size.
        let address = unsafe { bindings_ext::alloc_ring_pages(size) };
        let address = NonNull::new(address.cast::<u32>()).ok_or(ENOMEM)?;
        // INVARIANT: Allocated just above; there is no grant yet.
        let mut ring = Self {
            words: SharedWords {
                words: address,
                len: pages.wrapping_mul(WORDS_PER_PAGE),
            },
            references: [NO_REFERENCE; MAX_PAGES],
            pages,
        };
        for (index, place) in ring.references.iter_mut().take(pages).enumerate() {
            let first = index.wrapping_mul(WORDS_PER_PAGE);
            // SAFETY: In the memory that was allocated above.
            let page = unsafe { bindings_ext::virt_to_page(address.as_ptr().add(first).cast()) };
            let domain = device.otherend_id();
            // SAFETY: By the type invariant the page stays until its grant has ended.
            let reference = unsafe { reserve.grant(domain, page, GrantAccess::ReadWrite) }?;
            // INVARIANT: Granted just above.
            *place = reference.value();
        }
        Ok(ring)
    }

    /// Ends the grants of those pages that the other side no longer uses.
    ///
    /// Returns `true` if no grant is left.
    pub fn try_end(&mut self) -> bool {
        let mut all = true;
        for reference in self.references.iter_mut().take(self.pages) {
            if *reference == NO_REFERENCE {
                continue;
            }
            // SAFETY: By the type invariant it is ours and granted.
            if unsafe { grant::try_end(GrantRef::from_raw(*reference)) } {
                // INVARIANT: It has ended.
                *reference = NO_REFERENCE;
            } else {
                all = false;
            }
        }
        all
    }

    /// Returns the references of the pages, in order, for xenstore.
    pub fn references(&self) -> impl Iterator<Item = GrantRef> + '_ {
        self.references
            .iter()
            .take(self.pages)
            .map(|reference| GrantRef::from_raw(*reference))
    }
}

impl Deref for RingPages {
    type Target = SharedWords;

    #[inline]
    fn deref(&self) -> &SharedWords {
        &self.words
    }
}

impl Drop for RingPages {
    fn drop(&mut self) {
        let mut address = self.words.words.as_ptr().cast();
        // SAFETY: By the type invariant; the words are not used after this. For pages that the
        // other domain still maps, the grant table takes a page reference, so freeing them here
        // does not make them reusable. References that have ended are skipped.
        unsafe {
            bindings_ext::xenbus_teardown_ring(
                &mut address,
                self.pages as u32,
                self.references.as_mut_ptr(),
            )
        };
    }
}

/// A mapped ring of the other domain.
///
/// Dropping it unmaps the ring, and may sleep.
///
/// # Invariants
///
/// `words` are at an address from `xenbus_map_ring_valloc` for `device`.
pub struct MappedRing {
    words: SharedWords,
    device: ARef<xenbus::Device>,
}

impl MappedRing {
    /// Maps the pages that the other side of `device` has granted: 1 to [`MAX_PAGES`].
    ///
    /// The references are untrusted data, which Xen checks. Fails with `ENOSPC` if Xen allows this
    /// domain no more mappings, with `ENOMEM` if there is no memory (both may succeed later), and
    /// with `EFAULT` if Xen refuses a reference.
    ///
    /// Unlike `xenbus_map_ring_valloc()`, a failure does not switch the device to `Closing`. Call
    /// this only in a context in which the state of the device may be written.
    ///
    /// Context: may sleep, for up to 32 s for each page that is not in memory in the other domain.
    pub fn new(device: &xenbus::Device, references: &[ForeignRef]) -> Result<Self> {
        let pages = references.len();
        if pages == 0 || pages > MAX_PAGES {
            return Err(EINVAL);
        }
        Self::probe(device, references)?;
        let mut raw = [0; MAX_PAGES];
        for (raw, reference) in raw.iter_mut().zip(references) {
            *raw = reference.0;
        }
        let mut address = core::ptr::null_mut();
        // SAFETY: The device is valid; `raw` has at least `pages` references, `address` is valid
        // for a write.
        let map = || unsafe {
            bindings_ext::xenbus_map_ring_valloc(
                device.as_raw(),
                raw.as_mut_ptr(),
                pages as u32,
                &mut address,
            )
        };
        let result = to_result(device.without_fatal(map));
        // The function does not return Xen's status. The pages could be mapped just before, so now
        // there is no space for mappings.
        result.map_err(|error| if error == ENOENT { ENOSPC } else { error })?;
        let words = NonNull::new(address.cast()).ok_or(ENOMEM)?;
        // INVARIANT: Mapped just above, until `drop`.
        let words = SharedWords {
            words,
            len: pages.wrapping_mul(WORDS_PER_PAGE),
        };
        Ok(Self {
            words,
            device: ARef::from(device),
        })
    }
}

impl MappedRing {
    /// Maps and unmaps the pages, to get Xen's status if that fails.
    fn probe(device: &xenbus::Device, references: &[ForeignRef]) -> Result {
        let cache = KBox::pin_init(PageCache::new(), GFP_KERNEL)?;
        let mut mapper = Mapper::new(references.len())?;
        let mut pages = KVec::with_capacity(references.len(), GFP_KERNEL)?;
        let domain = device.otherend_id();
        mapper.map(
            &cache,
            domain,
            references,
            GrantAccess::ReadWrite,
            &mut pages,
        )?;
        mapper.unmap(&cache, &mut pages);
        Ok(())
    }
}

impl Deref for MappedRing {
    type Target = SharedWords;

    #[inline]
    fn deref(&self) -> &SharedWords {
        &self.words
    }
}

impl Drop for MappedRing {
    fn drop(&mut self) {
        // If it fails, the memory is leaked, and xenbus has logged that.
        //
        // SAFETY: By the type invariant; the words are not used after this.
        let _ = unsafe {
            bindings_ext::xenbus_unmap_ring_vfree(
                self.device.as_raw(),
                self.words.words.as_ptr().cast(),
            )
        };
    }
}
