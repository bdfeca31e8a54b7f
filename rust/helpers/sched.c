// SPDX-License-Identifier: GPL-2.0-only

#include <linux/freezer.h>
#include <linux/ioprio.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/wait.h>

void rust_helper_cond_resched(void)
{
	cond_resched();
}

bool rust_helper_try_to_freeze(void)
{
	return try_to_freeze();
}

unsigned int rust_helper_memalloc_noio_save(void)
{
	return memalloc_noio_save();
}

void rust_helper_memalloc_noio_restore(unsigned int flags)
{
	memalloc_noio_restore(flags);
}

bool rust_helper_wq_has_sleeper(struct wait_queue_head *wq_head)
{
	return wq_has_sleeper(wq_head);
}

int rust_helper_set_current_ioprio(int ioprio)
{
	return set_task_ioprio(current, ioprio);
}
