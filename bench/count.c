// SPDX-License-Identifier: GPL-2.0-only
/*
 * A QEMU plugin that counts the instructions of a Xen host, block by block.
 *
 * window  the time between the two functions of load.c that mark it. What runs
 *         outside of windows is not counted.
 * block   instructions that QEMU translates together and that run one after
 *         the other, from an address on.
 * slot    a virtual CPU of Xen: dom0's, the guest's, the idle one. They are told
 *         apart by what Xen's context_switch() is given, and numbered as they
 *         are first seen.
 * event   a run of a given function, with the values of two of its arguments:
 *         the key tells kinds of events apart, amounts are summed.
 *
 * Arguments: points=FILE, lines "switch ADDRESS" and "event NAME ADDRESS KEY
 * AMOUNT" (registers or -); out=FILE, to which each window is written as lines
 * "window NUMBER SLOT", "block ADDRESS INSTRUCTIONS SLOT RUNS", and
 * "event NAME SLOT KEY RUNS SUM EMPTY" (EMPTY: runs with an amount of 0).
 *
 * It counts for a machine with one processor.
 */

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qemu_plugin.h"

#define WINDOW_BEGIN 0x5b1c0000
#define WINDOW_END 0x5b1c0040
#define SLOTS 16
#define KEYS 64
#define BUCKETS (1 << 18)

struct block {
	uint64_t address, instructions;
	uint64_t runs[SLOTS];
	struct block *next;
};

struct tally {
	uint64_t runs, sum, empty;
};

struct event {
	char name[48], key[8], amount[8];
	uint64_t address;
	struct qemu_plugin_register *key_register, *amount_register;
	struct tally tallies[SLOTS][KEYS];
	struct event *next;
};

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

static struct block *blocks[BUCKETS];
static struct event *events;
static uint64_t switch_address, vcpus[SLOTS];
static unsigned int slot;
static bool counting;
static FILE *out;
static GByteArray *buffer;
static struct qemu_plugin_register *rdi, *rsi;

static uint64_t value_of(struct qemu_plugin_register *reg)
{
	uint64_t value = 0;

	g_byte_array_set_size(buffer, 0);
	if (reg && qemu_plugin_read_register(reg, buffer) > 0)
		memcpy(&value, buffer->data, buffer->len < 8 ? buffer->len : 8);
	return value;
}

static void run_block(unsigned int cpu, void *data)
{
	struct block *block = data;

	block->runs[slot] += counting;
}

static void run_switch(unsigned int cpu, void *data)
{
	uint64_t next = value_of(rsi);

	for (slot = 0; slot < SLOTS - 1; slot++) {
		if (!vcpus[slot])
			vcpus[slot] = next;
		if (vcpus[slot] == next)
			return;
	}
}

static void run_event(unsigned int cpu, void *data)
{
	struct event *event = data;
	uint64_t key, amount;
	struct tally *tally;

	if (!counting)
		return;
	key = (uint32_t)value_of(event->key_register);
	amount = value_of(event->amount_register);
	tally = &event->tallies[slot][key < KEYS ? key : KEYS - 1];
	tally->runs++;
	tally->sum += amount;
	tally->empty += !amount;
}

static void run_begin(unsigned int cpu, void *data)
{
	for (unsigned int i = 0; i < BUCKETS; i++)
		for (struct block *block = blocks[i]; block; block = block->next)
			memset(block->runs, 0, sizeof(block->runs));
	for (struct event *event = events; event; event = event->next)
		memset(event->tallies, 0, sizeof(event->tallies));
	counting = true;
}

static void write_event(struct event *event)
{
	for (unsigned int s = 0; s < SLOTS; s++)
		for (unsigned int key = 0; key < KEYS; key++) {
			struct tally *tally = &event->tallies[s][key];

			if (tally->runs)
				fprintf(out, "event %s %u %u %" PRIu64 " %" PRIu64 " %" PRIu64 "\n",
					event->name, s, key, tally->runs, tally->sum, tally->empty);
		}
}

static void run_end(unsigned int cpu, void *data)
{
	if (!counting)
		return;
	counting = false;
	fprintf(out, "window %" PRIu64 " %u\n", value_of(rdi), slot);
	for (unsigned int i = 0; i < BUCKETS; i++)
		for (struct block *block = blocks[i]; block; block = block->next)
			for (unsigned int s = 0; s < SLOTS; s++)
				if (block->runs[s])
					fprintf(out, "block %" PRIx64 " %" PRIu64 " %u %" PRIu64 "\n",
						block->address, block->instructions, s, block->runs[s]);
	for (struct event *event = events; event; event = event->next)
		write_event(event);
	fflush(out);
}

static struct block *block_of(uint64_t address, uint64_t instructions)
{
	struct block **place = &blocks[(address ^ address >> 18) % BUCKETS];
	struct block *block;

	for (block = *place; block; block = block->next)
		if (block->address == address && block->instructions == instructions)
			return block;
	block = calloc(1, sizeof(*block));
	if (!block)
		abort();
	block->address = address;
	block->instructions = instructions;
	block->next = *place;
	*place = block;
	return block;
}

static void translated(uint64_t id, struct qemu_plugin_tb *tb)
{
	uint64_t address = qemu_plugin_tb_vaddr(tb);
	struct block *block = block_of(address, qemu_plugin_tb_n_insns(tb));

	qemu_plugin_register_vcpu_tb_exec_cb(tb, run_block, QEMU_PLUGIN_CB_NO_REGS, block);
	if (address == switch_address)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, run_switch, QEMU_PLUGIN_CB_R_REGS, NULL);
	if (address == WINDOW_BEGIN)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, run_begin, QEMU_PLUGIN_CB_R_REGS, NULL);
	if (address == WINDOW_END)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, run_end, QEMU_PLUGIN_CB_R_REGS, NULL);
	for (struct event *event = events; event; event = event->next)
		if (address == event->address)
			qemu_plugin_register_vcpu_tb_exec_cb(tb, run_event, QEMU_PLUGIN_CB_R_REGS, event);
}

static struct qemu_plugin_register *register_called(const char *name)
{
	GArray *all = qemu_plugin_get_registers();
	qemu_plugin_reg_descriptor *list = (qemu_plugin_reg_descriptor *)all->data;

	for (unsigned int i = 0; i < all->len; i++)
		if (strcmp(list[i].name, name) == 0)
			return list[i].handle;
	return NULL;
}

static void started(uint64_t id, unsigned int cpu)
{
	buffer = g_byte_array_new();
	rdi = register_called("rdi");
	rsi = register_called("rsi");
	for (struct event *event = events; event; event = event->next) {
		event->key_register = register_called(event->key);
		event->amount_register = register_called(event->amount);
	}
}

static bool read_points(const char *path)
{
	FILE *file = fopen(path, "r");
	char line[256];

	while (file && fgets(line, sizeof(line), file)) {
		struct event *event = calloc(1, sizeof(*event));

		if (event && sscanf(line, "event %47s %" SCNx64 " %7s %7s", event->name, &event->address,
				    event->key, event->amount) == 4) {
			event->next = events;
			events = event;
		} else if (!event || sscanf(line, "switch %" SCNx64, &switch_address) != 1) {
			return false;
		}
	}
	return file && switch_address;
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(uint64_t id, const struct qemu_info_t *info, int argc,
					   char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (strncmp(argv[i], "points=", 7) == 0 && !read_points(argv[i] + 7))
			return -1;
		if (strncmp(argv[i], "out=", 4) == 0)
			out = fopen(argv[i] + 4, "w");
	}
	if (!out)
		return -1;
	qemu_plugin_register_vcpu_init_cb(id, started);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
