// SPDX-License-Identifier: GPL-2.0-only

#include <linux/device.h>
#include <linux/sysfs.h>

/* The layout of the two differs between kernels: anonymous unions or not. */

void rust_helper_device_attribute_init(struct device_attribute *attribute,
				       const char *name, umode_t mode,
				       ssize_t (*show)(struct device *, struct device_attribute *,
						       char *))
{
	sysfs_attr_init(&attribute->attr);
	attribute->attr.name = name;
	attribute->attr.mode = mode;
	attribute->show = show;
}

void rust_helper_attribute_group_init(struct attribute_group *group, const char *name,
				      struct attribute **attrs)
{
	group->name = name;
	group->attrs = attrs;
}
