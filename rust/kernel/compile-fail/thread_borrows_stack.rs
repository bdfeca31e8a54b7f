// SPDX-License-Identifier: GPL-2.0-only
// error: E0597

//! A thread may run for longer than the function that starts it, so it cannot borrow from that
//! function.

use kernel::{
    fmt,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

use kernel_ext::base::kthread::{
    KThread,
    KThreadOptions, //
};

fn misuse() -> Result<KThread> {
    let number = Atomic::new(0i32);
    let borrowed = &number;
    KThread::spawn(fmt!("misuse"), KThreadOptions::default(), move |_thread| {
        borrowed.store(1, Relaxed)
    })
}
