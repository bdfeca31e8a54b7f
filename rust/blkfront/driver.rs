// SPDX-License-Identifier: GPL-2.0-only

//! The xenbus driver.
//!
//! Xenbus calls `otherend_changed` in the `xenwatch` thread, which all devices of the guest share,
//! and the other callbacks with the device locked. So everything that may wait for the backend is
//! done by the device worker.
//!
//! `struct xenbus_driver blkfront_driver` of `xen-blkfront.c` has this role.

use kernel::{
    device::Core,
    prelude::*,
    sync::{
        aref::ARef,
        Arc, //
    },
    time::msecs_to_jiffies, //
};

use kernel_ext::{
    base::{
        kthread::{
            KThread,
            KThreadOptions, //
        },
        memalloc::NoioScope, //
    },
    xen::xenbus::{
        self,
        DeviceAction,
        DeviceId,
        Driver,
        IdArray,
        IdTable,
        OtherendState,
        Role, //
    },
};

use crate::{
    device::Device,
    shortage::ShortageSubscriber,
    wakeup::{
        DeviceWakeup,
        WakeReason, //
    },
    worker::DeviceWorker,
    xenstore, //
};

/// Time for which an unbind waits for the device worker after the disk was written back, in
/// milliseconds.
///
/// The worker waits half of that time for the last responses of the backend, and a second for it to
/// unmap pages. All other devices of the guest may have to wait that long, if the `xenwatch`
/// thread unbinds the device.
const REMOVE_TIMEOUT_MS: u32 = 10_000;

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"vbd")]);

/// The driver's data of a bound device.
pub(crate) struct VbdDriver {
    wakeup: Arc<DeviceWakeup>,
    worker: Arc<DeviceWorker>,
    _thread: KThread,
    _subscriber: ShortageSubscriber,
}

impl VbdDriver {
    fn new(dev: &xenbus::Device<Core<'_>>) -> Result<Self> {
        // The `xenwatch` thread probes devices, and memory reclaim may need it to reconnect a disk.
        let _noio = NoioScope::new();
        let xbdev: ARef<xenbus::Device> = dev.into();
        let vdev = xenstore::virtual_device(&xbdev)
            .inspect_err(|error| dev.dev_fatal(*error, fmt!("reading virtual-device")))?;
        xenstore::refuse_emulated(&xbdev, &vdev)?;
        let wakeup = DeviceWakeup::new()?;
        let backend = xenstore::path(dev.otherend()?)?;
        let device_state = Device::new(xbdev, vdev, wakeup.clone(), backend);
        let worker = DeviceWorker::new(device_state, wakeup.clone())?;
        let subscriber = ShortageSubscriber::new(wakeup.clone())?;

        // Reclaim may write to this disk, so the thread must not start I/O to allocate memory. It
        // must not be frozen either, because the image of a hibernation may be written to this
        // disk.
        let options = KThreadOptions { freezable: false };
        let runner = worker.clone();
        let thread = KThread::spawn(
            fmt!("rblkfront/{}", vdev.name.as_str()),
            options,
            move |_| {
                let _noio = NoioScope::new();
                DeviceWorker::run(&runner);
            },
        )?;
        Ok(Self {
            wakeup,
            worker,
            _thread: thread,
            _subscriber: subscriber,
        })
    }
}

impl Drop for VbdDriver {
    fn drop(&mut self) {
        // The thread has to end even if the device could not be bound.
        self.wakeup.set(WakeReason::Remove);
    }
}

impl Driver for VbdDriver {
    const ROLE: Role = Role::Frontend;
    const NAME: &'static CStr = c"vbd";
    const ID_TABLE: IdTable = IDS.as_table();
    const ALLOW_REBIND: bool = true;

    fn probe(dev: &xenbus::Device<Core<'_>>) -> impl PinInit<Self, Error> {
        Self::new(dev)
    }

    fn otherend_changed(
        self: Pin<&Self>,
        _dev: &xenbus::Device<Core<'_>>,
        state: OtherendState,
    ) -> DeviceAction {
        let _noio = NoioScope::new();
        self.worker.device.lock().backend_changed(state);
        self.wakeup.set(WakeReason::Backend);
        DeviceAction::Keep
    }

    fn remove(self: Pin<&Self>, dev: &xenbus::Device<Core<'_>>) {
        let _noio = NoioScope::new();
        self.wakeup.set(WakeReason::Remove);
        let mut syncing = false;
        while !self
            .wakeup
            .await_finish(msecs_to_jiffies(REMOVE_TIMEOUT_MS))
        {
            // There is no limit while the disk is written back: the worker stops that if the
            // backend does not respond.
            let synced = core::mem::replace(&mut syncing, self.wakeup.is_syncing());
            if !synced && !syncing {
                let text = if self.worker.device.lock().has_granted_requests() {
                    "the backend still has pages of requests mapped: the disk stays until the backend unmaps them"
                } else {
                    "the disk could not be removed in time: removing it in the background"
                };
                dev.dev_error(ETIMEDOUT, fmt!("{text}"));
                return;
            }
        }
    }

    fn resume(self: Pin<&Self>, dev: &xenbus::Device<Core<'_>>) -> Result {
        let _noio = NoioScope::new();
        let resumed = self.worker.device.lock().resume(dev.otherend()?);
        self.wakeup.set(WakeReason::Backend);
        resumed
    }

    fn is_ready(self: Pin<&Self>) -> bool {
        self.wakeup.is_ready()
    }
}
