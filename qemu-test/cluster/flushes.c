// SPDX-License-Identifier: GPL-2.0-only
/*
 * flushes DEVICE BLOCKS VERSION: writes a version of each of the first blocks of a device, and
 * flushes each few of them. Fails if a block did not have the version before, which was flushed.
 * Prints the longest time that a read, a write or a flush has taken, in milliseconds.
 *
 * What a block contains is the same as in rust/engine/tests/engines/writer.rs, which can check it
 * from outside.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define BATCH 16
/* A factor in the number from which the content of a block is made. */
#define STRIDE 1024

static long longest;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static long milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Counts the time since the end of the operation before. */
static void measure(void)
{
	static long last;
	long now = milliseconds();

	if (last && now - last > longest)
		longest = now - last;
	last = now;
}

static void contents(char *data, uint64_t block, uint64_t version)
{
	uint64_t state = (version * STRIDE + block) * 0x9e3779b97f4a7c15 | 1;
	size_t at;

	if (!version) {
		memset(data, 0, BLOCK);
		return;
	}
	for (at = 0; at < BLOCK; at += sizeof(state)) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		memcpy(data + at, &state, sizeof(state));
	}
}

static void check(const char *data, uint64_t first, uint64_t version)
{
	char expected[BLOCK];
	int index;

	for (index = 0; index < BATCH; index++) {
		contents(expected, first + index, version);
		if (!memcmp(data + index * BLOCK, expected, BLOCK))
			continue;
		fprintf(stderr, "block %d is not that of version %d\n", (int)first + index,
			(int)version);
		exit(1);
	}
}

static void update(int device, char *data, uint64_t first, uint64_t version)
{
	off_t offset = first * BLOCK;
	int index;

	if (pread(device, data, BATCH * BLOCK, offset) != BATCH * BLOCK)
		fail("read");
	measure();
	check(data, first, version - 1);
	for (index = 0; index < BATCH; index++)
		contents(data + index * BLOCK, first + index, version);
	if (pwrite(device, data, BATCH * BLOCK, offset) != BATCH * BLOCK)
		fail("write");
	measure();
	if (fdatasync(device))
		fail("flush");
	measure();
}

int main(int argc, char **argv)
{
	char *data = aligned_alloc(BLOCK, BATCH * BLOCK);
	uint64_t first, blocks, version;
	int device;

	if (argc != 4 || !data)
		return 2;
	blocks = strtoull(argv[2], NULL, 10);
	version = strtoull(argv[3], NULL, 10);
	device = open(argv[1], O_RDWR | O_DIRECT);
	if (device < 0)
		fail(argv[1]);
	measure();
	for (first = 0; first < blocks; first += BATCH)
		update(device, data, first, version);
	printf("%ld\n", longest);
	return 0;
}
