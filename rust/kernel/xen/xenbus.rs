// SPDX-License-Identifier: GPL-2.0-only

//! Xenbus: the bus of split drivers.
//!
//! Each side of a split device has a directory in xenstore, for which the kernel creates a device.
//! The *nodename* is the directory of this side, the *otherend* that of the other side, the
//! *otherend id* the domain of the other side. Each side writes a [`XenbusState`] to its directory,
//! and the bus calls the driver when the state of the other side changes.
//!
//! To implement a split driver, a module must do the following:
//!
//! - Implement [`Driver`] for the data of a device: its role, its table of device types, and the
//!   callbacks.
//! - Register it with an [`Adapter`].
//! - Read the nodes of the other side with a [`Reader`](super::xenstore::Reader), and write its own
//!   with the state in one transaction ([`Device::switch_state_with`]).
//! - Change its state in `otherend_changed`, and free shared resources in `remove`.
//!
//! The types with direct C counterparts are [`Device`] (`struct xenbus_device`), [`Driver`]
//! (`struct xenbus_driver`), [`DeviceId`] (`struct xenbus_device_id`) and [`XenbusState`]
//! (`enum xenbus_state`).
//!
//! [`Adapter`] registers the driver, by [`module_xenbus_driver`] or as part
//! of a module:
//!
//! ```ignore
//! #[pin_data]
//! struct MyModule {
//!     #[pin]
//!     driver: driver::Registration<xenbus::Adapter<MyDriver>>,
//! }
//!
//! impl kernel::InPlaceModule for MyModule {
//!     fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
//!         try_pin_init!(Self {
//!             driver <- driver::Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
//!         })
//!     }
//! }
//! ```
//!
//! A module that udev should load for a device has `alias: ["xen:vbd"]` (a frontend) or
//! `alias: ["xen-backend:vbd"]` in its `module!`.
//!
//! # Context
//!
//! `probe`, `remove`, `suspend` and `resume` run with the device locked. `otherend_changed` runs in
//! the `xenwatch` thread, never before `probe` has returned nor during or after `remove` or
//! `resume`. While it runs, no other device of this kernel is notified of changes.
//!
//! C header: [`include/xen/xenbus.h`](srctree/include/xen/xenbus.h)

use core::{
    marker::PhantomData,
    mem::offset_of,
    ptr::{
        addr_of,
        addr_of_mut,
        NonNull, //
    }, //
};

use kernel::{
    bindings,
    device,
    driver,
    error::{
        from_result,
        to_result, //
    },
    ffi,
    fmt,
    prelude::*,
    sync::{
        aref::{
            ARef,
            AlwaysRefCounted, //
        },
        atomic::{
            Acquire,
            Atomic,
            Release, //
        },
        Arc, //
    },
    time::msecs_to_jiffies,
    types::Opaque, //
};

use xen_io::node;

use crate::{
    base::{
        this_module::this_module,
        wait::WaitQueue, //
    },
    new_wait_queue, //
};

use super::{
    xenstore::{
        self,
        NodeError,
        Reader,
        Transaction,
        Watch,
        WatchHandler, //
    },
    DomId, //
};

pub use xen_io::xenbus::{
    UnknownState,
    XenbusState, //
};

/// Longest wait of [`unregister_device`] for the `xenwatch` thread.
const UNREGISTER_MS: u32 = 60_000;

/// Number of attempts of [`unregister`] to lock a device, which other code may lock briefly.
const LOCK_TRIES: usize = 50;
const LOCK_SLEEP_MS: u32 = 20;

/// The state of the other side: an error if the text in its node is not a state.
pub type OtherendState = Result<XenbusState, UnknownState>;

/// Reads the state in a directory.
///
/// A text that is not a number is not a state either.
fn read_state(transaction: &Transaction, dir: &CStr) -> Result<OtherendState> {
    match xenstore::read(transaction, dir, fmt!("state")) {
        Ok(value) => Ok(match node::decimal_u32("state", value.as_bytes()) {
            Ok(number) => XenbusState::try_from(number),
            Err(_) => Err(UnknownState),
        }),
        Err(error) if error == ENOENT => Ok(Ok(XenbusState::Unknown)),
        Err(error) => Err(error),
    }
}

