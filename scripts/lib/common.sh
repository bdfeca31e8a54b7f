# SPDX-License-Identifier: GPL-2.0-only
# Functions of the shell scripts. Sourced, not run.
#
# cache       downloads, build roots and kernels, outside the tree
# build root  a Debian trixie directory tree with every tool the project needs
# shellcheck shell=bash disable=SC2034

TREE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${RBLKIF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rblkif}

# say MESSAGE: prints progress on stderr; stdout is for results.
say() {
	printf '  %s\n' "$*" >&2
}

# die MESSAGE...: prints each message on a line and exits with status 1.
die() {
	printf '%s: %s\n' "${0##*/}" "$1" >&2
	shift
	[ $# -eq 0 ] || printf '    %s\n' "$@" >&2
	exit 1
}

# as_root CMD...: runs CMD as root, through sudo where needed.
as_root() {
	if [ "$(id -u)" -eq 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo -- "$@"
	else
		die "root is needed for: $*" "Run as root, or install sudo."
	fi
}

# hold_sudo: asks for the password, if one is needed, before anything else runs, and renews
# sudo's timestamp, which expires within minutes, while this script runs. The caller ends
# the process $sudo_refresher.
hold_sudo() {
	sudo_refresher=
	[ "$(id -u)" -ne 0 ] || return 0
	as_root true
	while sleep 30 && kill -0 $$ && sudo -n -v; do :; done 2>/dev/null &
	sudo_refresher=$!
}

# watch PID: prints progress every ten seconds until a process ends.
watch() {
	local start=$SECONDS
	while kill -0 "$1" 2>/dev/null; do
		sleep 1
		[ $(((SECONDS - start) % 10)) -ne 9 ] || say "... $((SECONDS - start + 1)) s"
	done
}

# end_with_children PID...: ends processes and their children, as root if needed.
end_with_children() {
	local pid children
	for pid; do
		children=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null) || continue
		# It may have ended meanwhile.
		kill "$pid" 2>/dev/null || sudo -n kill "$pid" 2>/dev/null || true
		# shellcheck disable=SC2086 # a list
		end_with_children $children
	done
}

# logged LOG TITLE CMD...: runs CMD with its output in LOG, and prints progress every ten
# seconds. On failure it prints the last lines and the path of the log, and exits.
logged() {
	local log=$1 title=$2 start=$SECONDS pid status=0
	shift 2
	mkdir -p "${log%/*}"
	say "$title (log: $log)"
	"$@" >"$log" 2>&1 &
	pid=$!
	watch "$pid"
	wait "$pid" || status=$?
	if [ "$status" -ne 0 ]; then
		tail -n 15 "$log" >&2
		die "failed after $((SECONDS - start)) s: $title" "The whole log: $log"
	fi
	say "done in $((SECONDS - start)) s"
}
