// SPDX-License-Identifier: GPL-2.0-only

#include <linux/interrupt.h>

int rust_helper_irq_set_affinity_to_cpu(unsigned int irq, unsigned int cpu)
{
	return irq_set_affinity(irq, cpumask_of(cpu));
}