/// Returns `true` if a side whose last state was `own` may replace `found` in its node by `state`.
///
/// Two states of another writer stay: Closing, after which the toolstack accepts only Closed, and
/// Initialising, for which the bus creates a new device. A directory that was removed is not
/// created again.
fn may_replace(state: XenbusState, found: XenbusState, own: XenbusState) -> bool {
    match found {
        XenbusState::Unknown => false,
        _ if found == own => true,
        XenbusState::Initialising => false,
        XenbusState::Closing => matches!(state, XenbusState::Closing | XenbusState::Closed),
        _ => true,
    }
}

/// The result of writing a state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Switched {
    /// The state is in xenstore.
    Written,
    /// Another state is in xenstore that must not be replaced. Nothing was written.
    Refused(XenbusState),
    /// Xenstore has failed. Nothing was written.
    Failed(Error),
}

/// A device of xenbus: this side of a split device.
///
/// A thread of a driver holds an `ARef<Device>`. All functions but [`Device::otherend`] can be used
/// with that; to write the state of a device that is no longer bound is a bug in the driver's
/// logic, without effect on memory safety.
///
/// # Invariants
///
/// A `Device` is a valid `struct xenbus_device` that the bus has created.
#[repr(transparent)]
pub struct Device<Ctx: device::DeviceContext = device::Normal>(
    Opaque<bindings_ext::xenbus_device>,
    PhantomData<Ctx>,
);

impl<Ctx: device::DeviceContext> Device<Ctx> {
    pub(crate) fn as_raw(&self) -> *mut bindings_ext::xenbus_device {
        self.0.get()
    }

    /// Returns the directory of this side, such as `device/vbd/51712` or `backend/vbd/1/51712`,
    /// below the home directory of this domain.
    pub fn nodename(&self) -> &CStr {
        // SAFETY: The bus sets the name before the device is visible to any other code, and frees
        // both together.
        unsafe { CStr::from_char_ptr((*self.as_raw()).nodename) }
    }

    /// Returns the number of the device among those of its type: the part of the nodename after the
    /// last `/`.
    ///
    /// Returns `None` if that is not a number.
    pub fn handle(&self) -> Option<u32> {
        let last = self
            .nodename()
            .to_bytes()
            .rsplit(|byte| *byte == b'/')
            .next()?;
        core::str::from_utf8(last).ok()?.parse().ok()
    }

    /// Returns the last state that this side has written.
    pub fn state(&self) -> XenbusState {
        // SAFETY: The device is valid by the type invariant; a number that may change meanwhile.
        let number = unsafe { addr_of!((*self.as_raw()).state).read_volatile() };
        XenbusState::try_from(number).unwrap_or(XenbusState::Unknown)
    }

    /// Returns the domain of the other side.
    pub fn otherend_id(&self) -> DomId {
        // SAFETY: The device is valid by the type invariant; a number that changes after a restore.
        let id = unsafe { addr_of!((*self.as_raw()).otherend_id).read_volatile() };
        DomId::from_raw(id as u16)
    }

    /// Writes the state of this side to xenstore, if it differs from the last one and may replace
    /// the one in xenstore (`xenbus_switch_state()`).
    ///
    /// `may_replace` tells which state may replace which. The caller logs an error of xenstore.
    ///
    /// A frontend switches to and from [`XenbusState::Initialising`] only in `otherend_changed`.
    /// The bus watches for that state in the same thread; if another thread switches it, the bus
    /// may find it in xenstore but not in the device. Then the bus takes the device for a new one,
    /// and replaces or loses it. So such a driver sets [`Driver::ALLOW_REBIND`], and closes in
    /// `remove` only from other states.
    ///
    /// Context: may sleep.
    pub fn switch_state(&self, state: XenbusState) -> Switched {
        if state == self.state() {
            return Switched::Written;
        }
        self.write_state(state, |_| Ok(()))
            .unwrap_or_else(Switched::Failed)
    }

