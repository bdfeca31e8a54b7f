// SPDX-License-Identifier: GPL-2.0-only

//! The xenbus driver: callbacks of the bus for a [`Device`] (`xen_blkbk_driver`).
//!
//! `otherend_changed` and the watch run in the `xenwatch` thread, which all devices of this domain
//! share. So they only record the event and schedule the work item of the device.

use kernel::{
    device::Core,
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};

use kernel_ext::{
    base::sysfs::{
        self,
        Attribute, //
    },
    xen::{
        xenbus::{
            self,
            DeviceAction,
            DeviceId,
            Driver,
            IdArray,
            IdTable,
            OtherendState,
            Role,
            XenbusState, //
        },
        xenstore::{
            Watch,
            WatchHandler, //
        },
    },
};

use crate::{
    device::Device,
    domain,
    stats, //
};

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"vbd")]);

/// Files in the sysfs directory of the device.
static ATTRIBUTES: [Attribute<Device>; 2] = [
    Attribute {
        name: c"physical_device",
        show: |device, out| device.show_physical_device(out),
    },
    Attribute {
        name: c"mode",
        show: |device, out| device.show_mode(out),
    },
];

/// Driver data of a bound device.
pub(crate) struct VbdDriver {
    device: Arc<Device>,
    /// `None` once the device is being unbound.
    watch: Pin<KBox<Mutex<Option<Watch<DiskWatch>>>>>,
}

/// Handler of the watch on `physical-device`.
struct DiskWatch(Arc<Device>);

impl Driver for VbdDriver {
    const ROLE: Role = Role::Backend;
    const NAME: &'static CStr = c"vbd";
    const ID_TABLE: IdTable = IDS.as_table();
    const ALLOW_REBIND: bool = true;

    fn probe(xbdev: &xenbus::Device<Core<'_>>) -> impl PinInit<Self, Error> {
        Self::check_take_over(xbdev).and_then(|()| {
            // The error does not close the device: a connected frontend stays connected, and the
            // device can be bound again.
            Self::new(xbdev)
                .inspect_err(|error| xbdev.dev_error(*error, fmt!("creating the device")))
        })
    }

    fn otherend_changed(
        self: Pin<&Self>,
        _xbdev: &xenbus::Device<Core<'_>>,
        _state: OtherendState,
    ) -> DeviceAction {
        self.device.schedule_work();
        DeviceAction::Keep
    }

    fn remove(self: Pin<&Self>, _xbdev: &xenbus::Device<Core<'_>>) {
        self.shut_down();
    }

    fn reclaim_memory(self: Pin<&Self>) {
        self.device.set_memory_pressure();
    }
}

impl VbdDriver {
    /// Checks that the driver may take over rings that are in use.
    ///
    /// If not, it writes no state, so that the device can be bound later.
    fn check_take_over(xbdev: &xenbus::Device<Core<'_>>) -> Result {
        let otherend = xbdev.otherend()?;
        if domain::is_orphaned(xbdev.nodename())
            && xbdev.read_driver_state(otherend)? == Ok(XenbusState::Connected)
        {
            dev_err!(
                xbdev.as_ref(),
                "queues from before the last unbind still wait for the disk: bind again when its I/O \
                 has completed\n"
            );
            return Err(EBUSY);
        }
        Ok(())
    }

    fn new(xbdev: &xenbus::Device<Core<'_>>) -> Result<Self> {
        let device = Device::new(xbdev)?;
        let watch = KBox::pin_init(new_mutex!(None), GFP_KERNEL)?;
        // If one of the following fails, dropping this undoes the rest.
        let driver = Self { device, watch };
        let device = &driver.device;
        device.start()?;
        sysfs::register(xbdev.as_ref(), None, &ATTRIBUTES, device.clone())?;
        sysfs::register(
            xbdev.as_ref(),
            Some(c"statistics"),
            &stats::STATISTICS,
            device.stats(),
        )?;
        let handler = Arc::new(DiskWatch(device.clone()), GFP_KERNEL)?;
        let watch = Watch::new(xbdev.nodename(), fmt!("physical-device"), handler)?;
        *driver.watch.lock() = Some(watch);
        Ok(driver)
    }

    /// Removes the watch, and shuts the device down.
    fn shut_down(&self) {
        // Removing the watch waits for the `xenwatch` thread, while the driver core holds the lock
        // of the device. This comes before the long wait for the disk, which keeps the window
        // small: if the `xenwatch` thread already waits for the lock, to remove the device, this
        // never ends (as in `xen-blkback`).
        let watch = self.watch.lock().take();
        drop(watch);
        self.device.shut_down();
    }
}

impl Drop for VbdDriver {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl WatchHandler for DiskWatch {
    fn changed(&self) {
        self.0.disk_named();
    }
}
