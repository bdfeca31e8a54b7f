// SPDX-License-Identifier: GPL-2.0-only

//! Every engine passes the same suite; what is special about one has tests of its own.

#[macro_use]
mod suite;
mod disk;
mod export;
mod malformed;
mod memory;
mod nbd;
mod qsd;
mod raw;
mod server;
mod vhd;
