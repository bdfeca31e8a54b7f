// SPDX-License-Identifier: GPL-2.0
/*
 * C functions around what Rust cannot call: inline functions and macros of
 * kernel headers. One file for each header, as in rust/helpers/ of the kernel.
 * No logic lives here.
 */

#include "grant_table.c"
