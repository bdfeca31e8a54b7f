// SPDX-License-Identifier: GPL-2.0-only

//! The backend of the echo pair, which tests the lifetimes of Xen's resources without a disk.
//!
//! It replies to the frontend's messages, each in the way that the message asks for.

#![deny(unsafe_code)]

mod protocol;
mod responder;

use kernel::{
    device::Core,
    prelude::*,
    sync::{
        aref::ARef,
        new_mutex,
        Mutex, //
    }, //
};

use kernel_ext::xen::{
    xenbus::{
        self,
        DeviceAction,
        DeviceId,
        IdArray,
        IdTable,
        OtherendState,
        Role,
        XenbusState, //
    },
    xenstore::Reader, //
};

use crate::responder::Connection;

kernel_ext::module_xenbus_driver! {
    type: Back,
    name: "rblk_echo_back",
    authors: ["The rblkif developers"],
    description: "Backend of a pair that tests rblkif's Xen layer",
    license: "GPL",
    alias: ["xen-backend:recho"],
}

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"recho")]);

/// A device.
#[pin_data]
struct Back {
    device: ARef<xenbus::Device>,
    #[pin]
    connection: Mutex<Option<Connection>>,
}

impl Back {
    /// Connects to the ring that the frontend has published, unless it is connected to it.
    fn connect(&self, otherend: &CStr) -> Result {
        let epoch = Reader::new(otherend).number("epoch")?;
        let mut connection = self.connection.lock();
        if connection
            .as_ref()
            .is_some_and(|connection| connection.epoch() == epoch)
        {
            return Ok(());
        }
        *connection = None;
        *connection = Some(Connection::new(&self.device, otherend, epoch)?);
        Ok(())
    }

    fn disconnect(&self) {
        *self.connection.lock() = None;
    }
}

impl xenbus::Driver for Back {
    const ROLE: Role = Role::Backend;
    const NAME: &'static CStr = c"recho";
    const ID_TABLE: IdTable = IDS.as_table();

    fn probe(dev: &xenbus::Device<Core<'_>>) -> impl PinInit<Self, Error> {
        dev.switch_state(XenbusState::InitWait);
        let device: ARef<xenbus::Device> = dev.into();
        try_pin_init!(Self {
            device,
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
            XenbusState::Initialising => {
                self.disconnect();
                dev.switch_state(XenbusState::InitWait);
            }
            XenbusState::Initialised | XenbusState::Connected => {
                match dev.otherend().and_then(|otherend| self.connect(otherend)) {
                    Ok(()) => {
                        dev.switch_state(XenbusState::Connected);
                    }
                    Err(error) => dev.dev_fatal(error, fmt!("connecting")),
                }
            }
            XenbusState::Closing => {
                self.disconnect();
                dev.switch_state(XenbusState::Closing);
            }
            XenbusState::Closed => {
                self.disconnect();
                dev.switch_state(XenbusState::Closed);
                if !dev.is_online() {
                    return DeviceAction::Unregister;
                }
            }
            XenbusState::Unknown => {
                self.disconnect();
                return DeviceAction::Unregister;
            }
            XenbusState::InitWait | XenbusState::Reconfiguring | XenbusState::Reconfigured => {}
        }
        DeviceAction::Keep
    }

    fn remove(self: Pin<&Self>, _dev: &xenbus::Device<Core<'_>>) {
        self.disconnect();
    }
}
