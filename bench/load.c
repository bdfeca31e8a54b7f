// SPDX-License-Identifier: GPL-2.0-only
/*
 * load DEVICE KIND BYTES DEPTH COUNT WINDOW JOBS: keeps DEPTH operations of BYTES
 * bytes on their way to a block device, around the page cache, and prints the
 * nanoseconds that COUNT of them took after a quarter as many to warm up.
 *
 * KIND is randread, randwrite, read, write, mixed (70 % reads, random) or
 * flushed (random writes, each followed by a flush). `load - idle 0 0 SECONDS
 * WINDOW 1` does nothing for a while. Each of several JOBS does all that on a CPU of
 * its own; they begin together, and the measured part ends with the last one.
 *
 * The measured part lies between calls of window_begin and window_end, two
 * functions that do nothing, at addresses that the counting plugin knows.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST_DEPTH 256

void window_begin(unsigned long window);
void window_end(unsigned long window);
asm(".pushsection .window, \"ax\", @progbits\n"
    ".globl window_begin\nwindow_begin:\n\tret\n"
    ".balign 64\n"
    ".globl window_end\nwindow_end:\n\tret\n"
    ".popsection\n");

struct load {
	int device;
	const char *kind;
	uint64_t bytes, places, next;
	uint64_t random;
	struct iocb operations[MOST_DEPTH];
};

static void die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static uint64_t draw(struct load *load)
{
	load->random ^= load->random << 13;
	load->random ^= load->random >> 7;
	load->random ^= load->random << 17;
	return load->random >> 11;
}

static int is(const struct load *load, const char *kind)
{
	return strcmp(load->kind, kind) == 0;
}

static int writes(struct load *load)
{
	if (is(load, "mixed"))
		return draw(load) % 10 >= 7;
	return is(load, "write") || is(load, "randwrite") || is(load, "flushed");
}

static void prepare(struct load *load, struct iocb *operation)
{
	int sequential = is(load, "read") || is(load, "write");
	uint64_t place = sequential ? load->next++ : draw(load);

	operation->aio_lio_opcode = writes(load) ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
	operation->aio_offset = place % load->places * load->bytes;
}

static void set_up(struct load *load, const char *path, unsigned int depth)
{
	uint64_t size;
	char *memory;

	load->device = open(path, O_RDWR | O_DIRECT);
	if (load->device < 0 || ioctl(load->device, BLKGETSIZE64, &size) < 0)
		die(path);
	load->places = size / load->bytes;
	if (posix_memalign((void **)&memory, 4096, depth * load->bytes))
		die("memory");
	memset(memory, 0x5a, depth * load->bytes);
	for (unsigned int i = 0; i < depth; i++)
		load->operations[i] = (struct iocb){
			.aio_fildes = load->device,
			.aio_buf = (uintptr_t)memory + i * load->bytes,
			.aio_nbytes = load->bytes,
		};
}

static void submit(aio_context_t context, struct iocb **operations, long count)
{
	if (count && syscall(SYS_io_submit, context, count, operations) != count)
		die("io_submit");
}

/* Does WARM operations to warm up, and then COUNT that are measured. Without WARM nothing is marked. */
static void run(struct load *load, unsigned int depth, uint64_t warm, uint64_t count,
		unsigned long window)
{
	struct io_event events[MOST_DEPTH];
	struct iocb *again[MOST_DEPTH];
	uint64_t done = 0, started = 0, begun = 0;
	aio_context_t context = 0;

	if (syscall(SYS_io_setup, depth, &context))
		die("io_setup");
	for (; started < depth; started++) {
		again[started] = &load->operations[started];
		prepare(load, again[started]);
	}
	submit(context, again, depth);
	while (done < started) {
		long got = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		long more = 0;

		if (got < 1)
			die("io_getevents");
		for (long i = 0; i < got; i++) {
			struct iocb *operation = (struct iocb *)(uintptr_t)events[i].obj;

			if (events[i].res != (int64_t)load->bytes)
				die("a transfer is short");
			if (is(load, "flushed") && fdatasync(load->device))
				die("fdatasync");
			if (started < warm + count + depth) {
				prepare(load, operation);
				again[more++] = operation;
				started++;
			}
		}
		/* The window begins and ends where nothing but these differ from any other turn. */
		if (done < warm && done + got >= warm) {
			warm = done + got;
			begun = now();
			window_begin(window);
		}
		if (begun && done < warm + count && done + got >= warm + count) {
			uint64_t ended;

			window_end(window);
			ended = now();
			printf("%llu %llu\n", (unsigned long long)(done + got - warm),
			       (unsigned long long)(ended - begun));
		}
		submit(context, again, more);
		done += got;
	}
}

/* One of several jobs: warms up, says so, and begins when the other end of `go` is closed. */
static void run_job(struct load *load, unsigned int job, unsigned int depth, uint64_t count, int ready,
		    int go)
{
	cpu_set_t cpus;
	char byte = 0;

	CPU_ZERO(&cpus);
	CPU_SET(job, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		die("sched_setaffinity");
	run(load, depth, 0, count / 4, 0);
	if (write(ready, &byte, 1) != 1 || read(go, &byte, 1) != 0)
		die("pipe");
	run(load, depth, 0, count - depth, 0);
	exit(0);
}

static int run_jobs(struct load *load, const char *path, unsigned int jobs, unsigned int depth,
		    uint64_t count, unsigned long window)
{
	int ready[2], go[2], status, failed = 0;
	uint64_t begun;
	char byte;

	if (pipe(ready) || pipe(go))
		die("pipe");
	for (unsigned int job = 0; job < jobs; job++)
		if (fork() == 0) {
			close(go[1]);
			set_up(load, path, depth);
			load->random += job;
			load->next = load->places / jobs * job;
			run_job(load, job, depth, count, ready[1], go[0]);
		}
	close(ready[1]);
	for (unsigned int job = 0; job < jobs; job++)
		if (read(ready[0], &byte, 1) != 1)
			die("a job");
	begun = now();
	window_begin(window);
	close(go[1]);
	while (wait(&status) > 0)
		failed |= status;
	window_end(window);
	printf("%llu %llu\n", (unsigned long long)(jobs * count), (unsigned long long)(now() - begun));
	return failed != 0;
}

int main(int argc, char **argv)
{
	static struct load load = { .random = 0x9e3779b97f4a7c15 };
	unsigned int depth, jobs;
	uint64_t count;

	if (argc != 8) {
		fprintf(stderr, "usage: load DEVICE KIND BYTES DEPTH COUNT WINDOW JOBS\n");
		return 2;
	}
	load.kind = argv[2];
	load.bytes = strtoull(argv[3], NULL, 0);
	depth = strtoul(argv[4], NULL, 0);
	count = strtoull(argv[5], NULL, 0);
	jobs = strtoul(argv[7], NULL, 0);
	if (is(&load, "idle")) {
		window_begin(strtoul(argv[6], NULL, 0));
		sleep(count);
		window_end(strtoul(argv[6], NULL, 0));
		printf("%llu %llu\n", (unsigned long long)count, (unsigned long long)count * 1000000000);
		return 0;
	}
	if (depth < 1 || depth > MOST_DEPTH || !load.bytes)
		die("depth or bytes");
	if (jobs > 1)
		return run_jobs(&load, argv[1], jobs, depth, count, strtoul(argv[6], NULL, 0));
	set_up(&load, argv[1], depth);
	run(&load, depth, count / 4, count, strtoul(argv[6], NULL, 0));
	return 0;
}
