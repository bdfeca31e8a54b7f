// SPDX-License-Identifier: GPL-2.0-only

#include <linux/gfp.h>
#include <linux/mm.h>

/*
 * A frontend makes its ring anew when it carries the disk that is swapped to. It
 * takes a smaller one where it does not get several pages in a row.
 */
void *rust_helper_alloc_ring_pages(size_t size)
{
	gfp_t gfp = GFP_NOIO | __GFP_HIGH | __GFP_ZERO | __GFP_NOWARN;

	if (size > PAGE_SIZE)
		gfp |= __GFP_NORETRY;
	return alloc_pages_exact(size, gfp);
}

struct page *rust_helper_virt_to_page(const void *addr)
{
	return virt_to_page(addr);
}