    /// Writes the state of this side, like [`Self::switch_state`], in one transaction with the
    /// nodes that `body` writes.
    ///
    /// The state is written even if it has not changed, so that the other side reads the nodes
    /// again. Nothing is written if the state is refused, or if `body` fails. `body` may be called
    /// several times.
    ///
    /// Context: may sleep.
    pub fn switch_state_with(
        &self,
        state: XenbusState,
        body: impl FnMut(&Transaction) -> Result,
    ) -> Result<Switched> {
        self.write_state(state, body)
    }

    fn write_state(
        &self,
        state: XenbusState,
        mut body: impl FnMut(&Transaction) -> Result,
    ) -> Result<Switched> {
        let dir = self.nodename();
        let own = self.state();
        if self.has_vanished() {
            // The bus will create a new device for the directory.
            return Ok(Switched::Refused(XenbusState::Initialising));
        }
        let switched = xenstore::transaction(|transaction| {
            match read_state(transaction, dir)? {
                Ok(found) if !may_replace(state, found, own) => {
                    return Ok(Switched::Refused(found));
                }
                // The toolstack has written it. Writing it again would wake the other side.
                Ok(found) if found == state && found != own => return Ok(Switched::Written),
                Ok(_) | Err(UnknownState) => {}
            }
            body(transaction)?;
            let number = state.number();
            xenstore::write(transaction, dir, fmt!("state"), fmt!("{}", number))?;
            Ok(Switched::Written)
        })?;
        if switched == Switched::Written {
            self.set_state(state);
        }
        Ok(switched)
    }

    /// Calls a C function that reports errors by `xenbus_dev_fatal()`, without the state Closing
    /// that this would write: the caller decides about the error.
    pub(super) fn without_fatal<R>(&self, function: impl FnOnce() -> R) -> R {
        let own = self.state();
        self.set_state(XenbusState::Closing);
        let result = function();
        self.set_state(own);
        result
    }

    /// Records a state as the last one that this side has written.
    fn set_state(&self, state: XenbusState) {
        // SAFETY: The device is valid by the type invariant; a number, which C reads and writes
        // without a lock too.
        unsafe { addr_of_mut!((*self.as_raw()).state).write_volatile(state.number()) };
    }

    /// Returns the state in the directory `path`.
    ///
    /// It is unknown if there is no node or an empty one. Unlike in `xenbus_read_driver_state()`, a
    /// failed read is an error.
    ///
    /// Context: may sleep.
    pub fn read_driver_state(&self, path: &CStr) -> Result<OtherendState> {
        if self.has_vanished() {
            return Ok(Ok(XenbusState::Unknown));
        }
        let reader = Reader::new(path).ignore_empty();
        match reader.parse("state", node::decimal_u32) {
            Ok(Some(number)) => Ok(XenbusState::try_from(number)),
            Ok(None) => Ok(Ok(XenbusState::Unknown)),
            Err(NodeError::Invalid(_)) => Ok(Err(UnknownState)),
            Err(NodeError::Xenstore(error)) => Err(error),
        }
    }

    /// Returns `true` if the bus has found another device in the directory.
    fn has_vanished(&self) -> bool {
        // SAFETY: The device is valid by the type invariant; C reads it without a lock too.
        unsafe { addr_of!((*self.as_raw()).vanished).read_volatile() }
    }

    /// Returns `true` if the toolstack wants the device to stay when the frontend closes it: the
    /// node `online` of a backend (`xenbus_dev_is_online()`).
    ///
    /// Context: may sleep.
    pub fn is_online(&self) -> bool {
        // SAFETY: The device is valid by the type invariant.
        unsafe { bindings_ext::xenbus_dev_is_online(self.as_raw()) != 0 }
    }

    /// Switches a frontend to [`XenbusState::Closed`], for which a shutdown waits
    /// (`xenbus_frontend_closed()`).
    ///
    /// Context: may sleep.
    pub fn frontend_closed(&self) -> Switched {
        let switched = self.switch_state(XenbusState::Closed);
        // Always returns 0. It writes the current state again, if any.
        //
        // SAFETY: The device is valid by the type invariant.
        let _ = unsafe { bindings_ext::xenbus_frontend_closed(self.as_raw()) };
        switched
    }

