// SPDX-License-Identifier: GPL-2.0

#include <linux/sched.h>
#include <linux/sched/mm.h>

void rust_helper_cond_resched(void)
{
	cond_resched();
}

unsigned int rust_helper_memalloc_noio_save(void)
{
	return memalloc_noio_save();
}

void rust_helper_memalloc_noio_restore(unsigned int flags)
{
	memalloc_noio_restore(flags);
}
