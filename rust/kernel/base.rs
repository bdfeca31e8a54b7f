// SPDX-License-Identifier: GPL-2.0-only

//! Abstractions for any driver that the stock `kernel` crate lacks.
//!
//! - [`cpu`]: the CPUs of the machine.
//! - [`global_mutex`]: mutexes in statics.
//! - [`blkcg`]: the cgroup and priority of a thread's I/O.
//! - [`spinlock_irqsave`]: a lock for data that an interrupt handler uses too.
//! - [`jiffies`]: the kernel's coarse clock.
//! - [`kthread`]: kernel threads that run a closure.
//! - [`module_param`]: module parameters that are visible in sysfs.
//! - [`module_ref`]: references to the module.
//! - [`memalloc`]: scopes in which allocations start no I/O.
//! - [`page`]: bytes of pages that may change at any time.
//! - [`page_owner`]: owners of pages that consist of other owners.
//! - [`ratelimit`]: rate limits of messages.
//! - [`fmt`](mod@fmt): formatting of values of crates that do not use the kernel.
//! - [`sysfs`]: read-only attributes of a device.
//! - [`this_module`]: the module that this crate is linked into.
//! - [`timer`]: timers of the kernel.
//! - [`wait`]: wait queues.
//! - [`workqueue`]: workqueues that end with their owner.

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
