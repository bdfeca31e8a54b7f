// SPDX-License-Identifier: GPL-2.0-only

#include <linux/highmem.h>

void rust_helper_memcpy_page(struct page *dst_page, size_t dst_off,
			     struct page *src_page, size_t src_off, size_t len)
{
	memcpy_page(dst_page, dst_off, src_page, src_off, len);
}

void rust_helper_copy_highpage(struct page *to, struct page *from)
{
	copy_highpage(to, from);
}

void rust_helper_memcpy_from_page(char *to, struct page *page, size_t offset,
				  size_t len)
{
	memcpy_from_page(to, page, offset, len);
}

void rust_helper_memcpy_to_page(struct page *page, size_t offset,
				const char *from, size_t len)
{
	memcpy_to_page(page, offset, from, len);
}
