// SPDX-License-Identifier: GPL-2.0-only

//! A device of xenbus.
//!
//! Xenbus tells of the backend in a thread that all devices of the guest share: what may wait for
//! the backend is left to the device's own thread.

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
        Role,
        State, //
    },
};

use crate::{
    control::Control,
    keeper::Keeper,
    nodes,
    shortage::Member,
    signal::{
        Cause,
        Signal, //
    }, //
};

/// How long an unbind waits for the thread of the device after the disk was written back. The thread
/// gives the backend half of that for its last answers, and a second to unmap. All other devices of
/// the guest may have to wait as long.
const REMOVE_MS: u32 = 10_000;

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"vbd")]);

/// A device.
pub(crate) struct Vbd {
    signal: Arc<Signal>,
    keeper: Arc<Keeper>,
    _thread: KThread,
    _member: Member,
}

impl Vbd {
    fn new(dev: &xenbus::Device<Core<'_>>) -> Result<Self> {
        let device: ARef<xenbus::Device> = dev.into();
        let vdev = nodes::virtual_device(&device)
            .inspect_err(|error| dev.dev_fatal(*error, fmt!("reading virtual-device")))?;
        nodes::refuse_emulated(&device, &vdev)?;
        let signal = Signal::new()?;
        let backend = nodes::path(dev.otherend()?)?;
        let control = Control::new(device, vdev, signal.clone(), backend);
        let keeper = Keeper::new(control, signal.clone())?;
        let member = Member::new(signal.clone())?;

        // A disk may be what memory is freed by writing to.
        let kind = KThreadOptions { freezable: false };
        let runner = keeper.clone();
        let thread = KThread::spawn(fmt!("rblkfront/{}", vdev.name.as_str()), kind, move |_| {
            let _noio = NoioScope::new();
            Keeper::run(&runner);
        })?;
        Ok(Self {
            signal,
            keeper,
            _thread: thread,
            _member: member,
        })
    }
}

impl Drop for Vbd {
    fn drop(&mut self) {
        // The thread has to end also if the device could not be bound.
        self.signal.raise(Cause::Remove);
    }
}

impl Driver for Vbd {
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
        state: State,
    ) -> DeviceAction {
        let _noio = NoioScope::new();
        self.keeper.control.lock().follow_backend(state);
        self.signal.raise(Cause::Backend);
        DeviceAction::Keep
    }

    fn remove(self: Pin<&Self>, dev: &xenbus::Device<Core<'_>>) {
        self.signal.raise(Cause::Remove);
        let mut syncing = false;
        while !self.signal.await_finish(msecs_to_jiffies(REMOVE_MS)) {
            // A backend that answers is given all the time that it takes.
            let synced = core::mem::replace(&mut syncing, self.signal.is_syncing());
            if !synced && !syncing {
                dev.dev_error(
                    ETIMEDOUT,
                    fmt!("the backend still uses pages of requests: the disk stays until it does not"),
                );
                return;
            }
        }
    }

    fn resume(self: Pin<&Self>, dev: &xenbus::Device<Core<'_>>) -> Result {
        let _noio = NoioScope::new();
        let resumed = self.keeper.control.lock().resume(dev.otherend()?);
        self.signal.raise(Cause::Backend);
        resumed
    }

    fn is_ready(self: Pin<&Self>) -> bool {
        self.signal.is_settled()
    }
}
