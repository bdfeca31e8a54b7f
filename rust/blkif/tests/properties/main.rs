// SPDX-License-Identifier: GPL-2.0-only

//! What holds for every input: the crate against models of it, with arbitrary values.

mod common;
mod plan;
mod request;
mod reservation;
mod resources;
mod ring;
mod text;
mod wire;
