// SPDX-License-Identifier: GPL-2.0-only
/*
 * Runs commands that arrive on stdin and answers on stdout, for the harness at the
 * other end of that line.
 *
 * Why not qemu-guest-agent: it needs GLib, and starts several processes for each command.
 * Under emulation, starting a program costs more than everything else here, so this
 * starts the shell and, only for long output, gzip. A guest without a network has only
 * its console, on which kernel messages appear between the lines.
 *
 * A request is one line, a number and what to do:
 *
 *   N run SCRIPT		runs a shell script, in which "\0ooo" is the byte of that
 *				octal number
 *   N again			repeats the last answer
 *   N pass TERMINAL SECONDS M ...
 *				gives "M ..." to the agent at that terminal; the answer
 *				is what that one answers, if it does before SECONDS
 *				without a word are over. With 0 seconds none is awaited.
 *   N talk SCRIPT		runs a shell script on a terminal of its own; until it ends
 *				this line is the other end of that, and there is no answer
 *
 * An answer is "#begin N", the output in base64, and "#end N STATUS FORM SUM".
 * FORM is how the output is in there, "plain" or by "gzip", and SUM the CRC-32
 * of what is in base64. The kernel may put a message of its own in the middle of
 * a line: the asker sees that by the sum, and asks "again". What was passed on is
 * not in base64, for the other agent has done that, and its FORM is "passed".
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define SCRIPT "/run/agent.script"
#define OUTPUT "/run/agent.output"
#define PACKED "/run/agent.packed"

/* Output of more bytes than that is packed. */
#define LONG 2048

/* How much of an answer is read at a time. */
#define PIECE 16384

/* The longest request: a script may have files in it. */
static char request[1 << 20];

/* What is said about the last script. */
static int status;
static const char *form = "plain";
static char *output;
static size_t length;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Has a terminal pass on all bytes as they are. */
static void make_raw(int file)
{
	struct termios settings;

	if (tcgetattr(file, &settings))
		return;
	cfmakeraw(&settings);
	tcsetattr(file, TCSANOW, &settings);
}