    /// Logs an error and writes it to `error/<nodename>/error` in xenstore (`xenbus_dev_error()`).
    ///
    /// The text is cut after 4 KB. Limit the rate of errors that the other domain can cause.
    ///
    /// Context: may sleep.
    pub fn dev_error(&self, error: Error, message: fmt::Arguments<'_>) {
        // SAFETY: The device is valid by the type invariant; `%pA` takes a pointer to `Arguments`.
        unsafe {
            bindings_ext::xenbus_dev_error(
                self.as_raw(),
                error.to_errno(),
                c"%pA".as_char_ptr(),
                core::ptr::from_ref(&message).cast::<ffi::c_void>(),
            )
        };
    }

    /// Logs an error by [`Self::dev_error`], and switches to [`XenbusState::Closing`], as
    /// `xenbus_dev_fatal()` does.
    ///
    /// Context: may sleep.
    pub fn dev_fatal(&self, error: Error, message: fmt::Arguments<'_>) {
        self.dev_error(error, message);
        self.switch_state(XenbusState::Closing);
    }
}

impl Device<device::Core<'_>> {
    /// Returns the directory of the other side, as an absolute path.
    ///
    /// Fails with `ENOENT` if it could not be read after a restore.
    ///
    /// A restore changes the path; so copy it if it is needed outside of callbacks, and again in
    /// `resume`.
    pub fn otherend(&self) -> Result<&CStr> {
        // SAFETY: The device is valid by the type invariant. The path is replaced before `resume`
        // is called and freed after `remove`, and neither happens while a callback runs.
        let path = unsafe { (*self.as_raw()).otherend };
        if path.is_null() {
            return Err(ENOENT);
        }
        // SAFETY: A zero-terminated string, valid as said above.
        Ok(unsafe { CStr::from_char_ptr(path) })
    }
}

// SAFETY: `Device` is a transparent wrapper of `struct xenbus_device`, and the offset is that of
// its `struct device`.
unsafe impl<Ctx: device::DeviceContext> device::AsBusDevice<Ctx> for Device<Ctx> {
    const OFFSET: usize = offset_of!(bindings_ext::xenbus_device, dev);
}

// SAFETY: `Device` is a transparent wrapper of a type that does not depend on the context.
kernel::impl_device_context_deref!(unsafe { Device });
kernel::impl_device_context_into_aref!(Device);

// SAFETY: Devices are always reference-counted.
unsafe impl AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        // SAFETY: A shared reference means that the count is not zero.
        unsafe { bindings::get_device(addr_of_mut!((*self.as_raw()).dev)) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        let device = obj.cast::<bindings_ext::xenbus_device>().as_ptr();
        // SAFETY: By the requirements of this function the count is not zero.
        unsafe { bindings::put_device(addr_of_mut!((*device).dev)) };
    }
}

impl<Ctx: device::DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: The device is valid by the type invariant, and so is the one in it.
        unsafe { device::Device::from_raw(addr_of_mut!((*self.as_raw()).dev)) }
    }
}

// SAFETY: A device may be released from any thread.
unsafe impl Send for Device {}

// SAFETY: All methods of `Device<Normal>` may be called from several threads.
unsafe impl Sync for Device {}

// SAFETY: As above; the two differ in nothing.
unsafe impl Sync for Device<device::Bound> {}

/// A type of device that a driver supports.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct DeviceId(bindings_ext::xenbus_device_id);

impl DeviceId {
    /// Creates the id of a type of device such as `vbd`, which has at most 31 characters.
    pub const fn new(devicetype: &'static CStr) -> Self {
        let bytes = devicetype.to_bytes_with_nul();
        let mut id = bindings_ext::xenbus_device_id {
            devicetype: [0; 32],
        };
        let mut index = 0;
        while index < bytes.len() {
            id.devicetype[index] = bytes[index];
            index += 1;
        }
        Self(id)
    }
}

