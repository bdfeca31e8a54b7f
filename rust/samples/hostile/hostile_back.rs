// SPDX-License-Identifier: GPL-2.0-only

//! A backend that breaks the protocol, to test what a frontend must withstand.
//!
//! It binds to one virtual block device, needs no disk for it, and serves it correctly until the
//! parameter `misbehaviour` selects a [`misbehaviour`].

#![deny(unsafe_code)]

mod back_params;
mod misbehaviour;
mod server;

use core::ffi::CStr;

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
    xenstore, //
};

use crate::server::{
    Connection,
    SECTORS, //
};

kernel_ext::module_xenbus_driver! {
    type: Back,
    name: "rblk_hostile_back",
    authors: ["The rblkif developers"],
    description: "Backend that breaks the rules, to test frontends",
    license: "GPL",
}

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"vbd")]);

/// A device.
#[pin_data]
struct Back {
    device: ARef<xenbus::Device>,
    #[pin]
    connection: Mutex<Option<Connection>>,
}

impl Back {
    /// Connects to the ring that the frontend has published, unless it is connected.
    fn connect(&self, frontend: &CStr) -> Result {
        let mut connection = self.connection.lock();
        if connection.is_none() {
            *connection = Some(Connection::new(&self.device, frontend)?);
            describe_disk(&self.device)?;
            self.device.switch_state(XenbusState::Connected);
        }
        Ok(())
    }

    fn disconnect(&self) {
        *self.connection.lock() = None;
    }
}

/// Writes the properties of the disk to xenstore.
fn describe_disk(device: &xenbus::Device) -> Result {
    xenstore::transaction(|transaction| {
        let write = |node: &str, value: u64| {
            let dir = device.nodename();
            xenstore::write(transaction, dir, fmt!("{node}"), fmt!("{value}"))
        };
        write("sectors", SECTORS)?;
        write("sector-size", 512)?;
        write("info", 0)?;
        let offered = if back_params::BARRIER.get() {
            "feature-barrier"
        } else {
            "feature-flush-cache"
        };
        write(offered, 1)
    })
}

impl xenbus::Driver for Back {
    const ROLE: Role = Role::Backend;
    const NAME: &'static CStr = c"vbd-hostile";
    const ID_TABLE: IdTable = IDS.as_table();

    fn probe(dev: &xenbus::Device<Core<'_>>) -> impl PinInit<Self, Error> {
        let device: ARef<xenbus::Device> = dev.into();
        if !back_params::HOARD.get() {
            server::release_hoard();
        }
        let wanted = dev.handle() == Some(back_params::DEVICE.get());
        if wanted {
            dev.switch_state(XenbusState::InitWait);
        }
        try_pin_init!(Self {
            device: wanted.then_some(device).ok_or(ENODEV)?,
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
            XenbusState::Initialised | XenbusState::Connected => {
                let result = dev.otherend().and_then(|frontend| self.connect(frontend));
                if let Err(error) = result {
                    dev.dev_fatal(error, fmt!("connecting"));
                }
            }
            XenbusState::Closing | XenbusState::Closed | XenbusState::Unknown => {
                self.disconnect();
                if state == XenbusState::Closing {
                    dev.switch_state(XenbusState::Closing);
                } else {
                    dev.switch_state(XenbusState::Closed);
                    if !dev.is_online() || state == XenbusState::Unknown {
                        return DeviceAction::Unregister;
                    }
                }
            }
            XenbusState::Initialising if dev.state() == XenbusState::Closed => {
                dev.switch_state(XenbusState::InitWait);
            }
            XenbusState::Initialising
            | XenbusState::InitWait
            | XenbusState::Reconfiguring
            | XenbusState::Reconfigured => {}
        }
        DeviceAction::Keep
    }

    fn remove(self: Pin<&Self>, _dev: &xenbus::Device<Core<'_>>) {
        self.disconnect();
    }
}
