// SPDX-License-Identifier: GPL-2.0-only
// error: E0502

//! Bytes of a mapped page cannot be used once it may be unmapped.

use kernel::prelude::*;

use kernel_ext::xen::grant::map::{
    MappedPage,
    Mapper,
    PageCache, //
};

fn misuse(mapper: &mut Mapper, cache: &PageCache, pages: &mut KVec<MappedPage>) -> usize {
    let Some(slice) = pages.first().and_then(|page| page.slice(0, 16)) else {
        return 0;
    };
    mapper.unmap(cache, pages);
    slice.read(&mut [0; 16])
}
