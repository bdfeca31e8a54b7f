// SPDX-License-Identifier: GPL-2.0-only

//! The engines for cluster storage pass the same suite as all others, with real daemons.

mod cost;
#[allow(dead_code)]
mod disk;
#[macro_use]
mod suite;
mod gluster;
mod machine;
mod rbd;
mod writer;
