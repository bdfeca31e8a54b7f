// SPDX-License-Identifier: GPL-2.0-only

//! I/O on a block device.
//!
//! A [`BioRequest`] owns the memory that is read or written and a context of the driver. [`submit`]
//! takes it, and [`BioContext::complete`] gets it back, once, when the device no longer uses the
//! memory. Meanwhile no code can access or free that memory.
//!
//! A `BioRequest` is one bio: up to [`MAX_RANGES`] ranges of memory for consecutive sectors. With
//! few ranges the bio is part of the `BioRequest`, so that nothing is allocated. Otherwise it comes
//! from a reserve of the device, so that `submit` waits for memory at most until other I/O of the
//! same device completes.
//!
//! C header: [`include/linux/bio.h`](srctree/include/linux/bio.h)

use core::mem::MaybeUninit;

use kernel::{
    bindings,
    error::to_result,
    ffi,
    prelude::*,
    sync::{
        rcu,
        Arc, //
    }, //
};

use crate::base::page::{
    PageOwner,
    PageSlice, //
};

use super::bdev::{
    Access,
    BlockDevice, //
};

/// Largest number of memory ranges of a [`BioRequest`].
pub const MAX_RANGES: usize = bindings::BIO_MAX_VECS as usize;

/// Largest number of sectors of an [`Operation::Discard`] or [`Operation::SecureErase`].
pub const MAX_DISCARD_SECTORS: u32 = u32::MAX >> SECTOR_SHIFT;

const SECTOR_SHIFT: u32 = bindings::SECTOR_SHIFT;
const SECTOR_SIZE: usize = 1 << SECTOR_SHIFT;

/// The operation of an I/O.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Operation {
    /// Reads into the memory.
    Read,
    /// Writes from the memory.
    Write,
    /// Makes all completed writes durable; then writes from the memory, if there is any, and makes
    /// that durable too.
    FlushWrite,
    /// Makes all completed writes durable. It has no memory.
    Flush,
    /// Discards sectors. It has no memory.
    Discard(u32),
    /// Discards sectors so that their data cannot be recovered. It has no memory.
    SecureErase(u32),
}

impl Operation {
    fn opf(self) -> bindings::blk_opf_t {
        const fn flag(bit: bindings::req_flag_bits) -> bindings::blk_opf_t {
            1 << bit
        }
        const SYNC: bindings::blk_opf_t = flag(bindings::req_flag_bits___REQ_SYNC);
        const IDLE: bindings::blk_opf_t = flag(bindings::req_flag_bits___REQ_IDLE);
        const PREFLUSH: bindings::blk_opf_t = flag(bindings::req_flag_bits___REQ_PREFLUSH);
        const FUA: bindings::blk_opf_t = flag(bindings::req_flag_bits___REQ_FUA);
        match self {
            Operation::Read => bindings::req_op_REQ_OP_READ,
            // Another domain waits for it, and other I/O may follow.
            Operation::Write => bindings::req_op_REQ_OP_WRITE | SYNC | IDLE,
            Operation::FlushWrite => bindings::req_op_REQ_OP_WRITE | SYNC | PREFLUSH | FUA,
            Operation::Flush => bindings::req_op_REQ_OP_WRITE | SYNC | PREFLUSH,
            Operation::Discard(_) => bindings::req_op_REQ_OP_DISCARD,
            Operation::SecureErase(_) => bindings::req_op_REQ_OP_SECURE_ERASE,
        }
    }

    /// Returns the number of sectors of an operation without memory.
    fn sectors(self) -> u32 {
        match self {
            Operation::Discard(sectors) | Operation::SecureErase(sectors) => sectors,
            Operation::Read | Operation::Write | Operation::FlushWrite | Operation::Flush => 0,
        }
    }

    fn takes_memory(self) -> bool {
        match self {
            Operation::Read | Operation::Write | Operation::FlushWrite => true,
            Operation::Flush | Operation::Discard(_) | Operation::SecureErase(_) => false,
        }
    }

    fn needs_memory(self) -> bool {
        matches!(self, Operation::Read | Operation::Write)
    }
}

/// A part of a page slice: `len` bytes from `offset` on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PageRange {
    /// Offset in the slice, in bytes.
    pub offset: usize,
    /// Number of bytes: a multiple of 512, not 0.
    pub len: usize,
}

/// Number of ranges for which a [`BioRequest`] has space itself.
const INLINE_RANGES: usize = 8;

/// Space for a bio with up to [`INLINE_RANGES`] ranges, which is used only while the I/O is in
/// flight.
struct InlineBio {
    bio: MaybeUninit<bindings::bio>,
    vectors: MaybeUninit<[bindings::bio_vec; INLINE_RANGES]>,
}

