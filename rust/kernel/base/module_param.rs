// SPDX-License-Identifier: GPL-2.0-only

//! Module parameters that are visible in sysfs.
//!
//! The `params` of [`kernel::prelude::module`] can be set at load time only, and are not visible in
//! `/sys/module/<module>/parameters/`. [`module_params`] creates the entries that the C macro
//! `module_param()` creates.
//!
//! C header: [`include/linux/moduleparam.h`](srctree/include/linux/moduleparam.h)

use core::{
    cell::UnsafeCell,
    ffi::CStr,
    ptr, //
};

use kernel::{
    bindings,
    ffi, //
};

/// A type that a module parameter can have.
///
/// # Safety
///
/// The functions of `OPS` take a pointer to `Self` as the parameter's argument, and write single
/// words that are valid values of `Self`.
pub unsafe trait ParamType: Copy + Send + Sync + 'static {
    #[doc(hidden)]
    const OPS: *const bindings::kernel_param_ops;
}

// SAFETY: `param_ops_uint` takes an `unsigned int *`, of which every value is valid.
unsafe impl ParamType for u32 {
    const OPS: *const bindings::kernel_param_ops = &raw const bindings::param_ops_uint;
}

// SAFETY: `param_ops_int` takes an `int *`, of which every value is valid.
unsafe impl ParamType for i32 {
    const OPS: *const bindings::kernel_param_ops = &raw const bindings::param_ops_int;
}

// SAFETY: `param_ops_bool` takes a `bool *` and writes 0 or 1.
unsafe impl ParamType for bool {
    const OPS: *const bindings::kernel_param_ops = &raw const bindings::param_ops_bool;
}

/// A module parameter, created by [`module_params`].
#[repr(transparent)]
pub struct Param<T: ParamType>(UnsafeCell<T>);

// SAFETY: All access is by single words: reads by `get`, writes by `set`, and by the promise of
// `ParamType` those of the kernel's parameter code.
unsafe impl<T: ParamType> Sync for Param<T> {}

impl<T: ParamType> Param<T> {
    /// Creates a parameter with its default.
    pub const fn new(default: T) -> Self {
        Self(UnsafeCell::new(default))
    }

    /// Returns the current value.
    ///
    /// A parameter that is writable in sysfs can change at any time.
    pub fn get(&self) -> T {
        // SAFETY: The pointer is valid. By the promise of `ParamType`, a write at the same time is
        // one of a word that is valid for `T`, and a volatile read of one word sees the old or the
        // new one.
        unsafe { ptr::read_volatile(self.0.get()) }
    }

    /// Replaces an invalid value, before it is used.
    pub fn set(&self, value: T) {
        // SAFETY: As in `get`: a write of one word that is valid for `T`.
        unsafe { ptr::write_volatile(self.0.get(), value) }
    }

    #[doc(hidden)]
    pub const fn as_ptr(&self) -> *mut kernel::ffi::c_void {
        self.0.get().cast()
    }
}

/// An entry of the section `__param`.
#[doc(hidden)]
#[repr(transparent)]
pub struct KernelParam(bindings::kernel_param);

// SAFETY: Entries are only read.
unsafe impl Sync for KernelParam {}

impl KernelParam {
    #[doc(hidden)]
    pub const fn new<T: ParamType>(
        name: &'static [u8],
        param: &'static Param<T>,
        perm: u16,
    ) -> Self {
        let value = bindings::kernel_param__bindgen_ty_1 {
            arg: param.as_ptr(),
        };
        Self::entry(name, T::OPS, perm, value)
    }

    /// Creates an entry for a list, which has no file in sysfs: only the module loader writes it.
    #[doc(hidden)]
    #[inline]
    pub const fn new_list(name: &'static [u8], list: &'static KernelParamList) -> Self {
        let value = bindings::kernel_param__bindgen_ty_1 {
            arr: &raw const list.0,
        };
        Self::entry(name, &raw const bindings::param_array_ops, 0, value)
    }

    // Only called while compiling; `inline` keeps it, and its assertion, out of the module.
    #[inline]
    const fn entry(
        name: &'static [u8],
        ops: *const bindings::kernel_param_ops,
        perm: u16,
        value: bindings::kernel_param__bindgen_ty_1,
    ) -> Self {
        assert!(
            CStr::from_bytes_with_nul(name).is_ok(),
            "the name of a parameter contains a NUL"
        );
        Self(bindings::kernel_param {
            name: name.as_ptr().cast(),
            mod_: super::this_module::this_module().as_ptr(),
            ops,
            perm,
            level: -1,
            flags: 0,
            __bindgen_anon_1: value,
        })
    }
}

/// A module parameter that is a list of at most `N` values, created by [`module_param_lists`].
///
/// # Invariants
///
/// Only the module loader writes it, before any code of the module runs. It sets the first `len`
/// values, and `len` is at most `N`.
#[repr(C)]
pub struct ParamList<T: ParamType, const N: usize> {
    len: UnsafeCell<ffi::c_uint>,
    values: UnsafeCell<[T; N]>,
}

// SAFETY: By the type invariant, nothing writes to it while code of the module can use it.
unsafe impl<T: ParamType, const N: usize> Sync for ParamList<T, N> {}

