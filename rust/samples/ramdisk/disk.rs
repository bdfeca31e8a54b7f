// SPDX-License-Identifier: GPL-2.0-only

//! The disk, and its driver.

use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Arc,
        ArcBorrow,
        Mutex, //
    },
    time::msecs_to_jiffies, //
};

use kernel_ext::{
    base::{
        kthread::Current,
        spinlock_irqsave::{
            new_spinlock_irqsave,
            SpinLockIrqSave, //
        },
        wait::WaitQueue, //
    },
    block::mq::{
        BlkStatus,
        Completed,
        EndBatch,
        Feature,
        GenDisk,
        GenDiskBuilder,
        HwQueue,
        InFlight,
        Op,
        OpenMode,
        Operations,
        QueueLimits,
        Queued,
        Rejected,
        Request,
        RequestId,
        TagSet,
        TagSetParams, //
    },
    new_wait_queue, //
};

use crate::{
    mode::{
        concerns,
        Mode, //
    },
    params,
    store::Store, //
};

const SECTORS_PER_MIB: u64 = 1 << 11;

/// Requests that are held in flight.
struct Held {
    /// `true` if the disk was removed; then no request is held.
    gone: bool,
    /// One slot for each request that can be in flight.
    slots: KVec<Option<(Mode, Request<Control, InFlight>)>>,
}

/// The disk and its driver: the data of its queue and of its thread.
#[pin_data]
pub(crate) struct Control {
    store: Store,
    count: Atomic<u32>,
    #[pin]
    held: SpinLockIrqSave<Held>,
    #[pin]
    disk: Mutex<Option<Arc<GenDisk<Control>>>>,
    /// 1 if there is work for the thread.
    scheduled: Atomic<i32>,
    #[pin]
    wait: WaitQueue,
}