static int write_all(int file, const char *data, size_t size)
{
	while (size) {
		ssize_t done = write(file, data, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return -1;
		data += done;
		size -= done;
	}
	return 0;
}

/*
 * Reads a line, and nothing of what comes after it: that may be for a program
 * that the line starts. False at the end of the input.
 */
static int read_line(void)
{
	size_t used = 0;

	for (;;) {
		char byte;
		ssize_t got = read(STDIN_FILENO, &byte, 1);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return 0;
		if (byte == '\n')
			break;
		if (used < sizeof(request) - 1)
			request[used++] = byte;
	}
	request[used] = 0;
	return 1;
}

/* Turns each "\0ooo" of a text into its byte. */
static void unescape(char *text)
{
	char *end = text;

	while (*text) {
		if (text[0] == '\\' && text[1] == '0' && strlen(text) >= 5) {
			char digits[4] = { text[2], text[3], text[4] };

			*end++ = strtol(digits, NULL, 8);
			text += 5;
		} else {
			*end++ = *text++;
		}
	}
	*end = 0;
}

/* A new file: who still writes to the old one of that name is not in it. */
static int create(const char *path)
{
	unlink(path);
	return open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
}

/* Runs a program with stdin, stdout and stderr from files; its exit status. */
static int run(const char *in, const char *out, char *const argv[])
{
	int state;
	pid_t child = fork();

	if (child < 0)
		return 126;
	if (!child) {
		int from = open(in, O_RDONLY);
		int to = create(out);

		if (from < 0 || to < 0 || dup2(from, 0) < 0 || dup2(to, 1) < 0 || dup2(to, 2) < 0)
			_exit(126);
		close(from);
		close(to);
		execvp(argv[0], argv);
		_exit(127);
	}
	while (waitpid(child, &state, 0) < 0)
		if (errno != EINTR)
			return 126;
	return WIFEXITED(state) ? WEXITSTATUS(state) : 128 + WTERMSIG(state);
}

/* Reads a file into `output`. */
static void take_output(const char *path)
{
	int file = open(path, O_RDONLY);
	struct stat info;

	free(output);
	output = NULL;
	length = 0;
	if (file < 0 || fstat(file, &info))
		goto close;
	output = malloc(info.st_size + 1);
	while (output && length < (size_t)info.st_size) {
		ssize_t got = read(file, output + length, info.st_size - length);

		if (got <= 0)
			break;
		length += got;
	}
close:
	if (file >= 0)
		close(file);
}

static void write_script(char *text)
{
	int file = create(SCRIPT);

	unescape(text);
	if (file < 0 || write_all(file, text, strlen(text)) || close(file))
		die(SCRIPT);
}

static void run_script(char *text)
{
	char *const shell[] = { "sh", "-e", SCRIPT, NULL };
	char *const pack[] = { "gzip", "-c", NULL };

	write_script(text);
	status = run("/dev/null", OUTPUT, shell);
	form = "plain";
	take_output(OUTPUT);
	if (length > LONG && !run(OUTPUT, PACKED, pack)) {
		form = "gzip";
		take_output(PACKED);
	}
}

static uint32_t crc32(const char *data, size_t size)
{
	uint32_t sum = ~0u;
	int bit;

	while (size--) {
		sum ^= (unsigned char)*data++;
		for (bit = 0; bit < 8; bit++)
			sum = sum >> 1 ^ (sum & 1 ? 0xedb88320 : 0);
	}
	return ~sum;
}

/* Prints data in base64, in lines of 76 characters. */
static void print_base64(const char *data, size_t size)
{
	static const char digits[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	size_t at;

	for (at = 0; at < size; at += 3) {
		uint32_t bits = (unsigned char)data[at] << 16;

		if (at + 1 < size)
			bits |= (unsigned char)data[at + 1] << 8;
		if (at + 2 < size)
			bits |= (unsigned char)data[at + 2];
		putchar(digits[bits >> 18]);
		putchar(digits[bits >> 12 & 63]);
		putchar(at + 1 < size ? digits[bits >> 6 & 63] : '=');
		putchar(at + 2 < size ? digits[bits & 63] : '=');
		if (at % 57 == 54 || at + 3 >= size)
			putchar('\n');
	}
}

static void answer(const char *number)
{
	printf("\n#begin %s\n", number);
	print_base64(output, length);
	printf("#end %s %d %s %08x\n", number, status, form, crc32(output, length));
	fflush(stdout);
}

/* Moves what there is to read. False at the end. */
static int move(int from, int to)
{
	char piece[256];
	ssize_t got = read(from, piece, sizeof(piece));

	return got > 0 && !write_all(to, piece, got);
}

static void talk(char *text)
{
	int terminal;
	pid_t child;

	write_script(text);
	child = forkpty(&terminal, NULL, NULL, NULL);
	if (child < 0)
		return;
	if (!child) {
		execlp("sh", "sh", SCRIPT, NULL);
		_exit(127);
	}
	for (;;) {
		struct pollfd ends[] = {
			{ .fd = STDIN_FILENO, .events = POLLIN },
			{ .fd = terminal, .events = POLLIN },
		};

		if (poll(ends, 2, -1) < 0 && errno != EINTR)
			break;
		if (ends[0].revents && !move(STDIN_FILENO, terminal))
			break;
		if (ends[1].revents && !move(terminal, STDOUT_FILENO))
			break;
	}
	close(terminal);
	waitpid(child, NULL, 0);
}

/* Whether a line of a text begins with `mark`, and is whole. */
static int has_line(const char *text, size_t size, const char *mark)
{
	const char *line = memmem(text, size, mark, strlen(mark));

	return line && memchr(line + strlen(mark), '\n', text + size - line - strlen(mark));
}

/* Waits for the answer of the other agent and takes it as output; 0 when it is there. */
static int await_answer(int terminal, const char *number, int seconds)
{
	struct pollfd wait = { .fd = terminal, .events = POLLIN };
	char mark[64];
	size_t room = 0;

	snprintf(mark, sizeof(mark), "\n#end %s ", number);
	while (poll(&wait, 1, seconds * 1000) > 0) {
		ssize_t got;

		if (length + PIECE > room) {
			char *more = realloc(output, room = 2 * (room + PIECE));

			if (!more)
				return 1;
			output = more;
		}
		got = read(terminal, output + length, PIECE);
		if (got <= 0)
			return 1;
		length += got;
		if (has_line(output, length, mark))
			return 0;
	}
	return 1;
}

/* Passes a request on; its answer becomes the output. */
static void pass(char *text)
{
	char path[64], number[16];
	int seconds, skip = 0, terminal = -1;

	free(output);
	output = NULL;
	length = 0;
	status = 3;
	if (sscanf(text, "%63s %d %n", path, &seconds, &skip) != 2 ||
	    sscanf(text + skip, "%15s", number) != 1)
		return;
	terminal = open(path, O_RDWR | O_NOCTTY);
	if (terminal < 0)
		return;
	make_raw(terminal);
	if (!write_all(terminal, text + skip, strlen(text + skip)) &&
	    !write_all(terminal, "\n", 1))
		status = seconds && await_answer(terminal, number, seconds) ? 4 : 0;
	close(terminal);
}

/* The last word of a request: it was passed on, and its answer follows as it came. */
static void answer_passed(const char *number)
{
	printf("\n#begin %s\n", number);
	fflush(stdout);
	write_all(STDOUT_FILENO, output, length);
	printf("\n#end %s %d passed 0\n", number, status);
	fflush(stdout);
}

int main(void)
{
	make_raw(STDIN_FILENO);
	printf("\n#agent ready\n");
	fflush(stdout);
	while (read_line()) {
		char number[16], what[16];
		int skip = 0;

		if (sscanf(request, "%15[0-9] %15s %n", number, what, &skip) < 2)
			continue;
		if (!strcmp(what, "pass")) {
			pass(request + skip);
			answer_passed(number);
			continue;
		}
		if (!strcmp(what, "talk")) {
			talk(request + skip);
			continue;
		}
		if (!strcmp(what, "run"))
			run_script(request + skip);
		else if (strcmp(what, "again"))
			continue;
		answer(number);
	}
	return 0;
}