/// A table of `N` types of devices, with an empty last entry.
#[repr(C)]
pub struct IdArray<const N: usize> {
    ids: [DeviceId; N],
    end: DeviceId,
}

impl<const N: usize> IdArray<N> {
    /// Creates a table of these types.
    pub const fn new(ids: [DeviceId; N]) -> Self {
        Self {
            ids,
            end: DeviceId::new(c""),
        }
    }

    /// Returns the table for [`Driver::ID_TABLE`].
    pub const fn as_table(&'static self) -> IdTable {
        // INVARIANT: The end follows the others.
        IdTable(core::ptr::from_ref(self).cast())
    }
}

/// The types of devices of a driver.
///
/// # Invariants
///
/// Points to a `'static` table whose last entry is empty.
#[derive(Clone, Copy)]
pub struct IdTable(*const bindings_ext::xenbus_device_id);

/// The side of a device that a driver is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The driver of devices that another domain serves: bus `xen`.
    Frontend,
    /// The driver of devices that this domain serves: bus `xen-backend`.
    Backend,
}

/// The action for a device after [`Driver::otherend_changed`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum DeviceAction {
    /// The device stays.
    Keep,
    /// The device is unbound from the driver and unregistered from the bus. For a backend whose
    /// device will not be used again.
    Unregister,
}

/// A driver of one side of a split device.
///
/// The implementing type is the private data of a bound device: created by [`Driver::probe`],
/// passed to the other callbacks, and dropped when the device is unbound, after [`Driver::remove`].
pub trait Driver: Send + Sync + Sized + 'static {
    /// Frontend or backend.
    const ROLE: Role;

    /// The name in sysfs, such as `vbd`.
    const NAME: &'static CStr;

    /// The types of devices.
    const ID_TABLE: IdTable;

    /// `true` if the device can be bound again, so that unbinding it does not set the state to
    /// Closed.
    const ALLOW_REBIND: bool = false;

    /// `true` if the boot of a domain need not wait for such a frontend.
    const NOT_ESSENTIAL: bool = false;

    /// Called when a device was found.
    ///
    /// The other side may be in any state; [`Driver::otherend_changed`] is called with that state
    /// soon after this has returned.
    fn probe(dev: &Device<device::Core<'_>>) -> impl PinInit<Self, Error>;

    /// Called when the state of the other side may have changed.
    ///
    /// It may be called again with the same state, and states may be missed.
    fn otherend_changed(
        self: Pin<&Self>,
        dev: &Device<device::Core<'_>>,
        state: OtherendState,
    ) -> DeviceAction;

    /// Called when the device is unbound from the driver or removed.
    ///
    /// It must not wait for the other domain without a deadline. Cleanup that needs no device
    /// belongs in `Drop`.
    fn remove(self: Pin<&Self>, dev: &Device<device::Core<'_>>) {
        let _ = dev;
    }

    /// Called when the domain is about to be saved.
    fn suspend(self: Pin<&Self>, dev: &Device<device::Core<'_>>) -> Result {
        let _ = dev;
        Ok(())
    }

    /// Called when the domain was restored, possibly on another host.
    ///
    /// The other side is a new one, event channels are closed and no grant is mapped.
    fn resume(self: Pin<&Self>, dev: &Device<device::Core<'_>>) -> Result {
        let _ = dev;
        Ok(())
    }

    /// Called when memory is short, to free memory that is not needed.
    ///
    /// Only for backends.
    ///
    /// Context: any allocation may call this, with any lock held. It must not wait for a lock, and
    /// not allocate.
    fn reclaim_memory(self: Pin<&Self>) {}

    /// Returns `true` if a frontend that is Connected can be used.
    ///
    /// Boot waits for that, for up to 5 minutes.
    fn is_ready(self: Pin<&Self>) -> bool {
        true
    }
}

/// An adapter that registers a [`Driver`], by `kernel::driver::Registration<Adapter<T>>`.
///
/// Registering fails with `ENODEV` outside of Xen, and with `EBUSY` and a message if there is a
/// driver of the same name. Registering a frontend driver waits up to 5 minutes until the existing
/// devices are connected.
pub struct Adapter<T: Driver>(T);

