/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Headers that the stock `bindings` crate leaves out. One `#include <...>` a
 * line: bindgen.mk takes each of these files whole, and nothing that they
 * include.
 */
#include <asm/xen/events.h>
#include <linux/kthread.h>
#include <uapi/linux/hdreg.h>
#include <xen/interface/xen.h>
#include <xen/interface/grant_table.h>
#include <xen/interface/event_channel.h>
#include <xen/interface/io/xenbus.h>
#include <xen/interface/io/xs_wire.h>
#include <xen/events.h>
#include <xen/grant_table.h>
#include <xen/page.h>
#include <xen/platform_pci.h>
#include <xen/xen.h>
#include <xen/xenbus.h>
