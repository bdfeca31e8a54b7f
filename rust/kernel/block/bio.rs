// SPDX-License-Identifier: GPL-2.0-only

//! I/O on a block device.
//!
//! A [`BioRequest`] owns the memory that is read or written and a context of the driver. [`submit`]
//! takes it, and it comes back through [`BioContext::complete`], once, when the device is done with
//! the memory. In between no code can access or free that memory.
//!
//! One `BioRequest` is one bio: up to [`MAX_RANGES`] pieces of memory for one run of sectors. With
//! few pieces the bio is part of the `BioRequest`, so that nothing is allocated. Otherwise it comes
//! from a reserve of the device, so that `submit` has to wait for memory at most until other I/O of
//! the same device ends.
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

/// Pieces of memory in one [`BioRequest`], at most.
pub const MAX_RANGES: usize = bindings::BIO_MAX_VECS as usize;

/// Sectors of one [`Operation::Discard`] or [`Operation::SecureErase`], at most.
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
    /// Makes all completed writes durable; then the memory, if there is any, is written and made
    /// durable too.
    FlushWrite,
    /// Makes all completed writes durable. No memory.
    Flush,
    /// Discards sectors. No memory.
    Discard(u32),
    /// Discards sectors such that they cannot be recovered. No memory.
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
            // Another domain waits for it; more may follow.
            Operation::Write => bindings::req_op_REQ_OP_WRITE | SYNC | IDLE,
            Operation::FlushWrite => bindings::req_op_REQ_OP_WRITE | SYNC | PREFLUSH | FUA,
            Operation::Flush => bindings::req_op_REQ_OP_WRITE | SYNC | PREFLUSH,
            Operation::Discard(_) => bindings::req_op_REQ_OP_DISCARD,
            Operation::SecureErase(_) => bindings::req_op_REQ_OP_SECURE_ERASE,
        }
    }

    /// Sectors of an operation that has no memory to tell how many.
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

/// A part of a piece of memory: `len` bytes from `offset` on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PageRange {
    /// Offset in the piece in bytes.
    pub offset: usize,
    /// Number of bytes: whole sectors of 512, not 0.
    pub len: usize,
}

/// Pieces of memory for which a [`BioRequest`] has room itself.
const INLINE_RANGES: usize = 8;

/// Room for a bio with up to [`INLINE_RANGES`] pieces of memory. Used only while the I/O is on its
/// way.
struct InlineBio {
    bio: MaybeUninit<bindings::bio>,
    vectors: MaybeUninit<[bindings::bio_vec; INLINE_RANGES]>,
}

// SAFETY: It is memory, with nothing in it while the I/O is not on its way.
unsafe impl Send for InlineBio {}
// SAFETY: As above; a reference to it gives nothing.
unsafe impl Sync for InlineBio {}

/// The memory of an I/O, and what the driver wants to have back with it.
///
/// # Invariants
///
/// While the I/O is on its way, `device` is the one that its bio was made for.
pub struct BioRequest<D, C> {
    data: D,
    /// The driver's own.
    pub context: C,
    /// Keeps the device open, and its reserve of bios in place, until after the end of the I/O.
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

    /// Returns the memory and the context, both to be changed.
    pub fn split_mut(&mut self) -> (&mut D, &mut C) {
        (&mut self.data, &mut self.context)
    }
}

/// The context of a [`BioRequest`]: it knows what part the memory has in it, and what to do at its
/// end.
pub trait BioContext<D>: Sized + Send + 'static {
    /// Returns the ranges of the memory that the I/O is about: the first lies in the first slice of
    /// the memory, and so on. There may be more slices than ranges.
    fn ranges(&self) -> impl ExactSizeIterator<Item = PageRange> + '_;

    /// Called when the I/O has ended. See [`is_unsupported`] for the one error with a special
    /// meaning.
    ///
    /// # Context
    ///
    /// **Any, including a hard interrupt**, on any CPU, and also the caller of [`submit`] before
    /// that returns; always in a read-side section of RCU. Must not sleep, and may take only locks
    /// that are taken with interrupts off elsewhere. Hand the `BioRequest` to a thread: what it
    /// owns may need to sleep to be freed, and the reference to its device too.
    fn complete(io: KBox<BioRequest<D, Self>>, result: Result);
}

/// Returns `true` if an I/O has ended with this error because the device cannot do the operation
/// (`EOPNOTSUPP`).
pub fn is_unsupported(error: Error) -> bool {
    error.to_errno().unsigned_abs() == bindings::EOPNOTSUPP
}

/// Starts an I/O at a sector (of 512 bytes) of a device. May sleep.
///
/// On an error it has not started, and is given back. `EINVAL`: the ranges do not lie in the
/// slices, are too many, or do not fit the operation, or no sectors are discarded. `EACCES`: the
/// device is not open for writing, or memory that must not change is read into.
pub fn submit<D: PageOwner + Send + 'static, C: BioContext<D>>(
    device: &Arc<BlockDevice>,
    operation: Operation,
    sector: u64,
    mut io: KBox<BioRequest<D, C>>,
) -> Result<(), (Error, KBox<BioRequest<D, C>>)> {
    // A `BioRequest` that goes around keeps the device that it has.
    let known = io.device.as_ref();
    if !known.is_some_and(|known| Arc::ptr_eq(known, device)) {
        // INVARIANT: It is not on its way yet.
        io.device = Some(device.clone());
    }
    let io = KBox::into_raw(io);
    // SAFETY: The `BioRequest` is ours alone, and no box until the bio has ended or was dropped.
    match unsafe { prepare(device, operation, sector, io) } {
        Ok(bio) => {
            // SAFETY: `io` was a box, and is not used any more. `prepare` has made the bio of its
            // memory.
            unsafe { bio.submit(io) };
            Ok(())
        }
        // SAFETY: It was a box, and the bio is gone, as `prepare` has failed.
        Err(error) => Err((error, unsafe { KBox::from_raw(io) })),
    }
}

