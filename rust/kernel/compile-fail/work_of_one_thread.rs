// SPDX-License-Identifier: GPL-2.0-only
// error: E0277

//! A work item must be `Send` and `Sync`.

use core::cell::Cell;

use kernel::{
    prelude::*,
    sync::Arc,
    workqueue::{
        impl_has_work,
        Work,
        WorkItem, //
    }, //
};

use kernel_ext::base::workqueue::OwnedQueue;

#[pin_data]
struct Misuse {
    number: Cell<u32>,
    #[pin]
    work: Work<Misuse>,
}

impl_has_work! {
    impl HasWork<Self> for Misuse { self.work }
}

impl WorkItem for Misuse {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.number.set(1);
    }
}

fn misuse(queue: &OwnedQueue, work: Arc<Misuse>) {
    let _ = queue.enqueue(work);
}
