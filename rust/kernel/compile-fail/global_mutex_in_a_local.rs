// SPDX-License-Identifier: GPL-2.0-only
// error: E0597

//! A mutex that is initialised in place must be a static.

use kernel_ext::base::global_mutex::GlobalMutex;

fn misuse() -> u32 {
    let mutex = GlobalMutex::new(0);
    let number = *mutex.lock();
    number
}
