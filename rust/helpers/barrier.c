// SPDX-License-Identifier: GPL-2.0-only

#include <asm/barrier.h>

void rust_helper_virt_mb(void)
{
	virt_mb();
}

void rust_helper_virt_rmb(void)
{
	virt_rmb();
}

void rust_helper_virt_wmb(void)
{
	virt_wmb();
}
