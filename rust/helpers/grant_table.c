// SPDX-License-Identifier: GPL-2.0-only

#include <asm/xen/hypercall.h>
#include <linux/mm.h>
#include <xen/grant_table.h>

unsigned long rust_helper_xen_page_to_gfn(struct page *page)
{
	return xen_page_to_gfn(page);
}

int rust_helper_page_count(const struct page *page)
{
	return page_count(page);
}

void rust_helper_gnttab_set_map_op(struct gnttab_map_grant_ref *map,
				   struct page *page, uint32_t flags,
				   grant_ref_t ref, domid_t domid)
{
	gnttab_set_map_op(map, (unsigned long)page_address(page), flags, ref,
			  domid);
}

void rust_helper_gnttab_set_unmap_op(struct gnttab_unmap_grant_ref *unmap,
				     struct page *page, uint32_t flags,
				     grant_handle_t handle)
{
	gnttab_set_unmap_op(unmap, (unsigned long)page_address(page), flags,
			    handle);
}

int rust_helper_gnttab_copy_op(struct gnttab_copy *ops, unsigned int count)
{
	return HYPERVISOR_grant_table_op(GNTTABOP_copy, ops, count);
}
