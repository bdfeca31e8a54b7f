// SPDX-License-Identifier: GPL-2.0-only

//! The Xen block protocol, without kernel code.
//!
//! All decisions about a Xen virtual block device that need no kernel are made here: the layout and
//! the checks of requests, the division of block requests into slots, the negotiation of features,
//! and the reactions to changes of the peer's state. The crate allocates nothing, takes no
//! lock, reads no clock and does no I/O, so all of it can be tested on the build machine in
//! milliseconds. Both drivers and `rblktap` use it.
//!
//! `Documentation/terminology.rst` defines the terms. A *word* has 32 bits, little endian. All
//! structures of the protocol consist of whole words.
//!
//! # Modules
//!
//! | module | question |
//! |---|---|
//! | [`wire`] | how are requests, responses and segments laid out, in each ABI? |
//! | [`ring`] | which slot is next, and must the peer be notified? |
//! | [`id`] | which request does a response belong to? |
//! | [`request`] | is this request valid for this disk? (backend) |
//! | [`plan`] | which slots does this block request need? (frontend) |
//! | [`resources`] | how many slots, pages and grants does a block request need? (frontend) |
//! | [`reservation`] | may a block request take its slots now? (frontend) |
//! | [`node`] | what is the value of a xenstore node? |
//! | [`negotiate`] | which features do the two sides agree on? |
//! | [`token_bucket`] | how often may the peer cause an action? |
//! | [`backoff`] | when is an operation retried that fails now? |
//! | [`state`] | what must a side do when its peer changes state? |
//! | [`vdev`] | which name and minors belong to a virtual device number? |
//!
//! The reference is `xen/include/public/io/blkif.h` and `ring.h` of the Xen project.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg(test)]
extern crate std;

pub mod backoff;
pub mod id;
pub mod negotiate;
pub mod node;
pub mod plan;
pub mod request;
pub mod reservation;
pub mod resources;
pub mod ring;
pub mod state;
pub mod token_bucket;
pub mod vdev;
pub mod wire;
