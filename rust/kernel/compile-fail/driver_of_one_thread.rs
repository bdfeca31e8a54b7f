// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! The data of a device is used by the thread that binds it and by the `xenwatch` thread.

use core::cell::Cell;

use kernel::{
    device::Core,
    prelude::*, //
};

use kernel_ext::xen::xenbus::*;

static IDS: IdArray<1> = IdArray::new([DeviceId::new(c"vbd")]);

struct Misuse(Cell<u32>);

impl Driver for Misuse {
    const ROLE: Role = Role::Frontend;
    const NAME: &'static CStr = c"misuse";
    const ID_TABLE: IdTable = IDS.as_table();

    fn probe(_: &Device<Core<'_>>) -> impl PinInit<Self, Error> {
        Ok(Misuse(Cell::new(0)))
    }

    fn otherend_changed(self: Pin<&Self>, _: &Device<Core<'_>>, _: OtherendState) -> DeviceAction {
        self.0.set(1);
        DeviceAction::Keep
    }
}
