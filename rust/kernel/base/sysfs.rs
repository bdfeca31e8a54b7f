// SPDX-License-Identifier: GPL-2.0-only

//! Read-only sysfs attributes of a device.
//!
//! A driver has a table of attributes, each with a name and a function that writes the value. It
//! registers the table for a device, with the data that the functions read. The kernel removes the
//! files when the driver is unbound from the device.
//!
//! C header: [`include/linux/sysfs.h`](srctree/include/linux/sysfs.h)

use core::{
    fmt::Write,
    ptr::NonNull, //
};

use kernel::{
    bindings,
    device::{
        Bound,
        Device, //
    },
    devres,
    error::to_result,
    ffi,
    fmt,
    prelude::*,
    sync::{
        aref::ARef,
        Arc, //
    },
    types::Opaque, //
};

use super::module_ref::ModuleRef;

/// An attribute, which is one file.
pub struct Attribute<T: 'static> {
    /// Name of the file.
    pub name: &'static CStr,
    /// Writes the content of the file. If it fails, the reader gets `EIO`.
    ///
    /// Context: may sleep.
    pub show: fn(&T, &mut Output<'_>) -> fmt::Result,
}

/// The output of a file: at most a page. A write that does not fit is an error.
pub struct Output<'a> {
    page: &'a mut [u8],
    used: usize,
}

impl Write for Output<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.used.checked_add(text.len()).ok_or(fmt::Error)?;
        let place = self.page.get_mut(self.used..end).ok_or(fmt::Error)?;
        place.copy_from_slice(text.as_bytes());
        self.used = end;
        Ok(())
    }
}

/// Creates the files of `attributes` in the device's directory, or in a directory `name` in it.
///
/// They show `data`, and exist until the device is unbound.
pub fn register<T: Send + Sync>(
    device: &Device<Bound>,
    name: Option<&'static CStr>,
    attributes: &'static [Attribute<T>],
    data: Arc<T>,
) -> Result {
    let group = Group::new(device, name, attributes, data)?;
    devres::register(device, group, GFP_KERNEL)
}

/// The entry of a file in the kernel.
///
/// # Invariants
///
/// `attribute` is initialised and part of an `Entry<T>`. `data` is valid while the file exists.
#[repr(C)]
struct Entry<T: 'static> {
    attribute: Opaque<bindings::device_attribute>,
    show: fn(&T, &mut Output<'_>) -> fmt::Result,
    data: NonNull<T>,
}

/// Files that exist until this is dropped.
///
/// # Invariants
///
/// - `group` is registered for `device`, which is bound.
/// - It points to `entries` and `pointers`, which do not change.
/// - The entries' `data` points to the data that `_data` owns.
struct Group<T: Send + Sync + 'static> {
    device: ARef<Device>,
    group: KBox<Opaque<bindings::attribute_group>>,
    _pointers: KVec<*mut bindings::attribute>,
    _entries: KVec<Entry<T>>,
    _data: Arc<T>,
    _module: ModuleRef,
}

// SAFETY: The pointers are to memory that the group owns; `T` may be used and dropped by any
// thread.
unsafe impl<T: Send + Sync> Send for Group<T> {}

impl<T: Send + Sync> Group<T> {
    fn new(
        device: &Device<Bound>,
        name: Option<&'static CStr>,
        attributes: &'static [Attribute<T>],
        data: Arc<T>,
    ) -> Result<Self> {
        let module = ModuleRef::new()?;
        let mut entries = KVec::with_capacity(attributes.len(), GFP_KERNEL)?;
        let mut pointers = KVec::with_capacity(attributes.len() + 1, GFP_KERNEL)?;
        for Attribute { name, show } in attributes {
            // INVARIANT: Initialised below; `Group` keeps the data.
            let entry = Entry {
                attribute: Opaque::zeroed(),
                show: *show,
                data: NonNull::from(&*data),
            };
            entries.push(entry, GFP_KERNEL)?;
            let entry: &Entry<T> = entries.last().ok_or(EINVAL)?;
            let attribute = entry.attribute.get();
            // SAFETY: `attribute` is zeroed memory that stays in place: the vector has the capacity
            // for all entries from the start. The name is `'static`.
            unsafe {
                bindings_ext::device_attribute_init(
                    attribute,
                    name.as_char_ptr(),
                    0o444,
                    Some(show_entry::<T>),
                )
            };
            // SAFETY: The pointer is valid, see above.
            pointers.push(unsafe { &raw mut (*attribute).attr }, GFP_KERNEL)?;
        }
        pointers.push(core::ptr::null_mut(), GFP_KERNEL)?;

        let group = KBox::new(Opaque::<bindings::attribute_group>::zeroed(), GFP_KERNEL)?;
        let name = name.map_or(core::ptr::null(), |name| name.as_char_ptr());
        // SAFETY: `group` is zeroed memory; `pointers` ends with a null.
        unsafe { bindings_ext::attribute_group_init(group.get(), name, pointers.as_mut_ptr()) };
        // SAFETY: The device is bound, so its kobject is in sysfs. The group is initialised, and it
        // and all that it points to stay in place until it is removed.
        to_result(unsafe { bindings::sysfs_create_group(kobject(device), group.get()) })?;
        // INVARIANT: Registered just now.
        Ok(Self {
            device: device.into(),
            group,
            _pointers: pointers,
            _entries: entries,
            _data: data,
            _module: module,
        })
    }
}

impl<T: Send + Sync> Drop for Group<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, the group is registered for this device. The function
        // waits for readers that are in a show function.
        unsafe { bindings::sysfs_remove_group(kobject(&self.device), self.group.get()) };
    }
}

/// Returns the kobject of a device.
fn kobject<Ctx: kernel::device::DeviceContext>(device: &Device<Ctx>) -> *mut bindings::kobject {
    let device: *const Device<Ctx> = device;
    // `Device` is a transparent wrapper of `struct device`.
    let device = device.cast_mut().cast::<bindings::device>();
    // SAFETY: The pointer comes from a reference.
    unsafe { &raw mut (*device).kobj }
}

/// # Safety
///
/// `attribute` is that of an [`Entry<T>`] of a registered group, `page` has `PAGE_SIZE` bytes.
unsafe extern "C" fn show_entry<T: Send + Sync + 'static>(
    _device: *mut bindings::device,
    attribute: *mut bindings::device_attribute,
    page: *mut ffi::c_char,
) -> isize {
    let attribute = Opaque::cast_from(attribute);
    // SAFETY: By the requirements of this function, and the group stays until we return.
    let entry = unsafe { &*kernel::container_of!(attribute, Entry<T>, attribute) };
    // SAFETY: By the invariant of `Entry`.
    let data = unsafe { entry.data.as_ref() };
    // SAFETY: By the requirements of this function. sysfs passes a page of zeroes, which has
    // no other user meanwhile.
    let page = unsafe { core::slice::from_raw_parts_mut(page.cast(), bindings::PAGE_SIZE) };
    let mut output = Output { page, used: 0 };
    match (entry.show)(data, &mut output) {
        Ok(()) => output.used as isize,
        Err(fmt::Error) => EIO.to_errno() as isize,
    }
}
