// SPDX-License-Identifier: GPL-2.0-only

//! C names that the stock `bindings` crate lacks.
//!
//! This crate is part of layer 1. bindgen generates it: `headers` from the kernel headers that
//! `headers.h` lists, `helpers` from the C functions in `rust/helpers/`. Names that
//! `kernel::bindings` has too are taken from there, so that the types are the same.
//!
//! Only `kernel_ext` uses this crate.

#![allow(
    clippy::all,
    clippy::as_underscore,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]
#![cfg_attr(not(CONFIG_RUSTC_HAS_UNNECESSARY_TRANSMUTES), allow(unknown_lints))]
#![allow(unnecessary_transmutes)]

mod headers {
    use pin_init::MaybeZeroable;

    use kernel::{
        bindings::*,
        ffi, //
    };

    include!(concat!(env!("RBLKIF_BINDINGS"), "/headers_generated.rs"));
}

mod helpers {
    #[allow(unused_imports)]
    use super::headers::*;
    use kernel::{
        bindings::*,
        ffi, //
    };

    include!(concat!(env!("RBLKIF_BINDINGS"), "/helpers_generated.rs"));
}

pub use headers::*;

pub use helpers::*;