// SAFETY:
// - `xenbus_driver` is `repr(C)`.
// - `T` is the type of the private data.
// - `xenbus_driver` embeds a `struct device_driver` at that offset.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = bindings_ext::xenbus_driver;
    type DriverData<'bound> = T;
    const DEVICE_DRIVER_OFFSET: usize = offset_of!(Self::DriverType, driver);
}

// SAFETY: `unregister` is valid after a `register` that succeeded.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        reg: &Opaque<Self::DriverType>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        if !super::is_xen_domain() {
            return Err(ENODEV);
        }
        // SAFETY: As the caller promises, the driver is valid; no other code uses it before it is
        // registered.
        unsafe {
            let driver = reg.get();
            (*driver).name = T::NAME.as_char_ptr();
            (*driver).ids = T::ID_TABLE.0;
            (*driver).allow_rebind = T::ALLOW_REBIND;
            (*driver).not_essential = T::NOT_ESSENTIAL;
            (*driver).probe = Some(Self::probe);
            (*driver).otherend_changed = Some(Self::otherend_changed);
            (*driver).remove = Some(Self::remove);
            (*driver).suspend = Some(Self::suspend);
            (*driver).resume = Some(Self::resume);
            (*driver).is_ready = Some(Self::is_ready);
            (*driver).reclaim_memory = Some(Self::reclaim_memory);
        }
        let register = match T::ROLE {
            Role::Frontend => bindings_ext::__xenbus_register_frontend,
            Role::Backend => bindings_ext::__xenbus_register_backend,
        };
        let registered =
            // SAFETY: The driver is filled in. As the caller promises, it is pinned until it is
            // unregistered.
            to_result(unsafe { register(reg.get(), module.as_ptr(), name.as_char_ptr()) });
        if registered == Err(EBUSY) {
            pr_err!(
                "{}: another module has the driver \"{}\": unload that one first\n",
                name,
                T::NAME
            );
        }
        registered
    }

    unsafe fn unregister(reg: &Opaque<Self::DriverType>) {
        // SAFETY: By the requirements of this function.
        unsafe { bindings_ext::xenbus_unregister_driver(reg.get()) };
        // `otherend_changed` may have unregistered the last device and not have returned yet.
        xenstore::synchronize();
    }
}