/// Makes a bio of the memory of `io`.
///
/// # Safety
///
/// `io` is valid. Until the bio has ended or was dropped it stays where it is, and is left alone
/// but for reading.
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
    // SAFETY: As the caller promises; `check` has looked at the number of ranges.
    let bio = unsafe { Bio::new(device, operation, sector, count, own) };
    let mut slices = data.slices();
    let mut added = 0usize;
    for PageRange { offset, len } in ranges {
        let slice = slices.next().and_then(|slice| slice.get(offset, len));
        bio.add(slice.ok_or(EINVAL)?)?;
        added = added.wrapping_add(1);
    }
    // The number was only what safe code says. A read of nothing must go to no device.
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
/// A bio with room for the ranges that it was made for, which has no other user: of the reserve of
/// an open device, or of an [`InlineBio`], which is known by having no reserve.
struct Bio(*mut bindings::bio);

impl Bio {
    /// # Safety
    ///
    /// `ranges` is at most [`MAX_RANGES`]. The caller keeps `own` where it is, and for nothing
    /// else, until the bio has ended or was dropped.
    #[inline]
    unsafe fn new(
        device: &BlockDevice,
        operation: Operation,
        sector: u64,
        ranges: usize,
        own: *mut InlineBio,
    ) -> Self {
        let bio = if ranges <= INLINE_RANGES {
            // The block layer looks at the first vector of a bio that has a table of them, whether
            // it was filled in or not.
            //
            // SAFETY: As the caller promises there is room for a bio and its vectors.
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
        // SAFETY: The bio was made just now, and is ours alone.
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

    /// Adds a part of the memory that the caller keeps until the bio has ended or was dropped.
    #[inline]
    fn add(&self, slice: PageSlice<'_>) -> Result {
        // What is not whole sectors is refused by blk-mq, but not by every other driver.
        if slice.is_empty() || slice.len() % SECTOR_SIZE != 0 {
            return Err(EINVAL);
        }
        // Both at most the size of a page.
        let (len, offset) = (slice.len() as ffi::c_uint, slice.offset() as ffi::c_uint);
        // SAFETY: The bio is valid by the type invariant, and ours alone.
        if unsafe { (*self.0).bi_vcnt >= (*self.0).bi_max_vecs } {
            return Err(EINVAL);
        }
        // Adjacent pages, which are rare among those of another domain, are put together further
        // down, where the limits of the device are known.
        //
        // SAFETY: The bio is valid by the type invariant, and has room; the bytes lie in the page
        // by the invariant of `PageSlice`.
        unsafe { bindings::__bio_add_page(self.0, slice.page().as_ptr(), len, offset) };
        Ok(())
    }

    /// Submits the bio; `io` becomes a box again at its end.
    ///
    /// # Safety
    ///
    /// `io` was a box, of which the caller makes no use any more. All memory of the bio belongs to
    /// it.
    unsafe fn submit<D: PageOwner + Send + 'static, C: BioContext<D>>(
        self,
        io: *mut BioRequest<D, C>,
    ) {
        let bio = self.0;
        core::mem::forget(self);
        // SAFETY: The bio is valid by the type invariant, and ours until it is submitted. All pages
        // in it belong to `io`, as the caller promises, and stay with it by the promise of
        // `PageOwner`. `end_io` gets it when the device does not use them any more.
        unsafe {
            (*bio).bi_private = io.cast();
            (*bio).bi_end_io = Some(end_io::<D, C>);
            bindings::submit_bio(bio);
        }
    }

    /// Gives a bio back to where it came from.
    ///
    /// # Safety
    ///
    /// The type invariant holds for `bio`, which is not used any more.
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

/// Ends a bio, where the block layer says so.
///
/// This may be the last code of the module that runs: the completion may end the thread that holds
/// it. Where bios end in interrupts, the kernel does not free a module's code before it has
/// returned, because it waits for a grace period of RCU. Others end in threads that can be
/// preempted (`loop`, `dm-crypt`), so all of it is a read-side section. Its end is the last call,
/// which the compiler makes a jump: nothing of the module runs after that.
/// `scripts/lib/check-objects` looks whether it is one.
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

/// Frees a bio, and passes on its `BioRequest`.
///
/// # Safety
///
/// `bio` was submitted by [`Bio::submit`] with the same types, and has ended.
#[inline(never)]
unsafe fn finish<D: PageOwner + Send + 'static, C: BioContext<D>>(bio: *mut bindings::bio) {
    // SAFETY: By the requirements of this function; it is called once, and the bio is not used
    // after its end. The `BioRequest` that it may be part of is no box yet, and by its invariant
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

/// Returns the result that a bio has ended with. Nearly all have ended without an error, which
/// costs no call.
#[inline]
fn status_to_result(status: bindings::blk_status_t) -> Result {
    if u32::from(status) == bindings::BLK_STS_OK {
        return Ok(());
    }
    // SAFETY: The function takes any status.
    to_result(unsafe { bindings::blk_status_to_errno(status) })
}

/// Runs `submits`, and gives the I/O that it submits to the devices together at its end.
pub fn with_plug<R>(submits: impl FnOnce() -> R) -> R {
    let mut plug = MaybeUninit::<bindings::blk_plug>::uninit();
    // SAFETY: `plug` stays in place until `blk_finish_plug`, which runs in the same task.
    unsafe { bindings::blk_start_plug(plug.as_mut_ptr()) };
    let result = submits();
    // SAFETY: Started above.
    unsafe { bindings::blk_finish_plug(plug.as_mut_ptr()) };
    result
}
