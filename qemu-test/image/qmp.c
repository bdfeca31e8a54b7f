// SPDX-License-Identifier: GPL-2.0-only
/*
 * qmp SOCKET COMMAND: executes a QMP command (JSON) and prints QEMU's response. The
 * exit status is 0 if the command succeeded.
 *
 * It runs in dom0, whose initramfs has no Python for the library of the QEMU project.
 */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

/* Skips the greeting and events. Returns 1 if the command succeeded. */
static int read_response(FILE *from, char *line, int size)
{
	while (fgets(line, size, from)) {
		if (!strncmp(line, "{\"return\"", 9))
			return 1;
		if (!strncmp(line, "{\"error\"", 8))
			return 0;
	}
	snprintf(line, size, "no response\n");
	return 0;
}

int main(int argc, char **argv)
{
	static char line[1 << 20];
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	FILE *from, *to;
	int fd, done;

	if (argc != 3 || strlen(argv[1]) >= sizeof(address.sun_path))
		return 2;
	snprintf(address.sun_path, sizeof(address.sun_path), "%s", argv[1]);
	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		perror(argv[1]);
		return 1;
	}
	from = fdopen(fd, "r");
	to = fdopen(fd, "w");
	fprintf(to, "{\"execute\": \"qmp_capabilities\"}\n");
	fflush(to);
	done = read_response(from, line, sizeof(line));
	if (done) {
		fprintf(to, "%s\n", argv[2]);
		fflush(to);
		done = read_response(from, line, sizeof(line));
	}
	fputs(line, stdout);
	return !done;
}