impl<T: Driver> Adapter<T> {
    /// Returns the device, and its private data.
    ///
    /// # Safety
    ///
    /// `device` is bound to this driver, `probe` has succeeded, and the device is not unbound
    /// during `'a`.
    unsafe fn bound<'a>(
        device: *mut bindings_ext::xenbus_device,
    ) -> (&'a Device<device::CoreInternal<'a>>, Pin<&'a T>) {
        // SAFETY: By the requirements of this function; the layout is transparent.
        let device = unsafe { &*device.cast::<Device<device::CoreInternal<'a>>>() };
        // SAFETY: By the requirements of this function, `probe` has stored a `T`, which stays until
        // the device is unbound.
        let data = unsafe { AsRef::<device::Device<_>>::as_ref(device).drvdata_borrow::<T>() };
        (device, data)
    }

    /// # Safety
    ///
    /// For xenbus: `device` is valid and locked, and is being bound to this driver.
    unsafe extern "C" fn probe(
        device: *mut bindings_ext::xenbus_device,
        _id: *const bindings_ext::xenbus_device_id,
    ) -> ffi::c_int {
        // SAFETY: By the requirements of this function; the layout is transparent.
        let device = unsafe { &*device.cast::<Device<device::CoreInternal<'_>>>() };
        from_result(|| {
            let data = T::probe(device);
            AsRef::<device::Device<_>>::as_ref(device).set_drvdata(data)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// For xenbus, in its thread, from a watch that it registers after `probe` has succeeded for
    /// `device`, and unregisters before `remove`.
    unsafe extern "C" fn otherend_changed(
        device: *mut bindings_ext::xenbus_device,
        state: bindings_ext::xenbus_state,
    ) {
        let after = {
            // SAFETY: By the requirements of this function; the code that unregisters the watch
            // waits for it.
            let (device, data) = unsafe { Self::bound(device) };
            T::otherend_changed(data, device, XenbusState::try_from(state))
        };
        if after == DeviceAction::Unregister {
            // SAFETY: By the requirements of this function this is the `xenwatch` thread, and the
            // device is registered: code that unregisters it waits for this function, in all
            // threads but this one. The references from above no longer exist.
            unsafe { unregister(addr_of_mut!((*device).dev)) };
        }
    }

    /// # Safety
    ///
    /// For xenbus: `probe` has succeeded for `device`, which is unbound after this.
    unsafe extern "C" fn remove(device: *mut bindings_ext::xenbus_device) {
        // SAFETY: By the requirements of this function.
        let (device, data) = unsafe { Self::bound(device) };
        T::remove(data, device);
    }

    /// # Safety
    ///
    /// For xenbus: `device` is valid and locked, and if it is bound, then to this driver.
    unsafe extern "C" fn suspend(device: *mut bindings_ext::xenbus_device) -> ffi::c_int {
        // SAFETY: By the requirements of this function.
        unsafe { Self::with_data(device, |data, device| T::suspend(data, device)) }
    }

    /// # Safety
    ///
    /// As for `suspend`.
    unsafe extern "C" fn resume(device: *mut bindings_ext::xenbus_device) -> ffi::c_int {
        // SAFETY: As in `suspend`.
        unsafe { Self::with_data(device, |data, device| T::resume(data, device)) }
    }

    /// Calls `callback` if the device is bound.
    ///
    /// # Safety
    ///
    /// `device` is valid and locked, and if it is bound, then to this driver.
    unsafe fn with_data(
        device: *mut bindings_ext::xenbus_device,
        callback: impl FnOnce(Pin<&T>, &Device<device::Core<'_>>) -> Result,
    ) -> ffi::c_int {
        // SAFETY: The device is valid.
        if unsafe { bindings::dev_get_drvdata(addr_of_mut!((*device).dev)) }.is_null() {
            return 0;
        }
        // SAFETY: By the requirements of this function. A driver's device has private data from the
        // end of `probe` until after `remove`, all under the lock of the device.
        let (device, data) = unsafe { Self::bound(device) };
        from_result(|| callback(data, device).map(|()| 0))
    }

    /// # Safety
    ///
    /// For xenbus: `device` is valid.
    unsafe extern "C" fn reclaim_memory(device: *mut bindings_ext::xenbus_device) {
        // SAFETY: By the requirements of this function.
        let dev = unsafe { addr_of_mut!((*device).dev) };
        // While the device is probed or unbound, it has little memory to free; the caller may even
        // hold the lock.
        //
        // SAFETY: The device is valid.
        if unsafe { bindings_ext::device_trylock(dev) } == 0 {
            return;
        }
        // SAFETY: The device is locked, and bound to this driver if it is the driver of that name.
        unsafe {
            if is_bound_to(dev, T::NAME) {
                Self::with_data(device, |data, _| {
                    T::reclaim_memory(data);
                    Ok(())
                });
            }
        }
        // SAFETY: Locked above.
        unsafe { bindings_ext::device_unlock(dev) };
    }

    /// # Safety
    ///
    /// For xenbus: `device` is valid, and not locked by the caller.
    unsafe extern "C" fn is_ready(device: *mut bindings_ext::xenbus_device) -> ffi::c_int {
        // SAFETY: By the requirements of this function.
        let dev = unsafe { addr_of_mut!((*device).dev) };
        // The bus calls this without a lock; locking keeps the device bound meanwhile.
        //
        // SAFETY: By the requirements of this function.
        unsafe { bindings_ext::device_lock(dev) };
        let mut ready = false;
        // SAFETY: The device is locked, and bound to this driver if it is the driver of that name.
        unsafe {
            if is_bound_to(dev, T::NAME) {
                Self::with_data(device, |data, _| {
                    ready = T::is_ready(data);
                    Ok(())
                });
            }
        }
        // SAFETY: Locked above.
        unsafe { bindings_ext::device_unlock(dev) };
        ready.into()
    }
}

/// Unregisters a device, unless it is being unbound.
///
/// The thread that unbinds it holds its lock, and waits for the `xenwatch` thread to return from
/// `otherend_changed`. Waiting for that lock here would be a deadlock, which would stop all other
/// devices too. A device that is unbound is unregistered when the toolstack removes its directory.
///
/// # Safety
///
/// The caller is the `xenwatch` thread, and the device is registered.
unsafe fn unregister(dev: *mut bindings::device) {
    for _ in 0..LOCK_TRIES {
        // SAFETY: The device is valid.
        if unsafe { bindings_ext::device_trylock(dev) } != 0 {
            // SAFETY: Locked just above.
            unsafe { bindings_ext::device_unlock(dev) };
            // SAFETY: By the requirements of this function.
            return unsafe { bindings::device_unregister(dev) };
        }
        // SAFETY: Just sleeps.
        unsafe { bindings::msleep(LOCK_SLEEP_MS) };
    }
}

/// Makes the `xenwatch` thread unregister a device from the bus, as [`DeviceAction::Unregister`]
/// does, and waits for that.
///
/// Does nothing if the device is no longer registered. If the thread is busy for 60 seconds, the
/// device is not unregistered: fails with `ETIMEDOUT` when the callback that the thread runs has
/// returned.
///
/// Context: sleeps; any thread but the `xenwatch` thread.
///
/// The caller need not hold a reference to the module if the module's exit waits for it.
pub fn unregister_device(device: &Device) -> Result {
    let request = Arc::pin_init(
        pin_init!(Unregister {
            device: device.into(),
            done: Atomic::new(false),
            wait <- new_wait_queue!(),
        }),
        GFP_KERNEL,
    )?;
    // A new watch is called at once, in the `xenwatch` thread. The node does not matter.
    let watch = Watch::register(c"domid", fmt!(""), request.clone(), None)?;
    let timeout = msecs_to_jiffies(UNREGISTER_MS);
    let done = request
        .wait
        .wait_timeout(timeout, || request.done.load(Acquire));
    drop(watch);
    done.then_some(()).ok_or(ETIMEDOUT)
}

/// A request to the `xenwatch` thread to unregister a device.
#[pin_data]
struct Unregister {
    device: ARef<Device>,
    done: Atomic<bool>,
    #[pin]
    wait: WaitQueue,
}

impl WatchHandler for Unregister {
    fn changed(&self) {
        if self.done.load(Acquire) {
            return;
        }
        // SAFETY: The device is valid by its type invariant.
        let dev = unsafe { addr_of_mut!((*self.device.as_raw()).dev) };
        // SAFETY: As above.
        if unsafe { bindings_ext::device_is_registered(dev) } {
            // SAFETY: This is the `xenwatch` thread, the only one that unregisters devices, and
            // this one is registered.
            unsafe { unregister(dev) };
        }
        self.done.store(true, Release);
        self.wait.wake_up();
    }
}

/// Returns `true` if a device is bound to the driver of this module with that name, which is unique
/// on its bus.
///
/// # Safety
///
/// The device is valid and locked.
unsafe fn is_bound_to(dev: *const bindings::device, name: &CStr) -> bool {
    // SAFETY: By the requirements of this function, `driver` is null or valid.
    let Some(driver) = (unsafe { (*dev).driver.as_ref() }) else {
        return false;
    };
    // SAFETY: A driver that is registered has a name.
    let same_name = unsafe { CStr::from_char_ptr(driver.name) } == name;
    same_name && core::ptr::eq(driver.owner, this_module().as_ptr())
}

/// Declares a module with one driver of xenbus and nothing else.
///
/// ```ignore
/// kernel_ext::module_xenbus_driver! {
///     type: MyDriver,
///     name: "my_driver",
///     authors: ["..."],
///     description: "...",
///     license: "GPL",
///     alias: ["xen:vbd"],
/// }
/// ```
#[macro_export]
macro_rules! module_xenbus_driver {
    ($($f:tt)*) => {
        ::kernel::module_driver!(<T>, $crate::xen::xenbus::Adapter<T>, { $($f)* });
    };
}
