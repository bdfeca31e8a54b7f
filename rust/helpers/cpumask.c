// SPDX-License-Identifier: GPL-2.0-only

#include <linux/cpumask.h>

unsigned int rust_helper_num_online_cpus(void)
{
	return num_online_cpus();
}

bool rust_helper_cpu_online(unsigned int cpu)
{
	return cpu_online(cpu);
}