impl Control {
    pub(crate) fn new() -> Result<Arc<Self>> {
        let store = Store::new(params::MAX_MIB.get())?;
        let in_flight = (params::QUEUES.get() as usize)
            .checked_mul(params::DEPTH.get() as usize)
            .ok_or(EINVAL)?;
        let mut slots = KVec::with_capacity(in_flight, GFP_KERNEL)?;
        for _ in 0..in_flight {
            slots.push(None, GFP_KERNEL)?;
        }

        Arc::pin_init(
            pin_init!(Self {
                store,
                count: Atomic::new(0),
                held <- new_spinlock_irqsave!(Held { gone: false, slots }),
                disk <- new_mutex!(None),
                scheduled: Atomic::new(0),
                wait <- new_wait_queue!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Creates the disk.
    pub(crate) fn create_disk(this: &Arc<Self>) -> Result {
        let tag_set = Arc::pin_init(
            TagSet::new(TagSetParams {
                nr_hw_queues: params::QUEUES.get(),
                queue_depth: params::DEPTH.get(),
                timeout: msecs_to_jiffies(params::TIMEOUT_MS.get()),
                no_scheduler: false,
            }),
            GFP_KERNEL,
        )?;

        let mut limits = QueueLimits::new();
        limits
            .set_logical_block_size(params::BLOCK_SIZE.get())
            .set_max_hw_sectors(256)
            .set_max_segments(32)
            .set_max_discard_sectors(u32::MAX)
            .set_discard_granularity(params::DISCARD_GRANULARITY.get())
            .set_discard_alignment(params::DISCARD_ALIGNMENT.get())
            .set_max_secure_erase_sectors(if params::SECURE_ERASE.get() {
                u32::MAX
            } else {
                0
            })
            .set_max_write_zeroes_sectors(u32::MAX)
            .set_feature(Feature::WriteCache, params::WRITE_CACHE.get())
            .set_feature(Feature::Fua, params::FUA.get());

        let disk = GenDiskBuilder::new(limits)
            .capacity(Self::capacity())
            .read_only(params::READ_ONLY.get())
            .build(fmt!("rblk0"), tag_set, this.clone())?;
        let disk = Arc::new(disk, GFP_KERNEL)?;
        *this.disk.lock() = Some(disk);
        Ok(())
    }

    /// Adds the disk to the system.
    ///
    /// Context: the thread is running.
    pub(crate) fn add_disk(&self) -> Result {
        let disk = self.disk.lock().clone().ok_or(ENODEV)?;
        disk.add(None)
    }

    /// Removes the disk and fails all requests in flight.
    pub(crate) fn remove(&self) {
        let Some(disk) = self.disk.lock().take() else {
            return;
        };
        disk.mark_dead();
        self.held.lock().gone = true;
        self.end_held(|_, _| Some(BlkStatus::IOERR));
        drop(disk);
        pr_info!("rblk0: removed\n");
    }

    fn capacity() -> u64 {
        u64::from(params::SIZE_MIB.get().min(params::MAX_MIB.get())).wrapping_mul(SECTORS_PER_MIB)
    }

    /// Ends the held requests for which `f` returns a status.
    fn end_held(&self, mut f: impl FnMut(Mode, &mut Request<Self, InFlight>) -> Option<BlkStatus>) {
        let mut batch = EndBatch::new();
        for slot in 0.. {
            let (mode, mut rq) = match self.held.lock().slots.get_mut(slot) {
                Some(slot) => match slot.take() {
                    Some(held) => held,
                    None => continue,
                },
                None => return,
            };
            match f(mode, &mut rq) {
                Some(status) => batch.end(rq, status),
                None => self.hold(mode, rq),
            }
        }
    }

    /// Holds a request that was started, or fails it if the disk was removed.
    fn hold(&self, mode: Mode, rq: Request<Self, InFlight>) {
        let mut held = self.held.lock();
        if !held.gone {
            if let Some(slot) = held.slots.iter_mut().find(|slot| slot.is_none()) {
                *slot = Some((mode, rq));
                return;
            }
        }
        drop(held);
        rq.end(BlkStatus::OFFLINE);
    }

    /// Returns the mode for the next request.
    fn next_mode(&self, op: Op) -> Mode {
        if !concerns(params::ONLY.get(), op) {
            return Mode::Now;
        }
        let count = self.count.fetch_add(1, Relaxed);
        if count.checked_rem(params::EVERY.get()).unwrap_or(0) == 0 {
            Mode::new(params::MODE.get())
        } else {
            Mode::Now
        }
    }

    fn schedule(&self) {
        self.scheduled.xchg(1, Full);
        self.wait.wake_up();
    }

    /// Runs the thread of the disk until the disk is removed.
    pub(crate) fn run(&self, current: &Current) {
        while !current.should_stop() && !params::GONE.get() {
            self.wait
                .wait_idle(|| current.should_stop() || self.scheduled.xchg(0, Full) != 0);
            self.work();
        }
        self.remove();
    }

    fn work(&self) {
        let now = Mode::new(params::MODE.get());
        self.end_held(|mode, rq| match (mode, now) {
            (Mode::Keep, Mode::Keep) => None,
            (Mode::Keep, Mode::Fail) => Some(BlkStatus::IOERR),
            _ => Some(self.store.execute(rq)),
        });

        let disk = self.disk.lock().clone();
        if let Some(disk) = disk {
            disk.kick_requeue_list();
            if disk.set_capacity_and_notify(Self::capacity()).is_err() {
                pr_err!("rblk0: capacity out of range\n");
            }
        }
    }
}

#[vtable]
impl Operations for Control {
    type QueueData = Self;
    type HwQueueData = Arc<Self>;
    type RequestData = u64;

    fn new_request_data(_hw_queue: u32) -> Result<u64> {
        Ok(0)
    }

    fn new_hw_queue_data(this: ArcBorrow<'_, Self>, _hw_queue: u32) -> Result<Arc<Self>> {
        Ok(this.into())
    }

    fn queue_rq<'q>(
        hw_queue: HwQueue<'q, Self>,
        mut rq: Request<Self, Queued<'q>>,
        last: bool,
    ) -> Result<(), Rejected<'q, Self>> {
        let this = hw_queue.queue_data();
        let uses = rq.data().wrapping_add(1);
        *rq.data_mut() = uses;

        match this.next_mode(rq.op()) {
            Mode::Now => {
                let mut rq = rq.start();
                let status = this.store.execute(&mut rq);
                rq.end(status);
            }
            Mode::Complete => rq.start().complete(),
            Mode::Later => {
                this.hold(Mode::Later, rq.start());
                if last {
                    this.schedule();
                }
            }
            Mode::Keep => this.hold(Mode::Keep, rq.start()),
            Mode::Fail => rq.end(BlkStatus::IOERR),
            Mode::Refuse => rq.end(BlkStatus::NOTSUPP),
            Mode::Reject => return Err(rq.reject()),
            Mode::Requeue => {
                rq.start().requeue();
                this.schedule();
            }
        }
        Ok(())
    }

    fn commit_rqs(hw_queue: HwQueue<'_, Self>) {
        hw_queue.queue_data().schedule();
    }

    fn complete(mut rq: Request<Self, Completed>) {
        let this = rq.queue_data();
        let status = this.store.execute(&mut rq);
        rq.end(status);
    }

    fn timed_out(this: ArcBorrow<'_, Self>, id: RequestId) {
        pr_warn!(
            "rblk0: request {} of queue {} timed out\n",
            id.tag,
            id.hw_queue
        );
        this.end_held(|_, rq| (rq.id() == id).then_some(BlkStatus::TIMEOUT));
    }

    fn open(this: ArcBorrow<'_, Self>, _mode: OpenMode) -> Result {
        this.schedule();
        Ok(())
    }
}