impl<T: ParamType, const N: usize> ParamList<T, N> {
    /// Creates a parameter that was not set.
    ///
    /// `filler` is not part of the list.
    pub const fn new(filler: T) -> Self {
        // INVARIANT: No value is set.
        Self {
            len: UnsafeCell::new(0),
            values: UnsafeCell::new([filler; N]),
        }
    }

    /// Returns the values that were given when the module was loaded.
    pub fn get(&self) -> &[T] {
        // SAFETY: By the type invariant, nothing writes to it any more; for both.
        let (len, values) = unsafe { (*self.len.get(), &*self.values.get()) };
        values.get(..len as usize).unwrap_or(values)
    }
}

/// The description of a [`ParamList`] for the module loader (`struct kparam_array`).
#[doc(hidden)]
#[repr(transparent)]
pub struct KernelParamList(bindings::kparam_array);

// SAFETY: It is only read.
unsafe impl Sync for KernelParamList {}

impl KernelParamList {
    #[doc(hidden)]
    pub const fn new<T: ParamType, const N: usize>(list: &'static ParamList<T, N>) -> Self {
        Self(bindings::kparam_array {
            max: N as ffi::c_uint,
            elemsize: core::mem::size_of::<T>() as ffi::c_uint,
            num: list.len.get(),
            ops: T::OPS,
            elem: list.values.get().cast(),
        })
    }
}

/// Declares module parameters as `module_param()` and `MODULE_PARM_DESC()` do.
///
/// Each becomes a static [`Param`]. The name and the mode of its file in sysfs are in parentheses;
/// with mode 0 there is no file. The types are `u32`, `i32` and `bool`.
///
/// ```ignore
/// module_params! {
///     /// Largest number of rings of a disk.
///     pub(crate) static MAX_QUEUES("max_queues", 0o444): u32 = 4,
///         "Maximum number of rings of a disk";
/// }
///
/// let queues = MAX_QUEUES.get();
/// ```
#[macro_export]
macro_rules! module_params {
    (@type u32) => { "uint" };
    (@type i32) => { "int" };
    (@type bool) => { "bool" };
    ($(
        $(#[$attr:meta])*
        $vis:vis static $ident:ident($name:literal, $perm:literal): $ty:ident = $default:expr,
            $desc:literal;
    )*) => {$(
        $(#[$attr])*
        $vis static $ident: $crate::base::module_param::Param<$ty> =
            $crate::base::module_param::Param::new($default);

        const _: () = {
            const NAME: &[u8] = concat!($name, "\0").as_bytes();

            #[link_section = "__param"]
            #[used]
            static ENTRY: $crate::base::module_param::KernelParam =
                $crate::base::module_param::KernelParam::new(NAME, &$ident, $perm);

            $crate::module_params!(@info $name, $crate::module_params!(@type $ty), $desc);
        };
    )*};
    (@info $name:literal, $type:expr, $desc:literal) => {
        const PARM: &[u8] = concat!("parm=", $name, ":", $desc, "\0").as_bytes();
        const PARM_TYPE: &[u8] = concat!("parmtype=", $name, ":", $type, "\0").as_bytes();

        #[link_section = ".modinfo"]
        #[used]
        static PARM_INFO: [u8; PARM.len()] = $crate::base::module_param::array(PARM);

        #[link_section = ".modinfo"]
        #[used]
        static PARM_TYPE_INFO: [u8; PARM_TYPE.len()] =
            $crate::base::module_param::array(PARM_TYPE);
    };
}
pub use module_params;

/// Declares module parameters that are lists, as `module_param_array()` does. They have no file in
/// sysfs.
///
/// Each becomes a static [`ParamList`]; the type and the largest number of its values are in
/// brackets.
///
/// ```ignore
/// module_param_lists! {
///     /// The numbers of the devices.
///     static DEVICES("devices"): [u32; 16] = 0, "Numbers of devices";
/// }
///
/// for number in DEVICES.get() {}
/// ```
#[macro_export]
macro_rules! module_param_lists {
    ($(
        $(#[$attr:meta])*
        $vis:vis static $ident:ident($name:literal): [$ty:ident; $max:expr] = $filler:expr,
            $desc:literal;
    )*) => {$(
        $(#[$attr])*
        $vis static $ident: $crate::base::module_param::ParamList<$ty, { $max }> =
            $crate::base::module_param::ParamList::new($filler);

        const _: () = {
            const NAME: &[u8] = concat!($name, "\0").as_bytes();

            static LIST: $crate::base::module_param::KernelParamList =
                $crate::base::module_param::KernelParamList::new(&$ident);

            #[link_section = "__param"]
            #[used]
            static ENTRY: $crate::base::module_param::KernelParam =
                $crate::base::module_param::KernelParam::new_list(NAME, &LIST);

            $crate::module_params!(
                @info $name, concat!("array of ", $crate::module_params!(@type $ty)), $desc
            );
        };
    )*};
}
pub use module_param_lists;

/// Returns the bytes as an array, for a section that consists of bytes.
#[doc(hidden)]
pub const fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    match bytes.first_chunk() {
        Some(array) => *array,
        // PANIC: While compiling, if at all: this is called for statics alone.
        None => panic!("shorter than declared"),
    }
}
