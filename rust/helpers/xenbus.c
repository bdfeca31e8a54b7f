// SPDX-License-Identifier: GPL-2.0

#include <xen/xenbus.h>

/* A frontend makes its ring anew when it carries the disk that is swapped to. */
int rust_helper_xenbus_setup_ring_noio(struct xenbus_device *dev, void **vaddr,
				       unsigned int nr_pages,
				       grant_ref_t *grefs)
{
	return xenbus_setup_ring(dev, GFP_NOIO | __GFP_HIGH, vaddr, nr_pages,
				 grefs);
}
