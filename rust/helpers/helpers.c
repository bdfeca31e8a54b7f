// SPDX-License-Identifier: GPL-2.0-only
/*
 * C functions around what Rust cannot call: inline functions and macros of
 * kernel headers. One file for each header, as in rust/helpers/ of the kernel.
 * No logic lives here.
 */

#include "barrier.c"
#include "bio.c"
#include "blk.c"
#include "blkdev.c"
#include "cgroup.c"
#include "cpumask.c"
#include "device.c"
#include "event_channel.c"
#include "grant_table.c"
#include "highmem.c"
#include "irq.c"
#include "ring.c"
#include "sched.c"
#include "spinlock.c"
#include "sysfs.c"
#include "xen.c"