// SAFETY: It is memory that is unused while the I/O is not in flight.
unsafe impl Send for InlineBio {}
// SAFETY: As above; nothing can be done with a reference to it.
unsafe impl Sync for InlineBio {}

/// The memory of an I/O, and the context of the driver.
///
/// # Invariants
///
/// While the I/O is in flight, `device` is the device of its bio.
pub struct BioRequest<D, C> {
    data: D,
    /// The context of the driver.
    pub context: C,
    /// Keeps the device open, and its reserve of bios allocated, until after the I/O has completed.
    device: Option<Arc<BlockDevice>>,
    own: InlineBio,
}

impl<D, C> BioRequest<D, C> {
    /// Creates an I/O that has not started.
    pub fn new(data: D, context: C) -> Self {
        Self {
            data,
            context,
            device: None,
            own: InlineBio {
                bio: MaybeUninit::uninit(),
                vectors: MaybeUninit::uninit(),
            },
        }
    }

    /// Returns the memory; the device is not using it (type invariant).
    pub fn data(&self) -> &D {
        &self.data
    }

    /// Returns the memory and the context, mutably.
    pub fn split_mut(&mut self) -> (&mut D, &mut C) {
        (&mut self.data, &mut self.context)
    }
}

/// The context of a [`BioRequest`]: tells which parts of the memory are used, and handles the
/// completion.
pub trait BioContext<D>: Sized + Send + 'static {
    /// Returns the ranges of the memory that the I/O uses: the first is in the first slice of the
    /// memory, and so on.
    ///
    /// There may be more slices than ranges.
    fn ranges(&self) -> impl ExactSizeIterator<Item = PageRange> + '_;

    /// Called when the I/O has completed.
    ///
    /// See [`is_unsupported`] for an error with a special meaning.
    ///
    /// # Context
    ///
    /// **Any, including a hard interrupt**, on any CPU, and also the caller of [`submit`] before it
    /// returns; always in an RCU read-side critical section. It must not sleep, and may take only
    /// locks that are taken with interrupts disabled elsewhere. Pass the `BioRequest` to a thread:
    /// freeing its data, or its reference to the device, may sleep.
    fn complete(io: KBox<BioRequest<D, Self>>, result: Result);
}

/// Returns `true` if an I/O has failed with this error because the device does not support the
/// operation (`EOPNOTSUPP`).
pub fn is_unsupported(error: Error) -> bool {
    error.to_errno().unsigned_abs() == bindings::EOPNOTSUPP
}

/// Starts an I/O at a sector (of 512 bytes) of a device.
///
/// On an error it was not started, and is returned. Fails with `EINVAL` if the ranges are not in
/// the slices, are too many, or do not fit the operation, or if no sectors are discarded; with
/// `EACCES` if the device is not open for writing, or if a read would write to memory that must not
/// change.
///
/// Context: may sleep.
pub fn submit<D: PageOwner + Send + 'static, C: BioContext<D>>(
    device: &Arc<BlockDevice>,
    operation: Operation,
    sector: u64,
    mut io: KBox<BioRequest<D, C>>,
) -> Result<(), (Error, KBox<BioRequest<D, C>>)> {
    // A `BioRequest` that is reused keeps its device.
    let known = io.device.as_ref();
    if !known.is_some_and(|known| Arc::ptr_eq(known, device)) {
        // INVARIANT: It is not in flight yet.
        io.device = Some(device.clone());
    }
    let io = KBox::into_raw(io);
    // SAFETY: The `BioRequest` is ours alone, and not a box until the bio has ended or was dropped.
    match unsafe { prepare(device, operation, sector, io) } {
        Ok(bio) => {
            // SAFETY: `io` was a box, and is no longer used. `prepare` has created the bio from its
            // memory.
            unsafe { bio.submit(io) };
            Ok(())
        }
        // SAFETY: It was a box, and there is no bio, because `prepare` has failed.
        Err(error) => Err((error, unsafe { KBox::from_raw(io) })),
    }
}

