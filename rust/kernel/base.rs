// SPDX-License-Identifier: GPL-2.0-only

//! What any driver may need and the stock `kernel` crate lacks.
//!
//! - [`cpu`]: the CPUs of the machine.
//! - [`global_mutex`]: mutexes in statics.
//! - [`blkcg`]: who the I/O of a thread counts for.
//! - [`spinlock_irqsave`]: a lock for data that an interrupt handler uses too.
//! - [`jiffies`]: the kernel's coarse clock.
//! - [`kthread`]: kernel threads that run a closure.
//! - [`module_param`]: module parameters that show in sysfs.
//! - [`module_ref`]: references to the module.
//! - [`noio`]: code that memory is freed by.
//! - [`page`]: bytes of pages that somebody else may change at any time.
//! - [`pages`]: owners of pages, made of other owners.
//! - [`ratelimit`]: messages that others can cause.
//! - [`shown`]: messages with values of crates that do not know the kernel.
//! - [`sysfs`]: read-only attributes of a device.
//! - [`this_module`]: the module that this crate is linked into.
//! - [`timer`]: calls at a later time.
//! - [`wait`]: wait queues.
//! - [`workqueue`]: work queues that end with their owner.

pub mod blkcg;
pub mod cpu;
pub mod fmt;
pub mod global_mutex;
pub mod jiffies;
pub mod kthread;
pub mod memalloc;
pub mod module_param;
pub mod module_ref;
pub mod page;
pub mod page_owner;
pub mod ratelimit;
pub mod spinlock_irqsave;
pub mod sysfs;
pub mod this_module;
pub mod timer;
pub mod wait;
pub mod workqueue;
