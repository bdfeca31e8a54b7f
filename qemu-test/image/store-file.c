// SPDX-License-Identifier: GPL-2.0-only
/*
 * store-file put FILE DIRECTORY	puts a file into xenstore
 * store-file get DIRECTORY		prints that file
 *
 * It brings files from dom0 into a guest that has no disk yet: the driver of its
 * console reads 16 bytes at a time, which costs far more. The nodes of DIRECTORY are
 * 0, 1, and so on to the end of the file, because a message to xenstore has room for
 * 4 KiB. Messages are those of xs_wire.h. xenstore-read and xenstore-write take one
 * process for each node, and no binary values.
 */
#include <err.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum type { READ = 2, WRITE = 11, REMOVE = 13, FAILED = 16 };

struct message {
	uint32_t type, request, transaction, length;
	char body[4096];
};

#define HEADER offsetof(struct message, body)

/* What is left of a message for data beside a path of this program. */
#define PIECE 3968
#define PATH (sizeof(((struct message *)0)->body) - PIECE)

static int xenstore;

static void receive(void *data, size_t size)
{
	while (size) {
		ssize_t got = read(xenstore, data, size);

		if (got <= 0)
			err(1, "xenstore");
		data = (char *)data + got;
		size -= got;
	}
}

/* Asks xenstore; `message` becomes the answer. False if that is an error. */
static int ask(struct message *message, enum type type, size_t length)
{
	message->type = type;
	message->request = message->transaction = 0;
	message->length = length;
	if (write(xenstore, message, HEADER + length) < 0)
		err(1, "xenstore");
	receive(message, HEADER);
	if (message->length > sizeof(message->body))
		errx(1, "xenstore: an answer of %u bytes", message->length);
	receive(message->body, message->length);
	return message->type != FAILED;
}

/* Begins a message with the path of a node; how long that is, with the 0 at its end. */
static size_t name(struct message *message, const char *directory, int number)
{
	int length = snprintf(message->body, PATH, "%s/%d", directory, number);

	if (length < 0 || length >= (int)PATH)
		errx(1, "%s: too long", directory);
	return length + 1;
}

static void put(const char *file, const char *directory)
{
	struct message message;
	int from = open(file, O_RDONLY), number;

	if (from < 0)
		err(1, "%s", file);
	for (number = 0;; number++) {
		size_t path = name(&message, directory, number);
		ssize_t got = read(from, message.body + path, PIECE);

		if (got < 0)
			err(1, "%s", file);
		if (!got)
			return;
		if (!ask(&message, WRITE, path + got))
			errx(1, "%s/%d: %.*s", directory, number, message.length, message.body);
	}
}

static void get(const char *directory)
{
	struct message message;
	int number;

	for (number = 0; ask(&message, READ, name(&message, directory, number)); number++)
		if (fwrite(message.body, 1, message.length, stdout) != message.length)
			err(1, "stdout");
	if (!number)
		errx(1, "%s/0: %.*s", directory, message.length, message.body);
	if (fflush(stdout))
		err(1, "stdout");
}

int main(int argc, char **argv)
{
	xenstore = open("/dev/xen/xenbus", O_RDWR);
	if (xenstore < 0)
		err(1, "/dev/xen/xenbus");
	if (argc == 4 && !strcmp(argv[1], "put"))
		put(argv[2], argv[3]);
	else if (argc == 3 && !strcmp(argv[1], "get"))
		get(argv[2]);
	else
		errx(2, "store-file put FILE DIRECTORY | get DIRECTORY");
	return 0;
}