/// Creates a bio from the memory of `io`.
///
/// # Safety
///
/// `io` is valid. Until the bio has ended or was dropped, it does not move and is only read.
unsafe fn prepare<D: PageOwner, C: BioContext<D>>(
    device: &BlockDevice,
    operation: Operation,
    sector: u64,
    io: *mut BioRequest<D, C>,
) -> Result<Bio> {
    // SAFETY: By the requirements of this function.
    let (data, context, own) = unsafe { (&(*io).data, &(*io).context, &raw mut (*io).own) };
    let ranges = context.ranges();
    let count = ranges.len();
    check(device, operation, count, data)?;
    // SAFETY: As the caller promises; `check` has checked the number of ranges.
    let bio = unsafe { Bio::new(device, operation, sector, count, own) };
    let mut slices = data.slices();
    let mut added = 0usize;
    for PageRange { offset, len } in ranges {
        let slice = slices.next().and_then(|slice| slice.get(offset, len));
        bio.add(slice.ok_or(EINVAL)?)?;
        added = added.wrapping_add(1);
    }
    // The number of ranges comes from safe code, so it may be wrong. A read without memory must not
    // be submitted.
    if added != count {
        return Err(EINVAL);
    }
    Ok(bio)
}

fn check(
    device: &BlockDevice,
    operation: Operation,
    ranges: usize,
    data: &impl PageOwner,
) -> Result {
    let some = ranges != 0;
    if ranges > MAX_RANGES
        || some && !operation.takes_memory()
        || !some && operation.needs_memory()
        || operation.sectors() > MAX_DISCARD_SECTORS
        || matches!(operation, Operation::Discard(0) | Operation::SecureErase(0))
    {
        return Err(EINVAL);
    }
    let allowed = match operation {
        Operation::Read => data.writable(),
        Operation::Flush => true,
        Operation::FlushWrite if !some => true,
        Operation::Write
        | Operation::FlushWrite
        | Operation::Discard(_)
        | Operation::SecureErase(_) => device.access() == Access::ReadWrite,
    };
    if allowed {
        Ok(())
    } else {
        Err(EACCES)
    }
}

/// A bio that was not submitted.
///
/// # Invariants
///
/// A bio with space for its ranges, which has no other user: from the reserve of an open device, or
/// in an [`InlineBio`], which has no reserve.
struct Bio(*mut bindings::bio);

impl Bio {
    /// # Safety
    ///
    /// `ranges` is at most [`MAX_RANGES`]. The caller does not move `own`, nor use it otherwise,
    /// until the bio has ended or was dropped.
    #[inline]
    unsafe fn new(
        device: &BlockDevice,
        operation: Operation,
        sector: u64,
        ranges: usize,
        own: *mut InlineBio,
    ) -> Self {
        let bio = if ranges <= INLINE_RANGES {
            // The block layer reads the first vector of a bio that has a table of them, even if it
            // was not filled in.
            //
            // SAFETY: As the caller promises there is space for a bio and its vectors.
            unsafe {
                let bio = (&raw mut (*own).bio).cast::<bindings::bio>();
                let (vectors, most) = match ranges {
                    0 => (core::ptr::null_mut(), 0),
                    _ => (
                        (&raw mut (*own).vectors).cast(),
                        INLINE_RANGES as ffi::c_ushort,
                    ),
                };
                bindings::bio_init(bio, device.bdev(), vectors, most, operation.opf());
                bio
            }
        } else {
            Self::allocate(device, operation, ranges)
        };
        // SAFETY: The bio was created just now, and is ours alone.
        unsafe {
            (*bio).bi_iter.bi_sector = sector;
            (*bio).bi_iter.bi_size = operation.sectors() << SECTOR_SHIFT;
        }
        // INVARIANT: Initialised just now.
        Self(bio)
    }

    /// Allocates a bio for up to [`MAX_RANGES`] ranges, from the reserve.
    fn allocate(device: &BlockDevice, operation: Operation, ranges: usize) -> *mut bindings::bio {
        const GFP_NOIO: bindings::gfp_t =
            1 << bindings::___GFP_DIRECT_RECLAIM_BIT | 1 << bindings::___GFP_KSWAPD_RECLAIM_BIT;
        let ranges = ranges.min(MAX_RANGES) as ffi::c_ushort;
        // An allocation that may reclaim does not fail, see `bio_alloc_bioset`.
        //
        // SAFETY: By the invariants of `BlockDevice`; there are at most `BIO_MAX_VECS` ranges.
        unsafe {
            bindings::bio_alloc_bioset(
                device.bdev(),
                ranges,
                operation.opf(),
                GFP_NOIO,
                device.bios.get(),
            )
        }
    }

