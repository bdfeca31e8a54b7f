// SPDX-License-Identifier: GPL-2.0-only

//! The frontend of the echo pair, which tests the lifetimes of Xen's resources without a disk.
//!
//! It sends messages while it is connected, checks the replies, and counts both; the counts are in
//! the device's directory in sysfs. It connects whenever the backend waits for it.
//!
//! The state is only switched in `otherend_changed`, which is called after `probe` in any case: see
//! [`xenbus::Device::switch_state`].

#![deny(unsafe_code)]

mod protocol;
mod sender;

use kernel::{
    device::Core,
    prelude::*,
    sync::{
        aref::ARef,
        new_mutex,
        Arc,
        Mutex, //
    }, //
};

use kernel_ext::{
    base::sysfs::{
        self,
        Attribute, //
    },
    xen::xenbus::{
        self,
        DeviceAction,
        DeviceId,
        IdArray,
        IdTable,
        OtherendState,
        Role,
        XenbusState, //
    },
};

use crate::sender::{
    Connection,
    Counters, //
};

kernel_ext::module_xenbus_driver! {
    type: Front,
    name: "rblk_echo_front",
    authors: ["The rblkif developers"],
    description: "Frontend of a pair that tests rblkif's Xen layer",
    license: "GPL",
    alias: ["xen:recho"],
}

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"recho")]);

static ATTRIBUTES: [Attribute<Counters>; 2] = [
    Attribute {
        name: c"echoed",
        show: |counters, output| counters.show_echoed(output),
    },
    Attribute {
        name: c"errors",
        show: |counters, output| counters.show_errors(output),
    },
];

/// A device.
#[pin_data]
struct Front {
    device: ARef<xenbus::Device>,
    counters: Arc<Counters>,
    #[pin]
    connection: Mutex<Option<Connection>>,
}

impl Front {
    /// Announces a new connection to the backend and creates it, after the previous one has ended.
    fn connect(&self) -> Result {
        let mut connection = self.connection.lock();
        *connection = None;
        self.device.switch_state(XenbusState::Initialising);
        *connection = Some(Connection::new(&self.device, &self.counters)?);
        self.device.switch_state(XenbusState::Initialised);
        Ok(())
    }

    fn disconnect(&self) {
        *self.connection.lock() = None;
    }

    fn is_connected(&self) -> bool {
        self.connection.lock().is_some()
    }
}

impl xenbus::Driver for Front {
    const ROLE: Role = Role::Frontend;
    const NAME: &'static CStr = c"recho";
    const ID_TABLE: IdTable = IDS.as_table();
    const ALLOW_REBIND: bool = true;
    const NOT_ESSENTIAL: bool = true;

    fn probe(dev: &xenbus::Device<Core<'_>>) -> impl PinInit<Self, Error> {
        let device: ARef<xenbus::Device> = dev.into();
        let counters = Arc::new(Counters::new(), GFP_KERNEL);
        let prepared = counters.map_err(Error::from).and_then(|counters| {
            sysfs::register(dev.as_ref(), None, &ATTRIBUTES, counters.clone())?;
            Ok(counters)
        });
        try_pin_init!(Self {
            device,
            counters: prepared?,
            connection <- new_mutex!(None),
        })
    }

    fn otherend_changed(
        self: Pin<&Self>,
        dev: &xenbus::Device<Core<'_>>,
        state: OtherendState,
    ) -> DeviceAction {
        let Ok(state) = state else {
            return DeviceAction::Keep;
        };
        match state {
            XenbusState::InitWait => {
                if let Err(error) = self.connect() {
                    dev.dev_fatal(error, fmt!("connecting"));
                }
            }
            XenbusState::Connected if self.is_connected() => {
                dev.switch_state(XenbusState::Connected);
            }
            XenbusState::Closing | XenbusState::Closed | XenbusState::Unknown => {
                self.disconnect();
                dev.frontend_closed();
                if state == XenbusState::Closed {
                    // Ready for a backend that connects again.
                    dev.switch_state(XenbusState::Initialising);
                }
            }
            XenbusState::Connected
            | XenbusState::Initialising
            | XenbusState::Initialised
            | XenbusState::Reconfiguring
            | XenbusState::Reconfigured => {}
        }
        DeviceAction::Keep
    }

    fn remove(self: Pin<&Self>, dev: &xenbus::Device<Core<'_>>) {
        self.disconnect();
        // The bus may read this state at the same time, in the `xenwatch` thread, and would take a
        // state that changes from Initialising for that of a new device.
        if dev.state() != XenbusState::Initialising {
            dev.switch_state(XenbusState::Closed);
        }
    }

    fn resume(self: Pin<&Self>, _dev: &xenbus::Device<Core<'_>>) -> Result {
        self.disconnect();
        Ok(())
    }
}
