// SPDX-License-Identifier: GPL-2.0-only

#include <linux/blk-cgroup.h>
#include <linux/cgroup.h>
#include <linux/err.h>
#include <linux/kthread.h>

#ifdef CONFIG_BLK_CGROUP

/* The part of a cgroup that controls I/O, with a reference. */
void *rust_helper_io_css_get_from_path(const char *path)
{
	struct cgroup *cgrp = cgroup_get_from_path(path);
	struct cgroup_subsys_state *css;

	if (IS_ERR(cgrp))
		return ERR_CAST(cgrp);
	css = cgroup_get_e_css(cgrp, &io_cgrp_subsys);
	cgroup_put(cgrp);
	return css;
}

void rust_helper_io_css_put(void *css)
{
	css_put(css);
}

void rust_helper_kthread_associate_io_css(void *css)
{
	kthread_associate_blkcg(css);
}

#else

void *rust_helper_io_css_get_from_path(const char *path)
{
	return ERR_PTR(-EOPNOTSUPP);
}

void rust_helper_io_css_put(void *css)
{
}

void rust_helper_kthread_associate_io_css(void *css)
{
}

#endif