    /// Adds a part of the memory, which the caller keeps until the bio has ended or was dropped.
    #[inline]
    fn add(&self, slice: PageSlice<'_>) -> Result {
        // blk-mq refuses parts of sectors, but not every other driver does.
        if slice.is_empty() || slice.len() % SECTOR_SIZE != 0 {
            return Err(EINVAL);
        }
        // Both at most the size of a page.
        let (len, offset) = (slice.len() as ffi::c_uint, slice.offset() as ffi::c_uint);
        // SAFETY: The bio is valid by the type invariant, and ours alone.
        if unsafe { (*self.0).bi_vcnt >= (*self.0).bi_max_vecs } {
            return Err(EINVAL);
        }
        // Adjacent pages, which are rare among those of another domain, are merged by the block
        // layer, which knows the limits of the device.
        //
        // SAFETY: The bio is valid by the type invariant, and has space; the bytes are in the page
        // by the invariant of `PageSlice`.
        unsafe { bindings::__bio_add_page(self.0, slice.page().as_ptr(), len, offset) };
        Ok(())
    }

    /// Submits the bio; `io` becomes a box again when it completes.
    ///
    /// # Safety
    ///
    /// `io` was a box, which the caller no longer uses. All memory of the bio belongs to it.
    unsafe fn submit<D: PageOwner + Send + 'static, C: BioContext<D>>(
        self,
        io: *mut BioRequest<D, C>,
    ) {
        let bio = self.0;
        core::mem::forget(self);
        // SAFETY: The bio is valid by the type invariant, and ours until it is submitted. All pages
        // in it belong to `io`, as the caller promises, and stay with it by the promise of
        // `PageOwner`. `end_io` gets it when the device no longer uses them.
        unsafe {
            (*bio).bi_private = io.cast();
            (*bio).bi_end_io = Some(end_io::<D, C>);
            bindings::submit_bio(bio);
        }
    }

    /// Frees a bio.
    ///
    /// # Safety
    ///
    /// The type invariant holds for `bio`, which is no longer used.
    #[inline]
    unsafe fn free(bio: *mut bindings::bio) {
        // SAFETY: By the requirements of this function. Its reference is the last one.
        unsafe {
            if (*bio).bi_pool.is_null() {
                bindings::bio_uninit(bio);
            } else {
                bindings::bio_put(bio);
            }
        }
    }
}

impl Drop for Bio {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; it was not submitted.
        unsafe { Self::free(self.0) };
    }
}

/// Handles the completion of a bio (`bi_end_io`).
///
/// This may be the last code of the module that runs: the completion may end the thread that holds
/// the module reference. The kernel waits for an RCU grace period before it frees the code of a
/// module. That suffices if the bio completes in an interrupt. It may also complete in a thread
/// that can be preempted (`loop`, `dm-crypt`), so all of this function is an RCU read-side critical
/// section. The unlock is the last call, which the compiler makes a jump: no code of the module
/// runs after it. `scripts/lib/check-objects` checks that it is a jump.
///
/// # Safety
///
/// As [`finish`].
unsafe extern "C" fn end_io<D: PageOwner + Send + 'static, C: BioContext<D>>(
    bio: *mut bindings::bio,
) {
    let _guard = rcu::read_lock();
    // SAFETY: By the requirements of this function.
    unsafe { finish::<D, C>(bio) };
}

/// Frees a bio, and passes its `BioRequest` to the driver.
///
/// # Safety
///
/// `bio` was submitted by [`Bio::submit`] with the same types, and has ended.
#[inline(never)]
unsafe fn finish<D: PageOwner + Send + 'static, C: BioContext<D>>(bio: *mut bindings::bio) {
    // SAFETY: By the requirements of this function; it is called once, and the bio is not used
    // after its end. The `BioRequest` that it may be part of is not a box yet, and by its invariant
    // has the device with the reserve.
    let (io, status) = unsafe {
        let (io, status) = (
            (*bio).bi_private.cast::<BioRequest<D, C>>(),
            (*bio).bi_status,
        );
        Bio::free(bio);
        (KBox::from_raw(io), status)
    };
    C::complete(io, status_to_result(status));
}

/// Returns the result of a bio.
///
/// Success, which is nearly always the result, takes no call.
#[inline]
fn status_to_result(status: bindings::blk_status_t) -> Result {
    if u32::from(status) == bindings::BLK_STS_OK {
        return Ok(());
    }
    // SAFETY: The function takes any status.
    to_result(unsafe { bindings::blk_status_to_errno(status) })
}

/// Calls `submits` under a plug: the I/O that it submits is passed to the devices together at its
/// end.
pub fn with_plug<R>(submits: impl FnOnce() -> R) -> R {
    let mut plug = MaybeUninit::<bindings::blk_plug>::uninit();
    // SAFETY: `plug` stays in place until `blk_finish_plug`, which runs in the same task.
    unsafe { bindings::blk_start_plug(plug.as_mut_ptr()) };
    let result = submits();
    // SAFETY: Started above.
    unsafe { bindings::blk_finish_plug(plug.as_mut_ptr()) };
    result
}
