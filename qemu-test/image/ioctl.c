// SPDX-License-Identifier: GPL-2.0-only
/*
 * ioctl FILE NUMBER: calls ioctl(2) on a file, with room for a result. Prints the
 * return value, the error number, and the first eight bytes of the result. Guests
 * have no Python, and busybox has no such command.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

int main(int argc, char **argv)
{
	unsigned char answer[64];
	int file, result, i;

	if (argc != 3)
		return 2;
	file = open(argv[1], O_RDONLY | O_NONBLOCK);
	if (file < 0) {
		perror(argv[1]);
		return 1;
	}
	memset(answer, 0xaa, sizeof(answer));
	errno = 0;
	result = ioctl(file, strtoul(argv[2], NULL, 0), answer);
	printf("%d %d ", result, errno);
	for (i = 0; i < 8; i++)
		printf("%02x", answer[i]);
	putchar('\n');
	return 0;
}
