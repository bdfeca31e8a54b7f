// SPDX-License-Identifier: GPL-2.0-only

#include <linux/device.h>

void rust_helper_device_lock(struct device *dev)
{
	device_lock(dev);
}

void rust_helper_device_unlock(struct device *dev)
{
	device_unlock(dev);
}

int rust_helper_device_trylock(struct device *dev)
{
	return device_trylock(dev);
}

bool rust_helper_device_is_registered(struct device *dev)
{
	return device_is_registered(dev);
}
