// SPDX-License-Identifier: GPL-2.0-only
/*
 * hold-grants LEFT: takes the entries of the domain's grant table until none is
 * free, gives LEFT of them back, prints how many it has, and holds them until it
 * is killed. Needs xen-gntalloc with a large limit.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <xen/gntalloc.h>

#define MOST 65536

static struct ioctl_gntalloc_dealloc_gref held[MOST];

int main(int argc, char **argv)
{
	struct ioctl_gntalloc_alloc_gref grant = { .domid = 0, .count = 1 };
	int file = open("/dev/xen/gntalloc", O_RDWR);
	int count = 0, left = argc > 1 ? atoi(argv[1]) : 0;

	if (file < 0) {
		perror("/dev/xen/gntalloc");
		return 1;
	}
	while (count < MOST && ioctl(file, IOCTL_GNTALLOC_ALLOC_GREF, &grant) == 0) {
		held[count].index = grant.index;
		held[count].count = 1;
		count++;
	}
	while (left-- > 0 && count > 0)
		ioctl(file, IOCTL_GNTALLOC_DEALLOC_GREF, &held[--count]);
	printf("%d\n", count);
	fflush(stdout);
	for (;;)
		pause();
}
