// SPDX-License-Identifier: GPL-2.0-only
/*
 * dio FILE: writes and reads a file by direct I/O, with memory and lengths that
 * have no more than the alignment that statx requires. Prints that alignment, of
 * memory and of offsets; fails if an I/O does or if other data is read. fio aligns
 * memory to pages.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/stat.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define ROOM (1 << 20)
#define VECTORS 64

static int fail(const char *what)
{
	perror(what);
	return 1;
}

/* Memory that is aligned to `align`, and to nothing more. */
static char *memory(unsigned int align)
{
	char *room = aligned_alloc(ROOM, ROOM);

	return room ? room + align : NULL;
}

/* Transfers `blocks` blocks, in one piece and in pieces of `align` that are apart. */
static int transfer(int file, char *from, char *to, unsigned int align, size_t block, int blocks)
{
	struct iovec out[VECTORS], in[VECTORS];
	size_t len = block * blocks;
	unsigned int count = len / align;
	unsigned int i;

	for (i = 0; i < len; i++)
		from[i] = rand();
	if (pwrite(file, from, len, block) != (ssize_t)len)
		return fail("pwrite");
	if (pread(file, to, len, block) != (ssize_t)len)
		return fail("pread");
	if (memcmp(from, to, len))
		return fail("other data");
	if (count > VECTORS || len % align)
		return 0;
	for (i = 0; i < count; i++) {
		out[i] = (struct iovec){ from + 2 * i * align, align };
		in[i] = (struct iovec){ to + 2 * i * align, align };
	}
	if (pwritev(file, out, count, 0) != (ssize_t)len)
		return fail("pwritev");
	if (preadv(file, in, count, 0) != (ssize_t)len)
		return fail("preadv");
	for (i = 0; i < count; i++)
		if (memcmp(out[i].iov_base, in[i].iov_base, align))
			return fail("other data in vectors");
	return 0;
}

int main(int argc, char **argv)
{
	struct statx info;
	char *from, *to;
	int blocks, file;

	if (argc != 2)
		return 2;
	if (statx(AT_FDCWD, argv[1], 0, STATX_DIOALIGN, &info))
		return fail("statx");
	printf("%u %u\n", info.stx_dio_mem_align, info.stx_dio_offset_align);
	fflush(stdout);
	file = open(argv[1], O_RDWR | O_DIRECT);
	if (file < 0)
		return fail(argv[1]);
	from = memory(info.stx_dio_mem_align);
	to = memory(info.stx_dio_mem_align);
	if (!from || !to)
		return fail("memory");
	for (blocks = 1; blocks <= 8; blocks++)
		if (transfer(file, from, to, info.stx_dio_mem_align, info.stx_dio_offset_align, blocks))
			return 1;
	return 0;
}
